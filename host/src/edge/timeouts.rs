//! Timeouts of connections: keep-alive idle, request header read, and response write.
//!
//! Activity is recorded by one or two atomic stores. The timeouts are checked periodically, up to a quarter of the timeout
//! late, which is cheaper than a timer for each request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::Limits;
use super::metrics::Limit;

/// Timeout of a request head at shutdown: one that was sent in two packets arrives whole.
const SHUTDOWN_HEADER_TIMEOUT: Duration = Duration::from_secs(1);

/// Minimum interval between two checks of a connection.
const MIN_INTERVAL: Duration = Duration::from_millis(10);

/// Recorded activity of a connection.
#[derive(Default)]
pub struct Activity {
    /// Number of requests begun and ended. A request is in flight until the end of its response.
    begun: AtomicU64,
    ended: AtomicU64,
    /// Number of reads, in all and until the end of the last request.
    reads: AtomicU64,
    reads_before: AtomicU64,
}

impl Activity {
    pub fn read(&self) {
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns whether a request is in flight.
    pub fn is_busy(&self) -> bool {
        self.begun.load(Ordering::Relaxed) > self.ended.load(Ordering::Relaxed)
    }

    pub fn begin(self: Arc<Self>) -> InFlight {
        self.begun.fetch_add(1, Ordering::Relaxed);
        InFlight(self)
    }
}

/// Guard of a request in flight.
pub struct InFlight(Arc<Activity>);

impl Drop for InFlight {
    fn drop(&mut self) {
        let Activity { ended, reads, reads_before, .. } = &*self.0;
        reads_before.store(reads.load(Ordering::Relaxed), Ordering::Relaxed);
        ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// Action on a connection.
pub enum TimeoutAction {
    Continue,
    /// Graceful shutdown: responses are still sent.
    ShutDown,
    Abort(Limit),
}

/// The timeouts of one connection.
pub struct ConnectionTimeouts {
    activity: Arc<Activity>,
    http2: bool,
    header_timeout: Duration,
    idle_timeout: Duration,
    /// State at the last check, and the time since when.
    state: State,
    since: Instant,
    /// Time since when it is shutting down.
    ending: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Busy,
    /// Waiting for the first request, or for the rest of a request head.
    ReadingHead {
        ended: u64,
    },
    /// Idle after this number of requests.
    Idle {
        ended: u64,
    },
}

impl ConnectionTimeouts {
    pub fn new(activity: Arc<Activity>, http2: bool, limits: &Limits) -> Self {
        let (header_timeout, idle_timeout) = (limits.header_timeout, limits.idle_timeout);
        let (state, since) = (State::ReadingHead { ended: 0 }, Instant::now());
        Self { activity, http2, header_timeout, idle_timeout, state, since, ending: None }
    }

    /// Shortens the timeout of request heads: no request was made yet, and the shutdown waits.
    pub fn shut_down(&mut self) {
        self.header_timeout = self.header_timeout.min(SHUTDOWN_HEADER_TIMEOUT);
    }

    /// Returns the time until the next check.
    pub fn next_look(&self) -> Duration {
        (self.header_timeout.min(self.idle_timeout) / 4).max(MIN_INTERVAL)
    }

    /// Checks the timeouts.
    pub fn look(&mut self) -> TimeoutAction {
        let state = self.now();
        if state != self.state {
            (self.state, self.since, self.ending) = (state, Instant::now(), None);
        }
        let (timeout, limit) = match state {
            State::Busy => return TimeoutAction::Continue,
            State::ReadingHead { .. } => (self.header_timeout, Limit::HeaderTimeout),
            State::Idle { .. } => (self.idle_timeout, Limit::IdleTimeout),
        };
        let is_over = self.since.elapsed() >= timeout;
        // A partial head of HTTP/1.1 cannot be responded to.
        let at_once = !self.http2 && matches!(state, State::ReadingHead { .. });
        match self.ending {
            None if is_over && at_once => TimeoutAction::Abort(limit),
            None if is_over => {
                self.ending = Some(Instant::now());
                TimeoutAction::ShutDown
            }
            Some(since) if since.elapsed() >= timeout => TimeoutAction::Abort(limit),
            None | Some(_) => TimeoutAction::Continue,
        }
    }

    fn now(&self) -> State {
        let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let Activity { begun, ended, reads, reads_before } = &*self.activity;
        let (ended, begun) = (get(ended), get(begun));
        if begun > ended {
            State::Busy
        // With HTTP/2 other frames than heads arrive between requests.
        } else if begun == 0 || (!self.http2 && get(reads) != get(reads_before)) {
            State::ReadingHead { ended }
        } else {
            State::Idle { ended }
        }
    }
}
