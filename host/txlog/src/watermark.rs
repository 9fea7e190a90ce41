//! The durable watermark: the newest durable sequence, and the waiters for it.
//!
//! Responses wait here. They are released in one place, in the order of their sequences, by the writer of the log.

use tokio::sync::oneshot;

use super::sync::atomic::{AtomicU64, Ordering};
use super::sync::{Mutex, MutexGuard, PoisonError};

/// So few waiters are never looked through.
const MIN_PRUNED: usize = 1_024;

/// The log failed before the sequence was known to be durable. It may be on disk or not.
#[derive(Debug, thiserror::Error)]
#[error("outcome unknown: the transaction log failed before this was known to be durable")]
pub struct OutcomeUnknown;

/// The durable watermark.
pub struct Watermark {
    durable: AtomicU64,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// Reason of the failure. Set once and never reset: after a failed sync the state of written entries is unknown.
    latched: Option<String>,
    /// Waiters in no order. Those that have given up stay until the watermark advances, or there are `prune_at`.
    sequences: Vec<(u64, oneshot::Sender<()>)>,
    prune_at: usize,
    latch: Vec<oneshot::Sender<()>>,
}

impl Waiting {
    /// Drops the waiters that have given up, when there are twice as many waiters as the last time: while the log takes long,
    /// their number grows with each request that ends in a timeout.
    fn prune(&mut self) {
        if self.sequences.len() >= self.prune_at.max(MIN_PRUNED) {
            self.sequences.retain(|(_, release)| !release.is_closed());
            self.prune_at = 2 * self.sequences.len();
        }
    }
}

impl Watermark {
    pub fn new(durable: u64) -> Self {
        Self { durable: AtomicU64::new(durable), waiting: Mutex::default() }
    }

    /// Returns the newest durable sequence.
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
            // Again under the lock, for a concurrent `advance`.
            if sequence <= self.durable() {
                return Ok(());
            }
            if waiting.latched.is_some() {
                return Err(OutcomeUnknown);
            }
            waiting.prune();
            let (release, released) = oneshot::channel();
            waiting.sequences.push((sequence, release));
            released
        };
        released.await.map_err(|_| OutcomeUnknown)
    }

    /// Advances the watermark, and releases the waiters up to it, lowest sequence first.
    pub fn advance(&self, durable: u64) {
        let mut waiting = self.waiting();
        // The watermark never goes back, in whatever order its updates arrive.
        let durable = durable.max(self.durable());
        self.durable.store(durable, Ordering::Release);
        let mut released: Vec<_> = waiting.sequences.extract_if(.., |(sequence, _)| *sequence <= durable).collect();
        drop(waiting);
        released.sort_unstable_by_key(|(sequence, _)| *sequence);
        for (_, release) in released {
            // The waiter may be gone, with its client.
            let _ = release.send(());
        }
    }

    /// Fails the watermark for good: the log failed, or another process took it over. All current and future waiters for
    /// later sequences get [`OutcomeUnknown`].
    pub fn latch(&self, reason: String) {
        let mut waiting = self.waiting();
        waiting.latched.get_or_insert(reason);
        // A dropped sender signals the failure.
        waiting.sequences.clear();
        waiting.latch.clear();
    }

    /// Returns why the log failed, if it did.
    pub fn failure(&self) -> Option<String> {
        self.waiting().latched.clone()
    }

    /// Waits until the log fails, and returns the reason.
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

    /// Returns the number of waiters, with those that have given up and were not dropped yet.
    #[cfg(test)]
    pub fn waiters(&self) -> usize {
        self.waiting().sequences.len()
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Every change under this lock is complete at every step, so poisoning can be ignored.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
