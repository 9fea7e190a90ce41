//! A circuit breaker around the database: while it is away, nobody waits for it.
//!
//! Closed, calls are made. After [`FAILURES`] failures in a row it is open: a write is refused at once. After a pause, which
//! grows with every vain try and is never twice the same, it is half open: one call is tried, and clients still wait for
//! nothing. Its success closes it. The one who tries is the writer, so no client is ever the one to find out.
//!
//! Owns: when to try again, and one line for each change. Must never know: what is called.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tracing::{info, warn};

use kvs_metrics::Counter;
use kvs_runtime::Clock;

/// One can be a connection that was idle for too long.
const FAILURES: u32 = 2;
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

pub struct Breaker {
    /// Read by every write.
    open: AtomicBool,
    state: Mutex<State>,
    pub opened: Counter,
    pub failures: Counter,
    clock: Clock,
}

enum State {
    Closed { failures: u32, pauses: ExponentialBackoff },
    Open { since: Instant, reason: String, pauses: ExponentialBackoff, trying: bool },
}

/// What a breaker is, by the name that everybody gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    Closed,
    Open,
    HalfOpen,
}

impl Breaker {
    pub fn new(clock: Clock) -> Self {
        let state = Mutex::new(State::closed());
        Self { open: AtomicBool::new(false), state, opened: Counter::default(), failures: Counter::default(), clock }
    }

    /// The time by its clock.
    pub fn now(&self) -> Instant {
        self.clock.now()
    }

    /// Whether a call would be made.
    pub fn is_closed(&self) -> bool {
        !self.open.load(Ordering::Acquire)
    }

    /// Whether the last call succeeded.
    pub fn is_well(&self) -> bool {
        matches!(&*self.lock(), State::Closed { failures: 0, .. })
    }

    pub fn position(&self) -> Position {
        match &*self.lock() {
            State::Closed { .. } => Position::Closed,
            State::Open { trying: false, .. } => Position::Open,
            State::Open { trying: true, .. } => Position::HalfOpen,
        }
    }

    /// Why it is not closed.
    pub fn reason(&self) -> Option<String> {
        match &*self.lock() {
            State::Closed { .. } => None,
            State::Open { reason, .. } => Some(reason.clone()),
        }
    }

    /// A call is about to be tried.
    pub fn try_again(&self) {
        if let State::Open { trying, .. } = &mut *self.lock() {
            *trying = true;
        }
    }

    /// A call failed. Returns how long to wait before the next.
    pub fn failed(&self, why: &str) -> Duration {
        self.failures.add(1);
        let mut state = self.lock();
        if let State::Closed { failures, pauses } = &mut *state {
            *failures += 1;
            if *failures < FAILURES {
                return pauses.next().unwrap_or(PAUSES.1);
            }
            warn!("the database is away, writes are refused and reads go on: {why}");
            self.opened.add(1);
            self.open.store(true, Ordering::Release);
            *state = State::Open { since: self.now(), reason: why.to_owned(), pauses: backoff(), trying: false };
        }
        let State::Open { reason, pauses, trying, .. } = &mut *state else { return PAUSES.1 };
        why.clone_into(reason);
        *trying = false;
        pauses.next().unwrap_or(PAUSES.1)
    }

    /// A call succeeded.
    pub fn succeeded(&self) {
        let mut state = self.lock();
        if let State::Open { since, .. } = &*state {
            info!("the database is back after {:.1?}", self.clock.elapsed(*since));
        }
        self.open.store(false, Ordering::Release);
        if !matches!(&*state, State::Closed { failures: 0, .. }) {
            *state = State::closed();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is whole at every step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn closed() -> Self {
        Self::Closed { failures: 0, pauses: backoff() }
    }
}

/// Without end, each longer than the one before, up to a point.
pub fn backoff() -> ExponentialBackoff {
    let builder = ExponentialBuilder::new().with_min_delay(PAUSES.0).with_max_delay(PAUSES.1);
    builder.with_jitter().without_max_times().build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_and_closes_after_one_success() {
        let breaker = Breaker::new(Clock::system());
        breaker.failed("a");
        assert!(breaker.is_closed());
        breaker.succeeded();
        breaker.failed("b");
        assert_eq!((breaker.is_closed(), breaker.position()), (true, Position::Closed));
        breaker.failed("c");
        assert_eq!((breaker.is_closed(), breaker.position()), (false, Position::Open));
        assert_eq!(breaker.reason().as_deref(), Some("c"));
        breaker.try_again();
        assert_eq!((breaker.is_closed(), breaker.position()), (false, Position::HalfOpen));
        breaker.failed("d");
        assert_eq!(breaker.position(), Position::Open);
        breaker.try_again();
        breaker.succeeded();
        assert_eq!((breaker.is_closed(), breaker.position()), (true, Position::Closed));
        assert_eq!((breaker.reason(), breaker.opened.get(), breaker.failures.get()), (None, 1, 4));
    }

    #[test]
    fn pauses_grow_up_to_a_point_and_differ() {
        let breaker = Breaker::new(Clock::system());
        let pauses: Vec<_> = (0..20).map(|_| breaker.failed("a")).collect();
        assert!(pauses[1] < PAUSES.0 * 2 && pauses[19] >= PAUSES.1, "{pauses:?}");
        assert!(pauses.iter().all(|pause| *pause <= PAUSES.1 * 2), "{pauses:?}");
        assert!(pauses[10..].iter().any(|pause| *pause != pauses[19]), "{pauses:?}");
    }
}
