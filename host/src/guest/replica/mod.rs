//! A replica: an instance of a guest that has its part of the log up to some entry, and takes in what comes after it.
//!
//! Every instance is one, whatever it is for: built at the start, after a trap or for a swap it takes in the log, as a
//! standby what another process appends, and what serves has appended the rest itself. So each can take the place of
//! another: see the shard's `promotion`.
//!
//! Owns: how far it is in the log, and that it is given its part of it. Must never know: whether it will ever serve.

pub mod spare;

use std::iter;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tracing::{info, warn};

use super::engine::{Guest, SHARDING};
use super::instance::Instance;
use super::owner::{Owners, Part};
use super::trap::Trapped;
use crate::contract::VERSION;
use kvs_runtime::Clock;
use kvs_txlog::change::Change;
use kvs_txlog::{Forgotten, REPLAY_ENTRIES, TransactionLog};

/// Interval of the progress lines of a long replay.
const PROGRESS: Duration = Duration::from_secs(1);

pub struct Replica {
    pub instance: Box<Instance>,
    /// Makes another in place of one that trapped.
    another: Another,
    pace: Pace,
    log: Arc<dyn TransactionLog>,
    part: Part,
    /// It has its part of the log up to here.
    sequence: u64,
    /// How many entries it was given.
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
    /// The batch after which a replay begins again with smaller ones is this many times as large as those: a thousand entries,
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

/// Called with the number of entries that were applied now, and the sequence of the newest. An error stops the replay.
pub type Progress<'p> = dyn Fn(u64, u64) -> Result<()> + Sync + 'p;

impl Replica {
    /// A new instance of the guest, which has nothing of the log yet. What goes wrong here is the guest's doing.
    pub fn new(guest: &Guest, log: &Arc<dyn TransactionLog>, part: Part) -> Result<Self> {
        let another: Another = Box::new(guest.instances(Arc::clone(log), part.clone()));
        let instance = Box::new(another()?);
        let (log, clock) = (Arc::clone(log), guest.env().clock.clone());
        Ok(Self { instance, another, pace: Pace::FULL, log, part, sequence: 0, entries: 0, clock })
    }

    /// A new instance with everything in the log that is durable now, and its own.
    pub fn build(
        guest: &Guest,
        log: &Arc<dyn TransactionLog>,
        part: Part,
        progress: &Progress<'_>,
    ) -> Result<(Self, Replayed)> {
        let started = guest.env().clock.now();
        let mut replica = Self::new(guest, log, part)?;
        replica.catch_up(progress)?;
        let replayed = replica.replayed(started)?;
        Ok((replica, replayed))
    }

    /// Takes in what has become durable since, and returns how many entries that were. An error that is
    /// [`Trapped`](super::instance::Trapped) is the guest's, any other the log's.
    ///
    /// When the guest traps or takes too long, another instance replays the log, with smaller batches from there on: in the
    /// end one entry is named, unless smaller batches are what was needed. When the log was compacted so that it would miss a
    /// delete, another instance replays it too.
    pub fn catch_up(&mut self, progress: &Progress<'_>) -> Result<u64> {
        loop {
            let mut failed = None;
            let error = match self.take_in(progress, &mut failed) {
                Ok(taken) => return Ok(taken),
                Err(error) if error.is::<Forgotten>() => {
                    warn!(shard = self.part.label(), "the log is replayed once more: {error}");
                    self.begin_again()?;
                    continue;
                }
                Err(error) => error,
            };
            let Some((from, entries @ 2..)) = failed else { return Err(error) };
            // Never later: the batches before would be as large as those that failed there.
            self.pace = Pace { from: from.min(self.pace.from), entries: (entries / Pace::SMALLER).max(1) };
            info!(
                shard = self.part.label(),
                "the log is replayed once more, with batches of {} from entry {} on: {error:#}",
                self.pace.entries,
                self.pace.from
            );
            self.begin_again()?;
        }
    }

    /// Replaces the instance by a new one, which has nothing of the log.
    pub fn begin_again(&mut self) -> Result<()> {
        (*self.instance, self.sequence, self.entries) = ((self.another)()?, 0, 0);
        Ok(())
    }

    /// The sequence up to which it has its part of the log.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Takes in the few entries that have become durable since. When the guest traps on them it is of no use any more.
    pub fn follow(&mut self) -> Result<u64> {
        self.take_in(&unobserved, &mut None)
    }

