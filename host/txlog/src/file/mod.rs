//! The file log: a directory of segments.
//!
//! Owns: the bytes on disk, and the guarantee that an acknowledged write survives any crash. Must never know: what a key or
//! a value means. Read on in `queue` (append), `writer` (commit), `recovery` and `tail`, `begin` (incarnations),
//! `replay` (reads).
//!
//! The format, the assumptions about the disk, and the reasons for a new incarnation: `docs/txlog-format.md`.
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
//! 10. A clean shutdown and an idle log leave a frame and a file with the end of the log: `mark`.
//! 11. Sequences that were lost, or that are in another copy of the log, are never reused: `begin`, `identity`.

mod begin;
pub(crate) mod bytes;
mod catalog;
mod compact;
mod compactor;
pub mod disk;
pub(crate) mod entry;
mod follower;
mod found;
pub(crate) mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod handover;
mod hang;
mod home;
mod identity;
pub(crate) mod incarnations;
mod listing;
mod liveness;
mod lock;
mod mark;
mod metrics;
mod offline;
mod output;
pub(crate) mod packer;
mod position;
mod preallocate;
mod queue;
mod recovery;
mod replay;
mod restore;
mod scan;
pub(crate) mod segment;
mod standby;
mod tail;
#[cfg(test)]
pub mod tests;
mod verify;
mod writer;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use arc_swap::{ArcSwap, Guard};
use kvs_runtime::{Clock, Env, Thread};
use uuid::Uuid;

pub use self::home::Damage;
pub use self::lock::Lock;
pub use self::offline::Offline;
pub(crate) use self::replay::Batch;
pub use self::restore::{check_empty, restore};
pub use self::standby::StandbyLog;
pub use self::verify::{Finding, verify};

use self::begin::Ready;
use self::catalog::Catalog;
use self::compactor::Compactor;
use self::disk::{Directory, Disk};
use self::hang::HangDetector;
use self::home::Home;
use self::metrics::Metrics;
use self::preallocate::{Preallocator, Sizes};
use self::queue::{FRAME_OVERHEAD, Queue, Shortage};
use self::recovery::Known;
use self::writer::Writer;
use super::{Condition, Receive, TransactionLog, Watermark, group_commit, sync};
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
    /// How long compaction keeps entries after they were superseded or deleted.
    pub retain: Duration,
    /// URL at which this process serves clients, announced to standbys.
    pub advertise: Option<String>,
    /// The clock, the randomness and the threads of the log.
    pub env: Env,
}

impl Options {
    /// Checks that segments hold the largest write.
    pub fn check(&self) -> anyhow::Result<()> {
        self.sizes().map(drop)
    }

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
    /// Another one after the log was handed over and taken back.
    shared: ArcSwap<Shared>,
    watermark: Arc<Watermark>,
    disk: Arc<dyn Disk>,
    options: Options,
    running: Mutex<Option<Running>>,
    /// Another process may write it.
    handed: AtomicBool,
}

struct Running {
    writer: Thread,
    preallocator: Thread,
    compactor: Option<Thread>,
    /// Released last. None where the disk is not a directory.
    lock: Option<Lock>,
}

/// State shared by the threads of one log.
struct Shared {
    home: Home,
    log: Uuid,
    /// No incarnation begins while the log is open.
    history: Arc<History>,
    segment_bytes: u64,
    durability: Durability,
    retain: Duration,
    catalog: Catalog,
    queue: Queue,
    preallocator: Preallocator,
    compactor: Compactor,
    watermark: Arc<Watermark>,
    hangs: HangDetector,
    metrics: Metrics,
    failure: Mutex<Option<String>>,
}

/// State from before a log is opened.
struct Before {
    /// Reason for a new incarnation of the log, if one was requested.
    asked: Option<&'static str>,
    /// State of the log that a standby has observed, and the watermark that its users wait for.
    known: Option<Known>,
    watermark: Arc<Watermark>,
}

impl Default for Before {
    fn default() -> Self {
        Self { asked: None, known: None, watermark: Arc::new(Watermark::new(0)) }
    }
}

impl FileLog {
    pub fn open(options: Options) -> anyhow::Result<Self> {
        let lock = Lock::take(&options.data, options.advertise.as_deref(), &options.env.clock)?;
        let directory = Arc::new(Directory::new(options.data.join("log")));
        let log = Self::open_on(directory, options, Some(lock))?;
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
        Self::open_after(disk, options, lock, Before::default())
    }

    fn open_after(disk: Arc<dyn Disk>, options: Options, lock: Option<Lock>, before: Before) -> anyhow::Result<Self> {
        let watermark = Arc::clone(&before.watermark);
        let (shared, running) = Self::run(Arc::clone(&disk), options.clone(), lock, before)?;
        let (running, handed) = (Mutex::new(Some(running)), AtomicBool::new(false));
        Ok(Self { shared: ArcSwap::new(shared), watermark, disk, options, running, handed })
    }

    /// Recovers the log, and starts its threads, but not compaction.
    fn run(
        disk: Arc<dyn Disk>,
        options: Options,
        lock: Option<Lock>,
        before: Before,
    ) -> anyhow::Result<(Arc<Shared>, Running)> {
        let (shared, writer) = Shared::begin(disk, options, before)?;
        shared.preallocator.reserve(&shared)?;
        let writer = start("log writer", &shared, |shared| writer.run(shared))?;
        let preallocator = match start("log spare", &shared, preallocate::run) {
            Ok(preallocator) => preallocator,
            Err(error) => {
                // It must not outlive the lock.
                shared.queue.fail();
                writer.join();
                return Err(error);
            }
        };
        Ok((shared, Running { writer, preallocator, compactor: None, lock }))
    }

