//! The access log: a line for each request, so many a second at most. What is left out is counted, and told when the
//! second is over.
//!
//! Owns: what is told of a request. Never a body or a header but its id.

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
/// What is told of a target at most.
const TARGET_BYTES: usize = 256;

pub struct AccessLog {
    most: usize,
    second: Mutex<Second>,
}

/// The second under way; [`AccessLog::start`] has it ended.
#[derive(Default)]
struct Second {
    told: usize,
    left_out: usize,
}

/// What is told.
pub struct Line<'l> {
    pub id: &'l HeaderValue,
    pub peer: SocketAddr,
    pub principal: Option<&'l str>,
    pub method: &'l Method,
    pub uri: &'l Uri,
    pub status: StatusCode,
    /// Of the body; none of a response that goes on.
    pub bytes: Option<u64>,
    pub took: Duration,
}

impl AccessLog {
    /// Tells of at most so many requests a second.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, second: Mutex::default() })
    }

    pub fn tell(&self, line: &Line<'_>) {
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
        let room = second.told < self.most;
        if room {
            second.told += 1;
        } else {
            second.left_out += 1;
        }
        room
    }

    /// Starts the task that tells what was left out in each second, to the end of the process.
    pub fn start(self: &Arc<Self>, env: &Env) -> Task {
        let access_log = Arc::clone(self);
        env.tasks.restart("access log", &env.clock, move || Arc::clone(&access_log).keep())
    }

    async fn keep(self: Arc<Self>) -> anyhow::Result<Infallible> {
        let mut interval = interval(SECOND);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let Second { left_out, .. } = mem::take(&mut *self.second.lock().unwrap_or_else(PoisonError::into_inner));
            if left_out > 0 {
                warn!(left_out, "requests that the access log left out");
            }
        }
    }
}

/// Path and query, and not without end.
fn target(uri: &Uri) -> String {
    let mut target = uri.path_and_query().map_or("", |target| target.as_str()).to_owned();
    if target.len() > TARGET_BYTES {
        target.truncate(target.floor_char_boundary(TARGET_BYTES));
        target.push('…');
    }
    target
}
