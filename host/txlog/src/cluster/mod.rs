//! The transaction log in a replicated service, the engine: it survives the loss of a machine.
//!
//! Owns: everything that makes a log of what an engine offers, which is little: numbered positions, and a put that succeeds
//! at the end of the log only. Must never know: what a key or a value means. Read `engine` first, then `frame` (what is
//! stored), `writer` (commit, once and in order), `follower` (standby and failover), `handover` (another process continues),
//! `reader` and `integrity`, and `replay`; `snapshot` and `compaction` bound the size; `copy` and `copying` keep a local copy; `nats` is the engine, and the only part that
//! knows it.
//!
//! # Primary, epoch and fencing
//!
//! The primary is the process whose claim is the newest in the log itself. A claim is a frame, and can be put only after the
//! last one: its writer has read everything before it, and no frame of an older epoch can follow. So nothing else is
//! needed to fence a process that was paused or partitioned: its next put is refused, it reads the claim and steps down. It may hold
//! entries that the log does not have, so a server with `--standby` restarts then.
//!
//! # Reads
//!
//! The primary answers reads under a lease (`remote::lease`), which each frame that became durable renews, counted from when
//! it was first sent. Others claim the log only when they have received no frame for the whole lease. While nothing is
//! written the primary puts heartbeats. When the engine is away for longer than four fifths of the lease, reads are refused.
//!
//! # Integrity
//!
//! The engine is not trusted with it: each frame names the checksum of the one before it, and all that is read is verified.
//! The newest frame that was durable is noted in the data directory, so that a log that has lost its end is not continued.

pub mod compaction;
mod condition;
pub mod copy;
mod copying;
pub mod engine;
mod follower;
mod frame;
mod handover;
mod integrity;
mod liveness;
mod mark;
mod metrics;
#[cfg(feature = "nats")]
pub mod nats;
mod puts;
mod reader;
mod replay;
#[cfg(any(test, feature = "nats"))]
mod restore;
mod snapshot;
#[cfg(test)]
mod tests;
mod writer;

use std::future::{Future, ready};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kvs_runtime::{Env, Task};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{SetOnce, watch};
use tracing::{error, info, warn};
use uuid::Uuid;

use self::copy::{Copy, Directory};
use self::engine::Engine;
use self::follower::Follower;
use self::frame::{Entries, Holder, Restored, Snapshot, Tip, is_mutant};
use self::handover::Position;
use self::integrity::{Integrity, LOSS_TIMEOUT};
use self::mark::{Mark, MarkFile};
use self::metrics::Metrics;
use self::reader::{Failure, Index};
use super::{Condition, Handed, History, News, Receive, Standby, TransactionLog, Watermark};
use crate::remote::breaker::Breaker;
use crate::remote::lease::Lease;
use crate::remote::queue::{End, Queue};
use crate::remote::until_closed;
use crate::standby::end_of_log;
use crate::{AppendError, Event};

/// Maximum size of a batch, unless one group is larger: with several frames in flight, more only adds to the latency.
const BATCH_BYTES: u64 = 256 << 10;
/// Delay between attempts to reach the engine at the start.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Time after which the start of a primary fails without the engine. Until then it can be electing a leader.
const START_TIMEOUT: Duration = LOSS_TIMEOUT.saturating_add(Duration::from_secs(5));

/// Default read lease: longer than the engine takes to elect a leader.
pub const READ_LEASE: Duration = Duration::from_secs(10);
/// Minimum read lease: the log keeps each heartbeat, of which an idle primary puts ten per lease.
const MIN_READ_LEASE: Duration = Duration::from_secs(1);

/// Options of a log, whatever its engine.
pub struct Options {
    /// Maximum size of a group of events, in bytes; without it, of the largest that the engine stores.
    pub group_bytes: Option<u64>,
    /// Follow the log while another process writes it, and wait for an engine that is away.
    pub standby: bool,
    /// Read lease, from one second to ten.
    pub lease: Duration,
    /// How long entries are kept after they were superseded or deleted.
    pub retain: Duration,
    /// URL at which this process serves clients, announced to standbys.
    pub advertise: Option<String>,
    /// The clock, the randomness and the tasks of the log.
    pub env: Env,
}

#[cfg(feature = "nats")]
impl Options {
    /// Options for a log that no server uses.
    fn at_rest() -> Self {
        let (lease, retain) = (READ_LEASE, Duration::ZERO);
        Self { group_bytes: None, standby: false, lease, retain, advertise: None, env: Env::real() }
    }
}

