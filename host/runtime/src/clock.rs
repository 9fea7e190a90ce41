//! The clock: time, and waiting.
//!
//! Reading the system's clock through this costs a predicted branch over reading it directly.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Polling interval of a waiting thread with an injected clock.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// An injected clock, such as the manual one of a simulation, or one that drifts.
pub trait Time: Send + Sync + 'static {
    /// Returns monotonic time: any `Instant`, plus the time passed since.
    fn now(&self) -> Instant;
    /// Returns wall-clock time.
    fn wall(&self) -> SystemTime;
    /// Completes when this time has passed.
    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// The clock of a process, real or injected. Clones share the lead of [`Clock::steady_ms`].
#[derive(Clone)]
pub struct Clock {
    source: Source,
    lead: Arc<Lead>,
}

/// How far the time has come, less the monotonic time that has passed.
struct Lead {
    begun: Instant,
    milliseconds: AtomicU64,
}

#[derive(Clone)]
enum Source {
    System,
    Given(Arc<dyn Time>),
}

impl Source {
    #[inline]
    #[expect(clippy::disallowed_methods, reason = "the place where the system's clock is read")]
    fn now(&self) -> Instant {
        match self {
            Self::System => Instant::now(),
            Self::Given(time) => time.now(),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the place where the system's clock is read")]
impl Clock {
    /// Creates the clock of the operating system, with the timers of tokio.
    pub fn system() -> Self {
        Self::of(Source::System)
    }

    pub fn given(time: Arc<dyn Time>) -> Self {
        Self::of(Source::Given(time))
    }

    fn of(source: Source) -> Self {
        let begun = source.now();
        Self { source, lead: Arc::new(Lead { begun, milliseconds: AtomicU64::new(0) }) }
    }

    /// Returns monotonic time.
    #[inline]
    pub fn now(&self) -> Instant {
        self.source.now()
    }

    /// Returns the time passed since.
    #[inline]
    pub fn elapsed(&self, since: Instant) -> Duration {
        self.now().saturating_duration_since(since)
    }

    /// Returns wall-clock time.
    pub fn wall(&self) -> SystemTime {
        match &self.source {
            Source::System => SystemTime::now(),
            Source::Given(time) => time.wall(),
        }
    }

    /// Returns wall-clock time in milliseconds since 1970.
    #[inline]
    pub fn unix_ms(&self) -> u64 {
        let since = self.wall().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    /// Returns wall-clock time in milliseconds since 1970 that never goes back, in no clone: when the system's clock is set
    /// back, or is behind a time given to [`not_before`](Self::not_before), time continues by the monotonic clock.
    pub fn steady_ms(&self) -> u64 {
        self.not_before(self.unix_ms())
    }

    /// Notes that it is this time or later, such as that of an entry of a log, and returns [`steady_ms`](Self::steady_ms)
    /// without asking the system for the wall-clock time.
    pub fn not_before(&self, milliseconds: u64) -> u64 {
        let passed = u64::try_from(self.elapsed(self.lead.begun).as_millis()).unwrap_or(u64::MAX);
        let lead = milliseconds.saturating_sub(passed);
        self.lead.milliseconds.fetch_max(lead, Ordering::Relaxed).max(lead).saturating_add(passed)
    }

    /// Waits in a task.
    pub async fn sleep(&self, time: Duration) {
        match &self.source {
            Source::System => tokio::time::sleep(time).await,
            Source::Given(given) => given.sleep(time).await,
        }
    }

    /// Waits in a thread.
    pub fn pause(&self, time: Duration) {
        match &self.source {
            Source::System => thread::sleep(time),
            Source::Given(given) => {
                let begun = given.now();
                while given.now().saturating_duration_since(begun) < time {
                    thread::sleep(POLL_INTERVAL);
                }
            }
        }
    }

    /// [`Condvar::wait_timeout`] by this clock. Returns true on timeout; false after a notification or a spurious wakeup.
    pub fn wait_timeout<'m, T>(
        &self,
        changed: &Condvar,
        mut guard: MutexGuard<'m, T>,
        time: Duration,
    ) -> (MutexGuard<'m, T>, bool) {
        let Source::Given(given) = &self.source else {
            let (guard, timeout) = changed.wait_timeout(guard, time).unwrap_or_else(PoisonError::into_inner);
            return (guard, timeout.timed_out());
        };
        let begun = given.now();
        while given.now().saturating_duration_since(begun) < time {
            let (woken, timeout) = changed.wait_timeout(guard, POLL_INTERVAL).unwrap_or_else(PoisonError::into_inner);
            guard = woken;
            if !timeout.timed_out() {
                return (guard, false);
            }
        }
        (guard, true)
    }

    /// [`Condvar::wait_timeout_while`] by this clock.
    pub fn wait_timeout_while<'m, T>(
        &self,
        changed: &Condvar,
        mut guard: MutexGuard<'m, T>,
        time: Duration,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> MutexGuard<'m, T> {
        let begun = self.now();
        while condition(&mut guard) {
            let Some(left) = time.checked_sub(self.elapsed(begun)).filter(|left| !left.is_zero()) else { break };
            guard = self.wait_timeout(changed, guard, left).0;
        }
        guard
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A manual clock.
    struct Manual {
        begun: Instant,
        passed: Mutex<Duration>,
    }

    impl Time for Manual {
        fn now(&self) -> Instant {
            self.begun + *self.passed.lock().unwrap()
        }

        fn wall(&self) -> SystemTime {
            UNIX_EPOCH + *self.passed.lock().unwrap()
        }

        fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
            *self.passed.lock().unwrap() += time;
            Box::pin(std::future::ready(()))
        }
    }

    fn manual() -> (Arc<Manual>, Clock) {
        let manual = Arc::new(Manual { begun: Instant::now(), passed: Mutex::default() });
        (Arc::clone(&manual), Clock::given(manual))
    }

    #[tokio::test]
    async fn given_clock_replaces_the_system_clock() {
        let (_, clock) = manual();
        let begun = clock.now();
        clock.sleep(Duration::from_secs(3600)).await;
        assert_eq!((clock.elapsed(begun), clock.unix_ms()), (Duration::from_secs(3600), 3_600_000));
    }

    #[test]
    fn steady_time_never_goes_back() {
        let (manual, clock) = manual();
        let other = clock.clone();
        assert_eq!(clock.not_before(3_600_000), 3_600_000);
        *manual.passed.lock().unwrap() += Duration::from_secs(60);
        assert_eq!((other.steady_ms(), other.unix_ms()), (3_660_000, 60_000));
        // What is older changes nothing.
        assert_eq!(other.not_before(3_600_000), 3_660_000);
        *manual.passed.lock().unwrap() += Duration::from_secs(7200);
        assert_eq!(clock.steady_ms(), 3_660_000 + 7_200_000);
    }

    #[test]
    fn condvar_waits_by_the_given_clock() {
        let (manual, clock) = manual();
        let mutex = Mutex::new(());
        let changed = Condvar::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..200 {
                    *manual.passed.lock().unwrap() += Duration::from_secs(1);
                    thread::sleep(POLL_INTERVAL);
                }
            });
            let guard = mutex.lock().unwrap();
            drop(clock.wait_timeout_while(&changed, guard, Duration::from_secs(8), |()| true));
        });
        assert!(clock.unix_ms() >= 8_000);
        // The clock stands still, so only the notification can end this.
        thread::scope(|scope| {
            let guard = mutex.lock().unwrap();
            scope.spawn(|| {
                drop(mutex.lock().unwrap());
                changed.notify_one();
            });
            assert!(!clock.wait_timeout(&changed, guard, Duration::from_secs(8)).1);
        });
    }
}