    /// `failed` is the first entry and the size of the batch that the guest did not take in.
    fn take_in(&mut self, progress: &Progress<'_>, failed: &mut Option<(u64, usize)>) -> Result<u64> {
        let Self { instance, pace, log, part, sequence, entries, clock, .. } = self;
        let (before, started) = (*entries, clock.now());
        let mut reported = started;
        let newest = log.appended();
        let until = log.replay(*sequence, &mut |batch| {
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
            // Here, and not at the end: a replay that is cut off continues from here.
            *sequence = last;
            *entries += batch.len() as u64;
            progress(batch.len() as u64, last)?;
            if clock.elapsed(reported) >= PROGRESS {
                reported = clock.now();
                let rate = (*entries - before) as f64 / clock.elapsed(started).as_secs_f64();
                let shard = part.label();
                info!(shard, "replaying: {entries} entries, sequence {last} of {newest}, {rate:.0} entries/s");
            }
            Ok(())
        })?;
        *sequence = until;
        Ok(*entries - before)
    }

    /// Takes in what another process appended, up to `until`. One that was built meanwhile has some of it already.
    pub fn apply_changes(&mut self, changes: &[Change], until: u64) -> Result<()> {
        let is_new = |change: &&Change| change.sequence > self.sequence && self.part.owns(change.key());
        let new: Vec<_> = changes.iter().filter(is_new).collect();
        for some in new.chunks(REPLAY_ENTRIES) {
            let metadata: Vec<_> = some.iter().map(|change| change.metadata()).collect();
            let entries: Vec<_> = some.iter().zip(&metadata).map(|(change, metadata)| change.entry(metadata)).collect();
            self.instance.apply(&entries)?;
        }
        self.appended(until);
        Ok(())
    }

    /// It has everything up to this sequence: of what it was not given, it appended itself all that is its part.
    pub fn appended(&mut self, sequence: u64) {
        self.sequence = self.sequence.max(sequence);
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

/// [`Replica::catch_up`] for each, beside each other: together they took in this many entries.
pub fn catch_up_all(replicas: &mut [Replica], progress: &Progress<'_>) -> Result<u64> {
    in_each(replicas, |replica| replica.catch_up(progress)).into_iter().sum()
}

/// [`Replica::follow`] for each, beside each other. An error after which one of them is lost goes before others.
pub fn follow_all(replicas: &mut [Replica]) -> Result<()> {
    let errors = in_each(replicas, Replica::follow).into_iter().filter_map(Result::err);
    errors.max_by_key(is_lost).map_or(Ok(()), Err)
}

/// Whether an error leaves a replica that cannot follow: the guest trapped, or the log was compacted under it. Any other is the
/// log's, and may pass.
pub fn is_lost(error: &anyhow::Error) -> bool {
    error.is::<Trapped>() || error.is::<Forgotten>()
}

/// The [`Progress`] of a replay that nobody observes.
pub fn unobserved(_: u64, _: u64) -> Result<()> {
    Ok(())
}

/// [`Replica::replayed`] of all.
pub fn replayed_by_all(replicas: &mut [Replica], started: Instant) -> Result<Replayed> {
    let each: Result<Vec<_>> = in_each(replicas, |replica| replica.replayed(started)).into_iter().collect();
    let each = each?;
    let (entries, keys) = (each.iter().map(|one| one.entries).sum(), each.iter().map(|one| one.keys).sum());
    let took = replicas.first().map_or(Duration::ZERO, |first| first.clock.elapsed(started));
    Ok(Replayed { entries, keys, took })
}

/// Does this with each, on as many threads, or as many as there can be.
pub fn in_each<R: Send, T: Send>(all: &mut [R], work: impl Fn(&mut R) -> T + Sync) -> Vec<T> {
    if let [only] = all {
        return vec![work(only)];
    }
    let others = 1..all.len();
    let left = Mutex::new(all.iter_mut().enumerate());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let take_turns = || iter::from_fn(next).map(|(at, one)| (at, work(one))).collect::<Vec<_>>();
    let mut done = thread::scope(|scope| {
        // Without a thread more the others do its share.
        let start = |_| thread::Builder::new().spawn_scoped(scope, take_turns).ok();
        let threads: Vec<_> = others.map_while(start).collect();
        let mut done = take_turns();
        for thread in threads {
            done.extend(thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, done)| done).collect()
}
