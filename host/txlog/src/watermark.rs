//! The watermark: how far the log is durable, who waits for it, and whether it can ever move again.
//!
//! Responses wait here. They are let go from one place, in the order of their sequences, by whoever made the log durable.

use tokio::sync::oneshot;

use super::sync::atomic::{AtomicU64, Ordering};
use super::sync::{Mutex, MutexGuard, PoisonError};

/// The log failed before the sequence was known to be durable. It may be on disk or not.
#[derive(Debug, thiserror::Error)]
#[error("outcome unknown: the transaction log failed before this was known to be durable")]
pub struct OutcomeUnknown;

pub struct Watermark {
    durable: AtomicU64,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// Set once and never taken back: after a failed sync nothing can be said about what was written.
    latched: Option<String>,
    /// In no order: there are no more of them than requests in flight.
    sequences: Vec<(u64, oneshot::Sender<()>)>,
    latch: Vec<oneshot::Sender<()>>,
}

impl Watermark {
    pub fn new(durable: u64) -> Self {
        Self { durable: AtomicU64::new(durable), waiting: Mutex::default() }
    }

    /// The newest sequence known to be durable.
    pub fn durable(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// Waits until the log is durable up to and including `sequence`. Returns at once when it is.
    pub async fn reached(&self, sequence: u64) -> Result<(), OutcomeUnknown> {
        if sequence <= self.durable() {
            return Ok(());
        }
        let released = {
            let mut waiting = self.waiting();
            // Once more under the lock: `advance` may have come between.
            if sequence <= self.durable() {
                return Ok(());
            }
            if waiting.latched.is_some() {
                return Err(OutcomeUnknown);
            }
            let (release, released) = oneshot::channel();
            waiting.sequences.push((sequence, release));
            released
        };
        released.await.map_err(|_| OutcomeUnknown)
    }

    /// Everything up to `durable` is on disk: lets go who waited for it, lowest sequence first.
    pub fn advance(&self, durable: u64) {
        let mut waiting = self.waiting();
        // What is durable stays so, in whatever order those come who found it.
        let durable = durable.max(self.durable());
        self.durable.store(durable, Ordering::Release);
        let mut released: Vec<_> = waiting.sequences.extract_if(.., |(sequence, _)| *sequence <= durable).collect();
        drop(waiting);
        released.sort_unstable_by_key(|(sequence, _)| *sequence);
        for (_, release) in released {
            // A client that left waits no more.
            let _ = release.send(());
        }
    }

    /// The log failed for good, or is another process's. Everyone who waits, and everyone who comes to wait for what is not
    /// durable, is told that the outcome is unknown.
    pub fn latch(&self, reason: String) {
        let mut waiting = self.waiting();
        waiting.latched.get_or_insert(reason);
        // Dropping a sender is the bad news.
        waiting.sequences.clear();
        waiting.latch.clear();
    }

    /// Why the log failed, if it did.
    pub fn failure(&self) -> Option<String> {
        self.waiting().latched.clone()
    }

    /// Waits until the log failed, and says why.
    pub async fn latched(&self) -> String {
        let failed = {
            let mut waiting = self.waiting();
            if let Some(reason) = &waiting.latched {
                return reason.clone();
            }
            let (keep, failed) = oneshot::channel();
            waiting.latch.push(keep);
            failed
        };
        let _ = failed.await;
        self.waiting().latched.clone().unwrap_or_default()
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Every change under this lock is whole at every step, so a panic elsewhere does not spoil it.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
