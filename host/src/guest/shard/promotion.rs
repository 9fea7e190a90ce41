//! Promotion: replicas take the place of what serves, whatever led to it: a swap, a rollback, a trap.
//!
//! Owns: that what serves has everything that was appended, and that all of it is durable. Must never know: why another is to
//! serve.

use std::time::Instant;

use anyhow::Result;
use tokio::task;

use super::super::metrics::Cause;
use super::super::replica::{self, Replica};
use super::{Serving, Shared, Turn};

/// Puts a replica of the guest `serving` in the place of the instance in each turn, which it returns. An error leaves
/// everything as it was.
///
/// The turns are held, so that the shards append nothing meanwhile. First everything that was appended becomes durable, then
/// the replicas take in what they lack of it: few entries, as calls wait for it, which they have done since `paused`.
pub async fn promote(
    shared: &Shared,
    serving: &Serving,
    turns: &mut [Turn],
    mut replicas: Vec<Replica>,
    (cause, paused): (Cause, Instant),
) -> Result<Vec<Option<Box<Replica>>>> {
    let newest = shared.log.appended();
    shared.log.watermark().reached(newest).await?;
    let replicas = task::spawn_blocking(move || replica::follow_all(&mut replicas).map(|()| replicas)).await??;
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
