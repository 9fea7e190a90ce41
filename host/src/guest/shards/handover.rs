//! Handover of the store to another process: no call between those of this process and those of the other.
//!
//! Must never know: how the other process gets the log, or how requests are forwarded.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Result;
use tokio::sync::OwnedMutexGuard;

use super::super::shard::{Shared, Turn};
use super::Shards;

/// A store in which no call is made, and none can be served from the response cache, until this is dropped.
pub struct Paused {
    turns: Vec<Turn>,
    shared: Arc<Shared>,
}

impl Shards {
    /// Drops the spares, so that the instances of another process fit into the memory, and builds none until the guard is
    /// dropped. An error when they do not fit.
    pub async fn make_room(&self, memory: u64) -> Result<OwnedMutexGuard<()>> {
        self.has_room_for_spares(memory)?;
        Ok(self.without_spares().await)
    }

    /// Takes the turns of all shards. Requests wait until the result is dropped, or this future is.
    pub async fn pause(&self) -> Result<Paused> {
        let mut paused = Paused { turns: Vec::with_capacity(self.shards.len()), shared: Arc::clone(&self.shared) };
        let _no_broadcast = self.broadcasts.write().await;
        for shard in &self.shards {
            paused.turns.push(shard.visit().await?);
        }
        // A hit takes no turn.
        self.shared.cache.serve(Arc::clone(&self.serving().headers));
        Ok(paused)
    }
}

impl Paused {
    /// Builds the instances again from the log, which has what they lack, while requests wait.
    pub fn rebuild(mut self) {
        for mut turn in mem::take(&mut self.turns) {
            let serving = turn.serving();
            // A turn that ends without an instance is followed by one.
            turn.take_out(serving);
        }
    }

    /// Drops the instances. Requests that wait, and all later ones, end with [`CallError::HandedOver`].
    ///
    /// [`CallError::HandedOver`]: super::super::shard::CallError::HandedOver
    pub fn hand_over(mut self) {
        self.shared.handed_over.store(true, Ordering::Release);
        mem::take(&mut self.turns).into_iter().for_each(Turn::hand_over);
    }
}

impl Drop for Paused {
    /// Serves the requests that have queued: a turn that is only dropped leaves them to the next caller.
    fn drop(&mut self) {
        self.turns.drain(..).for_each(Turn::serve_others);
    }
}
