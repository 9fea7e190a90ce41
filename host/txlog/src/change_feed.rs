//! Change feed: publishes durable changes to subscribers.
//!
//! It wraps a log: an append goes to the log, and, if its key has subscribers, is kept here until it is durable and then
//! published. Earlier changes are read from the log. So a write costs a lookup if its key has no subscribers, otherwise a
//! copy, and time in proportion to their number.
//!
//! Owns: the delivery of changes, and the reading of history. Must never know: HTTP, or the purpose of a subscription.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};
use kvs_runtime::{Env, Task};
use tokio::sync::Notify;
use tokio::task;
use uuid::Uuid;

use super::change::Change;
use super::subscribers::{Queue, Selection, Subscribers, lock};
use super::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use super::{Condition, Forgotten, History, OutcomeUnknown, Receive, TransactionLog, Watermark};
use crate::{AppendError, Event};

/// Condition of a log whose appends are rejected for maintenance.
const READ_ONLY: &str = "read-only: writes are rejected until `kvs read-only off`";

/// Maximum number of entries in one chunk of history.
const PAST_ENTRIES: usize = 10_000;
/// Bytes of keys and values after which a chunk of history ends.
const PAST_BYTES: usize = 4 << 20;

pub struct ChangeFeed {
    log: Arc<dyn TransactionLog>,
    /// Maximum size of the queue of a subscriber, in bytes of keys and values.
    lag_bytes: usize,
    env: Env,
    /// Taken before `pending`; while it is held to write, nothing is appended.
    subscribers: RwLock<Subscribers>,
    /// Appended changes that have subscribers and are not published yet, in the order of the log.
    pub(super) pending: Mutex<VecDeque<Arc<Change>>>,
    appended: Notify,
    /// Appends are rejected, for maintenance.
    rejects_appends: AtomicBool,
}

/// A subscription, which ends on drop.
pub struct Subscription {
    changes: Arc<ChangeFeed>,
    selection: Selection,
    number: u64,
    queue: Arc<Queue>,
    /// All later changes are queued, and no earlier ones.
    pub from: u64,
}

/// A chunk of history.
pub struct Past {
    pub changes: Vec<Change>,
    /// The chunk covers the log up to this sequence.
    pub until: u64,
    /// Compaction has dropped entries.
    pub gap: bool,
}

/// Why a watch cannot resume at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PositionError {
    #[error("the position is malformed; positions are what a watch or a list gave")]
    Malformed,
    #[error(
        "the position {0} is not in the history of this log, which was restored or is another one; read the keys again"
    )]
    Unknown(u64),
    #[error(
        "the position {0} is not yet here: this server follows the log and has not come so far, or cannot find out"
    )]
    NotYet(u64),
}

/// Stops a replay at the end of a chunk.
#[derive(Debug, thiserror::Error)]
#[error("enough")]
struct Enough;

impl ChangeFeed {
    pub fn new(log: Arc<dyn TransactionLog>, lag_bytes: usize, env: Env) -> Arc<Self> {
        let (subscribers, pending, appended) = (RwLock::default(), Mutex::default(), Notify::new());
        let rejects_appends = AtomicBool::new(false);
        Arc::new(Self { log, lag_bytes, env, subscribers, pending, appended, rejects_appends })
    }

    /// Rejects appends from now on, or accepts them again. When it returns, every append that is still accepted is in
    /// [`TransactionLog::appended`].
    pub fn reject_appends(&self, reject: bool) {
        // Appends test it under this lock.
        let _alone = self.subscribers_mut();
        self.rejects_appends.store(reject, Ordering::Release);
    }

    /// Returns whether appends are rejected, for maintenance.
    pub fn rejects_appends(&self) -> bool {
        self.rejects_appends.load(Ordering::Acquire)
    }

    /// Starts the task that publishes changes. If it panics, the current subscriptions are canceled, whose clients resume
    /// with what they missed, and the task is restarted.
    pub fn start(self: &Arc<Self>) -> Task {
        let changes = Arc::clone(self);
        self.env.tasks.restart("change feed", &self.env.clock, move || {
            let changes = Arc::clone(&changes);
            async move {
                let dying = Dismissal(&changes);
                // A failure of the log is reported by the watermark.
                let _ = changes.run().await;
                drop(dying);
                Ok(())
            }
        })
    }

