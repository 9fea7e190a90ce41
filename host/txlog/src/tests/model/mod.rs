//! Modules under every interleaving that a model checker comes upon.

mod feed;
mod waiters;

use shuttle::{check_pct, check_random};

/// Of each scenario and scheduler.
const EXECUTIONS: usize = 3_000;
/// Changes of priority in one execution, beside which a mistake shows.
const DEPTH: usize = 3;

/// What a file that is compiled below one of these modules finds in place of `crate::sync`.
pub mod sync {
    pub use std::sync::PoisonError;
    use std::time::{Duration, Instant};

    use shuttle::rand::{Rng, thread_rng};
    pub use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic};

    /// A clock by which a wait can be over at any moment.
    pub struct Clock;

    impl Clock {
        pub fn now(&self) -> Instant {
            Instant::now()
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
            // The time can be over while it is notified.
            (guard, thread_rng().r#gen())
        }
    }
}

pub fn check(scenario: impl Fn() + Clone + Send + Sync + 'static) {
    check_random(scenario.clone(), EXECUTIONS);
    check_pct(scenario, EXECUTIONS, DEPTH);
}
