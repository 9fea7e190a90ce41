//! How long a connection may ask nothing, take its time with the head of a request, or leave its answers lying.
//!
//! What happens on a connection is noted as it happens, for an atomic store or two; who has no more patience finds out by
//! looking at the notes now and again, up to a quarter of its time late.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::Limits;
use super::metrics::Limit;

/// Looks at a connection come no closer to each other.
const SHORTEST: Duration = Duration::from_millis(10);

/// What happens on a connection.
#[derive(Default)]
pub struct Activity {
    /// Requests begun and ended. One whose response goes on is under way for as long as it does.
    begun: AtomicU64,
    ended: AtomicU64,
    /// Times that bytes came, and how many of these before a request ended last.
    reads: AtomicU64,
    reads_before: AtomicU64,
}

impl Activity {
    pub fn read(&self) {
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    pub fn begin(self: Arc<Self>) -> UnderWay {
        self.begun.fetch_add(1, Ordering::Relaxed);
        UnderWay(self)
    }
}

/// A request under way, until it is dropped.
pub struct UnderWay(Arc<Activity>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let Activity { ended, reads, reads_before, .. } = &*self.0;
        reads_before.store(reads.load(Ordering::Relaxed), Ordering::Relaxed);
        ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// What to do with a connection.
pub enum Verdict {
    GoOn,
    /// Nothing is lost by that, if its client takes its answers.
    End,
    CutOff(Limit),
}

pub struct Patience {
    activity: Arc<Activity>,
    http2: bool,
    header_timeout: Duration,
    idle_timeout: Duration,
    /// Since when it does what it does.
    state: State,
    since: Instant,
    /// Since when it was told to end.
    ending: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Busy,
    /// It has yet to ask for anything, or a part of a head is here.
    Asking {
        ended: u64,
    },
    /// After so many requests.
    Idle {
        ended: u64,
    },
}

impl Patience {
    pub fn new(activity: Arc<Activity>, http2: bool, limits: &Limits) -> Self {
        let (header_timeout, idle_timeout) = (limits.header_timeout, limits.idle_timeout);
        let (state, since) = (State::Asking { ended: 0 }, Instant::now());
        Self { activity, http2, header_timeout, idle_timeout, state, since, ending: None }
    }

    /// When to look again.
    pub fn next_look(&self) -> Duration {
        (self.header_timeout.min(self.idle_timeout) / 4).max(SHORTEST)
    }

    pub fn look(&mut self) -> Verdict {
        let state = self.now();
        if state != self.state {
            (self.state, self.since, self.ending) = (state, Instant::now(), None);
        }
        let (timeout, limit) = match state {
            State::Busy => return Verdict::GoOn,
            State::Asking { .. } => (self.header_timeout, Limit::HeaderTimeout),
            State::Idle { .. } => (self.idle_timeout, Limit::IdleTimeout),
        };
        let is_over = self.since.elapsed() >= timeout;
        // To half a head of HTTP/1.1 there is nothing to say.
        let at_once = !self.http2 && matches!(state, State::Asking { .. });
        match self.ending {
            None if is_over && at_once => Verdict::CutOff(limit),
            None if is_over => {
                self.ending = Some(Instant::now());
                Verdict::End
            }
            Some(told) if told.elapsed() >= timeout => Verdict::CutOff(limit),
            None | Some(_) => Verdict::GoOn,
        }
    }

    fn now(&self) -> State {
        let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let Activity { begun, ended, reads, reads_before } = &*self.activity;
        let (ended, begun) = (get(ended), get(begun));
        if begun > ended {
            State::Busy
        // With HTTP/2 other things than heads come between requests.
        } else if begun == 0 || (!self.http2 && get(reads) != get(reads_before)) {
            State::Asking { ended }
        } else {
            State::Idle { ended }
        }
    }
}
