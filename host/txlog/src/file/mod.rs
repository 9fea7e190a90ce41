//! The file log: a directory of segments.
//!
//! Owns: the bytes on disk, and the guarantee that an acknowledged write survives any crash. Must never know: what a key or
//! a value means. Read on in `queue` (append), `writer` (group commit), `recovery` and `tail`, `begin` (incarnations),
//! `replay` (reads).
//!
//! # Format
//!
//! This is format 2. Format 1 is read and never written; its differences are at the end of this section.
//!
//! ```text
//! DIR/LOCK                              process that uses the directory
//! DIR/log/0000000001-0000000007.seg     segments 1 to 7, compacted into one file
//! DIR/log/0000000008.seg                a segment, full
//! DIR/log/0000000009.seg                the segment being written
//! DIR/log/0000000010.seg                the preallocated segment: a header, then zeros
//! DIR/log/watermark                     durable watermark when the log was last idle
//! DIR/log/identity                      distinguishes the directory from a copy of it
//! DIR/log/0000000009.seg.4096.1.torn    torn write that recovery truncated at that byte
//! DIR/log/*.tmp                         incomplete; removed at the start
//! ```
//!
//! All numbers are little-endian, all checksums CRC32C. A segment:
//!
//! ```text
//! byte 0      8       12   16         32        40       48                         104      108   508      512
//!      magic  version kind log (UUID) first no. last no. compacted: see below, size  ending   zero  checksum frames, zeros ...
//!
//! byte 48          56         64   72            76            80                 84     88         96
//!      first seq.  last seq.  end  chain before  chain after   own last checksum  epoch  horizon    file's size
//! ```
//!
//! "kvs log\n", version 2, kind 0 (written) or 1 (compacted). Magic, version and the place of the checksum never change,
//! so that an unsupported version is distinguished from corruption. A file that is shorter than its header states was
//! truncated. In a written segment bytes 48 to 96 and 104 to 108 are zero. A compacted segment stands for the segments from
//! `first no.` to `last no.`. It covers their sequences, so that those of dropped entries are never reused, and it
//! preserves the checksum of their last frame, so that the chain of frames continues after it, and that frame's epoch, kind
//! and flags (`ending`, as in a frame). `horizon`, the compaction horizon, is the newest sequence of a dropped tombstone.
//!
//! A frame is one batch, one write, one sync. Frames begin at multiples of 8:
//!
//! ```text
//! byte 0      4       8          16          24     28             32          48        52         56     60             64
//!      "FRME" length  first seq. durable     count  checksum of    log (UUID)  checksum  kind,      epoch  checksum       body
//!             of body            sequence           previous frame             of body   flags (24)        of bytes 0..60
//! ```
//!
//! `durable` is the newest sequence known to be on disk when the frame was written. The header's checksum covers the
//! body's, so the chain through `previous` covers all. `epoch` is that of the process that wrote the frame: one more than
//! the epoch of the last frame before it when it opened the log. Along the log it never falls.
//!
//! | kind | | body |
//! |---:|---|---|
//! | 0 | entries | `count` of them, at least one |
//! | 1 | close: the log was closed after the frame before this one | empty |
//! | 2 | incarnation: the first frame of its segment | records, see below; `count` is 0, `first seq.` that of the first record |
//! | 3 | reserved: a claim in a replicated log | |
//!
//! Flag 1: the body begins with optional fields. Flag 2: the process that wrote the frame acknowledges before it syncs
//! (`--durability os`); its first frame is synced nevertheless, so that a start after a power cut can detect this.
//!
//! A frame with valid checksums and an unknown kind or flag is refused by number, and one with an unknown optional field by
//! name: it is not skipped, and it is not a torn write. No field is defined yet.
//!
//! ```text
//! byte 0                2
//!      length of those  fields: (length of name: 1 byte, name in ASCII, length: 2 bytes, value) ...
//!      that follow
//! ```
//!
//! A body of entries, then up to 7 zeros:
//!
//! ```text
//! byte 0       4     5     13       17         21         25
//!      offset  kind  time  key      value      metadata   expires     key  value  metadata: (length, name,
//!                          length   length     length     if kind 3                          length, value) ...
//! ```
//!
//! The entry's sequence is `first` plus `offset`: compaction leaves gaps. Kind 1 is a delete, 2 a put, 3 a put that
//! expires. No frame spans the jump of an incarnation.
//!
//! An incarnation, see [`Incarnation`](crate::Incarnation):
//!
//! ```text
//! byte 0          16             32              40               48
//!      id (UUID)  parent (UUID)  fork: the last  first: its own   the next record
//!                                sequence before first sequence
//! ```
//!
//! A written segment has one record at most; a compacted one lists those of the segments it stands for, oldest first,
//! wherever in them they began. So the first frames of all segments contain the history. A record whose jump lies below
//! the compaction horizon may be dropped: a reader that resumes there must replay from the start in any case. The newest
//! record of the log is kept. Where the dropped one was the first record of a compacted segment, `first seq.` of that is
//! the sequence after the fork: the jump counts as covered.
//!
//! After the last frame there are zeros. A segment that is not the newest may hold no frame: a preallocated one that was too
//! small. One is sealed before it is full where an incarnation begins or the format changes.
//!
//! The watermark file, and the identity file:
//!
//! ```text
//! byte 0           8            24               32          36
//!      "kvs mark"  log (UUID)   newest durable   checksum
//!                               sequence         of the above
//!
//! byte 0           8            24               32          40          44
//!      "kvs iden"  log (UUID)   this file's      its birth   checksum
//!                               inode            time, ns    of the above
//! ```
//!
//! Format 1 has version 1 in the header of a segment. Its frames have zeros in bytes 52 to 60; one without entries is a
//! close. Compacted segments have zeros for epoch and ending. There are no incarnations, and no identity. A log in format
//! 1 that is opened for writing continues in a new segment in format 2, and compaction writes format 2.
//!
//! # When an incarnation begins
//!
//! At an open for writing, in a log that has entries, where sequences may have been given out that are not in it:
//!
//! - The identity file does not match its own inode and birth time: the directory was copied, or restored from a backup,
//!   into another or into its own. `mv` keeps it. A log without the file counts as a copy, unless it was never written in
//!   format 2: an upgrade in place begins no incarnation, so a copy of format 1 goes undetected at its first start.
//!   Block-level clones and snapshots of volumes keep inodes: they need `kvs txlog fork`.
//! - The log was not closed, and was written with `--durability os`, or is opened with it: a power cut can have lost
//!   entries that clients have seen.
//! - `kvs txlog fork` requests it.
//!
//! It is synced before the server is ready, and its cause remains on disk until then.
//!
//! # How a write becomes durable, by file
//!
//! 1. One process locks the directory, whatever happens to the files in it: `lock`.
//! 2. Segments are allocated, headed and synced under a temporary name, renamed, and the directory is synced. One is
//!    preallocated, so that a full disk is detected before a write is accepted: `segment`, `preallocate`, `queue`. The
//!    first of a log is small, since a start waits for it, and each is larger than the one before up to `--segment-bytes`.
//! 3. A batch is one frame, which names its predecessor and the durable watermark; no length in it is trusted unless the
//!    file is that long: `frame`, `entry`, `scan`.
//! 4. It is written at a tracked offset, never at "the end of the file": `writer`.
//! 5. It is synced, then the watermark advances, and only then waiting requests continue: `writer`, `super::watermark`.
//! 6. A failed sync fails the log; entries not known to be durable never become so: `writer`, [`FileLog::append`].
//! 7. Recovery drops cached pages, reads everything, and syncs what it read before anything depends on it: `recovery`.
//! 8. An invalid frame is either torn, not yet durable, or corrupt; the frames after it decide which: `tail`.
//! 9. Compaction drops garbage, creating new files before it removes old ones: `compactor` (when), `liveness` (what),
//!    `compact` (how).
//! 10. A clean shutdown and an idle log leave a frame and a file with the end of the log: `mark`, and see below.
//! 11. Sequences that were lost, or that are in another copy of the log, are never reused: `begin`, `identity`.
//!
//! # What is assumed of the disk
//!
//! - A successful sync means that all earlier writes survive a power cut, and a sync of the directory the same for names.
//!   After a failed sync nothing is known about them, even if a later sync succeeds.
//! - Before a sync each written sector of 512 bytes can hold its old content, the new, zeros or anything; a size or a name
//!   can be the old or the new.
//! - A write never changes bytes outside its own range, power cut or not. Frames share sectors.
//! - Rename is atomic.
//! - A write into allocated space does not run out of space.
//!
//! # What stays undetected
//!
//! Damage of exactly the last frame looks like a torn write, and is truncated with a log line. After a clean shutdown,
//! and a second after the last write, a frame or the watermark file shows the difference; in between nothing on one disk can.

