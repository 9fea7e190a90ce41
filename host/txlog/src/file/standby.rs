//! The standby: follows the log while another process has the lock, and takes over when that process ends.
//!
//! Owns: the role of this process. Before it has the lock it changes nothing; then the log is opened as at any start, and must
//! contain all entries that were followed.

use std::future::ready;
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvs_runtime::{Clock, Thread};
use tokio::sync::watch;
use uuid::Uuid;

use super::disk::{Directory, Disk, is_shortage};
use super::follower::Follower;
use super::handover::NO_LOCK;
use super::home::{Home, Unsupported};
use super::lock::{self, Lock, Unusable};
use super::recovery::Unrecorded;
use super::{Before, Damage, FileLog, Options};
use crate::standby::end_of_log;
use crate::{
    AppendError, Condition, Event, Forgotten, Handed, History, News, Receive, Standby, TransactionLog, Watermark,
};

/// Polling interval, hence a bound for the staleness of reads, and for the time from the end of the primary to the takeover.
const LOOK: Duration = Duration::from_millis(20);
/// Pause after a shortage, which a takeover would add to.
const SHORTAGE_PAUSE: Duration = Duration::from_secs(1);

/// Age of the last look from which on the standby counts as stalled, however slow the disk.
const MAX_AGE: Duration = Duration::from_secs(5);

/// A log whose primary is another process, until the takeover.
pub struct StandbyLog {
    shared: Arc<Shared>,
    thread: Mutex<Option<Thread>>,
}

struct Shared {
    options: Options,
    disk: Arc<dyn Disk>,
    follower: Follower,
    /// The same before and after the takeover, so that its waiters are not affected.
    watermark: Arc<Watermark>,
    followed: AtomicU64,
    news: watch::Sender<News>,
    /// Set when this process takes over.
    log: OnceLock<FileLog>,
    /// All entries were followed, and appends are accepted.
    begun: AtomicBool,
    state: Mutex<State>,
    closing: Condvar,
}

#[derive(Default)]
struct State {
    /// Why the end of the log is unknown, and why new entries could not be read.
    blind: Option<String>,
    unread: Option<String>,
    closed: bool,
    /// What the primary has handed to this process.
    handed: Option<Handed>,
    /// The lock, while this process alone knows that the log has lost its end.
    kept: Option<Lock>,
}

/// Result of polling the log.
enum Look {
    /// This process is primary.
    Ours,
    Theirs,
    /// Another process has the lock, and the log cannot be followed.
    Nothing(anyhow::Error),
}

impl StandbyLog {
    /// Blocks until there is a log to follow, or this process is primary. `waits` is called with the reason for the wait.
    pub fn open(options: Options, waits: impl Fn(String)) -> Result<Self> {
        options.check()?;
        lock::make_directory(&options.data)?;
        let directory = options.data.join("log");
        lock::make_directory(&directory)?;
        Self::open_on(Arc::new(Directory::new(directory)), options, waits)
    }

    /// [`open`](Self::open) with the log on this disk.
    pub(super) fn open_on(disk: Arc<dyn Disk>, options: Options, waits: impl Fn(String)) -> Result<Self> {
        let log = Self { shared: Arc::new(Shared::new(disk, options)), thread: Mutex::default() };
        let Shared { options, follower, .. } = &*log.shared;
        let data = options.data.display();
        loop {
            match log.shared.look()? {
                Look::Ours => {
                    tracing::info!("no other process uses {data}: this one is the primary");
                    log.begin()?;
                    return Ok(log);
                }
                Look::Theirs => {
                    let newest = follower.newest();
                    // The server begins with a replay of all these entries.
                    log.follow(newest);
                    let (holder, _) = lock::holder(&options.data);
                    tracing::info!("standby of {holder} at sequence {newest}");
                    log.start()?;
                    return Ok(log);
                }
                Look::Nothing(error) if is_lasting(&error) => {
                    return Err(error.context(format!("cannot follow the log in {data}")));
                }
                // The primary is starting, or is of a version that publishes no position.
                Look::Nothing(error) => {
                    log.shared.note(Some(&error));
                    waits(format!("cannot follow the log: {error:#}"));
                    log.shared.clock().pause(LOOK);
                }
            }
        }
    }

    fn start(&self) -> Result<()> {
        let (watching, failed) = (Arc::clone(&self.shared), Arc::clone(&self.shared));
        let tasks = &self.shared.options.env.tasks;
        let thread = tasks.fail_thread("log standby", move || watching.run(), move |error| failed.fail(error));
        let thread = thread.context("cannot start a thread of the log")?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    /// Returns the newest known sequence of the log, applied or not.
    pub(super) fn newest(&self) -> u64 {
        self.shared.news.borrow().newest
    }

    pub(super) fn log(&self) -> Option<&FileLog> {
        self.shared.log.get()
    }

    pub(super) fn begun(&self) -> bool {
        self.shared.begun.load(Ordering::Acquire)
    }
}

impl Shared {
    fn new(disk: Arc<dyn Disk>, options: Options) -> Self {
        let follower =
            Follower::new(Home { disk: Arc::clone(&disk), data: options.data.clone(), env: options.env.clone() });
        let news = News { newest: 0, holder: Some(String::new()), primary: None, as_of: options.env.clock.now() };
        Self {
            disk,
            follower,
            watermark: Arc::new(Watermark::new(0)),
            followed: AtomicU64::new(0),
            news: watch::Sender::new(news),
            log: OnceLock::new(),
            begun: AtomicBool::new(false),
            state: Mutex::default(),
            closing: Condvar::new(),
            options,
        }
    }

