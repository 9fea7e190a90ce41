//! The open batch: where appended events wait for the writer.
//!
//! Owns: the sequences, hence the order of the service, and every reason for which an append is refused. What is in here
//! was accepted: it will be written, or nothing after it ever will. Must never know: the database.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use super::batch::{Batch, size};
use super::breaker::Breaker;
use crate::contract::{AppendError, Event};

/// What may wait at most. A database that is this far behind will not catch up within a request's deadline.
const QUEUE_BYTES: u64 = 32 << 20;
/// A batch larger than this is committed as several.
const BATCH_BYTES: u64 = 4 << 20;

pub struct Queue {
    state: Mutex<State>,
    /// Tells the writer that there is something to do.
    ready: Notify,
    appended: AtomicU64,
    group_bytes: u64,
}

#[derive(Default)]
struct State {
    /// The last is being filled.
    batches: VecDeque<Batch>,
    /// Of all batches here and the one being written.
    bytes: u64,
    next: u64,
    /// The log is this process's to write.
    begun: bool,
    /// The database said that it has no room.
    full: bool,
    end: Option<End>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Closed,
    Failed,
    /// Another process writes this log now.
    ReadOnly,
}

/// What the writer is to do.
pub enum Work {
    Write(Batch),
    /// Nothing came for a while.
    Idle,
    /// Nothing will come any more, and everything was written.
    Closed,
}

impl Queue {
    /// One that takes nothing before it is begun.
    pub fn new(appended: u64, group_bytes: u64) -> Self {
        Self { state: Mutex::default(), ready: Notify::new(), appended: AtomicU64::new(appended), group_bytes }
    }

    /// What others wrote is taken in up to this sequence.
    pub fn follow(&self, appended: u64) {
        self.appended.store(appended, Ordering::Release);
    }

    /// The log is this process's, and goes on from there.
    pub fn begin(&self) {
        let mut state = self.lock();
        (state.begun, state.next) = (true, self.appended() + 1);
    }

    pub fn append(&self, breaker: &Breaker, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        let size: u64 = events.iter().map(size).sum();
        let mut state = self.lock();
        match state.end {
            Some(End::ReadOnly) => return Err(AppendError::ReadOnly),
            Some(_) => return Err(AppendError::Unavailable),
            None if !state.begun => return Err(AppendError::ReadOnly),
            None => {}
        }
        let first = state.next;
        if events.is_empty() {
            return Ok(first);
        }
        if size > self.group_bytes {
            return Err(AppendError::TooLarge(self.group_bytes));
        }
        if state.full {
            return Err(AppendError::Full);
        }
        // One group is taken into an empty queue however large it is.
        if !breaker.is_closed() || state.bytes > 0 && state.bytes + size > QUEUE_BYTES {
            return Err(AppendError::Unavailable);
        }
        // A group lies within one batch: that is what makes it all or nothing.
        if state.batches.back().is_none_or(|batch| batch.bytes + size > BATCH_BYTES) {
            state.batches.push_back(Batch::new(first));
        }
        let Some(batch) = state.batches.back_mut() else { return Err(AppendError::Unavailable) };
        events.iter().for_each(|event| batch.push(time, event));
        state.bytes += size;
        state.next += events.len() as u64;
        self.appended.store(state.next - 1, Ordering::Release);
        drop(state);
        self.ready.notify_one();
        Ok(first)
    }

    pub fn appended(&self) -> u64 {
        self.appended.load(Ordering::Acquire)
    }

    /// Waits for work: all that came while the last batch was being written, up to a batch. Gives up after `idle`.
    pub async fn take(&self, idle: Duration) -> Work {
        loop {
            {
                let mut state = self.lock();
                match (state.batches.pop_front(), state.end) {
                    (Some(batch), _) => return Work::Write(batch),
                    (None, Some(_)) => return Work::Closed,
                    (None, None) => {}
                }
            }
            // What came in between has left a permit.
            if timeout(idle, self.ready.notified()).await.is_err() {
                return Work::Idle;
            }
        }
    }

    /// A batch that was taken is durable.
    pub fn written(&self, batch: &Batch) {
        let mut state = self.lock();
        state.bytes -= batch.bytes;
        state.full = false;
    }

    pub fn set_full(&self) {
        self.lock().full = true;
    }

    /// No appends from now on. What is here is still to be written when it is closed, and is lost else.
    pub fn end(&self, end: End) {
        let mut state = self.lock();
        state.end.get_or_insert(end);
        if end != End::Closed {
            state.batches.clear();
        }
        drop(state);
        self.ready.notify_one();
    }

    pub fn begun(&self) -> bool {
        self.lock().begun
    }

    pub fn ended(&self) -> Option<End> {
        self.lock().end
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // An append that panicked half-way may have left half a group. Nothing under this lock panics but running out of
        // memory, which aborts.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
