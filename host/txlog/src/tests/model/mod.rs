//! Model checking of modules: each scenario runs under many interleavings.

mod feed;
mod waiters;

use shuttle::{check_pct, check_random};

/// Number of executions of each scenario with each scheduler.
const EXECUTIONS: usize = 3_000;
/// Number of priority changes in one execution of the PCT scheduler.
const DEPTH: usize = 3;

/// Replacement of `crate::sync` for the files compiled below these modules.
pub mod sync {
    pub use std::sync::PoisonError;
    use std::time::{Duration, Instant};

    use shuttle::rand::{Rng, thread_rng};
    pub use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic};

    /// A clock by which a wait can time out at any moment.
    pub struct Clock;

    impl Clock {
        pub fn now(&self) -> Instant {
            Instant::now()
        }

        /// Time stands still.
        pub fn elapsed(&self, _since: Instant) -> Duration {
            Duration::ZERO
        }

        pub fn wait_timeout<'m, T>(
            &self,
            changed: &Condvar,
            guard: MutexGuard<'m, T>,
            _time: Duration,
        ) -> (MutexGuard<'m, T>, bool) {
            if thread_rng().r#gen() {
                return (guard, true);
            }
            let guard = changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
            // The timeout can expire while it is notified.
            (guard, thread_rng().r#gen())
        }
    }
}

pub fn check(scenario: impl Fn() + Clone + Send + Sync + 'static) {
    check_random(scenario.clone(), EXECUTIONS);
    check_pct(scenario, EXECUTIONS, DEPTH);
}
