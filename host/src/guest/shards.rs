//! The store: one shard, or several that share out the keys, and the guest that serves in all of them.
//!
//! With one shard every request is its. With several the guest routes each: to the shard that owns its key, to all, whose
//! answers it makes one of, or to any. Another guest takes the place of the one that serves in all shards at once, so that
//! none is asked what another has routed.
//!
//! Owns: which shard is asked, and which guest serves. Must never know: what is asked, which request a shard handles, why
//! another guest is wanted.

mod handover;
mod routing;

use std::convert::Infallible;
use std::fmt;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use arc_swap::ArcSwap;
use bytesize::ByteSize;
use futures_util::future::{join_all, select_all};
use tokio::sync::{OwnedMutexGuard, RwLock, oneshot};
use tokio::task;
use tracing::error;

use super::alarm::Alarm;
use super::engine::Guest;
use super::message::{Answer, Incoming};
use super::metrics::{Cause, Held, Metrics};
use super::outage::Outage;
use super::owner::Owners;
use super::replica::spare::Spare;
use super::replica::{self, Replayed, Replica};
use super::routers::Routers;
use super::shadow::Shadow;
use super::shard::{CallError, Called, LastTrap, Raised, Serving, Shard, Shared, Turn, promote};
use super::trap;
use kvs_metrics::{Measured, Page};
use kvs_runtime::Env;
use kvs_txlog::change::Change;
use kvs_txlog::{Condition, TransactionLog};

pub use self::handover::Paused;

/// Timeout of a switch, in which requests wait.
const SWITCH_TIMEOUT: Duration = Duration::from_secs(10);

pub struct Shards {
    shards: Box<[Arc<Shard>]>,
    owners: Owners,
    shared: Arc<Shared>,
    routers: ArcSwap<Routers>,
    /// Whose turn it is to answer what any shard can.
    next: AtomicUsize,
    /// Held by each request to all shards that is not safe, and against them while the turns of all are taken.
    broadcasts: RwLock<()>,
}

/// How the guest is run.
#[derive(Clone, Copy)]
pub struct Arrangement {
    /// The number of shards.
    pub count: usize,
    /// Whether each has a spare.
    pub with_spares: bool,
}

/// Another guest serves.
pub struct Switched {
    /// How long no call was made.
    pub pause: Duration,
    /// Receives the first trap of the guest, while it is on probation.
    pub alarm: oneshot::Receiver<Raised>,
    pub before: Before,
}

/// The guest that served before, for a rollback.
pub struct Before {
    serving: Serving,
    routers: Arc<Routers>,
    /// One for each shard; none where there was no instance.
    replicas: Vec<Option<Box<Replica>>>,
}

impl Shards {
    /// This many instances, built from the log. Blocks until they are ready to be called.
    pub fn build(
        guest: Guest,
        log: Arc<dyn TransactionLog>,
        Arrangement { count, with_spares }: Arrangement,
        env: Env,
    ) -> Result<(Arc<Self>, Replayed)> {
        let (started, owners) = (env.clock.now(), Owners::new(count, &env.random)?);
        let replicas = replica::new_of_all(&guest, &log, &owners);
        let mut replicas = replicas.with_context(|| guest.source().cannot_be_run())?;
        replica::catch_up_all(&mut replicas, &replica::unobserved)?;
        let replayed = replica::replayed_by_all(&mut replicas, started)?;

        let serving = Serving::new(Arc::new(guest), &replicas[0].instance);
        let routers = ArcSwap::from_pointee(routers(&serving.guest, &log, &owners));
        let (metrics, alarm) = (Metrics::new(), Alarm::default());
        let (cache, quotas) = (Arc::clone(serving.guest.response_cache()), Arc::clone(serving.guest.quotas()));
        cache.serve(Arc::clone(&serving.headers));
        let (building, last_trap, handed_over, shadow) = Default::default();
        let shared =
            Arc::new(Shared { log, cache, quotas, metrics, alarm, building, last_trap, handed_over, shadow, env });
        let shard =
            |(part, replica)| Arc::new(Shard::new(Arc::clone(&shared), part, serving.clone(), replica, with_spares));
        let shards = owners.parts().zip(replicas).map(shard).collect();
        let (next, broadcasts) = Default::default();
        Ok((Arc::new(Self { shards, owners, shared, routers, next, broadcasts }), replayed))
    }

