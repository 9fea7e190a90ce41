//! `/guest` on the admin listener: which guest serves, and another in its place.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, StatusCode};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::{Answer, not_allowed, text};
use crate::audit::Actor;
use crate::guest::{GUEST_BYTES, Outcome, Source, SwapError, Swapper};

/// How long a component may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(60);

/// Answers what is asked of `/guest`.
pub struct Guests {
    swapper: Arc<Swapper>,
    /// Components are large: one arrives at a time.
    arriving: Mutex<()>,
}

impl Guests {
    pub fn new(swapper: Arc<Swapper>) -> Self {
        Self { swapper, arriving: Mutex::default() }
    }

    pub async fn respond(&self, request: Request<Incoming>, actor: Actor) -> Answer {
        let dry_run = match request.uri().query() {
            None | Some("") => false,
            Some("dry-run") => true,
            Some("rollback") if request.method() == Method::DELETE => return self.roll_back(),
            Some(_) => {
                return line(StatusCode::BAD_REQUEST, "unknown query; there are ?dry-run, and ?rollback for DELETE");
            }
        };
        match *request.method() {
            Method::GET | Method::HEAD => document(self.swapper.status()),
            Method::PUT => {
                let Ok(_alone) = self.arriving.try_lock() else { return refused(&SwapError::Busy) };
                match read(request).await {
                    Ok(component) => self.swap(Source::Sent, component, dry_run, actor).await,
                    Err(refusal) => refusal,
                }
            }
            // What is removed is the guest that was put there; what is left is the one in the binary.
            Method::DELETE => match Source::BuiltIn.read() {
                Ok(component) => self.swap(Source::BuiltIn, component, dry_run, actor).await,
                Err(error) => refused(&SwapError::Failed(error)),
            },
            _ => not_allowed("GET, HEAD, PUT, DELETE"),
        }
    }

    fn roll_back(&self) -> Answer {
        if self.swapper.roll_back() {
            line(StatusCode::ACCEPTED, "rolling back: the guest before serves again in a moment")
        } else {
            line(StatusCode::CONFLICT, "no guest is on probation")
        }
    }

    async fn swap(&self, source: Source, component: Vec<u8>, dry_run: bool, actor: Actor) -> Answer {
        if !dry_run && self.swapper.follows_primary() {
            let reason = "this server stands by and serves the guest of its primary; swap the guest there";
            return line(StatusCode::CONFLICT, reason);
        }
        match self.swapper.swap(source, component, dry_run, actor).await {
            Ok(outcome) => document(report(&outcome)),
            Err(error) => refused(&error),
        }
    }
}

async fn read(request: Request<Incoming>) -> Result<Vec<u8>, Answer> {
    let too_large = || line(StatusCode::PAYLOAD_TOO_LARGE, format!("a guest is at most {GUEST_BYTES} bytes"));
    let body = request.into_body();
    if body.size_hint().lower() > GUEST_BYTES {
        return Err(too_large());
    }
    match timeout(ARRIVAL, Limited::new(body, GUEST_BYTES as usize).collect()).await {
        Ok(Ok(whole)) => Ok(whole.to_bytes().into()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(line(StatusCode::BAD_REQUEST, "the body is malformed or incomplete")),
        Err(_) => Err(line(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")),
    }
}

fn report(outcome: &Outcome) -> Value {
    let Outcome { guest, version, digest, replayed, memory_bytes, pause } = outcome;
    json!({
        "name": guest,
        "version": version,
        "sha256": digest,
        "entries": replayed.entries,
        "keys": replayed.keys,
        "memory_bytes": memory_bytes,
        "seconds": replayed.took.as_secs_f64(),
        "pause_seconds": pause.map(|pause| pause.as_secs_f64()),
    })
}

fn refused(error: &SwapError) -> Answer {
    let status = match error {
        SwapError::Busy => StatusCode::CONFLICT,
        SwapError::Unfit(_) | SwapError::TakenBack { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        SwapError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    line(status, error)
}

fn line(status: StatusCode, reason: impl Display) -> Answer {
    text(status, format!("{reason}\n"))
}

fn document(value: Value) -> Answer {
    let mut response = text(StatusCode::OK, format!("{value:#}\n"));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
