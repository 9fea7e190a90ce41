//! The file log: a directory of segments.
//!
//! Owns: the bytes on disk and the promise that a write answered with success is there after any crash. Must never know:
//! what a key or a value means. To read it, begin here, then `queue` (where events come in), `writer` (how they
//! become durable), `recovery` and `tail` (what a crash leaves), `begin` (what a run begins with), `replay` (how they
//! come out).
//!
//! The bytes, the disk that they are made for, and when an incarnation begins: `deploy/txlog-format.md`.
//!
//! # How a write survives, and where that stands
//!
//! 1. One process has the directory, whatever becomes of the files in it: `lock`.
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
//! 10. A clean end and an idle moment leave a frame and a file that say how far the log went: `mark`.
//! 11. What was lost all the same, or is in another copy of the log, is never given again: `begin`, `identity`.

mod begin;
mod bytes;
mod catalog;
mod compact;
mod compactor;
pub mod disk;
mod entry;
mod follower;
mod found;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod garbage;
mod home;
mod identity;
mod incarnations;
mod listing;
mod lock;
mod mark;
mod metrics;
mod offline;
mod position;
mod queue;
mod recovery;
mod replay;
mod scan;
mod segment;
mod spare;
mod standby;
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

pub use self::home::Damage;
pub use self::offline::Offline;
pub use self::standby::StandbyLog;
pub use self::verify::{Finding, verify};

use self::begin::Ready;
use self::catalog::Catalog;
use self::compactor::Compactor;
use self::disk::{Directory, Disk};
use self::home::Home;
use self::lock::Lock;
use self::metrics::Metrics;
use self::queue::{FRAME_OVERHEAD, Queue};
use self::recovery::Known;
use self::spare::{Sizes, Spares};
use self::writer::Writer;
use super::{Condition, Receive, TransactionLog, Watermark, sync};
use crate::{AppendError, Event, History};

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
    /// URL at which this process serves clients, announced to those who stand by.
    pub advertise: Option<String>,
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
    /// None begins while the log is open.
    history: Arc<History>,
    segment_bytes: u64,
    durability: Durability,
    catalog: Catalog,
    queue: Queue,
    spares: Spares,
    compactor: Compactor,
    watermark: Arc<Watermark>,
    metrics: Metrics,
    failure: Mutex<Option<String>>,
}

/// What came before a log is opened.
struct Before {
    /// Why another incarnation of it is to begin.
    asked: Option<&'static str>,
    /// What a standby has seen of it, and the watermark that those wait for who use that.
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
        let lock = Lock::take(&options.data, options.advertise.as_deref())?;
        let directory = Arc::new(Directory::new(options.data.join("log")));
        let log = Self::open_on(directory, options, Some(lock))?;
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
        Self::open_after(disk, options, lock, Before::default())
    }

    fn open_after(disk: Arc<dyn Disk>, options: Options, lock: Option<Lock>, before: Before) -> anyhow::Result<Self> {
        let (shared, writer) = Shared::begin(disk, options, before)?;
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
    /// The log of a directory, read, put right and begun, and the writer that can go on with it. Nothing runs yet.
    fn begin(disk: Arc<dyn Disk>, options: Options, before: Before) -> anyhow::Result<(Arc<Self>, Writer)> {
        let Before { asked, known, watermark } = before;
        let sizes = options.sizes()?;
        let home = Home { disk, data: options.data.clone(), env: options.env.clone() };
        let (ready, writer) = recovery::recover(&home, known)
            .and_then(|recovered| begin::begin(&home, sizes, recovered, options.durability, asked))
            .with_context(|| format!("cannot open the log in {}", home.path("").display()))?;
        Ok((Arc::new(Self::new(home, &options, sizes, ready, watermark)), writer))
    }

    /// The log of a directory, read and put right. It is not written, and no incarnation of it begins.
    fn read(home: Home, options: &Options) -> anyhow::Result<Arc<Self>> {
        let recovered = recovery::recover(&home, None)
            .with_context(|| format!("cannot open the log in {}", home.path("").display()))?;
        let (ready, watermark) = (Ready::to_be_read(recovered), Arc::new(Watermark::new(0)));
        Ok(Arc::new(Self::new(home, options, options.sizes()?, ready, watermark)))
    }

    fn new(home: Home, options: &Options, sizes: Sizes, ready: Ready, watermark: Arc<Watermark>) -> Self {
        let Ready { log, segments, history, last, room, spares, next, next_size } = ready;
        let appended = incarnations::newest_given(&history, last);
        let segment_room = sizes.smallest_spare() - segment::HEAD_BYTES;
        let full = spares.is_empty();
        watermark.advance(appended);
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
            spares: Spares::new(spares, next, next_size, sizes),
            compactor: Compactor::default(),
            watermark,
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
        // Appends first: none may be accepted after those who wait were told.
        self.queue.fail();
        self.compactor.stop();
        self.spares.stop();
        self.watermark.latch(reason);
    }
}
