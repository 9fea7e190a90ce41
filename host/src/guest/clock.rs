//! The time that guests receive. It never goes back, whichever instance is asked: a key that has expired for one reader does
//! not come back for another because somebody set the clock, or because the guest was rebuilt.
//!
//! It is the system's while that is ahead. When the system's is behind the newest entry of the log, or was set back, time
//! continues from there by the monotonic clock, so that a TTL stays a duration: no key lives until the system has caught up.
//! It is the steady time of the environment, which the log asks too, so that compaction drops what has expired or was deleted.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvs_runtime::Env;
use kvs_txlog::Condition;
use tracing::{info, warn};

/// The difference between clocks that are kept in step, also those of two machines, and of an entry that is just written.
const TOLERANCE_MS: u64 = 1_000;

pub struct Clock {
    /// Whether a line has reported that the system's clock is behind.
    is_reported: AtomicBool,
    env: Env,
}

impl Clock {
    pub fn new(env: Env) -> Self {
        Self { is_reported: AtomicBool::new(false), env }
    }

    /// What the time is asked of, and all else that guests are given from outside.
    pub fn env(&self) -> &Env {
        &self.env
    }

    /// In milliseconds since 1970.
    pub fn now(&self) -> u64 {
        let system = self.env.clock.unix_ms();
        let now = self.not_before(system);
        let is_behind = now - system > TOLERANCE_MS;
        if is_behind != self.is_reported.load(Ordering::Relaxed)
            && self.is_reported.swap(is_behind, Ordering::Relaxed) != is_behind
        {
            match behind(now - system) {
                Some(reason) => warn!("{reason}"),
                None => info!("the system clock has caught up"),
            }
        }
        now
    }

    /// It is this time or later: an entry of the log has it.
    pub fn not_before(&self, time: u64) -> u64 {
        self.env.clock.not_before(time)
    }

    /// The time by which the system's clock is behind.
    pub fn behind(&self) -> Duration {
        let system = self.env.clock.unix_ms();
        Duration::from_millis(self.not_before(system).saturating_sub(system))
    }

    /// Condition of the clock, for `/readyz`.
    pub fn condition(&self) -> Condition {
        let behind = behind(u64::try_from(self.behind().as_millis()).unwrap_or(u64::MAX));
        behind.map_or(Condition::Well, Condition::But)
    }
}

/// The report that the system's clock is behind by this many milliseconds, when that is more than clocks differ by.
fn behind(milliseconds: u64) -> Option<String> {
    let behind = humantime::format_duration(Duration::from_secs(milliseconds / 1_000));
    (milliseconds > TOLERANCE_MS).then(|| {
        format!(
            "the system clock is {behind} behind the newest entry of the log, or was set back: time continues from there by \
             the monotonic clock; set the system clock"
        )
    })
}

#[cfg(test)]
mod tests {
    use std::future::{Future, ready};
    use std::pin::Pin;
    use std::sync::{Arc, Mutex};
    use std::time::{Instant, SystemTime, UNIX_EPOCH};

    use kvs_runtime::Time;

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    /// Monotonic time and the system's, each as it is set.
    struct Set {
        begun: Instant,
        times: Mutex<(Duration, Duration)>,
    }

    impl Set {
        fn pass(&self, monotonic: Duration, system: impl FnOnce(Duration) -> Duration) {
            let mut times = self.times.lock().unwrap();
            *times = (times.0 + monotonic, system(times.1));
        }
    }

    impl Time for Set {
        fn now(&self) -> Instant {
            self.begun + self.times.lock().unwrap().0
        }
        fn wall(&self) -> SystemTime {
            UNIX_EPOCH + self.times.lock().unwrap().1
        }
        fn sleep(&self, _: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
            Box::pin(ready(()))
        }
    }

    fn clock() -> (Arc<Set>, Clock) {
        let set = Arc::new(Set { begun: Instant::now(), times: Mutex::new((Duration::ZERO, 20_000 * DAY)) });
        let env = Env { clock: kvs_runtime::Clock::given(set.clone()), ..Env::real() };
        (set, Clock::new(env))
    }

    #[test]
    fn time_is_the_systems_while_that_is_ahead() {
        let (set, clock) = clock();
        assert_eq!(clock.now(), (20_000 * DAY).as_millis() as u64);
        set.pass(Duration::from_secs(1), |system| system + Duration::from_secs(2));
        assert_eq!(clock.now(), (20_000 * DAY + Duration::from_secs(2)).as_millis() as u64);
        assert_eq!((clock.behind(), clock.condition()), (Duration::ZERO, Condition::Well));
    }

    #[test]
    fn time_goes_on_from_an_entry_of_the_future() {
        let (set, clock) = clock();
        let ahead = clock.now() + (365 * DAY).as_millis() as u64;
        assert_eq!(clock.not_before(ahead), ahead);
        set.pass(Duration::from_secs(60), |system| system + Duration::from_secs(60));
        assert_eq!(clock.now(), ahead + 60_000, "a TTL of a minute does not end");
        // What is older changes nothing.
        assert_eq!(clock.not_before(ahead), ahead + 60_000);
        assert_eq!(clock.behind(), 365 * DAY);
        assert_eq!(clock.env().clock.steady_ms(), ahead + 60_000, "the log takes another time for now");
        assert!(
            matches!(clock.condition(), Condition::But(reason) if reason.contains("the system clock is 11months "))
        );
        set.pass(DAY, |system| system + 400 * DAY);
        assert_eq!((clock.behind(), clock.condition()), (Duration::ZERO, Condition::Well));
    }

    #[test]
    fn time_goes_on_when_the_system_is_set_back() {
        let (set, clock) = clock();
        let before = clock.now();
        set.pass(Duration::from_secs(5), |system| system - 2 * DAY);
        assert_eq!(clock.now(), before + 5_000);
        assert_eq!(clock.behind(), 2 * DAY + Duration::from_secs(5));
    }
}
