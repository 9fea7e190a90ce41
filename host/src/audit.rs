//! The audit trail: changes to a server for everybody, with who made them, and rejected requests to the admin listener, as log
//! lines of the target `audit`.

use std::fmt::Display;
use std::net::SocketAddr;

use anyhow::Result;
use hyper::header::HeaderValue;
use rustix::process::getuid;
use tracing::info;

/// Target of the log lines, for `--log-filter`.
pub const TARGET: &str = "audit";

/// The cause of an action: a client, a user or a signal.
#[derive(Clone)]
pub struct Actor {
    /// Name of the token, or the user or the signal. None where the listener asks for no token.
    pub principal: Option<String>,
    pub request_id: Option<HeaderValue>,
    /// Address of a client.
    pub peer: Option<SocketAddr>,
}

impl Actor {
    /// The user of a command.
    pub fn user() -> Self {
        Self::of_user(getuid().as_raw())
    }

    pub fn of_user(uid: u32) -> Self {
        Self::cause(&format!("uid={uid}"))
    }

    /// A cause within the process.
    pub fn cause(cause: &str) -> Self {
        Self { principal: Some(cause.to_owned()), request_id: None, peer: None }
    }
}

/// Logs an action on an object, and its outcome.
pub fn log(actor: &Actor, action: &str, object: impl Display, outcome: impl Display) {
    let request_id = actor.request_id.as_ref().and_then(|id| id.to_str().ok());
    let principal = actor.principal.as_deref();
    let peer = actor.peer.map(tracing::field::display);
    let (object, outcome) = (object.to_string(), outcome.to_string());
    info!(target: TARGET, action, object, outcome, principal, peer, request_id, "audit");
}

/// Logs the outcome of a command of a user, and returns it.
pub fn outcome<T>(action: &str, object: impl Display, done: Result<T>) -> Result<T> {
    match &done {
        Ok(_) => log(&Actor::user(), action, object, "success"),
        Err(error) => log(&Actor::user(), action, object, format_args!("{error:#}")),
    }
    done
}
