//! The compactor: decides when compaction is worth its while, how hard it may press the disk, and how far the log may
//! grow meanwhile.
//!
//! What is dead is not known without reading the log, but estimated: since the last run, whose result is known, each put
//! can have superseded about its own size, and each delete the size of a mean entry. When what may be dead has grown to a
//! third of the log, a run is due. A run that finds nothing has read as much as was written since the last, so the cost
//! stays in proportion. A delete counts once its segment is sealed, for until then no run can act on it.
//!
//! The log stays at most twice the entries that are needed, and two segments. Mostly a run is over long before; where it is
//! not, each commit waits until the run is as far as the log has grown: see [`Debt`]. Beside that the disk holds the spare,
//! the rest of the newest segment, and during a run the file that it writes, a segment each.
//!
//! What is needed is what was at the last run, as far as nothing tells that it is less: values deleted or made small that
//! were far larger than the mean stay until the next run, which falls due at the latest when half as much is written.
//! Where an estimate falls below what is there, half a segment is let in until the run is over. So all files together take
//! at most **twice the data that was live at any time since the run before the last, and five and a half segments**. Where
//! the log was not empty when it was opened, this begins with the end of the first run; where compaction fails, the log
//! grows on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvs_runtime::Clock;

use super::catalog::Segment;
use super::compact::{self, Effort, Outcome, SyncFailed};
use super::liveness::{GRACE_MS, KEYS};
use super::{Damage, Shared};
use crate::Condition;

/// After a segment was sealed it waits this long: what comes up meanwhile makes one run and not several.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// Entries expire although nothing is written.
const LOOK: Duration = Duration::from_secs(1);
/// For each second of work, this many of rest, as long as the log does not grow faster than the work goes on.
const REST: u32 = 3;
/// At most at once, so that a stop is not kept waiting.
const LONGEST_REST: Duration = Duration::from_millis(100);
/// After a failure it waits this long, then twice as long, up to the longest: a full disk for instance.
const AGAIN: Duration = Duration::from_secs(5);
const LONGEST_AGAIN: Duration = Duration::from_secs(320);
const WORTH_PERCENT: u64 = 25;
const NO_LIMIT: u64 = u64::MAX;

pub struct Compactor {
    state: Mutex<State>,
    changed: Condvar,
    /// How large the log may be on disk when the writer goes on.
    limit: AtomicU64,
}

#[derive(Default)]
struct State {
    /// The thread is there, and not recovering from a failure.
    ready: bool,
    stopped: bool,
    /// A segment is not written any more, and nobody looked at that yet.
    sealed: bool,
    /// The writer waits.
    held: bool,
    /// None where the log was not empty when it was opened, and nothing is known of it yet.
    known: Option<Known>,
    /// A run is due or under way.
    debt: Option<Debt>,
    /// Why the last run failed.
    failure: Option<String>,
}

/// What was known of the log after the last run, and when that was.
struct Known {
    needed: u64,
    mean: u64,
    expiring: [u64; 40],
    /// The newest sequence that the run saw.
    last: u64,
    at: Instant,
    /// How often the log had to be read to find what can go.
    passes: u64,
    /// So much more than what is needed made no run worth its while.
    floor: u64,
}

impl Known {
    /// Bytes that are at least needed now.
    fn needed(&self, clock: &Clock, sealed: &[Segment]) -> u64 {
        let passed = clock.elapsed(self.at).as_secs();
        let expired: u64 = (0..40).filter(|power| 1 << power <= passed).map(|power| self.expiring[power]).sum();
        // Those that a run did not see: one that is not sealed yet makes nothing dead that could go.
        let deletes: u64 = sealed.iter().filter(|one| one.first > self.last).map(|one| one.deletes).sum();
        let deleted = deletes.saturating_mul(self.mean);
        self.needed.saturating_sub(expired).saturating_sub(deleted)
    }
}

/// A run that is due, as the writer sees it. The log may grow by a quarter of what is left to its bound at once, and by
/// the rest as the run goes on. So it never passes the bound, and no commit waits for a whole run: it waits for as much
/// of the run as is in proportion to what it writes.
#[derive(Clone, Copy, Debug)]
pub struct Debt {
    /// The size of the log when the run fell due, and what it may be when the run is over.
    pub begin: u64,
    pub bound: u64,
    /// Bytes that the run has to read, once it is known, and has read.
    pub work: u64,
    pub done: u64,
}

