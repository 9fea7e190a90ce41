//! The log in a table of Postgres.
//!
//! Owns: the schema `kvs` of one database, and everything about a dependency that is elsewhere and can be away. Must never
//! know: what a key or a value means. To read it, begin with `schema.sql`, then `queue` (where events come in), `writer` (how
//! they become durable, once and in order), `breaker` (what happens while the database is away), `epoch` (who may write),
//! `incarnations` (what becomes of a log whose end was lost), `standby` (who waits for the epoch), `lease` (until when reads are answered) and `replay` (how entries
//! come out).
//!
//! # Who writes
//!
//! Whoever took the newest epoch, by adding one to `epoch` in `kvs.writer`. Every append names its epoch, and does nothing
//! under a newer one: a process that was paused, or cut off, for however long, cannot write after another took over. It
//! steps down: the log is at its end for it, as one that failed. It holds entries that the log may not have, so it does
//! not follow the other with what it has; a server that is to stand by begins anew. The epoch is taken at the start, when
//! nobody holds the advisory lock that a writer's connection holds, or when the one who does was not seen for
//! ten seconds; or later, by one that stands by. With such a one, reads are answered under a lease (`lease`).
//!
//! # While another process writes
//!
//! One that stands by looks ten times a second how far the log has come. Whoever serves from it takes in what is new by
//! [`TransactionLog::replay`] and says so ([`Standby::follow`]); nothing can be appended. When the epoch is to be had
//! it is taken at once, which makes an end of what can come; the rest is taken in, and then the log begins to take appends
//! ([`Standby::begin`]).
//!
//! # What an answered write has behind it
//!
//! A committed transaction. Whether that survives a power cut is the database's to say: where `fsync` is off, or a setting
//! like it (`conditions`), a log line and `/readyz` report it for as long as it is so.
//!
//! # After a restore, a failover of the database, or an unclean end without durable commits
//!
//! Entries may be missing that clients have seen. Whoever takes the epoch begins an incarnation then: the log goes on under
//! sequences far beyond those of the lost entries, so that no sequence is given twice. Sequences have no other gaps, and the
//! rows of `kvs.incarnations` name these. [`PostgresLog::fork`] begins one where that cannot be recognized. One that stands by
//! learns of an incarnation before it hands over entries beyond it.
//!
//! # While the database is away
//!
//! Reads that rest on what is durable are answered from memory. Writes under way wait for the outcome, up to their
//! deadline; the batch is asked for again until the database tells what became of it. New writes are refused at once.

mod batch;
mod breaker;
pub mod cloud_native_go;
mod compactor;
mod conditions;
mod epoch;
mod incarnations;
mod lease;
mod metrics;
mod opening;
mod pooler;
mod queue;
mod replay;
mod schema;
mod session;
mod standby;
mod target;
mod tls;
mod writer;

use std::future::ready;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::FutureExt;
use kvs_runtime::{Env, Task};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{Semaphore, watch};
use tokio_postgres::Statement;
use tracing::{error, info};

pub use self::opening::Manner;
pub use self::target::Url;

use self::breaker::Breaker;
use self::compactor::Effort;
use self::conditions::Conditions;
use self::epoch::Epoch;
use self::lease::Lease;
use self::metrics::Metrics;
use self::opening::{Holding, Opened};
use self::queue::{End, Queue};
use self::session::{Failure, Session};
use self::target::Target;
use self::writer::Writer;
use super::file::Durability;
use super::{Condition, History, Incarnation, News, Receive, Standby, TransactionLog, Watermark};
use crate::standby::end_of_log;
use crate::{AppendError, Event};

/// Replays at once, each with a connection of its own.
const READERS: usize = 4;
/// A group is one message to the database, which takes no more than a gigabyte.
const GROUP_BYTES: u64 = 256 << 20;

/// Read lease, where nothing else is said.
pub const READ_LEASE: Duration = Duration::from_secs(2);

pub struct Options {
    pub url: Url,
    /// The largest group of events that is taken.
    pub group_bytes: u64,
    pub durability: Durability,
    /// Longest wait for one call of the database.
    pub timeout: Duration,
    pub manner: Manner,
    /// Read lease, with a standby: from a tenth of a second to ten.
    pub lease: Duration,
    /// URL at which this process serves clients, announced to those who stand by.
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
    /// Of its own, so that it can be waited for by whoever runs on another.
    runtime: Runtime,
    writer: Task,
}

/// What all tasks of one log share.
struct Shared {
    target: Target,
    timeout: Duration,
    conditions: Conditions,
    /// URL that is announced.
    url: Option<String>,
    /// Set when this process takes it.
    epoch: OnceLock<i64>,
    news: watch::Sender<News>,
    /// Of the log as far as this process has learned of it: all of it once the epoch is its own.
    history: RwLock<Arc<History>>,
    queue: Queue,
    watermark: Watermark,
    breaker: Breaker,
    lease: Lease,
    readers: Semaphore,
    /// The connection of the last reader, for one that stands by and reads again soon.
    idle: Mutex<Option<Session>>,
    metrics: Metrics,
    /// Its tasks are in the runtime of the log.
    env: Env,
}

