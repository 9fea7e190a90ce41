//! An instance that takes in the log: at the start, after a trap, and beside a guest that serves, to take its place.
//!
//! Owns: how far it is in the log, and that it is given its part of it. Must never know: whether it will ever serve.

use std::iter;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tracing::info;

use super::engine::{Guest, SHARDING};
use super::instance::Instance;
use super::owner::{Owners, Part};
use crate::contract::VERSION;
use kvs_runtime::Clock;
use kvs_txlog::{REPLAY_ENTRIES, TransactionLog};

/// How often a long replay tells how far it is.
const PROGRESS: Duration = Duration::from_secs(1);

pub struct Replica {
    pub instance: Box<Instance>,
    /// Makes another in place of one that trapped; none for an instance that has served.
    another: Option<Another>,
    pace: Pace,
    log: Arc<dyn TransactionLog>,
    part: Part,
    entries: u64,
    clock: Clock,
}

type Another = Box<dyn Fn() -> Result<Instance> + Send>;

/// How many entries make a batch from some sequence on; before it, as many as the log hands over.
struct Pace {
    from: u64,
    entries: usize,
}

impl Pace {
    const FULL: Self = Self { from: u64::MAX, entries: REPLAY_ENTRIES };
    /// The batch after which a replay begins again with smaller ones is so many times as large as those: a thousand entries,
    /// thirty-one, one.
    const SMALLER: usize = 32;
}

/// How a guest came by its state.
#[derive(Clone, Copy, Debug)]
pub struct Replayed {
    pub entries: u64,
    /// Keys it holds after it.
    pub keys: u64,
    pub took: Duration,
}

/// Hears how many entries were taken in now, and of the sequence of the newest.
pub type Progress<'p> = dyn Fn(u64, u64) + Sync + 'p;

impl Replica {
    /// A new instance of the guest, which has nothing of the log yet. What goes wrong here is the guest's doing.
    pub fn new(guest: &Guest, log: &Arc<dyn TransactionLog>, part: Part) -> Result<Self> {
        let another: Another = Box::new(guest.instances(Arc::clone(log), part.clone()));
        let instance = Box::new(another()?);
        let (another, log, clock) = (Some(another), Arc::clone(log), guest.env().clock.clone());
        Ok(Self { instance, another, pace: Pace::FULL, log, part, entries: 0, clock })
    }

    /// A new instance with everything in the log that is durable now, and its own.
    pub fn build(guest: &Guest, log: &Arc<dyn TransactionLog>, part: Part) -> Result<(Self, Replayed)> {
        let started = guest.env().clock.now();
        let mut replica = Self::new(guest, log, part)?;
        replica.catch_up(&|_, _| {})?;
        let replayed = replica.replayed(started)?;
        Ok((replica, replayed))
    }

    /// An instance that has served, and has everything up to `sequence`.
    pub fn served(
        mut instance: Box<Instance>,
        log: Arc<dyn TransactionLog>,
        part: Part,
        sequence: u64,
        clock: Clock,
    ) -> Self {
        instance.sequence = instance.sequence.max(sequence);
        Self { instance, another: None, pace: Pace::FULL, log, part, entries: 0, clock }
    }

    /// Takes in what has become durable since, and returns how many entries that were. An error that is
    /// [`Trapped`](super::instance::Trapped) is the guest's, any other the log's.
    ///
    /// When the guest traps or takes too long, another instance replays the log, with smaller batches from there on: in the
    /// end one entry is named, unless smaller batches are what was needed.
    pub fn catch_up(&mut self, progress: &Progress<'_>) -> Result<u64> {
        loop {
            let mut failed = None;
            let error = match self.catch_up_once(progress, &mut failed) {
                Ok(taken) => return Ok(taken),
                Err(error) => error,
            };
            let (Some((from, entries @ 2..)), Some(another)) = (failed, &self.another) else { return Err(error) };
            self.pace = Pace { from, entries: (entries / Pace::SMALLER).max(1) };
            info!(
                shard = self.part.told(),
                "the log is replayed once more, with batches of {} from entry {from} on: {error:#}", self.pace.entries
            );
            (*self.instance, self.entries) = (another()?, 0);
        }
    }

