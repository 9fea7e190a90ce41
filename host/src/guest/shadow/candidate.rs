//! The candidate in one shard: a replica that is given the entries and the sampled requests of its queue.
//!
//! Owns: that it runs a request when it has exactly the entries before it. Must never know: who asked for it, or whether its
//! guest will serve.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use kvs_runtime::Clock;
use kvs_txlog::TransactionLog;
use tracing::{debug, warn};

use super::Metrics;
use super::compare::{self, Difference};
use super::decisions::Decisions;
use super::queue::{Item, Loss, Queue, Sample};
use super::record::Append;
use super::report::Report;
use crate::guest::Incoming;
use crate::guest::replica::Replica;
use crate::guest::routers::Routers;
use crate::guest::trap;

/// Pause before the next look at an empty queue: calls of the serving guest wake nobody.
const PAUSE: Duration = Duration::from_millis(10);
/// Time in which what was sampled before the end is still compared.
const DRAIN: Duration = Duration::from_secs(5);
/// Pause before it is built again, in times that this took: a candidate that traps on every request must not replay a large log
/// all the time.
const REBUILD_PAUSE: u32 = 4;

pub struct Candidate {
    /// Never promoted: what it appended was appended by another, and what else it did is nowhere in the log.
    replica: Replica,
    queue: Arc<Queue>,
    shard: usize,
    /// It may have entries that the log does not have, and is to be built again.
    is_spent: bool,
    /// Earliest time of the next rebuild.
    rebuild_from: Option<Instant>,
}

/// Shadow traffic of one candidate guest: what its instances in all shards share.
pub struct Session {
    /// Routers of the candidate.
    pub routers: Routers,
    pub decisions: Arc<Decisions>,
    pub log: Arc<dyn TransactionLog>,
    pub clock: Clock,
    pub metrics: Arc<Metrics>,
    pub report: Arc<Report>,
    pub end: Instant,
}

impl Session {
    /// Whether it is stopped, or so much time has passed since its end.
    fn is_over(&self, rest: Duration) -> bool {
        self.report.is_stopped() || self.clock.now() >= self.end + rest
    }

    /// An error when it is over, to cut short what takes long.
    fn check(&self) -> Result<()> {
        ensure!(!self.is_over(Duration::ZERO), Over);
        Ok(())
    }

    fn compared(&self, incoming: &Incoming, took: (Duration, Duration), difference: Option<Difference>) {
        self.metrics.compared.add(1);
        self.metrics.different.add(u64::from(difference.is_some()));
        self.report.compared(incoming, took, difference);
    }

    fn add_dropped(&self, count: u64) {
        self.metrics.dropped.add(count);
        self.report.dropped(count);
    }
}

/// The shadow traffic is over.
#[derive(Debug, thiserror::Error)]
#[error("the shadow traffic is over")]
struct Over;

/// The instance has other entries than the log.
struct Spent;

impl Candidate {
    pub fn new(replica: Replica, queue: Arc<Queue>, shard: usize) -> Self {
        Self { replica, queue, shard, is_spent: false, rebuild_from: None }
    }

    /// Compares until the end. An error is why its guest cannot follow the log at all.
    pub fn run(&mut self, with: &Session) -> Result<()> {
        while !with.is_over(Duration::ZERO) {
            match self.get_in_step(with) {
                Ok(()) => self.compare_all(with),
                Err(error) if error.is::<Over>() => break,
                Err(error) => return Err(error),
            }
        }
        self.queue.close();
        self.count_dropped(with);
        Ok(())
    }

    /// Has it apply the log up to where the queue begins.
    fn get_in_step(&mut self, with: &Session) -> Result<()> {
        // Entries that it took from the queue earlier can have been abandoned since.
        let is_abandoned = !self.is_spent && self.queue.open() == Some(Loss::Abandoned);
        self.is_spent |= is_abandoned;
        if self.is_spent {
            while self.rebuild_from.is_some_and(|from| with.clock.now() < from) {
                with.check()?;
                with.clock.pause(PAUSE);
            }
            let begun = with.clock.now();
            with.report.rebuilt();
            with.metrics.rebuilds.add(1);
            self.replica.begin_again()?;
            self.replica.catch_up(&|_, _| with.check())?;
            self.rebuild_from = Some(with.clock.now() + REBUILD_PAUSE * with.clock.elapsed(begun));
            // A new instance has durable entries only, which nothing abandons.
            self.queue.open();
            self.is_spent = false;
        }
        self.count_dropped(with);
        // Entries after these are in the queue: it was open when they were appended.
        let end = with.log.appended();
        loop {
            self.replica.catch_up(&|_, _| with.check())?;
            if self.replica.sequence() >= end {
                return Ok(());
            }
            with.check()?;
            with.clock.pause(PAUSE);
        }
    }