    fn shared(&self) -> Guard<Arc<Shared>> {
        self.shared.load()
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        // Every change under this lock is whole.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes what was appended durable, and ends the threads. Returns the lock; None when the log was closed before.
    fn stop(&self) -> anyhow::Result<Option<Lock>> {
        let Some(running) = self.running().take() else { return Ok(None) };
        let shared = self.shared();
        shared.compactor.stop();
        shared.preallocator.close();
        shared.queue.close();
        // If a thread failed, `failure` has the reason.
        let _ = running.compactor.map(Thread::join);
        running.writer.join();
        shared.preallocator.stop();
        running.preallocator.join();
        self.failure().map_or(Ok(running.lock), |reason| Err(anyhow!(reason)))
    }

    /// Returns why the log failed, and accepts no appends any more.
    pub fn failure(&self) -> Option<String> {
        self.shared().failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn compact_in_background(&self) -> anyhow::Result<()> {
        if let Some(running) = &mut *self.running() {
            let shared = self.shared();
            shared.compactor.begin_with(&shared);
            running.compactor = Some(start("log compactor", &shared, compactor::run)?);
        }
        Ok(())
    }
}

impl TransactionLog for FileLog {
    fn append(&self, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        self.shared().queue.append(time, events)
    }

    fn set_idle(&self, idle: bool) {
        self.shared().queue.set_idle(idle);
    }

    fn appended(&self) -> u64 {
        self.shared().queue.appended()
    }

    fn watermark(&self) -> &Watermark {
        &self.watermark
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> anyhow::Result<u64> {
        replay::replay(&self.shared(), after, receive)
    }

    fn id(&self) -> Uuid {
        self.shared().log
    }

    fn retained(&self) -> u64 {
        self.shared().catalog.retained()
    }

    fn history(&self) -> Arc<History> {
        self.shared().history.clone()
    }

    /// Once it was handed over and failed, its lock is free or with another process, which may serve by now.
    fn reads_refused(&self) -> Option<&'static str> {
        let is_lost = self.handed.load(Ordering::Relaxed) && self.watermark.failure().is_some();
        is_lost.then_some("another process may have taken the log over from this one")
    }

    fn condition(&self) -> Condition {
        if let Some(reason) = self.watermark().failure() {
            return Condition::Unfit(format!("failed: {reason}"));
        }
        let shared = self.shared();
        let conditions =
            [shared.hangs.condition(shared.clock()), shared.preallocator.condition(), shared.compactor.condition()];
        conditions.into_iter().find(|condition| *condition != Condition::Well).unwrap_or(Condition::Well)
    }

    fn close(&self) -> anyhow::Result<()> {
        self.stop().map(drop)
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
    fn begin(disk: Arc<dyn Disk>, options: Options, before: Before) -> anyhow::Result<(Arc<Self>, Writer)> {
        let Before { asked, known, watermark } = before;
        let sizes = options.sizes()?;
        let home = Home { disk, data: options.data.clone(), env: options.env.clone() };
        let (ready, writer) = recovery::recover(&home, known)
            .and_then(|recovered| begin::begin(&home, sizes, recovered, options.durability, asked))
            .with_context(|| format!("cannot open the log in {}", home.path("").display()))?;
        Ok((Arc::new(Self::new(home, &options, sizes, ready, watermark)), writer))
    }

    /// Recovers the log of a directory for reading. No incarnation begins.
    fn read(home: Home, options: &Options) -> anyhow::Result<Arc<Self>> {
        let recovered = recovery::recover(&home, None)
            .with_context(|| format!("cannot open the log in {}", home.path("").display()))?;
        let (ready, watermark) = (Ready::to_be_read(recovered), Arc::new(Watermark::new(0)));
        Ok(Arc::new(Self::new(home, options, options.sizes()?, ready, watermark)))
    }

    fn new(home: Home, options: &Options, sizes: Sizes, ready: Ready, watermark: Arc<Watermark>) -> Self {
        let Ready { log, segments, history, last, room, spares, next, next_size } = ready;
        let appended = history.newest_given(last);
        let segment_room = sizes.smallest_spare() - segment::HEAD_BYTES;
        let short = spares.is_empty().then_some(Shortage::Space);
        watermark.advance(appended);
        Self {
            home,
            log,
            history: Arc::new(history),
            segment_bytes: options.segment_bytes,
            durability: options.durability,
            retain: options.retain,
            catalog: Catalog::new(segments),
            queue: Queue::new(
                (appended, last + 1),
                room,
                short,
                segment_room,
                options.group_bytes,
                options.env.clock.clone(),
            ),
            preallocator: Preallocator::new(spares, next, next_size, sizes),
            compactor: Compactor::default(),
            watermark,
            hangs: HangDetector::default(),
            metrics: Metrics::new(),
            failure: Mutex::default(),
        }
    }

    fn clock(&self) -> &Clock {
        &self.home.env.clock
    }

    /// Returns the time from which on entries are retained, in milliseconds since 1970.
    fn retain_from(&self) -> u64 {
        if self.retain.is_zero() {
            return u64::MAX;
        }
        let retained = u64::try_from(self.retain.as_millis()).unwrap_or(u64::MAX);
        self.clock().steady_ms().saturating_sub(retained)
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
