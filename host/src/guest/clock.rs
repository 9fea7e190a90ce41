//! The time that guests are told: the system's, but never going back, whichever instance is asked. A key that has expired
//! for one reader does not come back for another because somebody set the clock, or because the guest was rebuilt.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// In milliseconds since 1970.
#[derive(Default)]
pub struct Clock(AtomicU64);

impl Clock {
    pub fn now(&self) -> u64 {
        let system = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        self.not_before(u64::try_from(system.as_millis()).unwrap_or(u64::MAX))
    }

    /// It is this time or later: an entry of the log has it.
    pub fn not_before(&self, time: u64) -> u64 {
        self.0.fetch_max(time, Ordering::Relaxed).max(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_never_goes_back() {
        let clock = Clock::default();
        let system = clock.now();
        assert!(system > 1_700_000_000_000, "the system's own time: {system}");
        let ahead = system + 3_600_000;
        assert_eq!(clock.not_before(ahead), ahead);
        assert_eq!(clock.now(), ahead);
        assert_eq!(clock.not_before(system), ahead);
    }
}