    /// The guest that serves now.
    pub fn serving(&self) -> Serving {
        self.shards[0].serving()
    }

    pub fn each(&self) -> &[Arc<Shard>] {
        &self.shards
    }

    /// The last trap since the start.
    pub fn last_trap(&self) -> Option<LastTrap> {
        self.shared.last_trap.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Shards without an instance, by number, and since when and why.
    pub fn outages(&self) -> impl Iterator<Item = (usize, Outage)> {
        self.shards.iter().enumerate().filter_map(|(number, shard)| Some((number, shard.outage()?)))
    }

    /// Condition of the guest, for `/readyz`: which shard has no instance, since when, and why.
    pub fn condition(&self) -> Condition {
        let (count, clock) = (self.shards.len(), &self.env().clock);
        let mut is_unfit = false;
        let down = self.outages().map(|(number, outage)| {
            is_unfit |= outage.is_long(clock);
            let since = humantime::format_rfc3339_seconds(outage.since);
            // The health is reported without a token.
            let reason = trap::without_printed(&outage.reason);
            format!("shard {number} of {count} has had no instance since {since}: {reason}")
        });
        let down = down.collect::<Vec<_>>().join("; ");
        match (down.is_empty(), is_unfit) {
            (true, _) => Condition::Well,
            (false, false) => Condition::But(down),
            (false, true) => Condition::Unfit(down),
        }
    }

    /// The spares, with the numbers of their shards, where they are wanted.
    pub fn spares(&self) -> impl Iterator<Item = (usize, &Spare)> {
        self.shards.iter().enumerate().filter_map(|(number, shard)| Some((number, shard.spare()?)))
    }

    /// Condition of the spares, for `/readyz`.
    pub fn spare_condition(&self) -> Condition {
        let count = self.shards.len();
        let lacks = self
            .spares()
            .filter_map(|(number, spare)| Some(format!("shard {number} of {count} has no spare: {}", spare.lack()?)));
        let lacks = lacks.collect::<Vec<_>>().join("; ");
        if lacks.is_empty() { Condition::Well } else { Condition::But(lacks) }
    }

    /// Starts the tasks that keep the spares, as long as twice what the instances hold is no more than this.
    pub fn keep_spares(self: &Arc<Self>, memory: u64) {
        for shard in &self.shards {
            let (shards, shard) = (Arc::clone(self), Arc::clone(shard));
            self.env().tasks.restart("guest spare", &self.env().clock, move || {
                let shards = Arc::clone(&shards);
                Arc::clone(&shard).keep_spare(move || shards.has_room_for_spares(memory))
            });
        }
    }

    fn has_room_for_spares(&self, memory: u64) -> Result<()> {
        fit_twice(self.sum(|held| &held.memory_bytes), memory)
    }

    fn held(&self, number: fn(&Held) -> &AtomicU64) -> impl Iterator<Item = u64> {
        self.each().iter().map(move |shard| number(shard.held()).load(Ordering::Relaxed))
    }

    fn sum(&self, number: fn(&Held) -> &AtomicU64) -> u64 {
        self.held(number).sum()
    }

    /// Drops the spares, and builds no other until the guard is dropped: there is memory for another guest. Waits for the
    /// one that is being built.
    pub async fn without_spares(&self) -> OwnedMutexGuard<()> {
        let alone = Arc::clone(&self.shared.building).lock_owned().await;
        for (_, spare) in self.spares() {
            let dropped = spare.take().await;
            spare.wake();
            task::spawn_blocking(move || drop(dropped));
        }
        alone
    }

    /// Condition of the clock of the guests.
    pub fn clock_condition(&self) -> Condition {
        self.serving().guest.clock().condition()
    }

    /// What it was given from outside.
    pub fn env(&self) -> &Env {
        &self.shared.env
    }

    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Routers of a guest.
    pub fn routers_of(&self, guest: &Arc<Guest>) -> Routers {
        routers(guest, &self.shared.log, &self.owners)
    }

    /// What is sampled for a candidate.
    pub fn shadow(&self) -> &Shadow {
        &self.shared.shadow
    }

    /// The response that was given to an equal request and is still right. Takes nobody's turn.
    pub fn kept(&self, incoming: &Incoming) -> Option<Answer> {
        self.shared.cache.get(incoming)
    }

    /// Waits until the keys with the prefix of a quota are counted. Returns whether they are.
    pub async fn counted(&self, prefix: &Arc<str>) -> bool {
        self.shared.quotas.counted(prefix, &self.shared.log, self.env()).await
    }

    /// Asks the shard that a request belongs to.
    pub async fn call(&self, mut incoming: Incoming, deadline: tokio::time::Instant) -> Result<Answer, CallError> {
        loop {
            let called = match &*self.shards {
                [only] => only.call(incoming, None, deadline).await,
                _ => self.call_routed(incoming, deadline).await,
            };
            match called? {
                Called::Answered(answer) => return Ok(answer),
                Called::Moved(moved) if self.shared.handed_over.load(Ordering::Acquire) => {
                    return Err(CallError::HandedOver(Box::new(moved)));
                }
                Called::Moved(moved) => incoming = moved,
            }
        }
    }

    /// Hands over what another process appended, up to `until`, to the shards that own it.
    pub async fn take_in(&self, changes: &[Change], until: u64) -> Result<()> {
        for shard in &self.shards {
            shard.take_in(changes, until).await?;
        }
        Ok(())
    }

    /// Has all of it built from the log once more, while those who ask wait.
    pub async fn rebuild(&self) -> Result<()> {
        // One turn at a time: a rollback, which can begin meanwhile, holds a turn while it waits for the others.
        for shard in &self.shards {
            let mut turn = shard.visit().await?;
            let serving = turn.serving();
            self.shared.cache.serve(Arc::clone(&serving.headers));
            // A turn that ends without an instance is followed by one.
            turn.take_out(serving);
        }
        Ok(())
    }

    /// Lets the guest do its housekeeping, in each shard.
    pub async fn keep_house(&self) -> Result<Infallible> {
        let each = self.shards.iter().map(|shard| Box::pin(shard.keep_house()));
        let (never, ..) = select_all(each).await;
        Ok(never)
    }

    /// Has the guest do its housekeeping soon: this process has become the one that writes the log. Its instances have all
    /// of it already.
    pub fn promoted(&self) {
        self.metrics().promotions[Cause::Takeover as usize].add(1);
        self.shared.cache.renew();
        self.shards.iter().for_each(|shard| shard.wake());
    }

    /// Instances of another guest, which have nothing of the log yet.
    pub fn replicas(&self, guest: &Guest) -> Result<Vec<Replica>> {
        replica::new_of_all(guest, &self.shared.log, &self.owners)
    }

    /// Puts another guest in the place of the one that serves, between two calls. It is given what it misses of the log
    /// while no call is made, so it should miss little. An error leaves everything as it was.
    pub async fn switch(&self, guest: Arc<Guest>, replicas: Vec<Replica>) -> Result<Switched> {
        let (mut turns, mut paused) = (Vec::with_capacity(self.shards.len()), None);
        let mut late = pin!(self.env().clock.sleep(SWITCH_TIMEOUT));
        let too_late = || {
            anyhow!(
                "no call was made for {SWITCH_TIMEOUT:?}: the log does not become durable or cannot be read, or a shard is rebuilt; \
                 correct that first"
            )
        };
        let _no_broadcast = tokio::select! {
            biased;
            alone = self.broadcasts.write() => alone,
            () = late.as_mut() => return Err(too_late()),
        };
        for shard in &self.shards {
            turns.push(tokio::select! {
                biased;
                turn = shard.visit() => turn?,
                () = late.as_mut() => return Err(too_late()),
            });
            paused.get_or_insert_with(|| self.env().clock.now());
        }
        let (before, serving) = (self.serving(), Serving::new(guest, &replicas[0].instance));
        let paused = paused.unwrap_or_else(|| self.env().clock.now());
        let promoted = tokio::select! {
            biased;
            promoted = promote(&self.shared, &serving, &mut turns, replicas, (Cause::Swap, paused)) => promoted,
            () = late => Err(too_late()),
        };
        let switched = promoted.map(|replicas| {
            self.shared.cache.serve(Arc::clone(&serving.headers));
            let routers = self.routers.swap(Arc::new(self.routers_of(&serving.guest)));
            Switched {
                pause: self.env().clock.elapsed(paused),
                alarm: self.shared.alarm.set(),
                before: Before { serving: before, routers, replicas },
            }
        });
        turns.into_iter().for_each(Turn::serve_others);
        switched
    }

    /// The guest has proved itself. False when it has not: the alarm has gone off.
    pub fn end_probation(&self) -> bool {
        self.shared.alarm.unset()
    }

    /// Raises the alarm on request. False when no guest is on probation.
    pub fn roll_back(&self) -> bool {
        self.shared.alarm.raise(Raised { reason: "rolled back on request".to_owned(), turn: None })
    }

    /// Linear memory of the guest in each shard.
    pub fn memory_bytes(&self) -> impl Iterator<Item = u64> {
        self.held(|held| &held.memory_bytes)
    }

    /// Restores the guest that served before the one that trapped. Its instances lack what was appended since.
    pub async fn restore(&self, before: Before, mut trapped: Option<Turn>) -> Result<()> {
        let (out, back) = (self.serving().description, &before.serving.description);
        error!("{} is rolled back on probation, {} serves again", out.name, back.name);
        let (mut turns, paused) = (Vec::with_capacity(self.shards.len()), self.env().clock.now());
        // Not after a trap: requests to all shards wait for the turn of the one that trapped.
        let _no_broadcast = match trapped {
            Some(_) => None,
            None => Some(self.broadcasts.write().await),
        };
        for shard in &self.shards {
            turns.push(match trapped.take_if(|turn| turn.is_at(shard)) {
                Some(turn) => turn,
                None => shard.visit().await?,
            });
        }
        self.routers.store(before.routers);
        self.shared.cache.serve(Arc::clone(&before.serving.headers));
        for turn in &mut turns {
            turn.take_out(before.serving.clone());
        }
        // Counters that went back to what they were would look like new events.
        before.serving.guest.metrics().clear();
        let serving = &before.serving;
        let promotions = turns.into_iter().zip(before.replicas).map(async |(turn, kept)| {
            let mut turns = [turn];
            if let Some(kept) = kept
                && let Err(error) =
                    promote(&self.shared, serving, &mut turns, vec![*kept], (Cause::Rollback, paused)).await
            {
                error!("the guest cannot catch up, and is rebuilt: {error:#}");
            }
            // A turn without an instance is followed by a rebuild.
            turns.map(Turn::serve_others)
        });
        join_all(promotions).await;
        Ok(())
    }
}

/// An error when instances that hold this many bytes and as many spares do not fit into the memory.
fn fit_twice(held: u64, memory: u64) -> Result<()> {
    let (instances, all) = (ByteSize(held), ByteSize(memory));
    ensure!(held <= memory / 2, "the instances hold {instances}, and twice that is more than the memory, {all}");
    Ok(())
}

fn routers(guest: &Arc<Guest>, log: &Arc<dyn TransactionLog>, owners: &Owners) -> Routers {
    Routers::new(Arc::clone(guest), Arc::clone(log), owners.part(0))
}

impl Measured for Shards {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let metrics = self.metrics();
        let serving = self.serving();
        let (name, version) = (serving.description.name.as_str(), serving.description.version.as_str());
        let digest = serving.guest.digest().to_string();
        let labels = [("name", name), ("version", version), ("sha256", digest.as_str())];
        page.info("guest", "The guest that serves", labels)?;
        let waiting: usize = self.each().iter().map(|shard| shard.waiting()).sum();
        page.gauge("guest_queue_length", "Requests that wait for their turn at the guest", waiting as u64)?;
        page.histogram("guest_call_duration_seconds", "Time of a request in the guest", &metrics.calls)?;
        page.counter("guest_traps", "Calls in which the guest trapped", metrics.traps.get())?;
        let rebuilds = [("done", metrics.rebuilds.get()), ("failed", metrics.failed_rebuilds.get())];
        let rebuilds = rebuilds.iter().map(|(outcome, count)| ([("outcome", *outcome)], *count));
        page.counters("guest_rebuilds", "Attempts to build the guest again from the log", rebuilds)?;
        let help = "Replicas that counted other keys or bytes than the instance of the same guest before them";
        page.counter("guest_rebuilds_differing", help, metrics.differing.get())?;
        let help = "Replicas that took the place of an instance, by the reason";
        let promotions = Cause::ALL.map(|cause| ([("cause", cause.name())], metrics.promotions[cause as usize].get()));
        page.counters("guest_promotions", help, promotions.iter().map(|(labels, count)| (*labels, *count)))?;
        let help = "Time without a call in a shard when a replica took the place of its instance";
        page.histogram("guest_promotion_duration_seconds", help, &metrics.promotion_pauses)?;
        let ready = self.spares().filter(|(_, spare)| spare.is_ready()).count() as u64;
        page.gauge("guest_spares", "Spares that follow the guest", ready)?;
        let lag = self.spares().filter(|(_, spare)| spare.is_ready()).map(|(_, spare)| spare.sequence()).min();
        let lag = lag.map_or(0, |sequence| self.shared.log.watermark().durable().saturating_sub(sequence));
        page.gauge("guest_spare_lag_entries", "Durable entries that the spare furthest behind lacks", lag)?;
        let builds = [("done", metrics.spares_built.get()), ("failed", metrics.spares_failed.get())];
        let builds = builds.iter().map(|(outcome, count)| ([("outcome", *outcome)], *count));
        page.counters("guest_spare_builds", "Spares that were built, and that failed, when built or later", builds)?;
        let behind = serving.guest.clock().behind().as_secs();
        page.gauge("clock_behind_seconds", "Time by which the system clock is behind that of the guests", behind)?;
        let down = self.outages().count() as u64;
        page.gauge("guest_shards_down", "Shards that have no instance of the guest", down)?;
        let exceeded = serving.guest.metrics().exceeded().counts();
        let exceeded = exceeded.iter().map(|(limit, count)| ([("limit", *limit)], *count));
        page.counters("guest_limit_exceeded", "Output, metrics and ticks of the guest beyond a limit", exceeded)?;
        let swaps = [
            ("done", metrics.swaps.get()),
            ("rolled_back", metrics.swaps_rolled_back.get()),
            ("refused", metrics.swaps_refused.get()),
        ];
        let swaps = swaps.iter().map(|(outcome, count)| ([("outcome", *outcome)], *count));
        page.counters("guest_swaps", "Swaps of the guest, by how they ended", swaps)?;
        page.gauge(
            "guest_memory_bytes",
            "Linear memory of the guest, in all shards",
            self.sum(|held| &held.memory_bytes),
        )?;
        let help = "Linear memory of all instances: those that serve, spares, and those of the other guest in a swap";
        page.gauge("guest_instances_memory_bytes", help, serving.guest.total_memory_bytes())?;
        let limit = (serving.guest.limits().memory_bytes * self.shards.len()) as u64;
        page.gauge("guest_memory_limit_bytes", "Limit of the linear memory of the guest, in all shards", limit)?;
        page.gauge("store_keys", "Keys, as the guest counts them now and again", self.sum(|held| &held.keys))?;
        let help = "Bytes of keys and values, as the guest counts them now and again";
        page.gauge("store_bytes", help, self.sum(|held| &held.stored_bytes))?;
        self.shared.shadow.measure(page)?;
        self.shared.cache.measure(page)?;
        serving.guest.metrics().measure(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spares_are_built_only_where_they_fit() {
        assert!(fit_twice(0, 1).is_ok() && fit_twice(2 << 30, 4 << 30).is_ok());
        let error = fit_twice((2 << 30) + 1, 4 << 30).expect_err("they do not fit").to_string();
        assert_eq!(error, "the instances hold 2.0 GiB, and twice that is more than the memory, 4.0 GiB");
    }
}
