//! Rate limit: a token bucket for each client, with a rate and a burst.
//!
//! A client is a principal, or else an address (for IPv6, the /64 network of one customer).

use std::convert::Infallible;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use hyper::StatusCode;
use hyper::header::{self, HeaderName, HeaderValue};
use kvs_runtime::{Env, Task};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::addresses::network;
use super::rejection::Rejection;

/// Maximum number of buckets. If there are more clients, those without a name share a bucket until some have gone.
const MAX_CLIENTS: usize = 100_000;
/// Interval at which full buckets are removed.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Rate limit of a client.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    pub quota: Quota,
    /// Maximum time that a request waits for a token before it is rejected.
    pub queue: Duration,
}

impl Rate {
    /// Returns `None` if count or burst is zero.
    pub fn new(count: u32, per: Duration, burst: Option<u32>, queue: Duration) -> Option<Self> {
        let count = NonZeroU32::new(count)?;
        let burst = burst.map_or(Some(count), NonZeroU32::new)?;
        Some(Self { quota: Quota::with_period(per / count.get())?.allow_burst(burst), queue })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Principal(Arc<str>),
    /// None for all clients of Unix sockets.
    Address(Option<IpAddr>),
    Overflow,
}

/// The rate limiter.
pub struct Throttle {
    buckets: DefaultKeyedRateLimiter<Key>,
    rate: Rate,
    is_full: AtomicBool,
}

impl Throttle {
    pub fn new(rate: Rate) -> Arc<Self> {
        Arc::new(Self { buckets: RateLimiter::keyed(rate.quota), rate, is_full: AtomicBool::new(false) })
    }

    /// Takes a token, or waits for one within the time of the queue. Returns whether it had to wait.
    pub async fn admit(&self, principal: Option<&Arc<str>>, address: Option<IpAddr>) -> Result<bool, Rejection> {
        let key = match principal {
            Some(name) => Key::Principal(Arc::clone(name)),
            None if self.is_full.load(Ordering::Relaxed) => Key::Overflow,
            None => Key::Address(address.map(network)),
        };
        let latest = Instant::now() + self.rate.queue;
        let mut waited = false;
        loop {
            let Err(not_yet) = self.buckets.check_key(&key) else { return Ok(waited) };
            let wait = not_yet.wait_time_from(DefaultClock::default().now());
            if Instant::now() + wait > latest {
                return Err(self.rejection(wait));
            }
            sleep(wait).await;
            waited = true;
        }
    }

    fn rejection(&self, wait: Duration) -> Rejection {
        let mut rejection = Rejection::new(StatusCode::TOO_MANY_REQUESTS, "rate limit exceeded; retry later");
        // The headers have a resolution of one second.
        let wait = wait.as_secs_f64().ceil().max(1.0);
        let (burst, window) = (self.rate.quota.burst_size(), self.rate.quota.burst_size_replenished_in());
        let window = window.as_secs_f64().ceil().max(1.0);
        for (name, value) in [
            (header::RETRY_AFTER, format!("{wait}")),
            (HeaderName::from_static("ratelimit-policy"), format!("\"client\";q={burst};w={window}")),
            (HeaderName::from_static("ratelimit"), format!("\"client\";r=0;t={wait}")),
        ] {
            if let Ok(value) = HeaderValue::from_str(&value) {
                rejection = rejection.with_header(name, value);
            }
        }
        rejection
    }

    /// Starts the task that removes the buckets of idle clients.
    pub fn start(self: &Arc<Self>, env: &Env) -> Task {
        let throttle = Arc::clone(self);
        env.tasks.restart("throttle sweep", &env.clock, move || Arc::clone(&throttle).sweep())
    }

    async fn sweep(self: Arc<Self>) -> anyhow::Result<Infallible> {
        let mut interval = interval(SWEEP_INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            self.buckets.retain_recent();
            self.buckets.shrink_to_fit();
            self.is_full.store(self.buckets.len() > MAX_CLIENTS, Ordering::Relaxed);
        }
    }
}