    /// Returns the environment.
    pub fn env(&self) -> &Env {
        &self.env
    }

    /// Publishes changes as they become durable, until the log ends.
    pub async fn run(&self) -> Result<(), OutcomeUnknown> {
        loop {
            let next = lock(&self.pending).front().map(|change| change.sequence);
            match next {
                None => self.appended.notified().await,
                Some(sequence) => match self.log.watermark().reached(sequence).await {
                    Ok(()) => self.hand_out(self.log.watermark().durable()),
                    Err(unknown) => {
                        self.end();
                        return Err(unknown);
                    }
                },
            }
        }
    }

    /// Subscribes. None after the end of the feed.
    pub fn watch(self: &Arc<Self>, selection: Selection) -> Option<Subscription> {
        let mut subscribers = self.subscribers_mut();
        let from = self.log.appended();
        let (number, queue) = subscribers.enter(&selection, from)?;
        Some(Subscription { changes: Arc::clone(self), selection, number, queue, from })
    }

    /// Parses the position that a watch resumes after, and checks that it is in the history of this log, as far as
    /// this process has applied it.
    pub async fn position(&self, text: &str) -> Result<u64, PositionError> {
        // As they are written: without a sign, and without zeros before.
        let sequence = text.parse::<u64>().ok().filter(|sequence| sequence.to_string() == text);
        let sequence = sequence.ok_or(PositionError::Malformed)?;
        // Before the history, which a standby receives together with the end.
        let end = if sequence <= self.log.appended() { Some(sequence) } else { self.log.end_of_log().await };
        if !self.log.history().contains(sequence) || end.is_some_and(|end| end < sequence) {
            Err(PositionError::Unknown(sequence))
        } else if sequence <= self.log.appended() {
            Ok(sequence)
        } else {
            Err(PositionError::NotYet(sequence))
        }
    }

    /// Reads a chunk of the selected changes after a sequence. At the end of history it covers the log up to the durable
    /// watermark.
    ///
    /// Sequences have no gaps of their own, so a gap is due to compaction, and an error: [`Forgotten`]. A dropped change is
    /// never skipped silently, even if newer ones supersede it.
    pub async fn past(&self, selection: &Arc<Selection>, after: u64) -> Result<Past> {
        let selection = Arc::clone(selection);
        let past = self.read(after, move |event| selection.selects(event)).await?;
        ensure!(!past.gap, Forgotten { after, newest: self.log.watermark().durable() });
        Ok(past)
    }

    /// Reads a chunk of history like [`ChangeFeed::past`], but with gaps, and with any filter of events.
    pub async fn read(&self, after: u64, selects: impl Fn(&Event) -> bool + Send + 'static) -> Result<Past> {
        let log = Arc::clone(&self.log);
        task::spawn_blocking(move || {
            // A position in a lost future is followed by a gap.
            let mut past = Past { changes: Vec::new(), until: after, gap: !log.history().contains(after) };
            let (mut seen, mut bytes) = (0, 0);
            let replayed = log.replay(after, &mut |entries| {
                // Not earlier: a standby learns of an incarnation together with its first entries.
                let history = log.history();
                for entry in entries {
                    past.gap |= entry.sequence != history.next(past.until);
                    past.until = entry.sequence;
                    seen += 1;
                    let change = Change::of(entry);
                    if selects(&change.event) {
                        bytes += change.bytes();
                        past.changes.push(change);
                    }
                    if seen >= PAST_ENTRIES || bytes >= PAST_BYTES {
                        return Err(Enough.into());
                    }
                }
                Ok(())
            });
            match replayed {
                Ok(until) => {
                    past.gap |= until >= log.history().next(past.until);
                    past.until = until;
                }
                Err(error) if error.is::<Enough>() => {}
                Err(error) => return Err(error),
            }
            Ok(past)
        })
        .await?
    }

    /// Publishes changes of another process, after they were acknowledged to the log.
    pub fn publish(&self, past: Past) {
        if past.gap {
            return self.dismiss();
        }
        let subscribers = self.subscribers();
        for change in past.changes.into_iter().map(Arc::new) {
            subscribers.concerned(&change.event).for_each(|queue| queue.push(&change, self.lag_bytes));
        }
    }

