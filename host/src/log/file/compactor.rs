//! The compactor: decides when compaction is worth its while, and how hard it may press the disk.
//!
//! What is dead is not known without reading the log, but bounded: since the last run, whose result is known, each put
//! can have superseded at most about its own size, and each delete about the size of a mean entry. When what may be dead
//! has grown to a third of the log, a run is due. A run that finds nothing has read as much as was written since the
//! last, so the cost stays in proportion.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::compact::{self, Effort, Outcome, SyncFailed};
use super::garbage::{GRACE_MS, KEYS};
use super::{Damage, Shared};

/// After a segment was sealed it waits this long: what comes up meanwhile makes one run and not several.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// Entries expire although nothing is written.
const LOOK: Duration = Duration::from_secs(1);
/// For each second of work, this many of rest, as long as the log is not too large.
const REST: u32 = 3;
/// At most at once, so that a stop is not kept waiting.
const LONGEST_REST: Duration = Duration::from_millis(100);
/// After a failure it waits this long, then twice as long, up to the longest: a full disk for instance.
const AGAIN: Duration = Duration::from_secs(5);
const LONGEST_AGAIN: Duration = Duration::from_secs(320);
const WORTH_PERCENT: u64 = 25;

#[derive(Default)]
pub struct Compactor {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    sealed: bool,
    stopped: bool,
}

impl Compactor {
    /// A segment is not written any more.
    pub fn sealed(&self) {
        self.lock().sealed = true;
        self.changed.notify_all();
    }

    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Waits until there may be something to do; true when it is to stop.
    fn wait_for_work(&self) -> bool {
        let state = self.lock();
        let waited = self.changed.wait_timeout_while(state, LOOK, |state| !state.sealed && !state.stopped);
        waited.unwrap_or_else(PoisonError::into_inner).0.sealed = false;
        self.rest(DEBOUNCE)
    }

    /// Waits; true when it is to stop.
    fn rest(&self, time: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), time, |state| !state.stopped);
        waited.unwrap_or_else(PoisonError::into_inner).0.stopped
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was known of the log after the last run, and when that was.
struct Known {
    needed: u64,
    mean: u64,
    expiring: [u64; 40],
    deletes: u64,
    at: Instant,
    /// So much more than what is needed made no run worth its while.
    floor: u64,
}

impl Known {
    /// Bytes that are at least needed now.
    fn needed(&self, deletes: u64) -> u64 {
        let passed = self.at.elapsed().as_secs();
        let expired: u64 = (0..40).filter(|power| 1 << power <= passed).map(|power| self.expiring[power]).sum();
        let deleted = (deletes - self.deletes).saturating_mul(self.mean);
        self.needed.saturating_sub(expired).saturating_sub(deleted)
    }
}

/// The thread that compacts until it is stopped.
pub fn run(shared: &Shared) -> anyhow::Result<()> {
    // What a log holds when it is opened is not known: the first run finds out, without haste.
    let nothing = Known { needed: 0, mean: 0, expiring: [0; 40], deletes: 0, at: Instant::now(), floor: 0 };
    let mut known = shared.catalog.sealed().is_empty().then_some(nothing);
    let mut again = AGAIN;
    while !shared.compactor.wait_for_work() {
        let deletes = shared.queue.deletes();
        let sealed = shared.catalog.sealed();
        let size: u64 = sealed.iter().map(|segment| segment.end.unwrap_or(shared.segment_bytes)).sum();
        let needed = known.as_ref().map_or(0, |known| known.needed(deletes));
        if size <= needed + needed / 2 + known.as_ref().map_or(0, |known| known.floor) {
            continue;
        }
        let effort = Effort { now: now().saturating_sub(GRACE_MS), worth_percent: WORTH_PERCENT, keys: KEYS };
        let begun = Instant::now();
        let bound = known.as_ref().map_or(u64::MAX, |_| 2 * needed + shared.segment_bytes);
        let mut pace = Pace { shared, since: Instant::now(), bound };
        match compact::run(shared, &sealed, &effort, &mut |_| pace.pause()) {
            Ok(outcome) => {
                let Outcome { needed, needed_entries, expiring, saved, .. } = outcome;
                tracing::info!("compacted the log: {saved} bytes less, in {:.1?}", begun.elapsed());
                let mean = needed.checked_div(needed_entries).unwrap_or(0);
                // Where a run could do little, the next must not come for the same.
                let left = size.saturating_sub(saved);
                let floor = (left + left / 8).saturating_sub(needed + needed / 2);
                known = Some(Known { needed, mean, expiring, deletes, at: Instant::now(), floor });
                again = AGAIN;
            }
            Err(error) if error.is::<Stopped>() => return Ok(()),
            Err(error) if error.is::<SyncFailed>() => return Err(error),
            // The store goes on with what it has in memory; what is on disk is left as it is for whoever repairs it.
            Err(error) if error.is::<Damage>() => {
                tracing::error!("the log is not compacted any more: {error:#}");
                return Ok(());
            }
            // The log is as it was, only larger than need be.
            Err(error) => {
                tracing::warn!("the log could not be compacted, next try in {again:.0?}: {error:#}");
                if shared.compactor.rest(again) {
                    return Ok(());
                }
                again = (2 * again).min(LONGEST_AGAIN);
            }
        }
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
#[error("stopped")]
struct Stopped;

/// Leaves the disk to those who wait for it, unless the log grows faster than it is compacted.
struct Pace<'a> {
    shared: &'a Shared,
    since: Instant,
    bound: u64,
}

impl Pace<'_> {
    fn pause(&mut self) -> anyhow::Result<()> {
        let behind = self.shared.catalog.bytes() > self.bound;
        let rest = if behind { Duration::ZERO } else { (self.since.elapsed() * REST).min(LONGEST_REST) };
        if self.shared.compactor.rest(rest) {
            return Err(Stopped.into());
        }
        self.since = Instant::now();
        Ok(())
    }
}

pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
