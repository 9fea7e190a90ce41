//! The access log: a line for each request, up to a rate per second.
//!
//! Owns: the logged fields of a request. Bodies and headers are never logged, except the request id.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hyper::header::HeaderValue;
use hyper::{Method, StatusCode, Uri};
use kvs_metrics::{Measured, Page};
use kvs_runtime::{Env, Task};
use tracing::info;

use super::line_rate::LineRate;
use crate::guest::Client;

/// Maximum length of a logged target.
const TARGET_BYTES: usize = 256;

/// The access log.
pub struct AccessLog {
    lines: Arc<LineRate>,
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
        Arc::new(Self { lines: LineRate::new(rate) })
    }

    pub fn log(&self, line: &Line<'_>) {
        if !self.lines.has_room() {
            return;
        }
        let target = target(line.uri);
        let (method, status, ms) = (line.method.as_str(), line.status.as_u16(), milliseconds(line.took));
        let request_id = line.id.to_str().unwrap_or_default();
        let (peer, principal, bytes) = (super::shown(line.client.address), line.principal, line.bytes);
        info!(request_id, %peer, principal, method, target, status, bytes, ms, "request");
    }

    pub fn start(&self, env: &Env) -> Task {
        self.lines.start("access log", env)
    }
}

impl Measured for AccessLog {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let help = "Requests without a line in the access log (--access-log-rate)";
        page.counter("access_log_skipped_requests", help, self.lines.left_out.get())
    }
}

/// Returns a duration in milliseconds, to the microsecond.
pub fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
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
