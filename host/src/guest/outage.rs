//! An outage: the time in which a shard has no instance, since when, and why.

use std::time::{Duration, Instant, SystemTime};

use kvs_runtime::Clock;

/// A rebuild that is over within this time only delays requests. From then on they are rejected at once, and the server is
/// not ready.
const GRACE: Duration = Duration::from_secs(2);

#[derive(Clone, Debug)]
pub struct Outage {
    /// The same moment as `since`, by the monotonic clock.
    pub begun: Instant,
    pub since: SystemTime,
    /// The trap, or the reason why no other instance could be built.
    pub reason: String,
}

impl Outage {
    pub fn new(clock: &Clock, reason: String) -> Self {
        Self { begun: clock.now(), since: clock.wall(), reason }
    }

    /// Whether requests should go elsewhere.
    pub fn is_long(&self, clock: &Clock) -> bool {
        clock.elapsed(self.begun) >= GRACE
    }
}
