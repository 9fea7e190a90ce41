//! Promotion: replicas replace the serving instances, after a swap, a rollback or a trap.
//!
//! Owns: that a promoted replica has all appended entries, and that these are durable. Must never know: the cause.

use std::time::Instant;

use anyhow::Result;
use tokio::task;

use super::super::metrics::Cause;
use super::super::replica::{self, Replica};
use super::{Serving, Shared, Turn};

/// Replaces the instance of each turn by a replica of the guest `serving`, and returns the previous instances. An error changes
/// nothing.
///
/// The turns are held, so that the shards append nothing meanwhile. First all appended entries become durable, then the replicas
/// apply those that they lack: few, since calls have been waiting since `paused`.
pub async fn promote(
    shared: &Shared,
    serving: &Serving,
    turns: &mut [Turn],
    mut replicas: Vec<Replica>,
    (cause, paused): (Cause, Instant),
) -> Result<Vec<Option<Box<Replica>>>> {
    let newest = shared.log.appended();
    if !is_early() {
        shared.log.watermark().reached(newest).await?;
    }
    if !is_incomplete() {
        replicas = task::spawn_blocking(move || replica::follow_all(&mut replicas).map(|()| replicas)).await??;
    }
    let promoted = turns.iter_mut().zip(replicas).map(|(turn, replica)| {
        let mut before = turn.promote(serving.clone(), replica)?;
        before.appended(newest);
        Some(before)
    });
    let before = promoted.collect();
    shared.metrics.promotions[cause as usize].add(1);
    shared.metrics.promotion_pauses.observe_time(shared.env.clock.elapsed(paused));
    Ok(before)
}

fn is_early() -> bool {
    #[cfg(test)]
    if tests::is(tests::Mutant::Early) {
        return true;
    }
    false
}

fn is_incomplete() -> bool {
    #[cfg(test)]
    if tests::is(tests::Mutant::Incomplete) {
        return true;
    }
    false
}

#[cfg(test)]
mod tests;
