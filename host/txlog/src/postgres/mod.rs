//! The transaction log in a table of PostgreSQL.
//!
//! Owns: the schema `kvs` of one database, and the handling of a remote dependency that can be unavailable. Must never
//! know: what a key or a value means. Read `schema.sql` first, then `queue` (append), `writer` (commit, once and in order),
//! `breaker` (outages of the database), `epoch` (fencing), `incarnations` (a log whose end was lost), `standby` (failover),
//! `handover` (another process continues), `lease` (read lease) and `replay` (reads).
//!
//! # Primary, epoch and fencing
//!
//! The primary is the process that took the newest epoch, by adding one to `epoch` in `kvs.writer`. Every append names its
//! epoch, and has no effect under a newer one: a process that was paused or partitioned, for however long, cannot write
//! after a failover. It steps down: the log fails for it. It may hold entries that the log does not have, so it does not
//! become a standby with its state; a server with `--standby` restarts instead. A process takes the epoch at its start, if
//! no primary's connection holds the advisory lock or the primary sent no heartbeat for ten seconds; a standby takes it
//! later. While there is a standby, the primary answers reads under a lease (`lease`).
//!
//! # Standby
//!
//! A standby polls the end of the log ten times a second. Its server applies new entries by [`TransactionLog::replay`] and
//! acknowledges them ([`Standby::follow`]); appends are rejected. When the primary's claim has expired, the standby takes
//! the epoch at once, so that no more entries can come; its server applies the rest, and then the log accepts appends
//! ([`Standby::begin`]).
//!
//! # Durability
//!
//! An acknowledged write is a committed transaction. Whether that survives a power cut depends on the database: while `fsync`
//! or a similar setting is off (`conditions`), a log line and `/readyz` report it.
//!
//! # After a restore, a failover of the database, or an unclean shutdown without durable commits
//!
//! Entries may be missing that clients have seen. The process that takes the epoch then begins an incarnation: the log
//! continues under sequences far beyond those of the lost entries, so that no sequence is reused. Sequences have no other
//! gaps, and the rows of `kvs.incarnations` list these. [`PostgresLog::fork`] begins one where this cannot be detected. A
//! standby learns of an incarnation before it hands over entries after it.
//!
//! # Outages of the database
//!
//! Reads that depend on durable entries only are served from memory. Writes in flight wait for their outcome, up to their
//! deadline; the writer repeats the batch until the database reports its outcome. New writes are rejected at once.

mod batch;
pub mod cloud_native_go;
mod compactor;
mod conditions;
mod epoch;
mod handover;
mod incarnations;
mod metrics;
mod opening;
mod pooler;
mod replay;
mod restore;
mod schema;
mod session;
mod standby;
mod target;
mod tls;
mod writer;

use std::future::ready;
use std::pin::Pin;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::FutureExt;
use kvs_runtime::{Env, Task};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{Semaphore, SetOnce, watch};
use tokio_postgres::Statement;
use tracing::{error, info};
use uuid::Uuid;

pub use self::opening::{Existing, Manner};
pub use self::target::Url;

use self::batch::Columns;
use self::compactor::CompactionParams;
use self::conditions::Conditions;
use self::epoch::Epoch;
use self::handover::Position;
use self::metrics::Metrics;
use self::opening::{Holding, Opened};
use self::session::{Failure, Session};
use self::target::Target;
use self::writer::Writer;
use super::file::Durability;
use super::{Condition, History, Incarnation, News, Receive, Standby, TransactionLog, Watermark};
use crate::remote::breaker::Breaker;
use crate::remote::lease::Lease;
use crate::remote::queue::{End, Queue};
use crate::remote::until_closed;
use crate::standby::end_of_log;
use crate::{AppendError, Event};

/// Maximum number of concurrent replays, each with its own connection.
const MAX_CONCURRENT_REPLAYS: usize = 4;
/// Maximum size of a group: it is one message to the database, which accepts at most a gigabyte.
const GROUP_BYTES: u64 = 256 << 20;

/// Maximum size of a batch.
const BATCH_BYTES: u64 = 4 << 20;

/// Time beyond the interval and the timeout of calls after which the task that makes them counts as stalled.
const SLACK: Duration = Duration::from_secs(1);

/// Default read lease.
pub const READ_LEASE: Duration = Duration::from_secs(2);

