//! The watermark: how far the log is durable, who waits for it, and whether it can ever move again.
//!
//! Responses wait here. They are let go from one place, in the order of their sequences, by whoever made the log durable.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

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
    /// Set once too: nothing more becomes durable, and what is can still be read.
    abandoned: bool,
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
            if waiting.latched.is_some() || waiting.abandoned {
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
        self.durable.store(durable, Ordering::Release);
        let mut released: Vec<_> = waiting.sequences.extract_if(.., |(sequence, _)| *sequence <= durable).collect();
        drop(waiting);
        released.sort_unstable_by_key(|(sequence, _)| *sequence);
        for (_, release) in released {
            // A client that left waits no more.
            let _ = release.send(());
        }
    }

    /// The log is somebody else's from here on. Everyone who waits, and everyone who comes to wait for what is not durable,
    /// is told that the outcome is unknown; what is durable stays.
    pub fn abandon(&self) {
        let mut waiting = self.waiting();
        waiting.abandoned = true;
        waiting.sequences.clear();
    }

    /// The log failed for good. Everyone who waits, and everyone who comes to wait, is told that the outcome is unknown.
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

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn a_durable_sequence_is_not_waited_for() {
        let watermark = Watermark::new(7);
        assert!(matches!(poll(pin!(watermark.reached(7))), Poll::Ready(Ok(()))));
    }

    #[test]
    fn advancing_releases_what_it_covers_and_nothing_more() {
        let watermark = Watermark::new(0);
        let (mut first, mut second) = (pin!(watermark.reached(1)), pin!(watermark.reached(2)));
        assert!(poll(first.as_mut()).is_pending());
        assert!(poll(second.as_mut()).is_pending());
        watermark.advance(1);
        assert!(matches!(poll(first.as_mut()), Poll::Ready(Ok(()))));
        assert!(poll(second.as_mut()).is_pending());
    }

    #[test]
    fn a_latch_tells_those_who_wait_and_those_who_come() {
        let watermark = Watermark::new(3);
        let mut waiting = pin!(watermark.reached(4));
        let mut latched = pin!(watermark.latched());
        assert!(poll(waiting.as_mut()).is_pending());
        assert!(poll(latched.as_mut()).is_pending());
        watermark.latch("fdatasync: input/output error".into());
        assert!(matches!(poll(waiting.as_mut()), Poll::Ready(Err(OutcomeUnknown))));
        assert!(matches!(poll(pin!(watermark.reached(5))), Poll::Ready(Err(OutcomeUnknown))));
        assert!(matches!(poll(pin!(watermark.reached(3))), Poll::Ready(Ok(()))));
        assert_eq!(poll(latched.as_mut()), Poll::Ready("fdatasync: input/output error".into()));
    }
}
