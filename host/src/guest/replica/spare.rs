//! A hot spare: a replica of the guest that serves, which follows it, so that a trap costs no replay.
//!
//! It follows the log, which every replica reads to catch up anyway, and not the change feed: that would copy each write
//! under a lock of all appends, and need a bound and a way out when it is passed. The end of the log is in the system's
//! memory, and a spare that is one pass behind lacks some thousand entries at most.
//!
//! Owns: when a spare is built, how closely it follows, and why there is none. Must never know: what serves, or what a spare
//! is promoted for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use kvs_runtime::Clock;
use kvs_txlog::{Closed, TransactionLog};
use tokio::sync::{Notify, OwnedMutexGuard, watch};
use tokio::task;
use tracing::{info, warn};

use super::super::engine::Guest;
use super::super::metrics::Metrics;
use super::super::owner::Part;
use super::{Replica, is_lost, unobserved};

/// Shortest and longest pause between two passes over what is new in the log: each begins up to 1 MiB before that.
const PAUSE: Duration = Duration::from_millis(25);
const LONGEST: Duration = Duration::from_millis(100);
/// Between these, a pause is this many times as long as the pass before it, so that the spares of many shards take little
/// time from requests. No longer, or one that is far behind would fall behind ever further.
const IDLE: u32 = 10;
/// The pauses before builds that follow on failures: doubled from the first to the last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

pub struct Spare {
    part: Part,
    /// Locked while it is built and while it follows: a promotion waits for that, which takes less time than a replay that
    /// begins now.
    slot: Arc<tokio::sync::Mutex<Option<Replica>>>,
    /// Whether there is one that follows.
    is_ready: watch::Sender<bool>,
    /// The sequence up to which it does.
    sequence: AtomicU64,
    taken: Notify,
    /// Why the last one failed, while there is no other.
    failure: Mutex<Option<String>>,
}

/// What a spare is built and followed with.
pub struct Surroundings<'s> {
    pub log: &'s Arc<dyn TransactionLog>,
    pub clock: &'s Clock,
    pub metrics: &'s Metrics,
    /// Held by the one that is built: of all shards, one at a time.
    pub building: &'s tokio::sync::Mutex<()>,
}

impl Spare {
    pub fn new(part: Part) -> Self {
        Self {
            part,
            slot: Arc::default(),
            is_ready: watch::Sender::default(),
            sequence: AtomicU64::default(),
            taken: Notify::new(),
            failure: Mutex::default(),
        }
    }

    /// Whether there is one that follows.
    pub fn is_ready(&self) -> bool {
        *self.is_ready.borrow()
    }

    /// Waits until there is one that follows.
    pub async fn ready(&self) {
        // What it waits for cannot be gone before it.
        let _ = self.is_ready.subscribe().wait_for(|is_ready| *is_ready).await;
    }

    /// The sequence up to which it has the log.
    pub fn sequence(&self) -> u64 {
        self.sequence.load(Ordering::Relaxed)
    }

    /// Why there is none; none when there is.
    pub fn lack(&self) -> Option<String> {
        let failure = || self.failure().clone().unwrap_or_else(|| "it is built from the log".to_owned());
        (!self.is_ready()).then(failure)
    }

    /// Takes it out. Waits until the one that is being built is there.
    pub async fn take(&self) -> Option<Replica> {
        let spare = self.slot.lock().await.take();
        self.is_ready.send_replace(false);
        if spare.is_some() {
            self.taken.notify_one();
        }
        spare
    }

    /// Ends the pause after one that failed: another guest is to serve.
    pub fn wake(&self) {
        self.taken.notify_one();
    }

    /// Sees to it that there is one, of the guest that `serving` returns, until the log fails. None is kept while that is an
    /// error.
    pub async fn keep(&self, with: Surroundings<'_>, serving: impl Fn() -> Result<Arc<Guest>>) -> Result<()> {
        let mut pause = Duration::ZERO;
        loop {
            let (built, took) = self.build(&with, &serving).await;
            // It may have read the whole log, and a swap has waited for it.
            let least = if built.is_err() { IDLE * took } else { Duration::ZERO };
            let begun = with.clock.now();
            let followed = match built {
                Ok(()) => self.follow(&with, &serving).await,
                Err(error) => Err(error),
            };
            match followed {
                Ok(End::LogFailed) => return Ok(()),
                // The one that was taken serves first.
                Ok(End::Taken) => pause = PAUSE,
                Err(error) if error.is::<Closed>() => return Ok(()),
                Err(error) => {
                    self.failed(&error, with.metrics);
                    // One that followed for long failed for another reason than the one before.
                    let is_new = with.clock.elapsed(begun) > 2 * PAUSES.1;
                    pause = if is_new { PAUSES.0 } else { (2 * pause).clamp(PAUSES.0, PAUSES.1) };
                }
            }
            tokio::select! {
                () = with.clock.sleep(pause.max(least)) => {}
                () = self.taken.notified() => {}
            }
        }
    }

