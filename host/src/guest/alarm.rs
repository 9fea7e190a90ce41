//! The alarm: goes off with the first trap of a guest on probation, whichever shard it was in.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::shard::Turn;

#[derive(Default)]
pub struct Alarm(Mutex<Option<oneshot::Sender<Raised>>>);

/// The guest trapped.
pub struct Raised {
    pub reason: String,
    /// The turn in which it did. None when no shard lost its instance.
    pub turn: Option<Turn>,
}

impl Alarm {
    pub fn set(&self) -> oneshot::Receiver<Raised> {
        let (alarm, raised) = oneshot::channel();
        *self.lock() = Some(alarm);
        raised
    }

    /// False when it has gone off.
    pub fn unset(&self) -> bool {
        self.lock().take().is_some()
    }

    /// Tells who set it. When nobody hears it, the turn goes its own way.
    pub fn raise(&self, reason: String, turn: Option<Turn>) {
        let set = self.lock().take();
        if let Some(set) = set {
            let _ = set.send(Raised { reason, turn });
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<oneshot::Sender<Raised>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
