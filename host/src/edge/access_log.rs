//! The access log: a line for each request, up to a rate per second. Requests over the rate are counted, and reported at the
//! end of the second.
//!
//! Owns: the logged fields of a request. Bodies and headers are never logged, except the request id.

use std::convert::Infallible;
use std::mem;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::header::HeaderValue;
use hyper::{Method, StatusCode, Uri};
use kvs_runtime::{Env, Task};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

const SECOND: Duration = Duration::from_secs(1);
/// Maximum length of a logged target.
const TARGET_BYTES: usize = 256;

/// The access log.
pub struct AccessLog {
    rate: usize,
    second: Mutex<Second>,
}

/// Counters of the current second, which the task of [`AccessLog::start`] resets.
#[derive(Default)]
struct Second {
    logged: usize,
    left_out: usize,
}

/// The logged fields of a request.
pub struct Line<'l> {
    pub id: &'l HeaderValue,
    pub peer: SocketAddr,
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
        Arc::new(Self { rate, second: Mutex::default() })
    }

    pub fn log(&self, line: &Line<'_>) {
        if !self.has_room() {
            return;
        }
        let target = target(line.uri);
        let (method, status, ms) = (line.method.as_str(), line.status.as_u16(), line.took.as_secs_f64() * 1e3);
        let request_id = line.id.to_str().unwrap_or_default();
        let (peer, principal, bytes) = (line.peer, line.principal, line.bytes);
        info!(request_id, %peer, principal, method, target, status, bytes, ms, "request");
    }

    fn has_room(&self) -> bool {
        let mut second = self.second.lock().unwrap_or_else(PoisonError::into_inner);
        let has_room = second.logged < self.rate;
        if has_room {
            second.logged += 1;
        } else {
            second.left_out += 1;
        }
        has_room
    }

    /// Starts the task that reports the requests over the rate in each second.
    pub fn start(self: &Arc<Self>, env: &Env) -> Task {
        let access_log = Arc::clone(self);
        env.tasks.restart("access log", &env.clock, move || Arc::clone(&access_log).run())
    }

    async fn run(self: Arc<Self>) -> anyhow::Result<Infallible> {
        let mut interval = interval(SECOND);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let Second { left_out, .. } = mem::take(&mut *self.second.lock().unwrap_or_else(PoisonError::into_inner));
            if left_out > 0 {
                warn!(left_out, "access log rate exceeded, requests were not logged");
            }
        }
    }
}

/// Returns path and query, truncated.
fn target(uri: &Uri) -> String {
    let mut target = uri.path_and_query().map_or("", |target| target.as_str()).to_owned();
    if target.len() > TARGET_BYTES {
        target.truncate(target.floor_char_boundary(TARGET_BYTES));
        target.push('…');
    }
    target
}