impl Debt {
    pub fn new(begin: u64, sealed: u64, needed: Option<u64>, segment_bytes: u64) -> Self {
        let bound = match needed {
            // However near it is: the writer may have gone on before this was looked at.
            Some(needed) if begin < 2 * (needed + segment_bytes) => 2 * (needed + segment_bytes),
            // Less is needed than there was.
            Some(_) => begin + segment_bytes / 2,
            // Nothing is known yet, so nothing can be kept; the first run is not to take for ever all the same.
            None => begin + segment_bytes.max(sealed / 2),
        };
        Self { begin, bound, work: u64::MAX, done: 0 }
    }

    /// How large the log may be now.
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
    /// Its thread is about to be there. From now on the log keeps to its bound, however long the thread takes to come.
    pub fn begin_with(&self, shared: &Shared) {
        let at = shared.clock().now();
        let nothing = Known { needed: 0, mean: 0, expiring: [0; 40], last: 0, at, passes: 1, floor: 0 };
        let mut state = self.lock();
        state.known = shared.catalog.sealed().is_empty().then_some(nothing);
        state.ready = true;
        self.consider(&mut state, shared);
    }

    /// A segment is not written any more.
    pub fn sealed(&self, shared: &Shared) {
        let mut state = self.lock();
        state.sealed = true;
        self.consider(&mut state, shared);
    }

    /// The writer is about to write so many bytes: waits until the log may grow by them.
    pub fn admit(&self, shared: &Shared, bytes: u64) {
        let is_held = || {
            let limit = self.limit.load(Ordering::Acquire);
            limit != NO_LIMIT && shared.catalog.bytes() + bytes > limit
        };
        if !is_held() {
            return;
        }
        let mut state = self.lock();
        while is_held() {
            state.held = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.held = false;
    }

    /// Bytes that may be dead, as far as is known.
    pub fn dead(&self, shared: &Shared) -> u64 {
        let state = self.lock();
        let sealed = shared.catalog.sealed();
        state.known.as_ref().map_or(0, |known| size(&sealed).saturating_sub(known.needed(shared.clock(), &sealed)))
    }

    /// Whether the log keeps its bound, or grows on since the last run failed.
    pub fn condition(&self) -> Condition {
        let failure = self.lock().failure.clone();
        failure.map_or(Condition::Well, |reason| Condition::But(format!("it is not compacted and grows: {reason}")))
    }

    pub fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        self.forgive(&mut state);
    }

    /// Decides whether a run is due: what may be dead has grown enough.
    fn consider(&self, state: &mut State, shared: &Shared) {
        if state.ready && !state.stopped && state.debt.is_none() {
            let sealed = shared.catalog.sealed();
            let needed = state.known.as_ref().map(|known| known.needed(shared.clock(), &sealed));
            let sealed = size(&sealed);
            let floor = state.known.as_ref().map_or(0, |known| known.floor);
            if needed.is_none_or(|needed| sealed > needed + needed / 2 + floor) && sealed > 0 {
                state.debt = Some(Debt::new(shared.catalog.bytes(), sealed, needed, shared.segment_bytes));
            }
        }
        self.limit_now(state);
    }

    /// No run is due, and the writer goes on as it likes.
    fn forgive(&self, state: &mut State) {
        state.debt = None;
        self.limit_now(state);
    }