    /// `failed` is the first entry and the size of the batch that the guest did not take in.
    fn catch_up_once(&mut self, progress: &Progress<'_>, failed: &mut Option<(u64, usize)>) -> Result<u64> {
        let Self { instance, pace, log, part, entries, clock, .. } = self;
        let (before, started) = (*entries, clock.now());
        let mut told = started;
        let newest = log.appended();
        let sequence = log.replay(instance.sequence, &mut |batch| {
            let Some(last) = batch.last().map(|last| last.sequence) else { return Ok(()) };
            let own: Vec<_>;
            let batch = if part.is_all() {
                batch
            } else {
                own = batch.iter().filter(|entry| part.owns(entry.event.key())).cloned().collect();
                &own
            };
            let (whole, rest) = batch.split_at(batch.partition_point(|entry| entry.sequence < pace.from));
            for some in iter::once(whole).chain(rest.chunks(pace.entries)) {
                instance
                    .apply(some)
                    .inspect_err(|_| *failed = some.first().map(|first| (first.sequence, some.len())))?;
            }
            *entries += batch.len() as u64;
            progress(batch.len() as u64, last);
            if clock.elapsed(told) >= PROGRESS {
                told = clock.now();
                let rate = (*entries - before) as f64 / clock.elapsed(started).as_secs_f64();
                let shard = part.told();
                info!(shard, "replaying: {entries} entries, sequence {last} of {newest}, {rate:.0} entries/s");
            }
            Ok(())
        })?;
        instance.sequence = sequence;
        Ok(*entries - before)
    }

    /// What it took in, and how long that took when it began at `started`.
    pub fn replayed(&mut self, started: Instant) -> Result<Replayed> {
        let keys = self.instance.stats_after_replay().context("stats failed")?.keys;
        Ok(Replayed { entries: self.entries, keys, took: self.clock.elapsed(started) })
    }
}

/// New instances of the guest, one for each part, which have nothing of the log yet.
pub fn new_of_all(guest: &Guest, log: &Arc<dyn TransactionLog>, owners: &Owners) -> Result<Vec<Replica>> {
    let shards = owners.count();
    ensure!(
        shards == 1 || guest.is_sharded(),
        "it does not export {SHARDING}@{VERSION}, so it runs in one shard, and this server has {shards} (--shards)"
    );
    owners.parts().map(|part| Replica::new(guest, log, part)).collect()
}

/// [`Replica::catch_up`] for each, beside each other: together they took in so many entries.
pub fn catch_up_all(replicas: &mut [Replica], progress: &Progress<'_>) -> Result<u64> {
    in_each(replicas, |replica| replica.catch_up(progress)).into_iter().sum()
}

/// [`Replica::replayed`] of all.
pub fn replayed_by_all(replicas: &mut [Replica], started: Instant) -> Result<Replayed> {
    let each: Result<Vec<_>> = in_each(replicas, |replica| replica.replayed(started)).into_iter().collect();
    let each = each?;
    let (entries, keys) = (each.iter().map(|one| one.entries).sum(), each.iter().map(|one| one.keys).sum());
    let took = replicas.first().map_or(Duration::ZERO, |first| first.clock.elapsed(started));
    Ok(Replayed { entries, keys, took })
}

/// Does this with each, on as many threads.
fn in_each<T: Send>(replicas: &mut [Replica], work: impl Fn(&mut Replica) -> T + Sync) -> Vec<T> {
    if let [only] = replicas {
        return vec![work(only)];
    }
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = replicas.iter_mut().map(|replica| scope.spawn(move || work(replica))).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, T>| thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        threads.into_iter().map(join).collect()
    })
}
