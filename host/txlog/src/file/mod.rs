//! The file log: a directory of segments.
//!
//! Owns: the bytes on disk and the promise that a write answered with success is there after any crash. Must never know:
//! what a key or a value means. To read it, begin here, then `queue` (where events come in), `writer` (how they
//! become durable), `recovery` and `tail` (what a crash leaves), `replay` (how they come out).
//!
//! # The bytes
//!
//! ```text
//! DIR/LOCK                              the process that uses the directory
//! DIR/log/0000000001-0000000007.seg     segments 1 to 7, compacted into one file
//! DIR/log/0000000008.seg                a segment, full
//! DIR/log/0000000009.seg                the segment being written
//! DIR/log/0000000010.seg                the spare: a head, then zeros
//! DIR/log/watermark                     how far the log was durable when last idle
//! DIR/log/0000000009.seg.4096.1.torn    what recovery cut off at that byte
//! DIR/log/*.tmp                         begun; removed at the start
//! ```
//!
//! All numbers are little-endian, all checksums CRC32C. A segment:
//!
//! ```text
//! byte 0      8   12   16         32        40       48                       96          508      512
//!      magic  ver kind log (UUID) first no. last no. compacted: see below ... file's size checksum frames, zeros ...
//!
//! byte 48          56         64   72            76            80                 88
//!      first seq.  last seq.  end  chain before  chain after   own last checksum  forgotten
//! ```
//!
//! "kvs log\n", version 1, kind 0 (written) or 1 (compacted). Magic, version and the place of the checksum never change,
//! so that a version this binary does not read is told from damage. A file that is shorter than its head says was cut
//! off. Bytes 48 to 96 are zero in a written segment, and so is what is between the size and the checksum. A compacted
//! segment stands for the segments from `first no.` to `last no.`. It covers their sequences, so that those of dropped
//! entries are never given again, and it hands on the checksum of their last frame, so that the chain of frames goes on
//! after it. `forgotten` is the newest sequence of a dropped delete.
//!
//! A frame is one batch, one write, one sync. Frames begin at multiples of 8:
//!
//! ```text
//! byte 0      4       8          16          24     28             32          48        52    60             64
//!      "FRME" length  first seq. durable     count  checksum of    log (UUID)  checksum  zero  checksum       body
//!             of body            sequence           previous frame             of body         of bytes 0..60
//! ```
//!
//! `durable` is the newest sequence known to be on disk when the frame was written. The head's checksum covers the
//! body's, so the chain through `previous` covers all. A frame without entries says that the log was closed.
//!
//! The body holds `count` entries, then up to 7 zeros:
//!
//! ```text
//! byte 0       4     5     13       17         21         25
//!      offset  kind  time  key      value      metadata   expires     key  value  metadata: (length, name,
//!                          length   length     length     if kind 3                          length, value) ...
//! ```
//!
//! The entry's sequence is `first` plus `offset`: compaction leaves gaps. Kind 1 is a delete, 2 a put, 3 a put that
//! expires.
//!
//! After the last frame there are zeros to the end of the segment. A segment that is not the newest may hold no frame at
//! all: a spare that was too small.
//!
//! The watermark file:
//!
//! ```text
//! byte 0           8            24               32          36
//!      "kvs mark"  log (UUID)   newest durable   checksum
//!                               sequence         of the above
//! ```
//!
//! # How a write survives, and where that stands
//!
//! 1. One process has the directory: `lock`.
//! 2. Segments are allocated, headed and synced under a temporary name, renamed, and the directory is synced; one is
//!    made before it is needed, so that a full disk is met before a write is taken: `segment`, `spare`, `queue`. The
//!    first of a log is small, for a start waits for it, and each is larger than the one before up to `--segment-bytes`.
//! 3. A batch is one frame, which says what it follows on and what was durable; no length in it is believed before the
//!    file is known to be so long: `frame`, `entry`, `scan`.
//! 4. It is written at a place that is kept track of, never at "the end of the file": `writer`.
//! 5. It is synced, then the watermark moves, and only then whoever waits for it goes on: `writer`, `super::watermark`.
//! 6. A sync that failed ends the log; what was not known to be durable never will be: `writer`, [`FileLog::append`].
//! 7. Recovery drops what is only in memory, reads all, and syncs what it read before anything rests on it: `recovery`.
//! 8. A tear is what was not yet durable, or damage; frames behind it tell which: `tail`.
//! 9. What no store needs any more goes, new files first and old ones last: `compactor` (when), `garbage` (what),
//!    `compact` (how).
//! 10. A clean end and an idle moment leave a frame and a file that say how far the log went: `mark`, and see below.
//!
//! # What is assumed of the disk
//!
//! - A sync that returned success means that what was written before is there after a power cut, and a sync of the
//!   directory the same of names. One that failed means nothing, then and ever after.
//! - Until then each sector of 512 bytes that was written can hold its old content, the new, zeros or anything; a size
//!   or a name can be the old or the new.
//! - A write never changes bytes outside its own range, power cut or not. Frames share sectors.
//! - Renaming replaces a name at once and whole.
//! - Writing into space that was allocated does not run out of space.
//!
//! # What stays undetected
//!
//! Damage to exactly the last frame looks like a write that was never finished, and is cut off with a line in the
//! host's own log. After a clean end, and a second after the last write, there is a frame or a watermark file that tells
//! the difference; in between nothing on one disk can.