pub struct Options {
    pub url: Url,
    /// Maximum size of a group of events, in bytes.
    pub group_bytes: u64,
    pub durability: Durability,
    /// Timeout of one database call.
    pub timeout: Duration,
    pub manner: Manner,
    /// Read lease, with a standby: from a tenth of a second to ten.
    pub lease: Duration,
    /// How long compaction keeps entries after they were superseded or deleted.
    pub retain: Duration,
    /// URL at which this process serves clients, announced to standbys.
    pub advertise: Option<String>,
    /// The clock, the randomness and the tasks of the log.
    pub env: Env,
}

pub struct PostgresLog {
    shared: Arc<Shared>,
    handle: Handle,
    schema: usize,
    running: Mutex<Option<Running>>,
}

struct Running {
    /// Separate runtime, so that tasks of another one can wait for it.
    runtime: Runtime,
    /// None while the log is handed over.
    writer: Option<Task>,
}

/// State shared by the tasks of one log.
struct Shared {
    target: Target,
    timeout: Duration,
    conditions: Conditions,
    /// URL announced to standbys.
    url: Option<String>,
    /// The newest epoch that this process took; 0 before the first.
    epoch: AtomicI64,
    /// What another process has handed over to this one.
    handed: watch::Sender<Option<Position>>,
    /// UUID of the log; nil where no version that knows incarnations has written it.
    log: Uuid,
    news: watch::Sender<News>,
    /// History of the log as far as this process has read it: complete once it holds the epoch.
    history: RwLock<Arc<History>>,
    queue: Queue<Columns>,
    watermark: Watermark,
    breaker: Breaker,
    lease: Lease,
    retain: Duration,
    /// The newest sequence for which compaction can have dropped an older entry, as of the last replay.
    retained: AtomicU64,
    readers: Semaphore,
    /// Connection of the last replay, kept for the next one of a standby.
    idle: Mutex<Option<Session>>,
    closed: SetOnce<()>,
    metrics: Metrics,
    /// Environment whose tasks run in the runtime of the log.
    env: Env,
}

impl PostgresLog {
    /// Opens the log and takes its epoch. Blocks, so must not be called from a task.
    pub fn open(options: &Options) -> Result<Self> {
        let target = Target::new(&options.url, options.timeout).context("the URL of the log cannot be used")?;
        let name = target.name();
        Self::open_at(target, options).with_context(|| format!("cannot open the log in the {name}"))
    }

    fn open_at(target: Target, options: &Options) -> Result<Self> {
        let Options { group_bytes, durability, timeout, manner, lease, .. } = *options;
        ensure!(
            group_bytes <= GROUP_BYTES,
            "the maximum size of a write is {GROUP_BYTES} bytes with PostgreSQL: lower --max-value-bytes"
        );
        let mut builder = Builder::new_multi_thread();
        let runtime = kvs_runtime::runtime(builder.worker_threads(1).thread_name("log postgres"));
        let runtime = runtime.context("no thread for the log")?;
        let conditions = Conditions::new(durability);
        let tasks = options.env.tasks.in_runtime(runtime.handle());
        let env = Env { tasks, ..options.env.clone() };
        let (as_of, url) = (env.clock.now(), options.advertise.clone());
        let opened =
            runtime.block_on(opening::open(&target, timeout, &conditions, manner, url.as_deref(), &env.clock))?;
        let Opened { session, append, holding, schema } = opened;
        let (epoch, log, history, retained, news) = match &holding {
            Holding::Ours(epoch) => (
                epoch.number,
                epoch.log,
                epoch.history.clone(),
                epoch.compacted,
                News { newest: epoch.last, holder: None, primary: None, as_of },
            ),
            Holding::Theirs(look, history, log) => {
                let (holder, primary) = (Some(look.holder.clone()), look.primary.clone());
                let news = News { newest: look.newest, holder, primary, as_of };
                // Known from the first replay on.
                (0, log.unwrap_or_default(), history.clone(), u64::MAX, news)
            }
        };
        let shared = Arc::new(Shared {
            target,
            timeout,
            conditions,
            url,
            epoch: AtomicI64::new(epoch),
            handed: watch::Sender::new(None),
            log,
            history: RwLock::new(Arc::new(history)),
            queue: Queue::new(news.newest, group_bytes, BATCH_BYTES, env.clock.clone()),
            watermark: Watermark::new(news.newest),
            news: watch::Sender::new(news),
            breaker: Breaker::new("database", env.clock.clone()),
            lease: Lease::new(lease, &env.clock),
            retain: options.retain,
            retained: AtomicU64::new(retained),
            readers: Semaphore::new(MAX_CONCURRENT_REPLAYS),
            idle: Mutex::default(),
            closed: SetOnce::new(),
            metrics: Metrics::new(),
            env,
        });
        let writer = match holding {
            Holding::Ours(epoch) => {
                shared.begin();
                shared.start("log writer", Arc::clone(&shared).write(epoch, (session, append)))
            }
            Holding::Theirs(look, ..) => {
                info!("standby of {}", look.holder);
                shared.start("log standby", standby::run(Arc::clone(&shared), session, append))
            }
        };
        let handle = runtime.handle().clone();
        Ok(Self { shared, handle, schema, running: Mutex::new(Some(Running { runtime, writer: Some(writer) })) })
    }