/// A log in an engine: its name for messages, and what is known of it.
pub struct Stored {
    pub engine: Arc<dyn Engine>,
    pub name: String,
    /// Its UUID, and the newest frame that was durable.
    pub mark: Mark,
    /// File for the newest frame that is durable.
    pub mark_file: Option<MarkFile>,
    /// Directory for a local copy of it.
    pub copies: Option<Directory>,
    /// Maximum size of a group of events, in bytes.
    pub group_bytes: u64,
    /// Minimum growth of the log between two compactions, in bytes.
    pub compaction_bytes: u64,
}

pub struct ClusterLog {
    shared: Arc<Shared>,
    handle: Handle,
    running: Mutex<Option<Running>>,
}

struct Running {
    /// Separate runtime, so that tasks of another one can wait for it.
    runtime: Runtime,
    /// None if the log is only read, and while it is handed over.
    task: Option<Task>,
}

/// State shared by the tasks of one log.
struct Shared {
    engine: Arc<dyn Engine>,
    name: String,
    log: Uuid,
    /// This process.
    holder: Holder,
    news: watch::Sender<News>,
    /// Set once a frame of the log was read.
    restored: OnceLock<Restored>,
    /// The newest complete snapshot that is known.
    snapshot: Mutex<Option<Snapshot>>,
    index: Index,
    queue: Queue<Entries>,
    watermark: Watermark,
    breaker: Breaker,
    lease: Lease,
    /// The end of the log when this process handed it over.
    left: Mutex<Option<Tip>>,
    /// What another process has handed over to this one.
    handed: watch::Sender<Option<Position>>,
    integrity: Mutex<Integrity>,
    mark_file: Option<MarkFile>,
    copies: Option<Arc<Directory>>,
    /// The local copy, once the log is known to continue it, and why there is none.
    copy: Mutex<Option<Arc<Copy>>>,
    copy_failure: Mutex<Option<String>>,
    /// Maximum size of a frame of a snapshot, and minimum growth of the log between two.
    frame_bytes: u64,
    compaction_bytes: u64,
    retain: Duration,
    /// Why the last compaction failed.
    compaction_failure: Mutex<Option<String>>,
    closed: SetOnce<()>,
    metrics: Metrics,
    /// Environment whose tasks run in the runtime of the log.
    env: Env,
}

impl ClusterLog {
    /// Opens the log, and claims it or becomes a standby. Runs in the runtime in which the engine does. Blocks, so must not be
    /// called from a task.
    pub fn open(runtime: Runtime, stored: Stored, options: &Options) -> Result<Self> {
        let name = stored.name.clone();
        let tasks = options.env.tasks.in_runtime(runtime.handle());
        let shared = Arc::new(Shared::new(stored, options, Env { tasks, ..options.env.clone() })?);
        let task =
            runtime.block_on(shared.open(options.standby)).with_context(|| format!("cannot open the log in {name}"))?;
        let handle = runtime.handle().clone();
        Ok(Self { shared, handle, running: Mutex::new(Some(Running { runtime, task: Some(task) })) })
    }

    /// Opens the log for reading what is in it now. Another process may write it.
    pub fn read(runtime: Runtime, stored: Stored, options: &Options) -> Result<Self> {
        let name = stored.name.clone();
        let shared = Arc::new(Shared::new(stored, options, options.env.clone())?);
        let follower =
            runtime.block_on(shared.find_end(false)).with_context(|| format!("cannot read the log in {name}"))?;
        follower.publish(&shared);
        shared.follow(follower.sequence());
        let handle = runtime.handle().clone();
        Ok(Self { shared, handle, running: Mutex::new(Some(Running { runtime, task: None })) })
    }

    /// Opens a local copy for reading.
    #[cfg(feature = "nats")]
    fn of_copy(runtime: Runtime, copy: Arc<Copy>, stored: Stored, options: &Options) -> Result<Self> {
        let shared = Shared::new(stored, options, options.env.clone())?;
        runtime.block_on(shared.read_restored())?;
        let follower = Follower::at(&shared, copy.tip());
        follower.publish(&shared);
        shared.follow(follower.sequence());
        let (shared, handle) = (Arc::new(shared), runtime.handle().clone());
        Ok(Self { shared, handle, running: Mutex::new(Some(Running { runtime, task: None })) })
    }

    /// Compacts the log, also while a server uses it. Returns None if there is nothing to compact.
    pub fn compact(&self) -> Result<Option<compaction::Outcome>> {
        self.handle.block_on(compaction::compact(&self.shared, compaction::Manner::Command))
    }

