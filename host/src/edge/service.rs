//! One request: read whole within its limits, answered by the guest, held back until the answer is safe to give.
//!
//! Must never know: sockets, what the request means.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming as Arriving};
use hyper::header::{self, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Request, Response, StatusCode};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::debug;

use super::Limits;
use crate::guest::{CallError, Client, Incoming, Shard};
use crate::log::TransactionLog;

/// What is still read of a body that is refused, so that the client gets to see why: closing a socket with unread bytes
/// resets it, and the response is lost.
const LINGER_BYTES: usize = 16 << 20;
const LINGER: Duration = Duration::from_secs(2);

/// Answers requests.
pub struct Service {
    pub shard: Arc<Shard>,
    pub log: Arc<dyn TransactionLog>,
    pub limits: Limits,
}

impl Service {
    pub(super) async fn respond(&self, request: Request<Arriving>, client: Arc<Client>) -> Response<Full<Bytes>> {
        let deadline = Instant::now() + self.limits.request_timeout;
        let request = match self.read(request, deadline).await {
            Ok(request) => request,
            Err(refusal) => return refusal,
        };
        let answer = match self.shard.call(Incoming { request, client }, deadline).await {
            Ok(answer) => answer,
            Err(error @ CallError::Trapped) => return refuse(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
            Err(error @ CallError::Late) => return refuse(StatusCode::SERVICE_UNAVAILABLE, &error.to_string()),
        };
        // Nothing a client has seen may be taken back by a crash.
        match timeout_at(deadline, self.log.watermark().reached(answer.rests_on)).await {
            Ok(Ok(())) => answer.response.map(Full::new),
            Ok(Err(unknown)) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &unknown.to_string()),
            Err(_) if answer.appended => {
                refuse(StatusCode::GATEWAY_TIMEOUT, "outcome unknown: this was not known to be durable in time")
            }
            Err(_) => {
                refuse(StatusCode::SERVICE_UNAVAILABLE, "what this would show was not known to be durable in time")
            }
        }
    }

    /// Reads the whole body, or says why not.
    async fn read(
        &self,
        request: Request<Arriving>,
        deadline: Instant,
    ) -> Result<Request<Bytes>, Response<Full<Bytes>>> {
        let (head, mut body) = request.into_parts();
        if head_bytes(&head) > self.limits.header_bytes {
            return Err(closing(refuse(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "the head of the request is too large",
            )));
        }
        if body.is_end_stream() {
            return Ok(Request::from_parts(head, Bytes::new()));
        }
        let limit = self.limits.body_bytes;
        if let Some(announced) = body.size_hint().exact()
            && announced > limit
        {
            // Who asked first (Expect: 100-continue) has sent nothing, and reading on would tell it to go on.
            if !head.headers.contains_key(header::EXPECT) {
                tokio::spawn(discard(body));
            }
            return Err(too_large(&format!("the body is {announced} bytes, at most {limit} are allowed")));
        }
        let whole = Limited::new(&mut body, usize::try_from(limit).unwrap_or(usize::MAX)).collect();
        match timeout_at(deadline, whole).await {
            Ok(Ok(whole)) => Ok(Request::from_parts(head, whole.to_bytes())),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                tokio::spawn(discard(body));
                Err(too_large(&format!("the body is more than the {limit} bytes that are allowed")))
            }
            // Nobody is left to read this, unless only the framing was wrong.
            Ok(Err(error)) => {
                debug!("body: {error}");
                Err(closing(refuse(StatusCode::BAD_REQUEST, "the body is malformed or incomplete")))
            }
            Err(_) => Err(closing(refuse(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time"))),
        }
    }
}

/// The size of a request's head, near enough. hyper's own limit is one of its buffer, which it may pass by a read.
fn head_bytes(head: &Parts) -> usize {
    let target = head.uri.path_and_query().map_or(0, |target| target.as_str().len());
    target + head.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>()
}

async fn discard(body: Arriving) {
    // However it ends, the connection is closed next.
    let _ = timeout(LINGER, Limited::new(body, LINGER_BYTES).collect()).await;
}

fn too_large(reason: &str) -> Response<Full<Bytes>> {
    closing(refuse(StatusCode::PAYLOAD_TOO_LARGE, reason))
}

/// One line of plain text.
fn refuse(status: StatusCode, reason: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(format!("{reason}\n"))));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// The rest of the body was not read, so nothing can follow on this connection.
fn closing(mut response: Response<Full<Bytes>>) -> Response<Full<Bytes>> {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}