    /// The log of a database that nobody serves from.
    pub fn at_rest(url: &Url, existing: Existing) -> Result<Self> {
        let (url, timeout, manner) = (url.clone(), Duration::from_secs(30), Manner { existing, standby: false });
        let (durability, lease, env) = (Durability::Sync, READ_LEASE, Env::real());
        let (group_bytes, retain, advertise) = (GROUP_BYTES, Duration::ZERO, None);
        Self::open(&Options { url, group_bytes, durability, timeout, manner, lease, retain, advertise, env })
    }

    /// Formats the version of the schema, and the version before this process opened the log.
    pub fn schema(&self) -> String {
        let version = schema::VERSION;
        if self.schema < version {
            format!("version {version}, migrated from version {}", self.schema)
        } else {
            format!("version {version}")
        }
    }

    /// Begins an incarnation after the last entry, for a copy that cannot be recognized as one. No append may run
    /// concurrently.
    pub fn fork(&self) -> Result<Incarnation> {
        let epoch = self.shared.epoch().context("another process writes it")?;
        let last = self.appended();
        ensure!(self.shared.watermark.durable() == last, "appended entries are not committed yet");
        let forking = async { epoch::fork(&self.shared.connect_to_write().await?, epoch, last).await };
        let forked: Result<_, Failure> = self.handle.block_on(forking);
        let (incarnation, history) = forked.context("cannot begin an incarnation")?;
        self.shared.set_history(history);
        self.shared.begin();
        Ok(incarnation)
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops every entry that can be dropped, and returns the number of remaining ones.
    pub fn compact(&self) -> Result<u64> {
        let epoch = self.shared.epoch().context("another process writes it")?;
        let newest = self.shared.watermark.durable();
        let params = CompactionParams { idle_ratio: 0, grace: Duration::ZERO, retain: Duration::ZERO };
        self.handle.block_on(compactor::compact(&self.shared, epoch, newest, params))
    }
}

impl TransactionLog for PostgresLog {
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
        self.shared.retained.load(Ordering::Acquire)
    }

    fn history(&self) -> Arc<History> {
        self.shared.history()
    }

    fn read_only(&self) -> Option<&'static str> {
        if self.shared.queue.ended() == Some(End::ReadOnly) {
            Some("another server took the log over from this one, and takes writes")
        } else if !self.shared.queue.begun() {
            Some("this server stands by; another one takes writes")
        } else {
            None
        }
    }

    fn reads_refused(&self) -> Option<&'static str> {
        let Shared { queue, lease, watermark, .. } = &*self.shared;
        if queue.ended() == Some(End::ReadOnly) {
            Some("another server took the log over from this one, and answers reads")
        } else if queue.ended() == Some(End::HandedOver) && watermark.failure().is_some() {
            Some("another process may have taken the log over from this one")
        } else if lease.is_over() {
            Some("another server may have taken the log over from this one: the database does not answer in time")
        } else {
            None
        }
    }

    fn condition(&self) -> Condition {
        let Shared { queue, watermark, breaker, conditions, .. } = &*self.shared;
        if queue.ended() == Some(End::ReadOnly) {
            return Condition::Unfit("read-only: another process is primary".into());
        }
        if let Some(reason) = watermark.failure() {
            return Condition::Unfit(format!("failed: {reason}"));
        }
        if let Some(reason) = self.reads_refused() {
            return Condition::Unfit(format!("reads are refused: {reason}"));
        }
        let mut reasons = conditions.durability_warnings();
        if !queue.begun() {
            let News { newest, holder, .. } = &*self.shared.news.borrow();
            let behind = self.history().entries(queue.appended(), *newest);
            reasons.push(match holder {
                Some(holder) => format!("standby of {holder}, replication lag {behind} entries"),
                None => format!("failover in progress, replication lag {behind} entries"),
            });
        }
        // Not unfit: reads are still served, and all servers would be taken out of service at once.
        match breaker.reason() {
            Some(reason) => reasons.push(format!("database unavailable, rejecting writes: {reason}")),
            None => reasons.extend(self.shared.silence()),
        }
        if reasons.is_empty() { Condition::Well } else { Condition::But(reasons.join("; ")) }
    }

    fn close(&self) -> Result<()> {
        let Some(running) = self.running().take() else { return Ok(()) };
        self.shared.queue.end(End::Closed);
        let _ = self.shared.closed.set(());
        // In a thread: the caller may run in a runtime, which does not allow to block on another one.
        let Running { runtime, writer } = running;
        let failed = Arc::clone(&self.shared);
        let close = move || {
            if let Some(writer) = writer {
                runtime.block_on(writer.ended());
            }
            runtime.shutdown_background();
            Ok(())
        };
        let closing = self.shared.env.tasks.fail_thread("log closing", close, move |error| failed.fail(error));
        closing.context("no thread to close the log")?.join();
        self.shared.watermark.failure().map_or(Ok(()), |reason| bail!("{reason}"))
    }
}