    /// Returns what was read so far and is damaged in a replica, while others have it.
    pub fn replica_damage(&self) -> Option<String> {
        self.shared.replica_damage()
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TransactionLog for ClusterLog {
    fn append(&self, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        self.shared.queue.append(&self.shared.breaker, time, events)
    }

    fn set_idle(&self, idle: bool) {
        self.shared.queue.set_idle(idle);
    }

    fn appended(&self) -> u64 {
        self.shared.queue.appended()
    }

    fn end_of_log(&self) -> Pin<Box<dyn Future<Output = Option<u64>> + Send + '_>> {
        if self.shared.queue.begun() {
            return Box::pin(ready(Some(self.appended())));
        }
        Box::pin(end_of_log(self.news(), self.shared.env.clock.now()))
    }

    fn watermark(&self) -> &Watermark {
        &self.shared.watermark
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
        self.handle.block_on(until_closed(&self.shared.closed, replay::replay(&self.shared, after, receive)))
    }

    fn id(&self) -> Uuid {
        self.shared.log
    }

    fn retained(&self) -> u64 {
        // Entries can have been dropped before the log was restored here, too.
        let Restored { horizon, history } = self.shared.restored();
        let restored = history.incarnations().last().filter(|_| horizon > 0).map_or(1, |incarnation| incarnation.fork);
        self.shared.snapshot().map_or(restored, |snapshot| snapshot.newest().max(restored))
    }

    fn history(&self) -> Arc<History> {
        self.shared.restored().history
    }

    fn read_only(&self) -> Option<&'static str> {
        self.shared.read_only()
    }

    fn reads_refused(&self) -> Option<&'static str> {
        self.shared.reads_refused()
    }

    fn condition(&self) -> Condition {
        self.shared.condition()
    }

    fn close(&self) -> Result<()> {
        let Some(running) = self.running().take() else { return Ok(()) };
        self.shared.queue.end(End::Closed);
        let _ = self.shared.closed.set(());
        // In a thread: the caller may run in a runtime, which does not allow to block on another one.
        let Running { runtime, task } = running;
        let (shared, failed) = (Arc::clone(&self.shared), Arc::clone(&self.shared));
        let close = move || {
            let is_writer = task.is_some();
            if let Some(task) = task {
                runtime.block_on(task.ended());
            }
            runtime.shutdown_background();
            // That of another process, which continues, is newer.
            if is_writer && let Err(error) = shared.write_mark() {
                // An older mark is right too.
                warn!("cannot record the end of the log: {error:#}");
            }
            Ok(())
        };
        let closing = self.shared.env.tasks.fail_thread("log closing", close, move |error| failed.fail(error));
        closing.context("no thread to close the log")?.join();
        self.shared.watermark.failure().map_or(Ok(()), |reason| bail!("{reason}"))
    }
}

impl Standby for ClusterLog {
    fn news(&self) -> watch::Receiver<News> {
        self.shared.news.subscribe()
    }

    fn follow(&self, sequence: u64) {
        self.shared.follow(sequence);
    }

    fn receive(&self, handed: Handed) {
        match handed.position.parse() {
            Ok(position) => drop(self.shared.handed.send_replace(Some(position))),
            Err(error) => self.shared.fail(&error),
        }
    }

    fn begin(&self) -> Result<()> {
        self.shared.begin();
        info!("promoted to primary, accepting writes after sequence {}", self.appended());
        Ok(())
    }
}

impl Drop for ClusterLog {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            error!("the log was not closed cleanly: {error:#}");
        }
    }
}

impl Shared {
    fn new(stored: Stored, options: &Options, env: Env) -> Result<Self> {
        let Stored { engine, name, mark, mark_file, copies, group_bytes, compaction_bytes } = stored;
        ensure!(
            options.lease >= MIN_READ_LEASE,
            "--read-lease is {:?}, but must be at least {MIN_READ_LEASE:?} for this log, which keeps each heartbeat: ten per lease",
            options.lease
        );
        let lease_ms = u32::try_from(options.lease.as_millis()).context("the read lease is too long")?;
        let holder = Holder {
            id: env.random.uuid()?,
            name: format!("process {}", std::process::id()),
            url: options.advertise.clone(),
            lease_ms,
        };
        let news = News { newest: 0, holder: None, primary: None, as_of: env.clock.now() };
        Ok(Self {
            engine,
            name,
            log: mark.log,
            holder,
            news: watch::Sender::new(news),
            restored: OnceLock::new(),
            snapshot: Mutex::default(),
            index: Index::default(),
            queue: Queue::new(0, group_bytes, BATCH_BYTES.min(group_bytes), env.clock.clone()),
            watermark: Watermark::new(0),
            breaker: Breaker::new("engine of the log", env.clock.clone()),
            lease: Lease::new(options.lease, &env.clock),
            left: Mutex::default(),
            handed: watch::Sender::new(None),
            integrity: Mutex::new(Integrity::new(mark)),
            mark_file,
            copies: copies.map(Arc::new),
            copy: Mutex::default(),
            copy_failure: Mutex::default(),
            frame_bytes: group_bytes,
            compaction_bytes,
            retain: options.retain,
            compaction_failure: Mutex::default(),
            closed: SetOnce::new(),
            metrics: Metrics::new(),
            env,
        })
    }

