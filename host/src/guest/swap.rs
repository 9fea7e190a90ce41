//! The swap: another guest takes over while requests are in flight.
//!
//! It is compiled and checked, built from the log beside the guest that serves, caught up, and put in its place between
//! two calls. Until then the one that serves notices nothing; after that it is kept for a while, and serves again when the new
//! one traps. The guest that is replaced is never asked for anything.
//!
//! Owns: the steps of a swap, and their report. Must never know: who asked for it, or how.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use kvs_runtime::{Clock, Tasks};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::{OwnedMutexGuard, oneshot};
use tokio::task;
use tokio::time::timeout;
use tracing::{info, warn};

use super::engine::{Engine, Guest};
use super::replica::{self, Replayed, Replica};
use super::shadow::{self, Plan, Report};
use super::shard::{Raised, Serving};
use super::shards::{Shards, Switched};
use super::source::{self, Digest, Identity, Source};
use super::trap::{self, Trapped};
use crate::audit::{self, Actor};
use kvs_txlog::{Condition, TransactionLog};

/// Entries that the new guest may lack when calls are held back for it: some milliseconds of its time.
const FEW: u64 = 2_000;
/// Rounds of catching up. A guest that takes in the log more slowly than it grows would need ever more.
const ROUNDS: usize = 100;

#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    #[error("another swap is in progress")]
    Busy,
    /// It is no guest, or one that cannot take in this log.
    #[error("{0:#}")]
    Unfit(anyhow::Error),
    /// Shadow traffic found differences, or was ended on request.
    #[error("{reason}")]
    Shadow { reason: String, report: Value },
    #[error("{guest} was rolled back on probation, the guest before serves again: {reason}")]
    RolledBack { guest: String, reason: String },
    /// Nothing is known to be wrong with the guest.
    #[error("{0:#}")]
    Failed(anyhow::Error),
}

/// The parts of a swap that are a matter of choice.
#[derive(Clone, Copy, Debug, Default)]
pub struct Steps {
    /// Everything is done but the switch.
    pub dry_run: bool,
    pub shadow: Option<Plan>,
}

impl Steps {
    /// Name in the audit trail.
    pub fn action(&self) -> &'static str {
        if self.dry_run { "swap-dry-run" } else { "swap" }
    }
}

/// The step of a swap that a rollback ended.
pub enum Ended {
    Shadow,
    Probation,
}

/// What a swap came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub guest: String,
    pub version: String,
    pub digest: String,
    pub replayed: Replayed,
    /// The guest's memory, with what it took in.
    pub memory_bytes: usize,
    /// How long no call was made; none in a dry run, after which the same guest serves as before.
    pub pause: Option<Duration>,
    /// The report of shadow traffic.
    pub shadow: Option<Value>,
}

/// Swaps the guest, one swap at a time.
pub struct Swapper {
    engine: Engine,
    shards: Arc<Shards>,
    log: Arc<dyn TransactionLog>,
    data: PathBuf,
    /// While this server is standby, the data directory is that of its primary.
    shares_data: bool,
    probation: Duration,
    /// The runtime where requests are served.
    tasks: Tasks,
    /// Held during a swap.
    swapping: Arc<tokio::sync::Mutex<()>>,
    status: Mutex<Status>,
}

struct Status {
    /// Since when the guest serves, in milliseconds since 1970.
    since: u64,
    phase: Option<Phase>,
    /// Shadow traffic in progress, until it is ended on request.
    shadow: Option<Arc<Report>>,
    /// How the last swap ended.
    last: Value,
}

/// Progress of a swap.
struct Phase {
    name: &'static str,
    begun: Instant,
    entries: u64,
    sequence: u64,
}

impl Swapper {
    /// `probation` is how long the guest before is kept. To be called where requests are served.
    pub fn new(
        engine: Engine,
        shards: Arc<Shards>,
        log: Arc<dyn TransactionLog>,
        (data, shares_data): (PathBuf, bool),
        probation: Duration,
    ) -> Arc<Self> {
        let status = Status { since: shards.env().clock.unix_ms(), phase: None, shadow: None, last: Value::Null };
        let tasks = shards.env().tasks.in_runtime(&Handle::current());
        let swapping = Arc::default();
        let status = Mutex::new(status);
        Arc::new(Self { engine, shards, log, data, shares_data, probation, tasks, swapping, status })
    }

