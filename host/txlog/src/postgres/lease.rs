//! The read lease: for how long the primary answers reads without a word from the database.
//!
//! A primary that is paused, or cut off from the database, cannot know whether another process has taken over and written.
//! With a standby about, it answers reads only while less than 0.8 of the lease have passed since it sent a statement that
//! was committed under its epoch. The others take the epoch only when they have seen no such statement for all of the lease,
//! which the transaction that takes it checks once more. So whatever was answered was answered before the epoch was taken,
//! whichever clocks those two have, as long as they run at about the same rate. That of a virtual machine that is paused as a
//! whole does not: it learns what it missed from the database, with its next heartbeat.
//!
//! A lease does not rest on the advisory lock. That one tells whether the connection of the primary is there: then it is
//! waited for five times as long, since a primary whose statements take long still writes.
//!
//! The length of the lease is in the row `kvs.writer`, which the primary changes in steps: it keeps to a lease before it is
//! written there, and until after it is taken out. A primary that has not heard of its standby yet has none there, and is
//! waited for longest.
//!
//! Owns: until when reads are answered. Must never know: who else there is, or what is read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvs_runtime::Clock;

/// Without a limit.
const ALWAYS: u64 = u64::MAX;
/// Renewals in the time of one lease.
const RENEWALS: u32 = 4;

pub struct Lease {
    pub time: Duration,
    begun: Instant,
    /// Microseconds after `begun`. Changed by the writer alone, read by every request.
    until: AtomicU64,
    clock: Clock,
}

impl Lease {
    /// One without a limit, as long as no standby is known of.
    pub fn new(time: Duration, clock: &Clock) -> Self {
        Self { time, begun: clock.now(), until: AtomicU64::new(ALWAYS), clock: clock.clone() }
    }

    /// The time between renewals.
    pub fn pause(&self) -> Duration {
        self.time / RENEWALS
    }

    /// Whether nothing that is read now may be answered.
    pub fn is_over(&self) -> bool {
        let until = self.until.load(Ordering::Acquire);
        until != ALWAYS && self.after(self.clock.now()) >= until
    }

    /// A statement that was sent at this time was committed under the epoch.
    pub fn renew(&self, sent: Instant) {
        if self.until.load(Ordering::Acquire) != ALWAYS {
            self.limit(sent);
        }
    }

    /// That statement also wrote whether there is a lease, and read whether there is a standby.
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
            unreachable!("nobody sleeps")
        }
    }

    #[test]
    fn lease_lasts_from_sending_and_only_with_a_standby() {
        let hand = Arc::new(Hand(Mutex::new(Instant::now())));
        let lease = Lease::new(Duration::from_secs(10), &Clock::given(Arc::clone(&hand) as _));
        let pass = |seconds| *hand.0.lock().expect("nothing panics under it") += Duration::from_secs(seconds);
        let begun = hand.now();
        pass(100);
        lease.renew(begun);
        assert!(!lease.is_over(), "no standby is known of");
        // A standby is there: from here on there is a limit, before that is written.
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
        // The standby has gone, and others read that there is a lease.
        lease.renew_with(hand.now(), true, false);
        pass(8);
        assert!(lease.is_over());
        lease.renew_with(hand.now(), false, false);
        pass(100);
        assert!(!lease.is_over());
    }
}