    /// Builds one, and returns how long that took.
    async fn build(&self, with: &Surroundings<'_>, serving: impl Fn() -> Result<Arc<Guest>>) -> (Result<()>, Duration) {
        let _alone = with.building.lock().await;
        let slot = Arc::clone(&self.slot).lock_owned().await;
        let begun = with.clock.now();
        let built = self.build_in(slot, with, serving).await;
        (built, with.clock.elapsed(begun))
    }

    async fn build_in(
        &self,
        mut slot: OwnedMutexGuard<Option<Replica>>,
        with: &Surroundings<'_>,
        serving: impl Fn() -> Result<Arc<Guest>>,
    ) -> Result<()> {
        let (guest, log, part) = (serving()?, Arc::clone(with.log), self.part.clone());
        let building = task::spawn_blocking(move || {
            let built = Replica::build(&guest, &log, part, &unobserved).and_then(|(mut replica, replayed)| {
                // What was appended meanwhile is more than a promotion should wait for.
                replica.pass()?;
                Ok((slot.insert(replica).sequence, replayed))
            });
            (slot, built)
        });
        let (slot, built) = building.await?;
        let (sequence, replayed) = built?;
        self.sequence.store(sequence, Ordering::Relaxed);
        self.is_ready.send_replace(true);
        *self.failure() = None;
        drop(slot);
        with.metrics.spares_built.add(1);
        info!(shard = self.part.label(), entries = replayed.entries, took = ?replayed.took, "a spare is ready");
        Ok(())
    }

    /// Lets it take in what becomes durable. An error is why there is none any more.
    async fn follow(&self, with: &Surroundings<'_>, serving: impl Fn() -> Result<Arc<Guest>>) -> Result<End> {
        loop {
            tokio::select! {
                reached = with.log.watermark().reached(self.sequence() + 1) => if reached.is_err() {
                    return Ok(End::LogFailed);
                },
                () = self.taken.notified() => {}
            }
            let begun = with.clock.now();
            let mut slot = Arc::clone(&self.slot).lock_owned().await;
            // The data has grown since it was built.
            if let Err(error) = serving() {
                self.is_ready.send_replace(false);
                task::spawn_blocking(move || drop(slot.take())).await?;
                return Err(error);
            }
            let passing = task::spawn_blocking(move || {
                let passed = slot.as_mut().map(Replica::pass);
                if let Some(Err(error)) = &passed
                    && is_lost(error)
                {
                    *slot = None;
                }
                (slot, passed)
            });
            let (slot, passed) = passing.await?;
            match passed {
                None => return Ok(End::Taken),
                Some(Ok(sequence)) => self.sequence.store(sequence, Ordering::Relaxed),
                Some(Err(error)) if is_lost(&error) => {
                    self.is_ready.send_replace(false);
                    return Err(error);
                }
                // The log's doing, which may pass.
                Some(Err(error)) => {
                    warn!(shard = self.part.label(), "the spare cannot follow: {error:#}");
                    drop(slot);
                    with.clock.sleep(PAUSES.1).await;
                    continue;
                }
            }
            drop(slot);
            with.clock.sleep((IDLE * with.clock.elapsed(begun)).clamp(PAUSE, LONGEST)).await;
        }
    }

    fn failed(&self, error: &anyhow::Error, metrics: &Metrics) {
        let reason = format!("{error:#}");
        metrics.spares_failed.add(1);
        let before = self.failure().replace(reason.clone());
        if before.as_ref() != Some(&reason) {
            warn!(shard = self.part.label(), "a spare failed, and is built again: {reason}");
        }
    }

    fn failure(&self) -> MutexGuard<'_, Option<String>> {
        // Every change under this lock is whole.
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How following ended, but by a failure of the spare.
enum End {
    Taken,
    LogFailed,
}

impl Replica {
    /// Applies the entries that have become durable since, and sorts the keys. Returns the sequence it has reached.
    fn pass(&mut self) -> Result<u64> {
        if self.follow()? > 0 {
            self.instance.stats_after_replay()?;
        }
        Ok(self.sequence)
    }
}
