//! Rebuild: after a trap the spare is promoted, or an instance that is built from the log.
//!
//! A swap or a rollback, which holds the turns of other shards meanwhile, does not wait for it: it brings an instance itself.
//!
//! Owns: the pauses between attempts, and the reports while there is no instance. Must never know: the cause.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use kvs_runtime::Env;
use tokio::task;
use tracing::{error, info};

use super::super::metrics::Cause;
use super::super::outage::Outage;
use super::super::replica::{Replayed, Replica};
use super::{Shard, Shared, Turn, Visit, promote};

/// A trap this long after the last rebuild is not a repetition of the previous one.
const QUIET: Duration = Duration::from_secs(10);
/// Shortest and longest pause before a repeated rebuild; each is twice the previous one.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// A swap or a rollback waits for the turn.
#[derive(Debug, thiserror::Error)]
#[error("another instance is about to serve")]
struct Awaited;

impl Shard {
    /// Promotes the spare in the background, or a new instance without one.
    pub(super) fn rebuild(self: Arc<Self>) {
        let Env { tasks, clock, .. } = self.shared.env.clone();
        // Restarted after a panic: nothing else gives this shard an instance.
        tasks.restart("guest rebuild", &clock, move || Arc::clone(&self).rebuild_until_done());
    }

    async fn rebuild_until_done(self: Arc<Self>) -> Result<()> {
        let Shared { log, metrics, env, .. } = &*self.shared;
        loop {
            let spare = self.take_spare().await;
            if log.watermark().failure().is_some() {
                return Ok(()); // The process is about to stop.
            }
            if spare.is_none() && self.give_turn() {
                return Ok(());
            }
            match self.rebuild_once(spare).await {
                Err(error) if error.is::<Awaited>() && self.give_turn() => return Ok(()),
                Ok(turn) => {
                    // In a task of its own: a panic from here on starts another rebuild.
                    env.tasks.detach("guest queue", async move { turn.serve_others() });
                    return Ok(());
                }
                Err(error) => self.is_down(format!("the guest cannot be rebuilt: {error:#}")),
            }
            if let Some(Outage { reason, .. }) = self.outage() {
                error!(shard = self.part.label(), "{reason}");
            }
            metrics.failed_rebuilds.add(1);
        }
    }

    /// Gives the turn, without an instance, to a swap or a rollback that waits for it.
    fn give_turn(self: &Arc<Self>) -> bool {
        let Some(visitor) = self.instance.take_visitor(Visit::Swap) else { return false };
        // A turn that promotes nothing starts another rebuild.
        let _ = visitor.send(Turn::without_instance(self));
        true
    }

    /// Returns the spare. Without one it pauses, until a spare is ready at the latest; that one counts as a rebuild.
    async fn take_spare(&self) -> Option<(Replica, Cause)> {
        let Some(spare) = &self.spare else {
            self.pause().await;
            return None;
        };
        let cause = if spare.is_ready() { Cause::Spare } else { Cause::Rebuild };
        if let Some(replica) = spare.take().await {
            return Some((replica, cause));
        }
        tokio::select! {
            () = self.pause() => {}
            () = spare.ready() => {}
        }
        spare.take().await.map(|replica| (replica, Cause::Rebuild))
    }

    async fn rebuild_once(self: &Arc<Self>, spare: Option<(Replica, Cause)>) -> Result<Turn> {
        let (serving, log, part) = (self.serving(), Arc::clone(&self.shared.log), self.part.clone());
        let clock = &self.shared.env.clock;
        let (replica, cause, replayed) = match spare {
            Some((spare, cause)) => (spare, cause, None),
            None => {
                let guest = Arc::clone(&serving.guest);
                let shard = Arc::clone(self);
                let progress = move |_: u64, _: u64| -> Result<()> {
                    ensure!(!shard.instance.is_awaited(Visit::Swap), Awaited);
                    Ok(())
                };
                let build = move || Replica::build(&guest, &log, part, &progress);
                let (replica, replayed) = task::spawn_blocking(build).await??;
                (replica, Cause::Rebuild, Some(replayed))
            }
        };
        // The replica can be newer than cached responses while another process writes the log.
        if self.shared.log.read_only().is_some() {
            self.shared.cache.serve(Arc::clone(&serving.headers));
        }
        let mut turns = [Turn::of_rebuild(self)];
        let down = self.outage().map_or_else(|| clock.now(), |outage| outage.begun);
        promote(&self.shared, &serving, &mut turns, vec![replica], (cause, down)).await?;
        let shard = self.part.label();
        match replayed {
            Some(Replayed { entries, keys, took }) => info!(shard, entries, keys, ?took, "the guest is rebuilt"),
            None => info!(shard, took = ?clock.elapsed(down), "the spare serves"),
        }
        if matches!(cause, Cause::Rebuild) {
            self.shared.metrics.rebuilds.add(1);
        }
        let [turn] = turns;
        Ok(turn)
    }

    /// Pauses before the next rebuild, until a swap or a rollback waits for the turn.
    async fn pause(&self) {
        let clock = &self.shared.env.clock;
        let (begun, pause) = (clock.now(), self.next_pause());
        while clock.elapsed(begun) < pause && !self.instance.is_awaited(Visit::Swap) {
            clock.sleep(PAUSES.0.min(pause)).await;
        }
    }

    /// Returns the pause before the next rebuild: none for the first, and longer for repeated ones.
    fn next_pause(&self) -> Duration {
        let mut state = self.state();
        let again = state.last_rebuild.is_some_and(|last| self.shared.env.clock.elapsed(last) < QUIET + state.pause);
        state.pause = if again { (state.pause * 2).clamp(PAUSES.0, PAUSES.1) } else { Duration::ZERO };
        state.last_rebuild = Some(self.shared.env.clock.now());
        state.pause
    }
}
