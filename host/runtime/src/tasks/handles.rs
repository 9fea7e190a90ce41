//! What is left in the hands of whoever started a thread or a task.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use futures_util::future::AbortHandle;
use tokio::sync::oneshot;

/// A task. It goes on when this is dropped.
pub struct Task {
    abort: AbortHandle,
    ended: oneshot::Receiver<()>,
}

impl Task {
    /// Beside it what the task drops at its end.
    pub(super) fn new(abort: AbortHandle) -> (oneshot::Sender<()>, Self) {
        let (end, ended) = oneshot::channel();
        (end, Self { abort, ended })
    }

    /// Ends it where it waits next.
    pub fn abort(&self) {
        self.abort.abort();
    }

    /// Waits for its end.
    pub async fn ended(self) {
        // Nothing is ever sent: the sender goes with the task.
        let _ = self.ended.await;
    }
}

/// A thread. It goes on when this is dropped.
pub struct Thread(Arc<End>);

#[derive(Default)]
struct End {
    over: Mutex<bool>,
    changed: Condvar,
}

/// Dropped by the thread at its end, however that comes.
pub(super) struct Ending(Arc<End>);

impl Thread {
    pub(super) fn new() -> (Ending, Self) {
        let end = Arc::<End>::default();
        (Ending(Arc::clone(&end)), Self(end))
    }

    /// Waits for its end.
    pub fn join(self) {
        let over = self.0.lock();
        let waited = self.0.changed.wait_while(over, |over| !*over);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl End {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        *self.0.lock() = true;
        self.0.changed.notify_all();
    }
}
