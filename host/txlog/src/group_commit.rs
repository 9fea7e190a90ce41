//! Group commit: decides when the open batch is committed. One policy for the writers of all logs.
//!
//! A commit costs about the same for one append as for a hundred. So a batch is delayed while more appends are likely: the
//! threads that append have requests left to process. Reasons and measurements: `docs/group-commit.md`.
//!
//! Owns: this decision, the number of clients that write, and the duration of a commit. Must never know: which log it is
//! for, or how the host finds out that its threads are idle.

use std::time::Duration;

use super::sync::atomic::{AtomicBool, AtomicU64, Ordering};
#[cfg(test)]
use crate::file::tests::mutants::{self, Mutant};

/// Maximum delay of a batch while threads are busy, in commits: a fifth of the time is left for commits.
const BUSY_DELAY: u32 = 4;
/// Maximum delay in any case.
const MAX_DELAY: Duration = Duration::from_millis(5);
/// Shortest delay while all threads are idle. A timer is no finer, and commits that fast are better not delayed.
const MIN_IDLE_DELAY: Duration = Duration::from_millis(1);
/// Size of a batch that is not delayed: its bytes cost more than the commit.
const LARGE_BATCH_BYTES: u64 = 256 << 10;

/// The policy. All but [`set_idle`](Self::set_idle) is called with the queue locked.
pub struct GroupCommit {
    /// No thread has a request left. True if the host does not report it: then nothing is known of later appends.
    idle: AtomicBool,
    /// A batch is delayed, and the writer must be notified when the threads are idle.
    delays: AtomicBool,
    /// Number of appends that wait for a commit, and of those in the commits in flight.
    waiting: AtomicU64,
    committing: AtomicU64,
    /// Number of clients: those that the last commit answered, and those that waited for another one then.
    clients: AtomicU64,
    /// Moving average of the duration of a commit, in nanoseconds.
    commit_ns: AtomicU64,
}

impl GroupCommit {
    pub fn new() -> Self {
        Self {
            idle: AtomicBool::new(true),
            delays: AtomicBool::new(false),
            waiting: AtomicU64::new(0),
            committing: AtomicU64::new(0),
            clients: AtomicU64::new(0),
            commit_ns: AtomicU64::new(0),
        }
    }

    /// Notes whether all threads that append are idle. Returns whether the writer must be notified.
    pub fn set_idle(&self, idle: bool) -> bool {
        // `delay` stores and loads in reverse, so that at least one of the two sees the other.
        self.idle.store(idle, Ordering::SeqCst);
        idle && self.delays.load(Ordering::SeqCst)
    }

    /// Counts an append to a batch that has these bytes now. Returns whether this ends a delay.
    pub fn append(&self, bytes: u64) -> bool {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        self.is_due(bytes)
    }

    /// Returns for how long to delay a batch of this age and size, at most. None if it is due.
    pub fn delay(&self, age: Duration, bytes: u64) -> Option<Duration> {
        self.delays.store(true, Ordering::SeqCst);
        let is_idle = self.idle.load(Ordering::SeqCst);
        let commit = Duration::from_nanos(self.commit_ns.load(Ordering::Relaxed));
        let most = if is_idle { idle_delay(commit) } else { (commit * BUSY_DELAY).min(MAX_DELAY) };
        #[cfg(test)]
        let most = match () {
            () if mutants::is(Mutant::IdleIgnored) => MAX_DELAY,
            () if mutants::is(Mutant::DelayUnbounded) => Duration::MAX,
            () => most,
        };
        let left = most.saturating_sub(age);
        let is_over = left.is_zero() || self.is_due(bytes);
        if is_over {
            self.delays.store(false, Ordering::SeqCst);
        }
        (!is_over).then_some(left)
    }

    /// Returns whether a batch is not delayed, whatever the threads do: it is large, or all clients wait for it.
    fn is_due(&self, bytes: u64) -> bool {
        let waiting = self.waiting.load(Ordering::Relaxed) + self.committing.load(Ordering::Relaxed);
        let clients = self.clients.load(Ordering::Relaxed);
        #[cfg(test)]
        match () {
            () if mutants::is(Mutant::LoneClientDelayed) => return bytes >= LARGE_BATCH_BYTES,
            () if mutants::is(Mutant::LargeBatchDelayed) => return waiting >= clients,
            () => {}
        }
        bytes >= LARGE_BATCH_BYTES || waiting >= clients
    }

    /// The writer takes all that waits. Returns its number of appends.
    pub fn taken(&self) -> u64 {
        let appends = self.waiting.swap(0, Ordering::Relaxed);
        self.committing.fetch_add(appends, Ordering::Relaxed);
        appends
    }

    /// The commit of what was taken took this long.
    pub fn committed(&self, appends: u64, took: Duration) {
        let committing = self.committing.fetch_sub(appends, Ordering::Relaxed);
        self.clients.store(committing + self.waiting.load(Ordering::Relaxed), Ordering::Relaxed);
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let before = self.commit_ns.load(Ordering::Relaxed);
        let average = if before == 0 { took } else { before - before / 8 + took / 8 };
        self.commit_ns.store(average, Ordering::Relaxed);
    }
}

/// Returns the delay of a batch that some clients have not joined while all threads are idle. The clients that the last commit
/// answered send their next requests soon. If commits are slow, it is better not to make them wait for a whole one.
fn idle_delay(commit: Duration) -> Duration {
    let delay = commit / 2;
    if delay < MIN_IDLE_DELAY { Duration::ZERO } else { delay.min(MAX_DELAY) }
}
