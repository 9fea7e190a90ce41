//! The time that guests are told: the system's, but never going back, whichever instance is asked. A key that has expired
//! for one reader does not come back for another because somebody set the clock, or because the guest was rebuilt.

use std::sync::atomic::{AtomicU64, Ordering};

use kvs_runtime::Env;

/// In milliseconds since 1970.
pub struct Clock {
    newest: AtomicU64,
    env: Env,
}

impl Clock {
    pub fn new(env: Env) -> Self {
        Self { newest: AtomicU64::new(0), env }
    }

    /// What the time is asked of, and all else that guests are given from outside.
    pub fn env(&self) -> &Env {
        &self.env
    }

    pub fn now(&self) -> u64 {
        self.not_before(self.env.clock.unix_ms())
    }

    /// It is this time or later: an entry of the log has it.
    pub fn not_before(&self, time: u64) -> u64 {
        self.newest.fetch_max(time, Ordering::Relaxed).max(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_never_goes_back() {
        let clock = Clock::new(Env::real());
        let system = clock.now();
        assert!(system > 1_700_000_000_000, "the system's own time: {system}");
        let ahead = system + 3_600_000;
        assert_eq!(clock.not_before(ahead), ahead);
        assert_eq!(clock.now(), ahead);
        assert_eq!(clock.not_before(system), ahead);
    }
}