impl PostgresLog {
    /// Blocks until the log is there and its epoch taken. Not to be called from a task.
    pub fn open(options: &Options) -> Result<Self> {
        let target = Target::new(&options.url, options.timeout).context("the URL of the log cannot be used")?;
        let name = target.name();
        Self::open_at(target, options).with_context(|| format!("cannot open the log in the {name}"))
    }

    fn open_at(target: Target, options: &Options) -> Result<Self> {
        let Options { group_bytes, durability, timeout, manner, lease, .. } = *options;
        ensure!(group_bytes <= GROUP_BYTES, "it takes writes of at most {GROUP_BYTES} bytes: lower --max-value-bytes");
        let threads = Builder::new_multi_thread().worker_threads(1).thread_name("log postgres").enable_all().build();
        let runtime = threads.context("no thread for the log")?;
        let conditions = Conditions::new(durability);
        let tasks = options.env.tasks.in_runtime(runtime.handle());
        let env = Env { tasks, ..options.env.clone() };
        let (as_of, url) = (env.clock.now(), options.advertise.clone());
        let opened =
            runtime.block_on(opening::open(&target, timeout, &conditions, manner, url.as_deref(), &env.clock))?;
        let Opened { session, append, holding, schema } = opened;
        let (epoch, history, news) = match &holding {
            Holding::Ours(epoch) => (
                OnceLock::from(epoch.number),
                epoch.history.clone(),
                News { newest: epoch.last, holder: None, primary: None, as_of },
            ),
            Holding::Theirs(look, history) => {
                let (holder, primary) = (Some(look.holder.clone()), look.primary.clone());
                let news = News { newest: look.newest, holder, primary, as_of };
                (OnceLock::new(), history.clone(), news)
            }
        };
        let shared = Arc::new(Shared {
            target,
            timeout,
            conditions,
            url,
            epoch,
            history: RwLock::new(Arc::new(history)),
            queue: Queue::new(news.newest, group_bytes),
            watermark: Watermark::new(news.newest),
            news: watch::Sender::new(news),
            breaker: Breaker::new(env.clock.clone()),
            lease: Lease::new(lease, &env.clock),
            readers: Semaphore::new(READERS),
            idle: Mutex::default(),
            metrics: Metrics::new(),
            env,
        });
        let writer = match holding {
            Holding::Ours(epoch) => {
                shared.begin();
                shared.start("log writer", Arc::clone(&shared).write(epoch, (session, append)))
            }
            Holding::Theirs(look, _) => {
                info!("standing by while {} writes the log", look.holder);
                shared.start("log standby", standby::run(Arc::clone(&shared), session, append))
            }
        };
        let handle = runtime.handle().clone();
        Ok(Self { shared, handle, schema, running: Mutex::new(Some(Running { runtime, writer })) })
    }

    /// The log of a database that nobody serves from. It must be there, unless `begin` says otherwise.
    pub fn at_rest(url: &Url, begin: bool) -> Result<Self> {
        let (url, timeout, manner) = (url.clone(), Duration::from_secs(30), Manner { begin, standby: false });
        let (durability, lease, env) = (Durability::Sync, READ_LEASE, Env::real());
        let (group_bytes, advertise) = (GROUP_BYTES, None);
        Self::open(&Options { url, group_bytes, durability, timeout, manner, lease, advertise, env })
    }

    /// The version of the schema, for people, and which one it had before this process opened the log.
    pub fn schema(&self) -> String {
        let version = schema::VERSION;
        if self.schema < version {
            format!("version {version}, brought up from version {}", self.schema)
        } else {
            format!("version {version}")
        }
    }

    /// Begins an incarnation after the last entry: for a copy that cannot be recognized as one. Nothing may be appended
    /// meanwhile.
    pub fn fork(&self) -> Result<Incarnation> {
        let epoch = *self.shared.epoch.get().context("another process writes it")?;
        let last = self.appended();
        ensure!(self.shared.watermark.durable() == last, "entries were appended that are not written yet");
        let forking = async { epoch::fork(&self.shared.connect_to_write().await?, epoch, last).await };
        let forked: Result<_, Failure> = self.handle.block_on(forking);
        let (incarnation, history) = forked.context("no incarnation can be begun")?;
        self.shared.set_history(history);
        self.shared.begin();
        Ok(incarnation)
    }

    /// Drops all that can be dropped, and returns how many entries are left.
    pub fn compact(&self) -> Result<u64> {
        let epoch = *self.shared.epoch.get().context("another process writes it")?;
        let newest = self.shared.watermark.durable();
        let effort = Effort { rest: 0, grace: Duration::ZERO };
        self.handle.block_on(compactor::compact(&self.shared, epoch, newest, effort))
    }
}

impl TransactionLog for PostgresLog {
    fn append(&self, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        self.shared.queue.append(&self.shared.breaker, time, events)
    }

    fn appended(&self) -> u64 {
        self.shared.queue.appended()
    }