    fn limit_now(&self, state: &State) {
        self.limit.store(state.debt.map_or(NO_LIMIT, |debt| debt.limit()), Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits until a run is due; false when it is to stop.
    fn wait_until_due(&self, shared: &Shared) -> bool {
        let mut state = self.lock();
        while !state.stopped && state.debt.is_none() {
            let idle = |state: &mut State| !state.stopped && !std::mem::take(&mut state.sealed);
            state = shared.clock().wait_timeout_while(&self.changed, state, LOOK, idle);
            self.consider(&mut state, shared);
        }
        drop(state);
        self.rest(shared, DEBOUNCE)
    }

    /// Waits, unless the writer does; false when it is to stop.
    fn rest(&self, shared: &Shared, time: Duration) -> bool {
        let resting = |state: &mut State| !state.stopped && !state.held;
        !shared.clock().wait_timeout_while(&self.changed, self.lock(), time, resting).stopped
    }

    /// A run over so many bytes begins.
    fn begin(&self, sealed: u64) {
        let mut state = self.lock();
        let passes = state.known.as_ref().map_or(1, |known| known.passes);
        if let Some(debt) = &mut state.debt {
            // Once more to write what stays.
            debt.work = (passes + 1) * sealed;
        }
    }

    /// The run has read so many bytes more. Returns whether the log comes close to what it may be.
    fn advance(&self, shared: &Shared, bytes: u64) -> bool {
        let mut state = self.lock();
        let Some(debt) = &mut state.debt else { return false };
        debt.done += bytes;
        let (limit, room) = (debt.limit(), debt.bound - debt.begin);
        self.limit_now(&state);
        shared.catalog.bytes() + room / 8 > limit
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread that compacts until it is stopped.
pub fn run(shared: &Shared) -> anyhow::Result<()> {
    let compactor = &shared.compactor;
    let mut again = AGAIN;
    while compactor.wait_until_due(shared) {
        match compact(shared) {
            Ok(known) => {
                let mut state = compactor.lock();
                (state.known, state.debt, state.failure) = (Some(known), None, None);
                // At once, for what was sealed meanwhile.
                compactor.consider(&mut state, shared);
                again = AGAIN;
            }
            Err(error) if error.is::<Stopped>() => break,
            Err(error) if error.is::<SyncFailed>() => return Err(error),
            Err(error) => {
                let mut state = compactor.lock();
                (state.ready, state.failure) = (false, Some(format!("{error:#}")));
                compactor.forgive(&mut state);
                // The store goes on with what it has in memory; what is on disk is left to whoever repairs it.
                if error.is::<Damage>() {
                    tracing::error!("the log is not compacted any more: {error:#}");
                    break;
                }
                // The log is as it was, only larger than need be.
                tracing::warn!("the log could not be compacted, next try in {again:.0?}: {error:#}");
                drop(state);
                if !compactor.rest(shared, again) {
                    break;
                }
                again = (2 * again).min(LONGEST_AGAIN);
                compactor.lock().ready = true;
            }
        }
    }
    Ok(())
}

/// One run over all that is sealed, and what is known after it.
fn compact(shared: &Shared) -> anyhow::Result<Known> {
    let sealed = shared.catalog.sealed();
    let size = size(&sealed);
    let effort =
        Effort { now: shared.clock().unix_ms().saturating_sub(GRACE_MS), worth_percent: WORTH_PERCENT, keys: KEYS };
    shared.compactor.begin(size);
    let clock = shared.clock();
    let begun = clock.now();
    let mut pace = Pace { shared, since: begun };
    let outcome = compact::run(shared, &sealed, &effort, &mut |bytes| pace.pause(bytes))?;
    let Outcome { needed, needed_entries, expiring, passes, saved } = outcome;
    shared.metrics.compactions.add(1);
    shared.metrics.reclaimed.add(saved);
    if saved > 0 {
        tracing::info!("compacted the log: {saved} bytes less, in {:.1?}", clock.elapsed(begun));
    }
    let mean = needed.checked_div(needed_entries).unwrap_or(0);
    // Where a run could do little, the next must not come for the same.
    let left = size.saturating_sub(saved);
    let floor = (left + left / 8).saturating_sub(needed + needed / 2);
    let last = sealed.last().map_or(0, |segment| segment.last);
    Ok(Known { needed, mean, expiring, last, at: clock.now(), passes, floor })
}

/// Bytes of the files of these segments.
fn size(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| segment.size).sum()
}

#[derive(Debug, thiserror::Error)]
#[error("stopped")]
struct Stopped;

/// Leaves the disk to those who wait for it, unless the log grows faster than it is compacted.
struct Pace<'a> {
    shared: &'a Shared,
    since: Instant,
}

impl Pace<'_> {
    fn pause(&mut self, bytes: u64) -> anyhow::Result<()> {
        let compactor = &self.shared.compactor;
        let behind = compactor.advance(self.shared, bytes);
        let rest =
            if behind { Duration::ZERO } else { (self.shared.clock().elapsed(self.since) * REST).min(LONGEST_REST) };
        if !compactor.rest(self.shared, rest) {
            return Err(Stopped.into());
        }
        self.since = self.shared.clock().now();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{FakeDisk, append, commit, open, put, replayed};
    use super::*;
    use crate::{Event, Put};

    #[test]
    fn what_has_expired_and_what_was_deleted_since_is_needed_no_more() {
        let mut expiring = [0; 40];
        // Within a second, within four, and much later.
        (expiring[0], expiring[2], expiring[20]) = (10, 200, 3_000);
        let clock = Clock::system();
        let known = |seconds| {
            let at = Instant::now().checked_sub(Duration::from_secs(seconds)).expect("this machine runs for longer");
            Known { needed: 10_000, mean: 100, expiring, last: 9, at, passes: 1, floor: 0 }
        };
        assert_eq!(
            [0, 1, 3, 4, 9].map(|seconds| known(seconds).needed(&clock, &[])),
            [10_000, 9_990, 9_990, 9_790, 9_790]
        );
        let deletes = |last, deletes| Segment { deletes, ..Segment::empty(1, last, 0, 0) };
        assert_eq!(known(0).needed(&clock, &[deletes(8, 5), deletes(9, 7), deletes(20, 1)]), 9_200);
        assert_eq!(known(0).needed(&clock, &[deletes(20, 1_000)]), 0);
    }

    #[test]
    fn a_run_that_could_do_little_is_due_again_when_the_log_has_grown_by_an_eighth() {
        let log = open(&FakeDisk::default()).unwrap();
        let shared = &log.shared;
        for number in 0..800 {
            append(&log, 1, &[put(&format!("key {number}"), b"needed"), Event::Delete(format!("nothing {number}"))]);
        }
        // Until the last delete is in a sealed segment.
        for _ in 0..9 {
            commit(&log, put("a", &[1; 500]));
        }
        // Who reads is in the way of forgetting the deletes.
        let reader = shared.catalog.reader(0).unwrap();
        let known = compact(shared).unwrap();
        drop(reader);
        let left = size(&shared.catalog.sealed());
        assert!(known.needed < left * 6 / 10, "{} of {left}", known.needed);
        {
            let mut state = shared.compactor.lock();
            (state.ready, state.known) = (true, Some(known));
            shared.compactor.consider(&mut state, shared);
        }
        let (least, mut most) = (left + left / 8, left);
        while shared.compactor.lock().debt.is_none() {
            most = size(&shared.catalog.sealed());
            commit(&log, put("a", &[1; 500]));
        }
        let due = size(&shared.catalog.sealed());
        assert!(most <= least && least < due, "{left}, then {most}, then {due}");
    }

    #[test]
    fn the_log_may_grow_as_a_run_goes_on() {
        let log = open(&FakeDisk::default()).unwrap();
        let (shared, compactor) = (&log.shared, &log.shared.compactor);
        let bytes = shared.catalog.bytes();
        let begin = bytes - 150;
        compactor.lock().debt = Some(Debt { begin, bound: begin + 800, work: u64::MAX, done: 0 });
        // To be read once, and once more to write what stays.
        compactor.begin(100);
        // What was read more, by how much the log may have grown, and whether it comes close to that.
        for (read, growth, is_close) in [(0, 200, true), (30, 290, false), (170, 800, false), (50, 800, false)] {
            assert_eq!(compactor.advance(shared, read), is_close, "{read}");
            assert_eq!(compactor.limit.load(Ordering::Acquire), begin + growth, "{read}");
        }
        // Nobody waits who need not.
        compactor.admit(shared, begin + 800 - bytes);
        let mut pace = Pace { shared, since: Instant::now() };
        assert!(pace.pause(0).is_ok());
        compactor.stop();
        assert!(pace.pause(0).is_err_and(|error| error.is::<Stopped>()));
    }

    #[test]
    fn what_goes_has_expired_by_the_clock_and_not_just_now() {
        let log = open(&FakeDisk::default()).unwrap();
        let now = || log.shared.clock().unix_ms();
        for (key, expires) in [("long ago", 5), ("just now", now() - 1), ("later", now() + 1_000_000)] {
            let (key, value, metadata, expires) = (key.into(), Vec::new(), Vec::new(), Some(expires));
            append(&log, 1, &[Event::Put(Put { key, value, metadata, expires })]);
        }
        for _ in 0..9 {
            commit(&log, put("another", &[1; 500]));
        }
        compact(&log.shared).unwrap();
        let left = replayed(&log).into_iter().map(|(sequence, ..)| sequence).filter(|sequence| *sequence < 4);
        assert_eq!(left.collect::<Vec<_>>(), [2, 3]);
    }
}
