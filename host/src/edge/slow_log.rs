//! The log of slow requests: where the time of each went, up to a rate per second.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kvs_metrics::{Counter, Measured, Page};
use kvs_runtime::{Env, Task};
use tracing::info;

use super::access_log::{Line, milliseconds, target};
use super::line_rate::LineRate;

/// Maximum number of lines per second. More say little more, and are many when everything is slow.
const RATE: usize = 10;

/// The log of slow requests.
pub struct SlowLog {
    threshold: Duration,
    lines: Arc<LineRate>,
    slow: Counter,
}

/// Where the time of a request went. The rest of it: the body, and the rate limit.
#[derive(Default)]
pub struct Times {
    /// In the queue for the guest.
    pub queue: Duration,
    pub guest: Duration,
    /// Until what the response shows was durable.
    pub commit: Duration,
}

impl SlowLog {
    pub fn new(threshold: Duration) -> Arc<Self> {
        Arc::new(Self { threshold, lines: LineRate::new(RATE), slow: Counter::default() })
    }

    /// Logs a request, if it was slow.
    pub fn log(&self, line: &Line<'_>, times: &Times) {
        if line.took < self.threshold {
            return;
        }
        self.slow.add(1);
        if !self.lines.has_room() {
            return;
        }
        let (method, target, status) = (line.method.as_str(), target(line.uri), line.status.as_u16());
        let request_id = line.id.to_str().unwrap_or_default();
        let [ms, queue_ms, guest_ms, commit_ms] = [line.took, times.queue, times.guest, times.commit].map(milliseconds);
        info!(request_id, method, target, status, ms, queue_ms, guest_ms, commit_ms, "slow request");
    }

    pub fn start(&self, env: &Env) -> Task {
        self.lines.start("slow request log", env)
    }
}

impl Measured for SlowLog {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        page.counter("slow_requests", "Requests that took longer than --slow-request", self.slow.get())
    }
}
