//! Rejected requests of the admin listener (401, 403) in the audit trail, up to a rate per second.

use std::sync::Arc;

use hyper::StatusCode;
use kvs_runtime::{Env, Task};

use crate::audit::{self, Actor};
use crate::edge::line_rate::LineRate;

/// Maximum number of lines per second. Nobody needs a token to be rejected.
const RATE: usize = 10;

/// The log of rejected requests.
pub struct Rejected {
    lines: Arc<LineRate>,
}

impl Rejected {
    pub fn new() -> Self {
        Self { lines: LineRate::new(RATE) }
    }

    /// Logs a response, if its request lacked the permission. `object` is the request.
    pub fn log(&self, actor: &Actor, object: &str, status: StatusCode) {
        if is_rejected(status) && self.lines.has_room() {
            audit::log(actor, "access", object, format_args!("rejected: {status}"));
        }
    }

    pub fn start(&self, env: &Env) -> Task {
        self.lines.start("audit log", env)
    }
}

/// Returns whether a status says that the request lacked the permission.
fn is_rejected(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}