mod begin;
mod bytes;
mod catalog;
mod compact;
mod compactor;
pub mod disk;
mod entry;
mod found;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod identity;
mod incarnations;
mod liveness;
mod lock;
mod mark;
mod metrics;
mod offline;
mod preallocate;
mod queue;
mod recovery;
mod replay;
mod scan;
mod segment;
mod tail;
#[cfg(test)]
pub mod tests;
mod verify;
mod writer;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, anyhow, bail};
use kvs_runtime::{Clock, Env, Thread};
use uuid::Uuid;

pub use self::offline::Offline;
pub use self::verify::{Finding, verify};

use self::begin::Ready;
use self::catalog::Catalog;
use self::compactor::Compactor;
use self::disk::{Directory, Disk};
use self::lock::Lock;
use self::metrics::Metrics;
use self::preallocate::{Preallocator, Sizes};
use self::queue::{FRAME_OVERHEAD, Queue};
use self::writer::Writer;
use super::{Condition, Receive, TransactionLog, Watermark};
use crate::{AppendError, Event, History};

/// Durability of an acknowledged write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Synced to disk: the write survives a power cut.
    #[default]
    Sync,
    /// Handed to the operating system: the write survives a crash of this process; a power cut loses the last seconds.
    Os,
}

#[derive(Clone, Debug)]
pub struct Options {
    /// The data directory; the log is in `log` under it.
    pub data: PathBuf,
    /// Size of a segment file, from the third on at the latest: the first are smaller.
    pub segment_bytes: u64,
    /// Maximum size of a group of events, in bytes of the log.
    pub group_bytes: u64,
    pub durability: Durability,
    /// The clock, the randomness and the threads of the log.
    pub env: Env,
}