    fn end_of_log(&self) -> Pin<Box<dyn Future<Output = Option<u64>> + Send + '_>> {
        if self.shared.queue.begun() {
            return Box::pin(ready(Some(self.appended())));
        }
        Box::pin(end_of_log(self.news()))
    }

    fn watermark(&self) -> &Watermark {
        &self.shared.watermark
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
        self.handle.block_on(replay::replay(&self.shared, after, receive))
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
        let Shared { queue, lease, .. } = &*self.shared;
        if queue.ended() == Some(End::ReadOnly) {
            Some("another server took the log over from this one, and answers reads")
        } else if lease.is_over() {
            Some("another server may have taken the log over from this one: the database does not answer in time")
        } else {
            None
        }
    }

    fn condition(&self) -> Condition {
        let Shared { queue, watermark, breaker, conditions, .. } = &*self.shared;
        if queue.ended() == Some(End::ReadOnly) {
            return Condition::Unfit("read-only: another process writes this log now".into());
        }
        if let Some(reason) = watermark.failure() {
            return Condition::Unfit(format!("failed: {reason}"));
        }
        if let Some(reason) = self.reads_refused() {
            return Condition::Unfit(format!("reads are refused: {reason}"));
        }
        let mut told = conditions.doubts();
        if !queue.begun() {
            let News { newest, holder, .. } = &*self.shared.news.borrow();
            let behind = self.history().entries(queue.appended(), *newest);
            told.push(match holder {
                Some(holder) => format!("standing by while {holder} writes it, {behind} entries behind"),
                None => format!("taking it over, {behind} entries behind"),
            });
        }
        // Reads go on. Who takes a server out of service for a database makes more of it than it is.
        told.extend(breaker.reason().map(|reason| format!("the database is away, writes are refused: {reason}")));
        if told.is_empty() { Condition::Well } else { Condition::But(told.join("; ")) }
    }

    fn close(&self) -> Result<()> {
        let Some(running) = self.running.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        self.shared.queue.end(End::Closed);
        // A thread that serves may be waiting here, which its runtime would not let it do for another.
        let Running { runtime, writer } = running;
        let failed = Arc::clone(&self.shared);
        let close = move || {
            runtime.block_on(writer.ended());
            runtime.shutdown_background();
            Ok(())
        };
        let closing = self.shared.env.tasks.fail_thread("log closing", close, move |error| failed.fail(error));
        closing.context("no thread to close the log")?.join();
        self.shared.watermark.failure().map_or(Ok(()), |reason| bail!("{reason}"))
    }
}

impl Standby for PostgresLog {
    fn news(&self) -> watch::Receiver<News> {
        self.shared.news.subscribe()
    }

    fn follow(&self, sequence: u64) {
        self.shared.queue.follow(sequence);
        self.shared.watermark.advance(sequence);
    }

    fn begin(&self) -> Result<()> {
        self.shared.begin();
        *self.shared.idle() = None;
        info!("this process writes the log now, after sequence {}", self.appended());
        Ok(())
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
    /// Starts what the log cannot do without. Should it panic, the log fails.
    fn start(self: &Arc<Self>, name: &'static str, task: impl Future<Output = ()> + Send + 'static) -> Task {
        let failed = Arc::clone(self);
        let task = async {
            task.await;
            Ok(())
        };
        self.env.tasks.fail(name, task, move |error| failed.fail(error))
    }

    /// Writes as long as the epoch is this process's.
    async fn write(self: Arc<Self>, epoch: Epoch, connection: (Session, Statement)) {
        let (shared, Env { tasks, clock, .. }) = (Arc::clone(&self), &self.env);
        tasks.restart("log compactor", clock, move || {
            let run = compactor::run(Arc::clone(&shared), epoch.number, epoch.compacted);
            run.map(Ok)
        });
        Writer::new(&epoch, connection).run(self).await;
    }

    /// The queue takes appends from now on, after everything that is there.
    fn begin(&self) {
        self.queue.begin(self.history().next(self.queue.appended()));
    }

    fn history(&self) -> Arc<History> {
        Arc::clone(&self.history.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Incarnations are only ever added: an older reading takes none away.
    fn set_history(&self, history: History) {
        let mut known = self.history.write().unwrap_or_else(PoisonError::into_inner);
        if history.incarnations().len() > known.incarnations().len() {
            *known = Arc::new(history);
        }
    }

    fn idle(&self) -> MutexGuard<'_, Option<Session>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session that reads.
    async fn connect(&self) -> Result<Session, Failure> {
        Session::connect(&self.target, self.timeout, &self.conditions.settings()).await
    }

    /// A session that writes.
    async fn connect_to_write(&self) -> Result<Session, Failure> {
        let session = self.connect().await?;
        self.conditions.check(&session).await?;
        Ok(session)
    }

    fn fail(&self, error: &anyhow::Error) {
        let reason = format!("the transaction log failed: {error:#}");
        error!("{reason}");
        // Appends first: none may be accepted after those who wait were told.
        self.queue.end(End::Failed);
        self.watermark.latch(reason);
    }

    /// Another process took the epoch. What was appended here and not written never will be, so whoever holds it is of no
    /// more use.
    fn step_down(&self) {
        let reason = "another process writes this log now";
        error!("{reason}");
        self.queue.end(End::ReadOnly);
        self.watermark.latch(reason.into());
    }
}