impl Drop for PostgresLog {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            error!("the log was not closed cleanly: {error:#}");
        }
    }
}

impl Shared {
    /// Starts an essential task. If it panics, the log fails.
    fn start(self: &Arc<Self>, name: &'static str, task: impl Future<Output = ()> + Send + 'static) -> Task {
        let failed = Arc::clone(self);
        let task = async {
            task.await;
            Ok(())
        };
        self.env.tasks.fail(name, task, move |error| failed.fail(error))
    }

    /// Writes until the epoch is lost or the log is closed.
    async fn write(self: Arc<Self>, epoch: Epoch, connection: (Session, Statement)) {
        let (shared, Env { tasks, clock, .. }) = (Arc::clone(&self), &self.env);
        tasks.restart("log compactor", clock, move || {
            let run = compactor::run(Arc::clone(&shared), epoch.number, epoch.compacted);
            run.map(Ok)
        });
        Writer::new(&epoch, connection).run(self).await;
    }

    /// Makes the queue accept appends after the entries of the log.
    fn begin(&self) {
        self.queue.begin(self.history().next(self.queue.appended()));
    }

    /// The epoch of this process.
    fn epoch(&self) -> Option<i64> {
        Some(self.epoch.load(Ordering::Acquire)).filter(|epoch| *epoch > 0)
    }

    fn set_epoch(&self, epoch: i64) {
        self.epoch.store(epoch, Ordering::Release);
    }

    fn history(&self) -> Arc<History> {
        Arc::clone(&self.history.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the history by a longer one. Incarnations are only ever added, so a shorter one is stale.
    fn set_history(&self, history: History) {
        let mut known = self.history.write().unwrap_or_else(PoisonError::into_inner);
        if history.incarnations().len() > known.incarnations().len() {
            *known = Arc::new(history);
        }
    }

    fn idle(&self) -> MutexGuard<'_, Option<Session>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a session for reads.
    async fn connect(&self) -> Result<Session, Failure> {
        Session::connect(&self.target, self.timeout, &self.conditions.settings()).await
    }

    /// Opens a session for writes.
    async fn connect_to_write(&self) -> Result<Session, Failure> {
        opening::connect(&self.target, self.timeout, &self.conditions).await
    }

    /// Reports a task that does not run: it makes calls at intervals, and each ends in time, one way or the other.
    fn silence(&self) -> Option<String> {
        let silence = self.breaker.silence();
        (silence > self.timeout + self.lease.time + SLACK)
            .then(|| format!("no call to the database has ended for {silence:.0?}, the task of the log does not run"))
    }

    fn fail(&self, error: &anyhow::Error) {
        let reason = format!("the transaction log failed: {error:#}");
        error!("{reason}");
        // Appends first: none may be accepted after the waiting writes were failed.
        self.queue.end(End::Failed);
        self.watermark.latch(reason);
    }

    /// Fails the log: another process took the epoch. Entries that were appended here and not committed never will be, so
    /// guest instances that applied them must not be used any more.
    fn step_down(&self) {
        let reason = "lost the epoch of the log: another process is primary";
        error!("{reason}");
        self.queue.end(End::ReadOnly);
        self.watermark.latch(reason.into());
    }
}