    /// Cancels the current subscriptions, which would miss changes. Their clients resume with what they missed, or get an
    /// error.
    pub fn dismiss(&self) {
        self.subscribers().dismiss();
    }

    /// Ends the feed: cancels all subscriptions, and accepts no new ones.
    pub fn end(&self) {
        self.subscribers_mut().end();
    }

    pub(super) fn hand_out(&self, durable: u64) {
        let subscribers = self.subscribers();
        let ready: Vec<_> = {
            let mut pending = lock(&self.pending);
            let count = pending.partition_point(|change| change.sequence <= durable);
            pending.drain(..count).collect()
        };
        for change in ready {
            subscribers.concerned(&change.event).for_each(|queue| queue.push(&change, self.lag_bytes));
        }
    }

    pub(super) fn subscribers(&self) -> RwLockReadGuard<'_, Subscribers> {
        self.subscribers.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn subscribers_mut(&self) -> RwLockWriteGuard<'_, Subscribers> {
        self.subscribers.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cancels the subscriptions when the task that serves them ends, also by a panic.
struct Dismissal<'c>(&'c ChangeFeed);

impl Drop for Dismissal<'_> {
    fn drop(&mut self) {
        self.0.dismiss();
    }
}

impl TransactionLog for ChangeFeed {
    fn append(&self, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        let subscribers = self.subscribers();
        if self.rejects_appends() {
            // For a time, unlike a log that is read-only for this process.
            return Err(AppendError::Unavailable);
        }
        if subscribers.is_empty() {
            return self.log.append(time, events);
        }
        let mut pending = lock(&self.pending);
        let first = self.log.append(time, events)?;
        let watched = (first..).zip(events).filter(|(_, event)| subscribers.concerned(event).next().is_some());
        pending.extend(watched.map(|(sequence, event)| Arc::new(Change::new(sequence, time, event.clone()))));
        if !pending.is_empty() {
            self.appended.notify_one();
        }
        Ok(first)
    }

    fn set_idle(&self, idle: bool) {
        self.log.set_idle(idle);
    }

    fn appended(&self) -> u64 {
        self.log.appended()
    }

    fn end_of_log(&self) -> Pin<Box<dyn Future<Output = Option<u64>> + Send + '_>> {
        self.log.end_of_log()
    }

    fn watermark(&self) -> &Watermark {
        self.log.watermark()
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
        self.log.replay(after, receive)
    }

    fn id(&self) -> Uuid {
        self.log.id()
    }

    fn retained(&self) -> u64 {
        self.log.retained()
    }

    fn history(&self) -> Arc<History> {
        self.log.history()
    }

    fn read_only(&self) -> Option<&'static str> {
        self.log.read_only()
    }

    fn reads_refused(&self) -> Option<&'static str> {
        self.log.reads_refused()
    }

    fn condition(&self) -> Condition {
        match self.log.condition() {
            Condition::Well if self.rejects_appends() => Condition::But(READ_ONLY.into()),
            Condition::But(reason) if self.rejects_appends() => Condition::But(format!("{READ_ONLY}; {reason}")),
            condition => condition,
        }
    }

    fn close(&self) -> Result<()> {
        self.end();
        self.log.close()
    }
}

impl Subscription {
    /// Returns the next change, once it is durable. None if the consumer was too slow, or the feed ended.
    pub async fn next(&mut self) -> Option<Arc<Change>> {
        self.queue.next().await
    }

    /// Returns the position from which a watch would miss nothing, if it continues where this one is. None while changes are
    /// queued, after some were dropped, while another process writes the log, and after the log failed.
    pub fn position(&self) -> Option<u64> {
        // No change is on its way to a queue.
        let _none_published = self.changes.subscribers_mut();
        let (log, watermark) = (&self.changes.log, self.changes.log.watermark());
        if log.read_only().is_some() || watermark.failure().is_some() || !self.queue.has_delivered_all() {
            return None;
        }
        let durable = watermark.durable();
        Some(lock(&self.changes.pending).front().map_or(durable, |next| durable.min(next.sequence - 1)))
    }

    /// Returns the bytes of keys and values of queued changes.
    pub fn waiting(&self) -> usize {
        self.queue.bytes()
    }

    /// Waits until a change is queued, or the feed ends.
    pub async fn grown(&self) {
        self.queue.changed().await;
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.changes.subscribers_mut().leave(&self.selection, self.number);
    }
}