    pub fn serving(&self) -> Serving {
        self.shards.serving()
    }

    /// Whether the primary decides which guest serves here.
    pub fn follows_primary(&self) -> bool {
        self.shares_data && self.log.read_only().is_some()
    }

    /// The guest of the primary, where this server shares its data directory and serves another.
    pub fn differs(&self) -> Result<Option<Identity>> {
        let recorded = if self.shares_data { source::recorded(&self.data)? } else { None };
        Ok(recorded.filter(|recorded| *recorded != self.identity()))
    }

    /// Condition of a standby that shares the data directory of its primary: a takeover is not to change the guest.
    pub fn condition(&self) -> Condition {
        let recorded = match self.differs() {
            Ok(Some(recorded)) => recorded,
            Ok(None) => return Condition::Well,
            Err(error) => return Condition::But(format!("it is unknown: {error:#}")),
        };
        let what = format!("this server serves {}, and its primary {recorded}", self.identity());
        match (self.lock().phase.is_some(), self.stands_by()) {
            // Its own guest is on probation.
            (true, false) => Condition::Well,
            (true, true) => Condition::But(format!("{what}, which is being swapped in")),
            (false, _) => Condition::Unfit(format!("{what}; name the same GUEST.wasm for both, or swap it in")),
        }
    }

    /// Records for standbys which guest serves.
    pub fn record(&self) {
        source::record(&self.data, &self.identity());
    }

    fn identity(&self) -> Identity {
        let guest = self.serving().guest;
        Identity::of(guest.source(), guest.digest())
    }

    /// Whether another process writes the log, so that there are no writes here to compare.
    pub fn stands_by(&self) -> bool {
        self.log.read_only().is_some()
    }

    /// The guest that serves, the swap in progress, and how the last one ended.
    pub fn status(&self) -> Value {
        let serving = self.serving();
        let status = self.lock();
        let shadow = status.shadow.as_ref().map(|report| report.json(self.shards.memory_bytes().sum()));
        let in_progress = status.phase.as_ref().map(|phase| {
            let seconds = self.clock().elapsed(phase.begun).as_secs_f64();
            json!({
                "phase": phase.name,
                "seconds": seconds,
                "entries": phase.entries,
                "sequence": phase.sequence.to_string(),
                "newest": self.log.appended().to_string(),
                "entries_per_second": (phase.entries as f64 / seconds).round(),
                "shadow": shadow,
            })
        });
        let down = self.shards.outages().map(|(number, outage)| {
            let since = humantime::format_rfc3339_seconds(outage.since).to_string();
            json!({ "shard": number, "since": since, "reason": outage.reason })
        });
        let spares = self.shards.spares().map(|(number, spare)| {
            let sequence = spare.sequence().to_string();
            json!({ "shard": number, "sequence": sequence, "lack": spare.lack() })
        });
        json!({
            "name": serving.description.name,
            "version": serving.description.version,
            "sha256": serving.guest.digest().to_string(),
            "source": serving.guest.source().to_string(),
            "since": status.since,
            "probation_seconds": self.probation.as_secs_f64(),
            "shards": self.shards.memory_bytes().map(|bytes| json!({ "memory_bytes": bytes })).collect::<Vec<_>>(),
            "swap": in_progress,
            "last_swap": status.last,
            "last_trap": self.shards.last_trap().map(|trap| json!({ "at": trap.at, "reason": trap.reason })),
            "spares": spares.collect::<Vec<_>>(),
            "shards_down": down.collect::<Vec<_>>(),
        })
    }

    /// Swaps the guest for `component`, which came from `source`. Runs to its end whether or not anybody waits for it.
    pub async fn swap(
        self: &Arc<Self>,
        source: Source,
        component: Vec<u8>,
        steps: Steps,
        actor: Actor,
    ) -> Result<Outcome, SwapError> {
        let me = Arc::clone(self);
        let (done, outcome) = oneshot::channel();
        self.tasks.detach("guest swap", async move {
            let (action, digest) = (steps.action(), Digest::of(&component));
            let outcome = me.swap_alone(source, component, steps).await;
            match &outcome {
                Ok(_) => audit::log(&actor, action, digest, "success"),
                Err(error) => audit::log(&actor, action, digest, trap::without_printed(&error.to_string())),
            }
            // The client may have left.
            let _ = done.send(outcome);
        });
        outcome.await.unwrap_or_else(|_| Err(SwapError::Failed(anyhow!("the swap ended half-way"))))
    }