    fn clock(&self) -> &Clock {
        &self.options.env.clock
    }

    /// Polls until this process is primary.
    fn run(&self) -> Result<()> {
        loop {
            let state = self.state();
            let waits = |state: &mut State| !state.closed && state.handed.is_none();
            let mut state = self.clock().wait_timeout_while(&self.closing, state, LOOK, waits);
            if state.closed {
                return Ok(());
            }
            let handed = state.handed.take();
            drop(state);
            if let Some(handed) = handed {
                return self.take_handed(handed);
            }
            match self.look()? {
                Look::Ours => return Ok(()),
                Look::Theirs => {}
                Look::Nothing(error) => {
                    self.note(Some(&error));
                    // A takeover that fails has read and written.
                    if is_passing(&error) {
                        self.clock().pause(SHORTAGE_PAUSE);
                    }
                }
            }
        }
    }

    /// Takes over if the lock is free, and reads the position otherwise. An error is one of a takeover that cannot be repeated.
    fn look(&self) -> Result<Look> {
        let as_of = self.clock().now();
        let kept = self.state().kept.take();
        let attempt = || Lock::attempt(&self.options.data, self.options.advertise.as_deref());
        let newest = match kept.map_or_else(attempt, |lock| Ok(Some(lock))) {
            Ok(Some(lock)) => match self.take_over_or_keep(lock, as_of) {
                Ok(()) => return Ok(Look::Ours),
                // This may be the last server. The lock is free again, and the next look takes over.
                Err(error) if is_passing(&error) => Err(error),
                Err(error) => return Err(error),
            },
            #[cfg(test)]
            Ok(None) if super::tests::mutants::is(super::tests::mutants::Mutant::TakenUnlocked) => {
                self.take_over(None, as_of, None)?;
                return Ok(Look::Ours);
            }
            Ok(None) => self.follower.look(),
            Err(error) => Err(error),
        };
        match newest {
            Ok(newest) => {
                self.note(None);
                let (holder, primary) = lock::holder(&self.options.data);
                self.news.send_replace(News { newest, holder: Some(holder), primary, as_of });
                Ok(Look::Theirs)
            }
            Err(error) => Ok(Look::Nothing(error)),
        }
    }

    /// Records why the log cannot be followed, and logs it once.
    fn note(&self, blind: Option<&anyhow::Error>) {
        let blind = blind.map(|error| format!("{error:#}"));
        let mut state = self.state();
        if blind != state.blind {
            match &blind {
                Some(why) => tracing::warn!("cannot follow the log: {why}"),
                None => tracing::info!("following the log again"),
            }
            state.blind = blind;
        }
    }

    /// Takes over a log that must end exactly where its primary has closed it.
    fn take_handed(&self, Handed { lock, position }: Handed) -> Result<()> {
        let lock = lock.context(NO_LOCK)?;
        let as_of = self.clock().now();
        let newest = self.follower.look()?;
        let found = self.follower.position().map(|found| found.to_string());
        if found.as_ref() != Some(&position) {
            bail!("the log was handed over at {position}, and ends at {}", found.as_deref().unwrap_or("its begin"));
        }
        lock.announce(&self.options.data, self.options.advertise.as_deref())?;
        self.take_over(Some(lock), as_of, Some(newest))
    }

    /// Takes over, and keeps the lock after [`Unrecorded`]: no other process may open the log.
    fn take_over_or_keep(&self, lock: Lock, begun: Instant) -> Result<()> {
        let again = lock.duplicate();
        self.take_over(Some(lock), begun, None).inspect_err(|error| {
            if error.is::<Unrecorded>() {
                self.state().kept = again.ok();
            }
        })
    }

    fn take_over(&self, lock: Option<Lock>, begun: Instant, end: Option<u64>) -> Result<()> {
        let before =
            Before { known: self.follower.known(), watermark: Arc::clone(&self.watermark), ..Before::default() };
        let log = FileLog::open_after(Arc::clone(&self.disk), self.options.clone(), lock, before)?;
        let newest = log.appended();
        if let Some(end) = end.filter(|end| *end != newest) {
            bail!("the log was handed over at sequence {end}, and was opened at {newest}");
        }
        if self.log.set(log).is_err() {
            bail!("the log was taken over twice");
        }
        tracing::info!("took over the log at sequence {newest} within {:.0?}", self.clock().elapsed(begun));
        self.news.send_replace(News { newest, holder: None, primary: None, as_of: begun });
        Ok(())
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
        let mut was_received = true;
        let replayed = self.follower.replay(after, &mut |entries| {
            let received = receive(entries);
            was_received = received.is_ok();
            received
        });
        let unread = replayed.as_ref().err().filter(|error| was_received && !error.is::<Forgotten>());
        self.state().unread = unread.map(|error| format!("{error:#}"));
        replayed
    }