#[cfg(test)]
mod anything;
mod bytes;
mod catalog;
mod compact;
mod compactor;
pub mod disk;
mod entry;
mod found;
mod frame;
mod garbage;
mod lock;
mod mark;
mod metrics;
mod offline;
mod queue;
mod recovery;
mod replay;
mod scan;
mod segment;
mod spare;
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

use self::catalog::Catalog;
use self::compactor::Compactor;
use self::disk::{Directory, Disk};
use self::lock::Lock;
use self::metrics::Metrics;
use self::queue::{FRAME_OVERHEAD, Queue};
use self::spare::{Sizes, Spares};
use self::writer::Writer;
use super::{Receive, TransactionLog, Watermark};
use crate::{AppendError, Event};

/// What an answered write has behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// The disk: it survives a power cut.
    #[default]
    Sync,
    /// The operating system: it survives the end of this process, and a power cut takes the last seconds with it.
    Os,
}

#[derive(Clone, Debug)]
pub struct Options {
    /// The data directory; the log is in `log` under it.
    pub data: PathBuf,
    /// The size of a segment file, from the third on at the latest: the first are smaller.
    pub segment_bytes: u64,
    /// The largest group of events that is taken, in bytes of the log.
    pub group_bytes: u64,
    pub durability: Durability,
    /// The clock, the randomness and the threads of the log.
    pub env: Env,
}

/// The size of segment files where nobody says otherwise.
pub const DEFAULT_SEGMENT_BYTES: u64 = 64 << 20;

/// The largest group that segments of a size can hold.
pub fn largest_group(segment_bytes: u64) -> u64 {
    segment_bytes.saturating_sub(segment::HEAD_BYTES + FRAME_OVERHEAD)
}

pub struct FileLog {
    shared: Arc<Shared>,
    running: Mutex<Option<Running>>,
}

struct Running {
    writer: Thread,
    spares: Thread,
    compactor: Option<Thread>,
    /// Given up last. None where the disk is not a directory.
    _lock: Option<Lock>,
}

/// What the threads of one log share.
struct Shared {
    home: Home,
    log: Uuid,
    segment_bytes: u64,
    durability: Durability,
    catalog: Catalog,
    queue: Queue,
    spares: Spares,
    compactor: Compactor,
    watermark: Watermark,
    metrics: Metrics,
    failure: Mutex<Option<String>>,
}