    /// Allows no swap until the guard is dropped. None while there is one.
    pub fn hold(&self) -> Option<OwnedMutexGuard<()>> {
        Arc::clone(&self.swapping).try_lock_owned().ok()
    }

    /// Ends shadow traffic, so that the same guest continues to serve, or the probation of the guest, so that the previous one
    /// serves again. None when there is neither.
    pub fn roll_back(&self) -> Option<Ended> {
        let shadow = self.lock().shadow.take();
        match shadow {
            Some(report) => {
                report.stop();
                Some(Ended::Shadow)
            }
            None => self.shards.roll_back().then_some(Ended::Probation),
        }
    }

    async fn swap_alone(
        self: &Arc<Self>,
        source: Source,
        component: Vec<u8>,
        steps: Steps,
    ) -> Result<Outcome, SwapError> {
        let Ok(_alone) = self.swapping.try_lock() else { return Err(SwapError::Busy) };
        let steps = async {
            // In memory beside the guest that serves is the new one, and no spares.
            let _no_spares = self.shards.without_spares().await;
            self.steps(source, component, steps).await
        };
        let steps = self.tasks.caught("guest swap", steps);
        let outcome = steps.await.unwrap_or_else(|panic| Err(SwapError::Failed(panic)));
        self.ended(&outcome);
        outcome
    }

    async fn steps(self: &Arc<Self>, source: Source, component: Vec<u8>, steps: Steps) -> Result<Outcome, SwapError> {
        self.phase("compiling");
        let component = Arc::new(component);
        let (me, from, bytes) = (Arc::clone(self), source.clone(), Arc::clone(&component));
        let guest = blocking(move || me.engine.compile(from, &bytes).map_err(SwapError::Unfit)).await?;
        let guest = Arc::new(guest);

        let me = Arc::clone(self);
        let replaying = Arc::clone(&guest);
        let (mut replicas, replayed) = blocking(move || me.replay(&replaying)).await?;
        let description = replicas[0].instance.description();
        let mut outcome = Outcome {
            guest: description.name.clone(),
            version: description.version.clone(),
            digest: guest.digest().to_string(),
            replayed,
            memory_bytes: replicas.iter().map(|replica| replica.instance.memory_bytes()).sum(),
            pause: None,
            shadow: None,
        };
        if let Some(plan) = steps.shadow {
            outcome.shadow = Some(self.shadow(&guest, replicas, plan, steps.dry_run).await?);
            if steps.dry_run {
                return Ok(outcome);
            }
            // An instance that was given requests never serves.
            let (me, replaying) = (Arc::clone(self), Arc::clone(&guest));
            (replicas, outcome.replayed) = blocking(move || me.replay(&replaying)).await?;
        }
        if steps.dry_run {
            // Memory is given back in its own time.
            task::spawn_blocking(move || drop(replicas));
            return Ok(outcome);
        }

        self.phase("switching");
        let switched = self.shards.switch(guest, replicas).await.map_err(blame)?;
        let Switched { pause, mut alarm, before } = switched;
        outcome.pause = Some(pause);
        self.lock().since = self.clock().unix_ms();
        info!(guest = outcome.guest, version = outcome.version, ?pause, "another guest serves, on probation");

        self.phase("probation");
        let mut raised = timeout(self.probation, &mut alarm).await.ok();
        if raised.is_none() && !self.shards.end_probation() {
            // It trapped in the last moment.
            raised = Some(alarm.await);
        }
        if let Some(raised) = raised {
            let Raised { reason, turn } =
                raised.context("the end of the probation was not observed").map_err(SwapError::Failed)?;
            self.shards.restore(before, turn).await.map_err(SwapError::Failed)?;
            self.lock().since = self.clock().unix_ms();
            return Err(SwapError::RolledBack { guest: outcome.guest, reason });
        }
        // Memory is given back in its own time.
        task::spawn_blocking(move || drop(before));
        let (me, guest) = (Arc::clone(self), self.serving().guest);
        blocking(move || {
            me.engine.keep(&guest);
            Ok(())
        })
        .await?;
        if self.follows_primary() {
            return Ok(outcome);
        }
        // A file that was named at the start is named again at the next.
        let remembered = match &source {
            Source::Sent => source::remember(&self.data, Some(&component)),
            Source::BuiltIn => source::remember(&self.data, None),
            Source::File(_) | Source::Remembered(_) => Ok(()),
        };
        // After the file: a standby that reads the record looks for the guest.
        self.record();
        remembered.context("it serves now, but could not be kept for the next start").map_err(SwapError::Failed)?;
        Ok(outcome)
    }

