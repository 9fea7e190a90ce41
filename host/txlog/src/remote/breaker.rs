//! Circuit breaker around a remote service: during an outage writes fail fast.
//!
//! While it is closed, calls are made. After [`FAILURES`] consecutive failures it is open: writes are rejected at once.
//! After an exponential backoff with jitter it is half-open: one call is attempted, and clients still do not wait. A success
//! closes it. The writer makes the attempts, never a client's request.
//!
//! Owns: the delay between attempts, and a log line for each change. Must never know: what is called.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tracing::{info, warn};

use kvs_metrics::Counter;
use kvs_runtime::Clock;

/// Consecutive failures that open the breaker. A single one can be a connection that was idle for too long.
const FAILURES: u32 = 2;
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The circuit breaker.
pub struct Breaker {
    /// Name of the service, for log lines.
    service: &'static str,
    /// Read by every write.
    open: AtomicBool,
    state: Mutex<State>,
    begun: Instant,
    /// Time of the last success, in milliseconds after `begun`.
    succeeded: AtomicU64,
    pub opened: Counter,
    pub failures: Counter,
    clock: Clock,
}

enum State {
    Closed { failures: u32, pauses: ExponentialBackoff },
    Open { since: Instant, reason: String, pauses: ExponentialBackoff, half_open: bool },
}

/// State of a circuit breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    Closed,
    Open,
    HalfOpen,
}

impl Breaker {
    pub fn new(service: &'static str, clock: Clock) -> Self {
        let state = Mutex::new(State::closed());
        let (opened, failures) = (Counter::default(), Counter::default());
        let (open, begun, succeeded) = (AtomicBool::new(false), clock.now(), AtomicU64::new(0));
        Self { service, open, state, begun, succeeded, opened, failures, clock }
    }

    /// Returns whether writes are accepted.
    pub fn is_closed(&self) -> bool {
        !self.open.load(Ordering::Acquire)
    }

    /// Returns whether the last call succeeded.
    #[cfg(feature = "postgres")]
    pub fn is_well(&self) -> bool {
        matches!(&*self.lock(), State::Closed { failures: 0, .. })
    }

    /// Returns the time since the last success. Nothing else shows that the caller itself stands still.
    #[cfg(feature = "postgres")]
    pub fn silence(&self) -> Duration {
        let succeeded = Duration::from_millis(self.succeeded.load(Ordering::Relaxed));
        self.clock.elapsed(self.begun).saturating_sub(succeeded)
    }

    pub fn current(&self) -> BreakerState {
        match &*self.lock() {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { half_open: false, .. } => BreakerState::Open,
            State::Open { half_open: true, .. } => BreakerState::HalfOpen,
        }
    }

    /// Returns the last error, unless it is closed.
    pub fn reason(&self) -> Option<String> {
        match &*self.lock() {
            State::Closed { .. } => None,
            State::Open { reason, .. } => Some(reason.clone()),
        }
    }

    /// Notes that a call is attempted: an open breaker becomes half-open.
    pub fn on_attempt(&self) {
        if let State::Open { half_open, .. } = &mut *self.lock() {
            *half_open = true;
        }
    }

    /// Notes a failed call. Returns the delay before the next attempt.
    pub fn failed(&self, why: &str) -> Duration {
        self.failures.add(1);
        let mut state = self.lock();
        if let State::Closed { failures, pauses } = &mut *state {
            *failures += 1;
            if *failures < FAILURES {
                return pauses.next().unwrap_or(PAUSES.1);
            }
            warn!("{} unavailable: rejecting writes, still serving reads: {why}", self.service);
            self.opened.add(1);
            self.open.store(true, Ordering::Release);
            *state =
                State::Open { since: self.clock.now(), reason: why.to_owned(), pauses: backoff(), half_open: false };
        }
        let State::Open { reason, pauses, half_open, .. } = &mut *state else { return PAUSES.1 };
        why.clone_into(reason);
        *half_open = false;
        pauses.next().unwrap_or(PAUSES.1)
    }

    /// Notes a successful call.
    pub fn succeeded(&self) {
        let time = u64::try_from(self.clock.elapsed(self.begun).as_millis()).unwrap_or(u64::MAX);
        self.succeeded.store(time, Ordering::Relaxed);
        let mut state = self.lock();
        if let State::Open { since, .. } = &*state {
            info!("{} available again after {:.1?}", self.service, self.clock.elapsed(*since));
        }
        self.open.store(false, Ordering::Release);
        if !matches!(&*state, State::Closed { failures: 0, .. }) {
            *state = State::closed();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is complete at every step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn closed() -> Self {
        Self::Closed { failures: 0, pauses: backoff() }
    }
}

/// Returns an unlimited exponential backoff with jitter and a maximum delay.
pub fn backoff() -> ExponentialBackoff {
    let builder = ExponentialBuilder::new().with_min_delay(PAUSES.0).with_max_delay(PAUSES.1);
    builder.with_jitter().without_max_times().build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breaker_opens_on_consecutive_failures_only() {
        let breaker = Breaker::new("database", Clock::system());
        breaker.failed("a");
        assert!(breaker.is_closed());
        breaker.succeeded();
        breaker.failed("b");
        assert_eq!((breaker.is_closed(), breaker.current()), (true, BreakerState::Closed));
        breaker.failed("c");
        assert_eq!((breaker.is_closed(), breaker.current()), (false, BreakerState::Open));
        assert_eq!(breaker.reason().as_deref(), Some("c"));
        breaker.on_attempt();
        assert_eq!((breaker.is_closed(), breaker.current()), (false, BreakerState::HalfOpen));
        breaker.failed("d");
        assert_eq!(breaker.current(), BreakerState::Open);
        breaker.on_attempt();
        breaker.succeeded();
        assert_eq!((breaker.is_closed(), breaker.current()), (true, BreakerState::Closed));
        assert_eq!((breaker.reason(), breaker.opened.get(), breaker.failures.get()), (None, 1, 4));
    }

    #[cfg(feature = "postgres")]
    #[test]
    fn silence_is_time_since_last_success() {
        let mut breaker = Breaker::new("database", Clock::system());
        let minute = Duration::from_secs(60);
        breaker.begun = breaker.begun.checked_sub(2 * minute).expect("this machine runs for longer");
        assert!(breaker.silence() >= 2 * minute);
        breaker.succeeded();
        breaker.failed("a");
        assert!(breaker.silence() < minute);
    }

    #[test]
    fn backoff_grows_to_its_maximum_with_jitter() {
        let breaker = Breaker::new("database", Clock::system());
        let pauses: Vec<_> = (0..20).map(|_| breaker.failed("a")).collect();
        assert!(pauses[1] < PAUSES.0 * 2 && pauses[19] >= PAUSES.1, "{pauses:?}");
        assert!(pauses.iter().all(|pause| *pause <= PAUSES.1 * 2), "{pauses:?}");
        assert!(pauses[10..].iter().any(|pause| *pause != pauses[19]), "{pauses:?}");
    }
}
