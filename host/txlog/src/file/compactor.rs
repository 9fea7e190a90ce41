//! The compactor: schedules compaction, throttles its disk I/O, and stalls the writer when the log grows too fast.
//!
//! The amount of garbage is not known without reading the log, but estimated: since the last run, whose result is known,
//! each put can have superseded about its own size, and each delete the size of a mean entry. A run is due when garbage
//! may have grown to a third of the log. A run that finds none has read as much as was written since the last, so the cost
//! stays in proportion. A delete counts once its segment is sealed, since no run can act on it before.
//!
//! The log is bounded by twice the live entries, plus two segments. Most runs end long before that bound is reached;
//! otherwise each commit waits until the progress of the run matches the growth of the log: see [`Debt`]. In addition, the
//! disk holds the preallocated segment, the rest of the newest segment, and during a run the file that it writes, one
//! segment each.
//!
//! With [`Options::retain`](super::Options::retain), what is retained counts as live until it is old enough.
//!
//! The live bytes are those of the last run, less known deletes and expiries: values that were deleted or overwritten and
//! were far larger than the mean remain until the next run, which is due at the latest when half as much is written.
//! Where an estimate falls below the actual size, the log may grow by half a segment until the run ends. So all files
//! together take at most **twice the data that was live, or retained, at any time since the run before the last, and five and
//! a half segments**. Where the log was not empty when it was opened, this holds from the end of the first run; while compaction
//! fails, the log grows without this bound.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvs_runtime::Clock;

use super::catalog::Segment;
use super::compact::{self, CompactionParams, Outcome};
use super::hang::Cause;
use super::liveness::{MAX_KEYS, TOMBSTONE_GRACE_MS};
use super::output::SyncFailed;
use super::{Damage, Shared};
use crate::Condition;

/// Delay after a segment was sealed, so that segments sealed shortly after it share one run.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// Interval at which an idle log is checked: entries expire although nothing is written.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Idle time per time of work, as long as the run keeps up with the growth of the log.
const IDLE_RATIO: u32 = 3;
/// Longest single pause of a run, so that a shutdown does not wait for it.
const MAX_IDLE: Duration = Duration::from_millis(100);
/// Exponential backoff after a failed run, for instance on a full disk.
const RETRY_BACKOFF: Duration = Duration::from_secs(5);
const MAX_RETRY_BACKOFF: Duration = Duration::from_secs(320);
const MIN_YIELD_PERCENT: u64 = 25;
const NO_LIMIT: u64 = u64::MAX;

pub struct Compactor {
    state: Mutex<State>,
    changed: Condvar,
    /// Size of the log on disk above which the writer stalls.
    limit: AtomicU64,
}

#[derive(Default)]
struct State {
    /// The thread is running, and not in backoff after a failure.
    ready: bool,
    stopped: bool,
    /// A segment was sealed since the last check.
    sealed: bool,
    writer_stalled: bool,
    /// None until the first run over a log that was not empty when it was opened.
    estimate: Option<Estimate>,
    /// Set while a run is due or running.
    debt: Option<Debt>,
    /// Why the last run failed.
    failure: Option<String>,
}

/// Estimate of the live bytes, based on the last run.
struct Estimate {
    live: u64,
    mean: u64,
    expiring: [u64; 40],
    /// Newest sequence that the run read.
    last: u64,
    at: Instant,
    /// Number of passes over the log that the run took.
    passes: u64,
    /// Garbage that the last run could not remove, and that does not make the next one due.
    hysteresis: u64,
}

impl Estimate {
    /// Returns a lower bound of the live bytes now.
    fn live(&self, clock: &Clock, sealed: &[Segment]) -> u64 {
        let passed = clock.elapsed(self.at).as_secs();
        let expired: u64 = (0..40).filter(|power| 1 << power <= passed).map(|power| self.expiring[power]).sum();
        // Only deletes in segments sealed since that run: no run can act on the others.
        let deletes: u64 = sealed.iter().filter(|one| one.first > self.last).map(|one| one.deletes).sum();
        let deleted = deletes.saturating_mul(self.mean);
        self.live.saturating_sub(expired).saturating_sub(deleted)
    }
}

/// Compaction debt: the write stall while a run is due or running. The log may grow at once by a quarter of the room left
/// to its bound, and by the rest in proportion to the progress of the run. So it never exceeds the bound, and no commit
/// waits for a whole run, but for a part of it in proportion to the bytes it writes.
#[derive(Clone, Copy, Debug)]
pub struct Debt {
    /// The size of the log when the run became due, and its maximum size when the run ends.
    pub begin: u64,
    pub bound: u64,
    /// Bytes that the run has to read, `u64::MAX` until that is known, and bytes that it has read.
    pub work: u64,
    pub done: u64,
}

