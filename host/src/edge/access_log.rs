//! The access log: a line for each request, up to a rate per second. Requests over the rate are counted, and reported at most
//! once a minute.
//!
//! Owns: the logged fields of a request. Bodies and headers are never logged, except the request id.

use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::header::HeaderValue;
use hyper::{Method, StatusCode, Uri};
use kvs_metrics::{Counter, Measured, Page};
use kvs_runtime::{Env, Task};
use tokio::time::{MissedTickBehavior, interval};
use tracing::info;

use crate::guest::Client;

const SECOND: Duration = Duration::from_secs(1);
/// Minimum number of seconds between two reports of requests over the rate.
const REPORT_SECONDS: u32 = 60;
/// Maximum length of a logged target.
const TARGET_BYTES: usize = 256;

/// The access log.
pub struct AccessLog {
    rate: usize,
    /// Lines of the current second, which the task of [`AccessLog::start`] resets.
    logged: Mutex<usize>,
    left_out: Counter,
}

/// The logged fields of a request.
pub struct Line<'l> {
    pub id: &'l HeaderValue,
    pub client: &'l Client,
    pub principal: Option<&'l str>,
    pub method: &'l Method,
    pub uri: &'l Uri,
    pub status: StatusCode,
    /// Size of the response body; None for a stream.
    pub bytes: Option<u64>,
    pub took: Duration,
}

impl AccessLog {
    /// Creates an access log of at most `rate` requests per second.
    pub fn new(rate: usize) -> Arc<Self> {
        Arc::new(Self { rate, logged: Mutex::default(), left_out: Counter::default() })
    }

    pub fn log(&self, line: &Line<'_>) {
        if !self.has_room() {
            return;
        }
        let target = target(line.uri);
        let (method, status, ms) = (line.method.as_str(), line.status.as_u16(), line.took.as_secs_f64() * 1e3);
        let request_id = line.id.to_str().unwrap_or_default();
        let (peer, principal, bytes) = (super::shown(line.client.address), line.principal, line.bytes);
        info!(request_id, %peer, principal, method, target, status, bytes, ms, "request");
    }

    fn has_room(&self) -> bool {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let has_room = *logged < self.rate;
        if has_room {
            *logged += 1;
        } else {
            self.left_out.add(1);
        }
        has_room
    }

    /// Starts the task that begins each second, and reports the requests over the rate.
    pub fn start(self: &Arc<Self>, env: &Env) -> Task {
        let access_log = Arc::clone(self);
        env.tasks.restart("access log", &env.clock, move || Arc::clone(&access_log).run())
    }

    async fn run(self: Arc<Self>) -> anyhow::Result<Infallible> {
        let mut interval = interval(SECOND);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut reported, mut seconds) = (self.left_out.get(), REPORT_SECONDS);
        loop {
            interval.tick().await;
            *self.logged.lock().unwrap_or_else(PoisonError::into_inner) = 0;
            seconds = seconds.saturating_add(1);
            let left_out = self.left_out.get();
            if left_out > reported && seconds >= REPORT_SECONDS {
                info!(left_out = left_out - reported, "access log rate exceeded, requests were not logged");
                (reported, seconds) = (left_out, 0);
            }
        }
    }
}

impl Measured for AccessLog {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let help = "Requests without a line in the access log (--access-log-rate)";
        page.counter("access_log_skipped_requests", help, self.left_out.get())
    }
}

/// Returns path and query, truncated.
pub fn target(uri: &Uri) -> String {
    let mut target = uri.path_and_query().map_or("", |target| target.as_str()).to_owned();
    if target.len() > TARGET_BYTES {
        target.truncate(target.floor_char_boundary(TARGET_BYTES));
        target.push('…');
    }
    target
}
