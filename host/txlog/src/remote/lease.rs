//! Read lease: the time for which the primary serves reads without contact to the service that stores the log.
//!
//! A primary that is paused, or partitioned from the service, cannot know whether another process has taken over and
//! written. It serves reads only while less than 0.8 of the lease have passed since it sent a write that the service then
//! committed. Other processes take over only when they have seen no such write for the whole lease. So every read was served
//! before the takeover, whatever clocks those two have, as long as they run at about the same rate. The clock of a virtual
//! machine that is paused as a whole does not: it detects the failover with its next write.
//!
//! Owns: the time up to which reads are served. Must never know: other processes, or what is read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvs_runtime::Clock;

/// No expiry.
const ALWAYS: u64 = u64::MAX;

/// The read lease of a primary.
pub struct Lease {
    pub time: Duration,
    begun: Instant,
    /// Expiry, in microseconds after `begun`. Written by the writer only, read by every request.
    until: AtomicU64,
    clock: Clock,
}

impl Lease {
    /// Creates a lease without expiry, which lasts until a standby is known.
    pub fn new(time: Duration, clock: &Clock) -> Self {
        Self { time, begun: clock.now(), until: AtomicU64::new(ALWAYS), clock: clock.clone() }
    }

    /// Returns whether the lease has expired, so that no read may be served.
    pub fn is_over(&self) -> bool {
        let until = self.until.load(Ordering::Acquire);
        until != ALWAYS && self.after(self.clock.now()) >= until
    }

    /// Renews the lease: a write sent at this time was committed.
    pub fn renew(&self, sent: Instant) {
        if self.until.load(Ordering::Acquire) != ALWAYS {
            self.limit(sent);
        }
    }

    /// Renews the lease by a write that also stored whether there is a lease, and read whether there is a standby.
    pub fn renew_with(&self, sent: Instant, is_written: bool, has_standby: bool) {
        if is_written || has_standby {
            self.limit(sent);
        } else {
            self.until.store(ALWAYS, Ordering::Release);
        }
    }

    fn limit(&self, sent: Instant) {
        let time = u64::try_from((self.time * 4 / 5).as_micros()).unwrap_or(ALWAYS);
        let until = self.after(sent).saturating_add(time);
        let known = self.until.load(Ordering::Acquire);
        self.until.store(if known == ALWAYS { until } else { until.max(known) }, Ordering::Release);
    }

    fn after(&self, time: Instant) -> u64 {
        u64::try_from(time.saturating_duration_since(self.begun).as_micros()).unwrap_or(ALWAYS)
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::sync::{Arc, Mutex};
    use std::time::SystemTime;

    use kvs_runtime::Time;

    use super::*;

    struct Hand(Mutex<Instant>);

    impl Time for Hand {
        fn now(&self) -> Instant {
            *self.0.lock().expect("nothing panics under it")
        }

        fn wall(&self) -> SystemTime {
            SystemTime::UNIX_EPOCH
        }

        fn sleep(&self, _time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
            unreachable!("the lease does not sleep")
        }
    }

    #[test]
    fn lease_expires_only_while_there_is_a_standby() {
        let hand = Arc::new(Hand(Mutex::new(Instant::now())));
        let lease = Lease::new(Duration::from_secs(10), &Clock::given(Arc::clone(&hand) as _));
        let pass = |seconds| *hand.0.lock().expect("nothing panics under it") += Duration::from_secs(seconds);
        let begun = hand.now();
        pass(100);
        lease.renew(begun);
        assert!(!lease.is_over(), "there is no known standby");
        // With a standby the lease expires, even before it is written.
        let sent = hand.now();
        pass(7);
        lease.renew_with(sent, false, true);
        assert!(!lease.is_over());
        pass(1);
        assert!(lease.is_over());
        let sent = hand.now();
        lease.renew(sent);
        pass(7);
        assert!(!lease.is_over());
        // The standby has gone, but the row still has the lease.
        lease.renew_with(hand.now(), true, false);
        pass(8);
        assert!(lease.is_over());
        lease.renew_with(hand.now(), false, false);
        pass(100);
        assert!(!lease.is_over());
    }
}