    /// Compares what is in the queue, until the queue lacks entries or the candidate is spent.
    fn compare_all(&mut self, with: &Session) {
        loop {
            let items = match self.queue.take() {
                Ok(items) => items,
                Err(loss) => {
                    debug!(?loss, "the queue of the candidate lacks entries");
                    self.is_spent |= loss == Loss::Abandoned;
                    return;
                }
            };
            // Decisions belong to no shard: the candidate that gets here first compares them.
            let (compared, different, dropped) = with.decisions.compare(&with.routers, &with.report);
            with.metrics.compared.add(compared);
            with.metrics.different.add(different);
            with.add_dropped(dropped);
            if items.is_empty() {
                if with.is_over(Duration::ZERO) {
                    return;
                }
                with.clock.pause(PAUSE);
                continue;
            }
            let begun = with.clock.now();
            let mut items = items.into_iter();
            while let Some(item) = items.next() {
                if self.take_in(item, with).is_err() {
                    self.is_spent = true;
                }
                if self.is_spent || with.is_over(DRAIN) {
                    self.queue.lose(Loss::InLog);
                    self.queue.add_dropped(items.filter(|item| item.sample.is_some()).count());
                    break;
                }
            }
            with.report.busy(with.clock.elapsed(begun));
            with.report.set_memory(self.shard, self.replica.instance.memory_bytes() as u64);
            self.count_dropped(with);
            if self.is_spent {
                return;
            }
        }
    }

    fn take_in(&mut self, mut item: Item, with: &Session) -> Result<(), Spent> {
        // Otherwise it has entries already that the serving guest did not have.
        if let Some(sample) = item.sample.take_if(|sample| sample.before >= self.replica.sequence()) {
            if sample.incoming.key_prefix.is_none() || self.replica.instance.enforces_key_prefix() {
                return self.compare(*sample, item.time, item.appends, with);
            }
            let rejected = "403: the component does not enforce key prefixes".to_owned();
            let difference = Difference::new("key prefix", format!("status {}", sample.response.status), rejected);
            with.compared(&sample.incoming, (sample.took, Duration::ZERO), Some(difference));
        }
        self.queue.add_dropped(usize::from(item.sample.is_some()));
        let changes = item.changes();
        let until = changes.last().map_or(0, |change| change.sequence);
        // A new instance names the entry, or can apply it.
        self.replica.apply_changes(&changes, until).map_err(|error| {
            warn!("the candidate is built again: {error:#}");
            Spent
        })
    }

    fn compare(&mut self, sample: Sample, time: u64, appends: Vec<Append>, with: &Session) -> Result<(), Spent> {
        let Sample { incoming, given, response, asked, took, .. } = sample;
        let begun = with.clock.now();
        let called = self.replica.instance.handle_scripted(&incoming, time, appends, given);
        let took = (took, with.clock.elapsed(begun));
        with.metrics.calls.observe_time(took.1);
        let mut is_spent = false;
        let difference = match called {
            Err(trapped) => {
                is_spent = true;
                let trap = trap::without_printed(&trapped.to_string()).to_owned();
                Some(Difference::new("trap", format!("status {}", response.status), trap))
            }
            Ok(called) => match called.appends {
                Err(difference) => {
                    is_spent = true;
                    Some(difference)
                }
                Ok(sequence) => {
                    self.replica.appended(sequence.unwrap_or_default());
                    compare::responses(&response, &called.response).or_else(|| compare::asked(asked, called.asked))
                }
            },
        };
        with.compared(&incoming, took, difference);
        if is_spent { Err(Spent) } else { Ok(()) }
    }

    fn count_dropped(&self, with: &Session) {
        with.add_dropped(self.queue.dropped());
    }
}