    fn fail(&self, error: &anyhow::Error) {
        let reason = format!("the transaction log failed: {error:#}");
        tracing::error!("{reason}");
        self.watermark.latch(reason);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a shortage of descriptors, threads or memory is the cause, or of room for what must be recorded.
pub(super) fn is_passing(error: &anyhow::Error) -> bool {
    error.is::<Unrecorded>() || error.chain().filter_map(|cause| cause.downcast_ref()).any(is_shortage)
}

/// Whether to wait for the primary does not help.
fn is_lasting(error: &anyhow::Error) -> bool {
    let denies =
        |error: &io::Error| matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem);
    let is_denied = error.chain().filter_map(|cause| cause.downcast_ref()).any(denies);
    is_denied || error.is::<Damage>() || error.is::<Unsupported>() || error.is::<Unusable>()
}

impl TransactionLog for StandbyLog {
    fn append(&self, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        match self.log() {
            Some(log) if self.begun() => log.append(time, events),
            _ => Err(AppendError::ReadOnly),
        }
    }

    fn set_idle(&self, idle: bool) {
        if let Some(log) = self.log() {
            log.set_idle(idle);
        }
    }

    fn appended(&self) -> u64 {
        match self.log() {
            Some(log) if self.begun() => log.appended(),
            _ => self.shared.followed.load(Ordering::Acquire),
        }
    }

    fn end_of_log(&self) -> Pin<Box<dyn Future<Output = Option<u64>> + Send + '_>> {
        if self.begun() {
            return Box::pin(ready(Some(self.appended())));
        }
        Box::pin(end_of_log(self.news(), self.shared.clock().now()))
    }

    fn watermark(&self) -> &Watermark {
        &self.shared.watermark
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
        match self.log() {
            Some(log) => log.replay(after, receive),
            None => self.shared.replay(after, receive),
        }
    }

    fn id(&self) -> Uuid {
        let followed = || self.shared.follower.position().map_or(Uuid::nil(), |position| position.log);
        self.log().map_or_else(followed, FileLog::id)
    }

    fn retained(&self) -> u64 {
        self.log().map_or_else(|| self.shared.follower.retained(), FileLog::retained)
    }

    fn history(&self) -> Arc<History> {
        self.log().map_or_else(|| self.shared.follower.history(), FileLog::history)
    }

    fn read_only(&self) -> Option<&'static str> {
        let follows = !self.begun() && self.shared.watermark.failure().is_none();
        follows.then_some("this server stands by; another one takes writes")
    }

    fn reads_refused(&self) -> Option<&'static str> {
        self.log().and_then(TransactionLog::reads_refused)
    }

    fn condition(&self) -> Condition {
        if let Some(reason) = self.shared.watermark.failure() {
            return Condition::Unfit(format!("failed: {reason}"));
        }
        if let Some(log) = self.log().filter(|_| self.begun()) {
            return log.condition();
        }
        let state = self.shared.state();
        if let Some(why) = state.blind.as_ref().or(state.unread.as_ref()) {
            return Condition::Unfit(format!("standby cannot follow the log: {why}"));
        }
        drop(state);
        let News { newest, holder, as_of, .. } = self.shared.news.borrow().clone();
        let age = self.shared.clock().elapsed(as_of);
        if holder.is_some() && age > MAX_AGE {
            return Condition::Unfit(format!("standby cannot follow the log: it has not looked at it for {age:.0?}"));
        }
        let behind = self.history().entries(self.appended(), newest);
        Condition::But(match holder {
            Some(holder) => format!("standby of {holder}, replication lag {behind} entries"),
            None => format!("failover in progress, replication lag {behind} entries"),
        })
    }

    fn close(&self) -> Result<()> {
        self.shared.state().closed = true;
        self.shared.closing.notify_all();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            thread.join();
        }
        match self.log() {
            Some(log) => log.close(),
            None => self.shared.watermark.failure().map_or(Ok(()), |reason| bail!("{reason}")),
        }
    }
}

impl Standby for StandbyLog {
    fn news(&self) -> watch::Receiver<News> {
        self.shared.news.subscribe()
    }

    fn follow(&self, sequence: u64) {
        self.shared.followed.store(sequence, Ordering::Release);
        self.shared.watermark.advance(sequence);
        self.shared.follower.passed(sequence);
    }

    fn receive(&self, handed: Handed) {
        self.shared.state().handed = Some(handed);
        self.shared.closing.notify_all();
    }

    fn begin(&self) -> Result<()> {
        let log = self.log().context("another process writes the log")?;
        // Not earlier: compaction could drop entries that are not applied yet.
        log.compact_in_background()?;
        self.shared.begun.store(true, Ordering::Release);
        tracing::info!("promoted to primary, accepting writes after sequence {}", log.appended());
        Ok(())
    }
}

impl Drop for StandbyLog {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!("the log was not closed cleanly: {error:#}");
        }
    }
}