    /// Finds the end of the log, and waits for an election meanwhile; a standby for as long as it takes.
    async fn find_end(&self, standby: bool) -> Result<Follower, Failure> {
        let begun = self.env.clock.now();
        let mut last = String::new();
        loop {
            match Follower::begin(self).await {
                Err(Failure::Silent(reason)) if standby || self.env.clock.elapsed(begun) < START_TIMEOUT => {
                    if reason != last {
                        warn!("engine of the log unavailable, retrying: {reason}");
                        last = reason;
                    }
                    self.env.clock.sleep(RETRY_DELAY).await;
                }
                found => return found,
            }
        }
    }

    /// Claims the log or begins to follow it, and starts the task that continues with that.
    async fn open(self: &Arc<Self>, standby: bool) -> Result<Task> {
        let copy = self.open_copy().await;
        let follower = self.find_end(standby).await?;
        self.use_copy(copy).await;
        let shared = Arc::clone(self);
        let task = if standby {
            follower.publish(self);
            self.follow(follower.sequence());
            self.start("log standby", async move { follower.run(&shared).await })
        } else {
            let (follower, writer) = follower.claim_at_start(self).await?;
            self.follow(follower.sequence());
            self.begin();
            self.start("log writer", async move { writer.run(&shared).await })
        };
        let [checked, compacted, copied] = [self, self, self].map(Arc::clone);
        let clock = self.env.clock.clone();
        self.env.tasks.restart("log integrity", &clock, move || {
            let shared = Arc::clone(&checked);
            async move { shared.watch_integrity().await }
        });
        self.env.tasks.restart("log compaction", &clock, move || compaction::run(Arc::clone(&compacted)));
        self.env.tasks.restart("log copy", &clock, move || copying::run(Arc::clone(&copied)));
        Ok(task)
    }

    /// Starts an essential task. If it panics, the log fails.
    fn start(self: &Arc<Self>, name: &'static str, task: impl Future<Output = ()> + Send + 'static) -> Task {
        let failed = Arc::clone(self);
        let task = async {
            task.await;
            Ok(())
        };
        self.env.tasks.fail(name, task, move |error| failed.fail(error))
    }

    /// Acknowledges that the entries up to this sequence were applied.
    fn follow(&self, sequence: u64) {
        let sequence = self.restored().history.newest_given(sequence);
        self.queue.follow(sequence);
        self.watermark.advance(sequence);
    }

    /// Accepts appends after the entries of the log.
    fn begin(&self) {
        let appended = self.queue.appended();
        let next = self.restored().history.next(appended);
        self.queue.begin(if is_mutant("SequenceReused") { appended } else { next });
    }

    fn read_only(&self) -> Option<&'static str> {
        if self.queue.ended() == Some(End::ReadOnly) {
            Some("another server took the log over from this one, and takes writes")
        } else if !self.queue.begun() {
            Some("this server stands by; another one takes writes")
        } else {
            None
        }
    }

    fn restored(&self) -> Restored {
        self.restored.get().cloned().unwrap_or_default()
    }

    fn fail(&self, error: &anyhow::Error) {
        let reason = format!("the transaction log failed: {error:#}");
        error!("{reason}");
        // Appends first: none may be accepted after the waiting writes were failed.
        self.queue.end(End::Failed);
        self.watermark.latch(reason);
    }

    /// Fails the log: another process claimed it. Entries that were appended here and are not durable never will be, so guest
    /// instances that applied them must not be used any more.
    fn step_down(&self) {
        let reason = "lost the epoch of the log: another process is primary";
        error!("{reason}");
        self.queue.end(End::ReadOnly);
        self.watermark.latch(reason.into());
    }
}
