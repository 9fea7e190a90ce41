//! Shadow traffic: before it serves, another guest is given real requests, and its responses and effects are compared with those
//! of the serving guest. Nobody gets them.
//!
//! Each shard has a queue (`queue`), which its turns fill with all entries and with sampled requests, each with what its call was
//! given and did (`record`). On a thread of its own a replica of the other guest, the candidate, takes them from there
//! (`candidate`): it applies entries, and runs a request when it has exactly the entries that the serving guest had. Its n-th
//! append gets the result of the n-th append of the serving guest, and has no other effect. Equal effects are the same entries in
//! both guests; a candidate with others is built again from the log. Differences (`compare`) are counted and shown (`report`).
//!
//! A candidate is dropped in the end, whatever it did: the replica that is promoted has never been given a request.
//!
//! Owns: which requests are sampled, and from when to when. Must never know: how a guest is called, or what follows from a report.

mod candidate;
pub mod compare;
mod decisions;
mod queue;
mod record;
mod report;

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{fmt, io, mem, thread};

use anyhow::{Context, Result};
use kvs_metrics::{Counter, Histogram, Page};
use kvs_txlog::TransactionLog;
use tokio::task;

use self::candidate::{Candidate, Session};
pub use self::compare::Difference;
pub use self::decisions::{Decision, Decisions};
pub use self::queue::{Loss, Queue};
pub use self::record::{Append, Appends, Inputs, Record, Recorded, Script, Surroundings};
pub use self::report::Report;
use super::fixed;
use super::replica::Replica;
use super::routers::Routers;
use super::shards::Shards;

/// Longest shadow traffic: no other swap begins meanwhile, and there are no spares.
pub const MAX_DURATION: Duration = Duration::from_secs(3_600);

/// Extent of shadow traffic.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub duration: Duration,
    /// Percentage of the requests.
    pub sample: f64,
    /// With more differences the guest does not serve.
    pub max_differences: u64,
}

impl Plan {
    pub const DEFAULT_SAMPLE: f64 = 10.0;
}

/// Sampling of the requests of all shards.
pub struct Shadow {
    /// A request is sampled when its hash is less; 0 when there is no candidate.
    threshold: AtomicU64,
    requests: AtomicU64,
    decisions: Arc<Decisions>,
    metrics: Arc<Metrics>,
}

struct Metrics {
    compared: Counter,
    different: Counter,
    dropped: Counter,
    rebuilds: Counter,
    calls: Histogram,
}

impl Default for Shadow {
    fn default() -> Self {
        let metrics = Metrics {
            compared: Counter::default(),
            different: Counter::default(),
            dropped: Counter::default(),
            rebuilds: Counter::default(),
            calls: Histogram::of_short_times(),
        };
        let (threshold, requests) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { threshold, requests, decisions: Arc::default(), metrics: Arc::new(metrics) }
    }
}

impl Shadow {
    /// Whether the next request is sampled. Any pattern of requests is sampled evenly.
    pub fn samples(&self) -> bool {
        let threshold = self.threshold.load(Ordering::Relaxed);
        threshold > 0 && fixed::nth(self.requests.fetch_add(1, Ordering::Relaxed)) <= threshold
    }

    /// Decisions of routers about sampled requests.
    pub fn decisions(&self) -> &Decisions {
        &self.decisions
    }

    fn sample(&self, percent: f64) {
        self.threshold.store((percent / 100.0 * u64::MAX as f64) as u64, Ordering::Relaxed);
    }

    pub fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let Metrics { compared, different, dropped, rebuilds, calls } = &*self.metrics;
        page.counter("shadow_compared", "Requests of shadow traffic that were compared", compared.get())?;
        page.counter("shadow_different", "Of these, requests that differed", different.get())?;
        page.counter("shadow_dropped", "Requests of shadow traffic that were not compared", dropped.get())?;
        let help = "Instances of a candidate that were built again, after an effect that differed or a trap";
        page.counter("shadow_rebuilds", help, rebuilds.get())?;
        page.histogram("shadow_call_duration_seconds", "Time of a request in the candidate", calls)
    }
}

/// The queues of all shards, while they are filled.
struct Taps<'s> {
    shards: &'s Shards,
    report: &'s Report,
}

impl Drop for Taps<'_> {
    fn drop(&mut self) {
        self.report.stop();
        self.shards.shadow().sample(0.0);
        self.shards.each().iter().for_each(|shard| shard.set_tap(None));
        self.shards.shadow().decisions.clear();
    }
}

/// Ends the shadow traffic when it is dropped.
struct StopOnDrop<'r>(&'r Report);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Gives the candidates of all shards their shadow traffic, until its time is over or the report is stopped. An error is why their
/// guest cannot follow the log.
pub async fn run(
    shards: &Shards,
    log: &Arc<dyn TransactionLog>,
    (routers, replicas): (Routers, Vec<Replica>),
    report: &Arc<Report>,
) -> Result<()> {
    let (clock, plan) = (&shards.env().clock, report.plan());
    let _taps = Taps { shards, report };
    let mut candidates = Vec::with_capacity(replicas.len());
    for ((number, shard), replica) in shards.each().iter().enumerate().zip(replicas) {
        let queue = Arc::<Queue>::default();
        candidates.push(Candidate::new(replica, Arc::clone(&queue), number));
        // Between two calls: none is recorded in part.
        let turn = shard.visit().await?;
        shard.set_tap(Some(queue));
        turn.serve_others();
    }
    let session = Session {
        routers,
        decisions: Arc::clone(&shards.shadow().decisions),
        log: Arc::clone(log),
        clock: clock.clone(),
        metrics: Arc::clone(&shards.shadow().metrics),
        report: Arc::clone(report),
        end: clock.now() + plan.duration,
    };
    shards.shadow().decisions.clear();
    shards.shadow().sample(plan.sample);
    let mut running = task::spawn_blocking(move || {
        let session = &session;
        let run = |candidate: &mut Candidate| {
            // One of them decides for all, also when it panics.
            let stop = StopOnDrop(&session.report);
            candidate.run(session)?;
            mem::forget(stop);
            Ok(())
        };
        // All at once: what one thread does after another would compare nothing.
        thread::scope(|scope| {
            let stop = StopOnDrop(&session.report);
            let start = |candidate| thread::Builder::new().spawn_scoped(scope, move || run(candidate));
            let started: io::Result<Vec<_>> = candidates.iter_mut().map(start).collect();
            let threads = started.context("no thread for the shadow traffic of each shard")?;
            mem::forget(stop);
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
        })
    });
    tokio::select! {
        ran = &mut running => ran?,
        () = clock.sleep(plan.duration) => {
            shards.shadow().sample(0.0);
            running.await?
        }
    }
}
