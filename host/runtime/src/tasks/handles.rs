//! Handles of started threads and tasks.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use futures_util::future::AbortHandle;
use tokio::sync::oneshot;

/// Handle of a task, which continues when the handle is dropped.
pub struct Task {
    abort: AbortHandle,
    ended: oneshot::Receiver<()>,
}

impl Task {
    /// Creates a handle, and the sender that the task drops at its end.
    pub(super) fn new(abort: AbortHandle) -> (oneshot::Sender<()>, Self) {
        let (end, ended) = oneshot::channel();
        (end, Self { abort, ended })
    }

    /// Aborts the task at its next await.
    pub fn abort(&self) {
        self.abort.abort();
    }

    /// Waits for the end of the task.
    pub async fn ended(self) {
        // Nothing is ever sent: the sender goes with the task.
        let _ = self.ended.await;
    }
}

/// Handle of a thread, which continues when the handle is dropped.
pub struct Thread(Arc<End>);

#[derive(Default)]
struct End {
    over: Mutex<bool>,
    changed: Condvar,
}

/// Guard that the thread drops at its end, also on a panic.
pub(super) struct Ending(Arc<End>);

impl Thread {
    pub(super) fn new() -> (Ending, Self) {
        let end = Arc::<End>::default();
        (Ending(Arc::clone(&end)), Self(end))
    }

    /// Waits for the end of the thread.
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