    /// Compares the guest with the one that serves, and returns the report.
    async fn shadow(
        &self,
        guest: &Arc<Guest>,
        replicas: Vec<Replica>,
        plan: Plan,
        dry_run: bool,
    ) -> Result<Value, SwapError> {
        self.phase("shadow");
        let report = Arc::new(Report::new(plan, !dry_run));
        self.lock().shadow = Some(Arc::clone(&report));
        let ended = shadow::run(&self.shards, &self.log, (self.shards.routers_of(guest), replicas), &report).await;
        let on_request = self.lock().shadow.take().is_none();
        ended.map_err(blame)?;
        let shown = report.json(self.shards.memory_bytes().sum());
        let reason = match on_request {
            true => "shadow traffic was ended on request, the same guest serves".to_owned(),
            false if !dry_run && report.is_exceeded() => report.verdict(),
            false => return Ok(shown),
        };
        Err(SwapError::Shadow { reason, report: shown })
    }

    /// Builds its instances from the log, up to the last few entries.
    fn replay(&self, guest: &Guest) -> Result<(Vec<Replica>, Replayed), SwapError> {
        self.phase("replaying");
        let started = self.clock().now();
        let mut replicas = self.shards.replicas(guest).map_err(SwapError::Unfit)?;
        if !self.catch_up(&mut replicas).map_err(blame)? {
            return Err(SwapError::Unfit(anyhow!("it takes in the log more slowly than the log grows")));
        }
        let replayed = replica::replayed_by_all(&mut replicas, started).map_err(SwapError::Unfit)?;
        Ok((replicas, replayed))
    }

    /// False when it does not get there.
    fn catch_up(&self, replicas: &mut [Replica]) -> Result<bool> {
        let progress = |entries, sequence| {
            if let Some(phase) = &mut self.lock().phase {
                (phase.entries, phase.sequence) = (phase.entries + entries, phase.sequence.max(sequence));
            }
            Ok(())
        };
        for _ in 0..ROUNDS {
            if replica::catch_up_all(replicas, &progress)? < FEW {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn phase(&self, name: &'static str) {
        self.lock().phase = Some(Phase { name, begun: self.clock().now(), entries: 0, sequence: 0 });
    }

    fn ended(&self, outcome: &Result<Outcome, SwapError>) {
        let metrics = self.shards.metrics();
        match outcome {
            Ok(Outcome { pause: Some(_), .. }) => metrics.swaps.add(1),
            Ok(_) => {}
            Err(SwapError::RolledBack { .. }) => metrics.swaps_rolled_back.add(1),
            Err(_) => metrics.swaps_refused.add(1),
        }
        let last = match outcome {
            Ok(Outcome { guest, version, replayed, pause, shadow, .. }) => {
                let what = if pause.is_some() { "the guest was swapped" } else { "the guest could be swapped" };
                info!(guest, version, entries = replayed.entries, keys = replayed.keys, took = ?replayed.took, "{what}");
                let at = self.clock().unix_ms();
                json!({ "at": at, "guest": guest, "version": version, "outcome": what, "shadow": shadow })
            }
            Err(error) => {
                warn!("the guest was not swapped: {error}");
                let shadow = if let SwapError::Shadow { report, .. } = error { report } else { &Value::Null };
                let (at, what) = (self.clock().unix_ms(), "the guest was not swapped");
                json!({ "at": at, "outcome": what, "reason": error.to_string(), "shadow": shadow })
            }
        };
        let mut status = self.lock();
        status.phase = None;
        // Left behind by a panic.
        status.shadow = None;
        status.last = last;
    }

    fn clock(&self) -> &Clock {
        &self.shards.env().clock
    }

    fn lock(&self) -> MutexGuard<'_, Status> {
        // Every change under this lock is whole.
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whose fault it is that the new guest does not have the log.
fn blame(error: anyhow::Error) -> SwapError {
    if error.is::<Trapped>() { SwapError::Unfit(error) } else { SwapError::Failed(error) }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SwapError> + Send + 'static,
) -> Result<T, SwapError> {
    let done = task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| Err(SwapError::Failed(anyhow!(panic))))
}