impl FileLog {
    pub fn open(options: Options) -> anyhow::Result<Self> {
        let lock = Lock::take(&options.data)?;
        let directory = options.data.join("log");
        lock::make_directory(&directory)?;
        let log = Self::open_on(Arc::new(Directory::new(directory)), options, Some(lock))?;
        log.compact_in_background()?;
        Ok(log)
    }

    /// Opens the log on a disk that is given from outside, as [`open`](Self::open) does on the directory `log` below
    /// `options.data`, which is used in messages only. Whoever gives the disk sees to it that one process uses it.
    pub fn open_on_disk(disk: Arc<dyn Disk>, options: Options) -> anyhow::Result<Self> {
        let log = Self::open_on(disk, options, None)?;
        log.compact_in_background()?;
        Ok(log)
    }

    fn open_on(disk: Arc<dyn Disk>, options: Options, lock: Option<Lock>) -> anyhow::Result<Self> {
        let (shared, writer) = Shared::recover(disk, options)?;
        shared.spares.begin(&shared)?;
        let running = Running {
            writer: start("log writer", &shared, |shared| writer.run(shared))?,
            spares: start("log spare", &shared, spare::run)?,
            compactor: None,
            _lock: lock,
        };
        Ok(Self { shared, running: Mutex::new(Some(running)) })
    }

    /// Why the log takes nothing any more, when it failed.
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

    fn close(&self) -> anyhow::Result<()> {
        let Some(running) = self.running.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        self.shared.compactor.stop();
        self.shared.spares.close();
        self.shared.queue.close();
        // However they end, the failure says why.
        let _ = running.compactor.map(Thread::join);
        running.writer.join();
        self.shared.spares.stop();
        running.spares.join();
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

/// Runs a thread of the log. However it fails, the log fails with it: nothing more is accepted, and whoever waits is
/// told that the outcome is unknown.
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
    /// The log of a directory, read and put right, and the writer that can go on with it. Nothing runs yet.
    fn recover(disk: Arc<dyn Disk>, options: Options) -> anyhow::Result<(Arc<Self>, Writer)> {
        let Options { data, segment_bytes, group_bytes, durability, env } = options;
        let needed = segment::HEAD_BYTES + FRAME_OVERHEAD + group_bytes;
        if needed > segment_bytes || segment_bytes > u64::from(u32::MAX) {
            bail!(
                "segments of {segment_bytes} bytes cannot hold the largest write of {group_bytes}: choose --segment-bytes \
                 between {needed} and {}, or lower --max-value-bytes",
                u32::MAX
            );
        }
        let clock = env.clock.clone();
        let home = Home { disk, data, env };
        let sizes = Sizes::new(needed, segment_bytes);
        let recovered = recovery::recover(&home, sizes)
            .with_context(|| format!("cannot open the log in {}", home.path("").display()))?;
        let writer = recovered.writer;
        let (room, segment_room) = (writer.size - writer.end, sizes.smallest_spare() - segment::HEAD_BYTES);
        let full = recovered.spares.is_empty();
        let shared = Self {
            home,
            log: recovered.log,
            segment_bytes,
            durability,
            catalog: Catalog::new(recovered.segments),
            queue: Queue::new(writer.last, room, full, segment_room, group_bytes, clock),
            spares: Spares::new(recovered.spares, recovered.next, recovered.next_size, sizes),
            compactor: Compactor::default(),
            watermark: Watermark::new(writer.last),
            metrics: Metrics::new(),
            failure: Mutex::default(),
        };
        Ok((Arc::new(shared), writer))
    }

    fn clock(&self) -> &Clock {
        &self.home.env.clock
    }

    fn fail(&self, error: &anyhow::Error) {
        let reason = format!("the transaction log failed: {error:#}");
        tracing::error!("{reason}");
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason.clone());
        // Appends first: none may be accepted after those who wait were told.
        self.queue.fail();
        self.compactor.stop();
        self.spares.stop();
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
}