impl Options {
    fn sizes(&self) -> anyhow::Result<Sizes> {
        let needed = segment::HEAD_BYTES + FRAME_OVERHEAD + self.group_bytes;
        if needed > self.segment_bytes || self.segment_bytes > u64::from(u32::MAX) {
            bail!(
                "segments of {} bytes cannot hold the largest write of {}: choose --segment-bytes between {needed} and \
                 {}, or lower --max-value-bytes",
                self.segment_bytes,
                self.group_bytes,
                u32::MAX
            );
        }
        Ok(Sizes::new(needed, self.segment_bytes))
    }
}

/// Default size of segment files.
pub const DEFAULT_SEGMENT_BYTES: u64 = 64 << 20;

/// Returns the size of the largest group that fits segments of this size.
pub fn largest_group(segment_bytes: u64) -> u64 {
    segment_bytes.saturating_sub(segment::HEAD_BYTES + FRAME_OVERHEAD)
}

/// The transaction log in a directory of segment files.
pub struct FileLog {
    shared: Arc<Shared>,
    running: Mutex<Option<Running>>,
}

struct Running {
    writer: Thread,
    preallocator: Thread,
    compactor: Option<Thread>,
    /// Released last. None where the disk is not a directory.
    _lock: Option<Lock>,
}

/// State shared by the threads of one log.
struct Shared {
    home: Home,
    log: Uuid,
    /// No incarnation begins while the log is open.
    history: Arc<History>,
    segment_bytes: u64,
    durability: Durability,
    catalog: Catalog,
    queue: Queue,
    preallocator: Preallocator,
    compactor: Compactor,
    watermark: Watermark,
    metrics: Metrics,
    failure: Mutex<Option<String>>,
}

