//! Durable changes, for those who watch.
//!
//! Stands in front of a log: what is appended goes to it, and, when somebody watches its key, stays here until it is durable
//! and then goes to whoever watches it. What happened before somebody began to watch is read from the log. So a write
//! costs nothing more than a look while nobody watches its key, and else a copy, and as much as its subscribers are many.
//!
//! Owns: when a change goes to whom, and what is told of the past. Must never know: HTTP, or why somebody watches.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;

use anyhow::{Result, ensure};
use kvs_runtime::{Env, Task};
use tokio::sync::Notify;
use tokio::task;

use super::change::Change;
use super::subscribers::{Queue, Selection, Subscribers, lock};
use super::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use super::{Condition, Forgotten, History, OutcomeUnknown, Receive, TransactionLog, Watermark};
use crate::{AppendError, Event};

/// Entries that are read at a time of what happened before.
const PAST_ENTRIES: usize = 10_000;
/// Bytes of their keys and values after which no more are read.
const PAST_BYTES: usize = 4 << 20;

pub struct ChangeFeed {
    log: Arc<dyn TransactionLog>,
    /// What a watcher may have waiting before it is given up, in bytes of keys and values.
    lag_bytes: usize,
    env: Env,
    /// Taken before `pending`; while it is held to write, nothing is appended.
    subscribers: RwLock<Subscribers>,
    /// What was appended, is watched, and has not gone to the subscribers; in the order of the log.
    pub(super) pending: Mutex<VecDeque<Arc<Change>>>,
    appended: Notify,
}

/// One who watches, until it is dropped.
pub struct Subscription {
    changes: Arc<ChangeFeed>,
    selection: Selection,
    number: u64,
    queue: Arc<Queue>,
    /// All later changes come by the queue, and none of the earlier ones.
    pub from: u64,
}

/// Some of what happened before.
pub struct Past {
    pub changes: Vec<Change>,
    /// All up to this sequence was looked at.
    pub until: u64,
    /// Compaction has left something out.
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

/// Ends a replay that has brought enough.
#[derive(Debug, thiserror::Error)]
#[error("enough")]
struct Enough;

impl ChangeFeed {
    pub fn new(log: Arc<dyn TransactionLog>, lag_bytes: usize, env: Env) -> Arc<Self> {
        let (subscribers, pending, appended) = (RwLock::default(), Mutex::default(), Notify::new());
        Arc::new(Self { log, lag_bytes, env, subscribers, pending, appended })
    }

    /// Starts the task that hands out changes. Should it die, whoever watches then is told nothing more, and finds out by
    /// asking what it missed; the task is started again.
    pub fn start(self: &Arc<Self>) -> Task {
        let changes = Arc::clone(self);
        self.env.tasks.restart("change feed", &self.env.clock, move || {
            let changes = Arc::clone(&changes);
            async move {
                let dying = Dismissal(&changes);
                // Whoever waits for the log hears of its failure there.
                let _ = changes.run().await;
                drop(dying);
                Ok(())
            }
        })
    }

    /// The clock and the tasks that it was given.
    pub fn env(&self) -> &Env {
        &self.env
    }

    /// Hands out changes as they become durable, for as long as the log lives.
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

    /// Begins to watch. None when the end has come.
    pub fn watch(self: &Arc<Self>, selection: Selection) -> Option<Subscription> {
        let mut subscribers = self.subscribers_mut();
        let from = self.log.appended();
        let (number, queue) = subscribers.enter(&selection, from)?;
        Some(Subscription { changes: Arc::clone(self), selection, number, queue, from })
    }

    /// Parses the position that a watch resumes after, and checks that it is in the history of this log, as far as that was
    /// taken in.
    pub async fn position(&self, text: &str) -> Result<u64, PositionError> {
        // As they are written: without a sign, and without zeros before.
        let sequence = text.parse::<u64>().ok().filter(|sequence| sequence.to_string() == text);
        let sequence = sequence.ok_or(PositionError::Malformed)?;
        // Before the history, of which a standby learns together with the end.
        let end = if sequence <= self.log.appended() { Some(sequence) } else { self.log.end_of_log().await };
        if !self.log.history().contains(sequence) || end.is_some_and(|end| end < sequence) {
            Err(PositionError::Unknown(sequence))
        } else if sequence <= self.log.appended() {
            Ok(sequence)
        } else {
            Err(PositionError::NotYet(sequence))
        }
    }

    /// Some of these changes after a sequence, and how far that goes: to what is durable when nothing is left.
    ///
    /// The log numbers entries without gaps, so one is what compaction has left, and [`Forgotten`]: a change that is not
    /// there any more is not passed over in silence, however well the newer ones make up for it.
    pub async fn past(&self, selection: &Arc<Selection>, after: u64) -> Result<Past> {
        let selection = Arc::clone(selection);
        let past = self.read(after, move |event| selection.selects(event)).await?;
        ensure!(!past.gap, Forgotten { after, newest: self.log.watermark().durable() });
        Ok(past)
    }

    /// [`ChangeFeed::past`], of what is left of it, whichever events `selects` picks.
    pub async fn read(&self, after: u64, selects: impl Fn(&Event) -> bool + Send + 'static) -> Result<Past> {
        let log = Arc::clone(&self.log);
        task::spawn_blocking(move || {
            // Nothing follows on a position in a lost future.
            let mut past = Past { changes: Vec::new(), until: after, gap: !log.history().contains(after) };
            let (mut seen, mut bytes) = (0, 0);
            let replayed = log.replay(after, &mut |entries| {
                // Now, and not before: a standby learns of an incarnation together with its first entries.
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

    /// Hands out what another process appended, after the log was told that it is there.
    pub fn tell(&self, past: Past) {
        if past.gap {
            return self.dismiss();
        }
        let subscribers = self.subscribers();
        for change in past.changes.into_iter().map(Arc::new) {
            subscribers.concerned(&change.event).for_each(|queue| queue.push(&change, self.lag_bytes));
        }
    }

    /// Who watches now would miss something, is told nothing more, and finds out by asking for what it missed.
    pub fn dismiss(&self) {
        self.subscribers().dismiss();
    }

    /// Nobody watches any more, and nobody begins to.
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

/// Dismisses whoever watches, when the task that told them ends, however that comes.
struct Dismissal<'c>(&'c ChangeFeed);

impl Drop for Dismissal<'_> {
    fn drop(&mut self) {
        self.0.dismiss();
    }
}

impl TransactionLog for ChangeFeed {
    fn append(&self, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        let subscribers = self.subscribers();
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
        self.log.condition()
    }

    fn close(&self) -> Result<()> {
        self.end();
        self.log.close()
    }
}

impl Subscription {
    /// The next change, once it is durable. None when the watcher fell too far behind, or the end has come.
    pub async fn next(&mut self) -> Option<Arc<Change>> {
        self.queue.next().await
    }

    /// Bytes of keys and values of changes that wait for the watcher.
    pub fn waiting(&self) -> usize {
        self.queue.bytes()
    }

    /// Returns when more waits, or the end has come.
    pub async fn grown(&self) {
        self.queue.changed().await;
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.changes.subscribers_mut().leave(&self.selection, self.number);
    }
}
