//! Promotion: replicas replace the serving instances, after a swap, a rollback or a trap.
//!
//! Owns: that a promoted replica has all appended entries, and that these are durable. Must never know: the cause.

use std::time::{Duration, Instant};

use anyhow::Result;
use kvs_runtime::Clock;
use tokio::task;
use tracing::warn;

use super::super::metrics::Cause;
use super::super::replica::{self, Replica};
use super::{Serving, Shared, Turn};

/// Attempts to read the last entries, and the pause between them: an error of the log can pass, and the replicas took long to
/// build.
const ATTEMPTS: usize = 10;
const PAUSE: Duration = Duration::from_millis(50);

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
        let clock = shared.env.clock.clone();
        replicas = task::spawn_blocking(move || follow(&mut replicas, &clock).map(|()| replicas)).await??;
    }
    for (turn, replica) in turns.iter().zip(&mut replicas) {
        turn.compare(&serving.guest, replica)?;
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

/// Has the replicas apply what became durable. They are given up after an error only if that is their own, or lasts.
fn follow(replicas: &mut [Replica], clock: &Clock) -> Result<()> {
    for _ in 1..ATTEMPTS {
        match replica::follow_all(replicas) {
            Err(error) if !replica::is_lost(&error) => warn!("the log cannot be read for a promotion: {error:#}"),
            followed => return followed,
        }
        clock.pause(PAUSE);
    }
    replica::follow_all(replicas)
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