impl FileLog {
    pub fn open(options: Options) -> anyhow::Result<Self> {
        let lock = Lock::take(&options.data)?;
        let directory = options.data.join("log");
        let log = Self::open_on(Arc::new(Directory::new(directory)), options, Some(lock))?;
        log.compact_in_background()?;
        Ok(log)
    }

    /// Opens the log on the given disk, like [`open`](Self::open) on the directory `log` below `options.data`, which is used
    /// in messages only. The caller ensures that no other process uses the disk.
    pub fn open_on_disk(disk: Arc<dyn Disk>, options: Options) -> anyhow::Result<Self> {
        let log = Self::open_on(disk, options, None)?;
        log.compact_in_background()?;
        Ok(log)
    }

    fn open_on(disk: Arc<dyn Disk>, options: Options, lock: Option<Lock>) -> anyhow::Result<Self> {
        let (shared, writer) = Shared::recover(disk, options)?;
        shared.preallocator.reserve(&shared)?;
        let running = Running {
            writer: start("log writer", &shared, |shared| writer.run(shared))?,
            preallocator: start("log spare", &shared, preallocate::run)?,
            compactor: None,
            _lock: lock,
        };
        Ok(Self { shared, running: Mutex::new(Some(running)) })
    }

    /// Returns why the log failed, and accepts no appends any more.
    pub fn failure(&self) -> Option<String> {
        self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn compact_in_background(&self) -> anyhow::Result<()> {
        if let Some(running) = &mut *self.running.lock().unwrap_or_else(PoisonError::into_inner) {
            self.shared.compactor.begin_with(&self.shared);
            running.compactor = Some(start("log compactor", &self.shared, compactor::run)?);
        }
        Ok(())
    }
}

impl TransactionLog for FileLog {
    fn append(&self, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        self.shared.queue.append(time, events)
    }

    fn appended(&self) -> u64 {
        self.shared.queue.appended()
    }

    fn watermark(&self) -> &Watermark {
        &self.shared.watermark
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> anyhow::Result<u64> {
        replay::replay(&self.shared, after, receive)
    }

    fn history(&self) -> Arc<History> {
        self.shared.history.clone()
    }

    fn condition(&self) -> Condition {
        let failure = self.watermark().failure();
        failure
            .map_or_else(|| self.shared.compactor.condition(), |reason| Condition::Unfit(format!("failed: {reason}")))
    }

    fn close(&self) -> anyhow::Result<()> {
        let Some(running) = self.running.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        self.shared.compactor.stop();
        self.shared.preallocator.close();
        self.shared.queue.close();
        // If a thread failed, `failure` has the reason.
        let _ = running.compactor.map(Thread::join);
        running.writer.join();
        self.shared.preallocator.stop();
        running.preallocator.join();
        self.failure().map_or(Ok(()), |reason| Err(anyhow!(reason)))
    }
}

impl Drop for FileLog {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!("the log was not closed cleanly: {error:#}");
        }
    }
}

