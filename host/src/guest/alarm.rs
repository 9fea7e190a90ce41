//! The alarm: goes off with the first trap of a guest on probation, whichever shard it was in.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

pub struct Alarm<T>(Mutex<Option<oneshot::Sender<T>>>);

impl<T> Default for Alarm<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Alarm<T> {
    pub fn set(&self) -> oneshot::Receiver<T> {
        let (alarm, raised) = oneshot::channel();
        *self.lock() = Some(alarm);
        raised
    }

    /// False when it has gone off.
    pub fn unset(&self) -> bool {
        self.lock().take().is_some()
    }

    /// Notifies the one who set it. False when it is not set, or nobody waits for it: then `value` is dropped.
    pub fn raise(&self, value: T) -> bool {
        let set = self.lock().take();
        set.is_some_and(|set| set.send(value).is_ok())
    }

    fn lock(&self) -> MutexGuard<'_, Option<oneshot::Sender<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