impl Debt {
    pub fn new(begin: u64, sealed: u64, live: Option<u64>, segment_bytes: u64) -> Self {
        let bound = match live {
            // However near the bound is: the writer may have continued before this check.
            Some(live) if begin < 2 * (live + segment_bytes) => 2 * (live + segment_bytes),
            // Fewer bytes are live than before.
            Some(_) => begin + segment_bytes / 2,
            // No estimate yet, hence no bound to keep, but the first run must still end.
            None => begin + segment_bytes.max(sealed / 2),
        };
        Self { begin, bound, work: u64::MAX, done: 0 }
    }

    /// Returns the size up to which the log may grow now.
    pub fn limit(&self) -> u64 {
        let room = self.bound - self.begin;
        let earned = u128::from(room - room / 4) * u128::from(self.done.min(self.work)) / u128::from(self.work);
        self.begin + room / 4 + earned as u64
    }
}

impl Default for Compactor {
    fn default() -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), limit: NO_LIMIT.into() }
    }
}

impl Compactor {
    /// Enables scheduling, shortly before the thread starts. The bound holds from now on, however late the thread is.
    pub fn begin_with(&self, shared: &Shared) {
        let at = shared.clock().now();
        let empty = Estimate { live: 0, mean: 0, expiring: [0; 40], last: 0, at, passes: 1, hysteresis: 0 };
        let mut state = self.lock();
        state.estimate = shared.catalog.sealed().is_empty().then_some(empty);
        state.ready = true;
        self.check(&mut state, shared);
    }

    /// Notifies the compactor that a segment was sealed.
    pub fn sealed(&self, shared: &Shared) {
        let mut state = self.lock();
        state.sealed = true;
        self.check(&mut state, shared);
    }

    /// Stalls the writer until the log may grow by `bytes`.
    pub fn stall_if_needed(&self, shared: &Shared, bytes: u64) {
        let exceeds_limit = || {
            let limit = self.limit.load(Ordering::Acquire);
            limit != NO_LIMIT && shared.catalog.bytes() + bytes > limit
        };
        if !exceeds_limit() {
            return;
        }
        shared.hangs.begin(shared.clock(), Cause::Compaction);
        let mut state = self.lock();
        while exceeds_limit() {
            state.writer_stalled = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.writer_stalled = false;
        shared.hangs.begin(shared.clock(), Cause::Disk);
    }

    /// Returns the estimated bytes of garbage.
    pub fn garbage(&self, shared: &Shared) -> u64 {
        let state = self.lock();
        let sealed = shared.catalog.sealed();
        let live = state.estimate.as_ref().map(|estimate| estimate.live(shared.clock(), &sealed));
        live.map_or(0, |live| size(&sealed).saturating_sub(live))
    }

    /// Returns a degraded condition while the log exceeds its bound because the last run failed.
    pub fn condition(&self) -> Condition {
        let failure = self.lock().failure.clone();
        failure.map_or(Condition::Well, |reason| {
            Condition::But(format!("compaction fails and the log keeps growing: {reason}"))
        })
    }

    pub fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        self.clear_debt(&mut state);
    }

    /// Makes a run due if there is enough garbage.
    fn check(&self, state: &mut State, shared: &Shared) {
        if state.ready && !state.stopped && state.debt.is_none() {
            let sealed = shared.catalog.sealed();
            let live = state.estimate.as_ref().map(|estimate| estimate.live(shared.clock(), &sealed));
            let sealed = size(&sealed);
            let hysteresis = state.estimate.as_ref().map_or(0, |estimate| estimate.hysteresis);
            if live.is_none_or(|live| sealed > live + live / 2 + hysteresis) && sealed > 0 {
                state.debt = Some(Debt::new(shared.catalog.bytes(), sealed, live, shared.segment_bytes));
            }
        }
        self.update_limit(state);
    }

    /// Cancels the scheduled run and lifts the write stall.
    fn clear_debt(&self, state: &mut State) {
        state.debt = None;
        self.update_limit(state);
    }