/// Starts a thread of the log. The log fails with it: appends are rejected from then on, and writes in flight end with an
/// unknown outcome.
fn start(
    name: &'static str,
    shared: &Arc<Shared>,
    work: impl FnOnce(&Shared) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<Thread> {
    let worked = Arc::clone(shared);
    let failed = Arc::clone(shared);
    let thread = shared.home.env.tasks.fail_thread(name, move || work(&worked), move |error| failed.fail(error));
    thread.context("cannot start a thread of the log")
}

impl Shared {
    /// Recovers the log of a directory for writing, and returns the writer that continues it. No thread runs yet.
    fn recover(disk: Arc<dyn Disk>, options: Options) -> anyhow::Result<(Arc<Self>, Writer)> {
        Self::begin(disk, options, None)
    }

    /// Like `recover`, with the reason for a new incarnation of the log, if one was requested.
    fn begin(
        disk: Arc<dyn Disk>,
        options: Options,
        asked: Option<&'static str>,
    ) -> anyhow::Result<(Arc<Self>, Writer)> {
        let sizes = options.sizes()?;
        let home = Home { disk, data: options.data.clone(), env: options.env.clone() };
        let (ready, writer) = recovery::recover(&home)
            .and_then(|recovered| begin::begin(&home, sizes, recovered, options.durability, asked))
            .with_context(|| format!("cannot open the log in {}", home.path("").display()))?;
        Ok((Arc::new(Self::new(home, &options, sizes, ready)), writer))
    }

    /// Recovers the log of a directory for reading. No incarnation begins.
    fn read(home: Home, options: &Options) -> anyhow::Result<Arc<Self>> {
        let recovered =
            recovery::recover(&home).with_context(|| format!("cannot open the log in {}", home.path("").display()))?;
        Ok(Arc::new(Self::new(home, options, options.sizes()?, Ready::to_be_read(recovered))))
    }

    fn new(home: Home, options: &Options, sizes: Sizes, ready: Ready) -> Self {
        let Ready { log, segments, history, last, room, spares, next, next_size } = ready;
        let appended = incarnations::newest_given(&history, last);
        let segment_room = sizes.smallest_spare() - segment::HEAD_BYTES;
        let full = spares.is_empty();
        Self {
            home,
            log,
            history: Arc::new(history),
            segment_bytes: options.segment_bytes,
            durability: options.durability,
            catalog: Catalog::new(segments),
            queue: Queue::new(
                (appended, last + 1),
                room,
                full,
                segment_room,
                options.group_bytes,
                options.env.clock.clone(),
            ),
            preallocator: Preallocator::new(spares, next, next_size, sizes),
            compactor: Compactor::default(),
            watermark: Watermark::new(appended),
            metrics: Metrics::new(),
            failure: Mutex::default(),
        }
    }

    fn clock(&self) -> &Clock {
        &self.home.env.clock
    }

    fn fail(&self, error: &anyhow::Error) {
        let reason = format!("the transaction log failed: {error:#}");
        tracing::error!("{reason}");
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason.clone());
        // Appends first: none may be accepted after the waiting writes were failed.
        self.queue.fail();
        self.compactor.stop();
        self.preallocator.stop();
        self.watermark.latch(reason);
    }
}

/// The surroundings of the log: the directory, how errors speak of it, and the rest of what is given from outside.
struct Home {
    disk: Arc<dyn Disk>,
    data: PathBuf,
    env: Env,
}

/// What is on disk is not what was written there. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[error("{} is damaged at byte {offset}: {what}; `kvs txlog verify --data-dir {}` tells what else is, restore a backup or begin anew in an empty directory", file.display(), data.display())]
pub struct Damage {
    pub file: PathBuf,
    pub offset: u64,
    pub what: String,
    data: PathBuf,
}

impl Home {
    /// Of a file of the log; of their directory when the name is empty.
    fn path(&self, name: &str) -> PathBuf {
        let log = self.data.join("log");
        if name.is_empty() { log } else { log.join(name) }
    }

    fn damage(&self, name: &str, offset: u64, what: impl Into<String>) -> anyhow::Error {
        Damage { file: self.path(name), offset, what: what.into(), data: self.data.clone() }.into()
    }

    /// The error for a frame that is not damaged, and that this binary does not read all the same.
    fn refused(&self, name: &str, offset: u64, why: &str) -> anyhow::Error {
        anyhow!("{} at byte {offset}: {why}", self.path(name).display())
    }
}
