//! Rejections by the host: a status and a line with the reason.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Incoming as Arriving};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Response, StatusCode};
use tokio::time::{sleep, timeout};

use super::metrics::Limit;

/// Lingering close: bytes and time for which the body of a rejected request is still read, so that the client gets the
/// response: closing a socket with unread bytes resets it, and the response is lost.
const LINGER_BYTES: usize = 16 << 20;
/// Maximum number of parts of such a body: a client can send it in chunks of a byte.
const LINGER_PARTS: usize = 10_000;
const LINGER: Duration = Duration::from_secs(2);
/// Time within which a response has begun.
const RESPONDING: Duration = Duration::from_millis(50);

pub type Answer = Response<Bytes>;

/// A rejection. Boxed, since most requests have none.
pub type Refusal = Box<Answer>;

/// Creates a rejection with a line of plain text.
pub fn refuse(status: StatusCode, reason: &str) -> Answer {
    let mut response = Response::new(Bytes::from(format!("{reason}\n")));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Tags a rejection with the exceeded limit, for the metrics.
pub fn beyond(limit: Limit, mut response: Answer) -> Answer {
    response.extensions_mut().insert(limit);
    response
}

/// Closes the connection after the response.
pub fn closing(mut response: Answer) -> Answer {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Rejects a request whose body was not read, with a lingering close.
pub fn unread(headers: &HeaderMap, body: Arriving, response: Answer) -> Answer {
    if body.is_end_stream() {
        return response;
    }
    linger(headers, body);
    closing(response)
}

/// Reads the body of a rejected request for a moment, while it is answered.
#[expect(clippy::disallowed_methods, reason = "a detached task of a connection that is about to close")]
pub fn linger(headers: &HeaderMap, body: Arriving) {
    let expects = headers.contains_key(header::EXPECT);
    tokio::spawn(async move {
        // With Expect: 100-continue, hyper would ask for the body unless the response has begun. A proxy sends it all the same.
        if expects {
            sleep(RESPONDING).await;
        }
        discard(body).await;
    });
}

async fn discard(body: Arriving) {
    let mut body = Limited::new(body, LINGER_BYTES);
    let reading = async {
        for _ in 0..LINGER_PARTS {
            match body.frame().await {
                Some(Ok(_)) => {}
                None | Some(Err(_)) => break,
            }
        }
    };
    // The result is irrelevant: the connection is about to close.
    let _ = timeout(LINGER, reading).await;
}
