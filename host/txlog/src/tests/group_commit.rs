//! Group commit on a simulated clock: a writer that commits when the policy says so.

use std::time::Duration;

use crate::file::tests::mutants::{self, Mutant};
use crate::group_commit::GroupCommit;

/// What happens at a time, in microseconds.
#[derive(Clone, Copy)]
enum Step {
    /// An append of this many bytes.
    Append(u64),
    Idle(bool),
}

use Step::{Append, Idle};

const SMALL: Step = Append(100);

/// A writer and its queue, whose commits take `commit` microseconds each.
struct Simulation {
    policy: GroupCommit,
    commit: u64,
    now: u64,
    /// Time of the first append and bytes of the open batch.
    batch: Option<(u64, u64)>,
    /// End of the commit in progress and its number of appends, and end of the delay.
    committing: Option<(u64, u64)>,
    delayed: Option<u64>,
    commits: Vec<u64>,
}

impl Simulation {
    /// Begins after a commit that answered this many clients, while threads are busy.
    fn begin(clients: usize, commit: u64) -> Self {
        let policy = after_commit(clients, Duration::from_micros(commit));
        policy.set_idle(false);
        Self { policy, commit, now: 0, batch: None, committing: None, delayed: None, commits: Vec::new() }
    }

    /// Runs the steps, and half a second more. Returns the times at which commits began.
    fn run(mut self, steps: &[(u64, Step)]) -> Vec<u64> {
        for (at, step) in steps {
            self.advance(*at);
            let is_notified = match *step {
                Append(bytes) => {
                    let (_, size) = self.batch.get_or_insert((self.now, 0));
                    *size += bytes;
                    // A writer that waits for work is notified of each append.
                    self.policy.append(*size) || self.delayed.is_none()
                }
                Idle(idle) => self.policy.set_idle(idle),
            };
            if is_notified {
                self.take();
            }
        }
        self.advance(self.now + 500_000);
        self.commits
    }

    fn advance(&mut self, until: u64) {
        while let Some(next) = self.committing.map(|(end, _)| end).or(self.delayed).filter(|next| *next <= until) {
            self.now = next;
            self.delayed = None;
            if let Some((_, appends)) = self.committing.take() {
                self.policy.committed(appends, Duration::from_micros(self.commit));
            }
            self.take();
        }
        self.now = until;
    }

    fn take(&mut self) {
        let Some((begun, bytes)) = self.batch.filter(|_| self.committing.is_none()) else { return };
        match self.policy.delay(Duration::from_micros(self.now - begun), bytes) {
            Some(delay) => {
                let delay = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
                self.delayed = Some(self.now.saturating_add(delay));
            }
            None => {
                let appends = self.policy.taken();
                (self.batch, self.delayed) = (None, None);
                self.commits.push(self.now);
                self.committing = Some((self.now + self.commit, appends));
            }
        }
    }
}

/// Returns the policy after a commit that answered this many clients.
fn after_commit(clients: usize, took: Duration) -> GroupCommit {
    let policy = GroupCommit::new();
    for _ in 0..clients {
        policy.append(100);
    }
    policy.committed(policy.taken(), took);
    policy
}

fn lone_client() -> Vec<u64> {
    Simulation::begin(1, 1_000).run(&[(0, SMALL), (1_500, SMALL), (9_000, SMALL)])
}

fn idle_threads() -> Vec<u64> {
    Simulation::begin(3, 1_000).run(&[(0, SMALL), (100, SMALL), (300, Idle(true)), (400, Idle(false))])
}

fn busy_threads() -> Vec<u64> {
    Simulation::begin(3, 1_000).run(&[(0, SMALL), (100, SMALL)])
}

fn large_batch() -> Vec<u64> {
    Simulation::begin(9, 1_000).run(&[(0, SMALL), (200, Append(256 << 10))])
}

#[test]
fn lone_client_is_not_delayed() {
    assert_eq!(lone_client(), [0, 1_500, 9_000]);
}

#[test]
fn idle_threads_end_the_delay() {
    assert_eq!(idle_threads(), [300]);
    // They were idle when the commit before ended.
    let before = [(0, Append(256 << 10)), (100, SMALL), (200, Idle(true))];
    assert_eq!(Simulation::begin(3, 1_000).run(&before), [0, 1_000]);
}

#[test]
fn busy_threads_delay_for_four_commits() {
    assert_eq!(busy_threads(), [4_000]);
    // Including the time in which the commit before was in progress.
    let before = [(0, Append(256 << 10)), (100, SMALL)];
    assert_eq!(Simulation::begin(3, 1_000).run(&before), [0, 4_100]);
    assert_eq!(Simulation::begin(3, 60_000).run(&[(0, SMALL)]), [5_000], "and never longer than this");
}

#[test]
fn large_batch_is_not_delayed() {
    assert_eq!(large_batch(), [200]);
}

#[test]
fn last_client_ends_the_delay() {
    assert_eq!(Simulation::begin(3, 1_000).run(&[(0, SMALL), (100, SMALL), (250, SMALL)]), [250]);
}

#[test]
fn clients_in_flight_are_not_waited_for() {
    let policy = after_commit(3, Duration::from_secs(1));
    policy.append(100);
    policy.append(100);
    assert_eq!(policy.taken(), 2);
    assert!(policy.append(100), "the third client is delayed for those in flight");
}

#[test]
fn clients_that_left_delay_once() {
    assert_eq!(Simulation::begin(3, 1_000).run(&[(0, SMALL), (9_000, SMALL)]), [4_000, 9_000]);
}

#[test]
fn slow_commit_delays_for_half_of_it_when_idle() {
    let steps = [(0, Idle(true)), (0, SMALL), (100, SMALL)];
    let commits = |commit| Simulation::begin(3, commit).run(&steps);
    assert_eq!((commits(1_900), commits(2_000), commits(40_000)), (vec![0, 1_900], vec![1_000], vec![5_000]));
}

#[test]
fn host_that_reports_nothing_delays_nothing() {
    let policy = after_commit(3, Duration::from_millis(1));
    let simulation = Simulation { policy, ..Simulation::begin(3, 1_000) };
    assert_eq!(simulation.run(&[(0, SMALL)]), [0]);
}

#[test]
fn every_mutant_of_group_commit_is_found() {
    let tests = [
        (Mutant::LoneClientDelayed, lone_client as fn() -> Vec<u64>),
        (Mutant::IdleIgnored, idle_threads),
        (Mutant::DelayUnbounded, busy_threads),
        (Mutant::LargeBatchDelayed, large_batch),
    ];
    for (mutant, commits) in tests {
        let right = commits();
        mutants::set(Some(mutant));
        let wrong = commits();
        mutants::set(None);
        assert_ne!(right, wrong, "{mutant:?}");
    }
}