    fn update_limit(&self, state: &State) {
        self.limit.store(state.debt.map_or(NO_LIMIT, |debt| debt.limit()), Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits until a run is due; returns false at shutdown.
    fn wait_until_due(&self, shared: &Shared) -> bool {
        let mut state = self.lock();
        while !state.stopped && state.debt.is_none() {
            let idle = |state: &mut State| !state.stopped && !std::mem::take(&mut state.sealed);
            state = shared.clock().wait_timeout_while(&self.changed, state, POLL_INTERVAL, idle);
            self.check(&mut state, shared);
        }
        drop(state);
        self.rest(shared, DEBOUNCE)
    }

    /// Waits, unless the writer is stalled; returns false at shutdown.
    fn rest(&self, shared: &Shared, time: Duration) -> bool {
        let resting = |state: &mut State| !state.stopped && !state.writer_stalled;
        !shared.clock().wait_timeout_while(&self.changed, self.lock(), time, resting).stopped
    }

    /// Notes that a run over `sealed` bytes begins.
    fn begin(&self, sealed: u64) {
        let mut state = self.lock();
        let passes = state.estimate.as_ref().map_or(1, |estimate| estimate.passes);
        if let Some(debt) = &mut state.debt {
            // The last pass copies the live entries.
            debt.work = (passes + 1) * sealed;
        }
    }

    /// Notes that the run has read `bytes` more. Returns whether the log is close to its limit.
    fn advance(&self, shared: &Shared, bytes: u64) -> bool {
        let mut state = self.lock();
        let Some(debt) = &mut state.debt else { return false };
        debt.done += bytes;
        let (limit, room) = (debt.limit(), debt.bound - debt.begin);
        self.update_limit(&state);
        shared.catalog.bytes() + room / 8 > limit
    }

    /// Lets the log grow no more.
    #[cfg(test)]
    pub fn stall(&self) {
        let mut state = self.lock();
        state.debt = Some(Debt { begin: 0, bound: 0, work: u64::MAX, done: 0 });
        self.update_limit(&state);
    }

    #[cfg(test)]
    pub fn is_stalled(&self) -> bool {
        self.lock().writer_stalled
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Compaction thread: runs until shutdown.
pub fn run(shared: &Shared) -> anyhow::Result<()> {
    let compactor = &shared.compactor;
    let mut backoff = RETRY_BACKOFF;
    while compactor.wait_until_due(shared) {
        match compact(shared) {
            Ok(estimate) => {
                let mut state = compactor.lock();
                state.estimate = Some(estimate);
                state.debt = None;
                state.failure = None;
                // At once, for segments that were sealed during the run.
                compactor.check(&mut state, shared);
                backoff = RETRY_BACKOFF;
            }
            Err(error) if error.is::<Stopped>() => break,
            Err(error) if error.is::<SyncFailed>() => return Err(error),
            Err(error) => {
                let mut state = compactor.lock();
                state.ready = false;
                state.failure = Some(format!("{error:#}"));
                compactor.clear_debt(&mut state);
                // The store continues to serve from memory; the corrupted files are left to the operator.
                if error.is::<Damage>() {
                    tracing::error!("compaction of the log stopped for good, it is corrupted: {error:#}");
                    break;
                }
                // The log is unchanged, only larger than necessary.
                tracing::warn!("compaction of the log failed, retrying in {backoff:.0?}: {error:#}");
                drop(state);
                if !compactor.rest(shared, backoff) {
                    break;
                }
                backoff = (2 * backoff).min(MAX_RETRY_BACKOFF);
                compactor.lock().ready = true;
            }
        }
    }
    Ok(())
}

/// Compacts all sealed segments, and returns the new estimate.
fn compact(shared: &Shared) -> anyhow::Result<Estimate> {
    let sealed = shared.catalog.sealed();
    let size = size(&sealed);
    let params = CompactionParams {
        now: shared.clock().steady_ms().saturating_sub(TOMBSTONE_GRACE_MS),
        retain_from: shared.retain_from(),
        min_yield_percent: MIN_YIELD_PERCENT,
        keys: MAX_KEYS,
    };
    shared.compactor.begin(size);
    let clock = shared.clock();
    let begun = clock.now();
    let mut throttle = Throttle { shared, since: begun };
    let outcome = compact::run(shared, &sealed, &params, &mut |bytes| throttle.pause(bytes))?;
    let Outcome { live, live_entries, expiring, passes, saved } = outcome;
    shared.metrics.compactions.add(1);
    shared.metrics.reclaimed.add(saved);
    if saved > 0 {
        tracing::info!("compacted the log: saved {saved} bytes in {:.1?}", clock.elapsed(begun));
    }
    let mean = live.checked_div(live_entries).unwrap_or(0);
    // After a low-yield run the next one is due only when the log has grown by an eighth.
    let remaining = size.saturating_sub(saved);
    let hysteresis = (remaining + remaining / 8).saturating_sub(live + live / 2);
    let last = sealed.last().map_or(0, |segment| segment.last);
    Ok(Estimate { live, mean, expiring, last, at: clock.now(), passes, hysteresis })
}

/// Returns the bytes of the files of these segments.
fn size(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| segment.size).sum()
}

#[derive(Debug, thiserror::Error)]
#[error("stopped")]
struct Stopped;

/// Pauses between reads, so that the disk is free for commits, unless the log grows faster than it is compacted.
struct Throttle<'a> {
    shared: &'a Shared,
    since: Instant,
}

impl Throttle<'_> {
    fn pause(&mut self, bytes: u64) -> anyhow::Result<()> {
        let compactor = &self.shared.compactor;
        let is_behind = compactor.advance(self.shared, bytes);
        let worked = self.shared.clock().elapsed(self.since);
        let idle = if is_behind { Duration::ZERO } else { (worked * IDLE_RATIO).min(MAX_IDLE) };
        if !compactor.rest(self.shared, idle) {
            return Err(Stopped.into());
        }
        self.since = self.shared.clock().now();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
