//! Answers the host gives itself: a status and one line that says why.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Incoming as Arriving};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Response, StatusCode};
use tokio::time::timeout;

use super::metrics::Limit;

/// What is still read of a body that is refused, so that the client gets to see why: closing a socket with unread bytes
/// resets it, and the response is lost.
const LINGER_BYTES: usize = 16 << 20;
/// In so many parts: a client can send them in chunks of a byte.
const LINGER_PARTS: usize = 10_000;
const LINGER: Duration = Duration::from_secs(2);

pub type Answer = Response<Bytes>;

/// An answer in place of what was wanted. Boxed, since most requests have none.
pub type Refusal = Box<Answer>;

/// One line of plain text.
pub fn refuse(status: StatusCode, reason: &str) -> Answer {
    let mut response = Response::new(Bytes::from(format!("{reason}\n")));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// It is refused because of this limit, which is counted.
pub fn beyond(limit: Limit, mut response: Answer) -> Answer {
    response.extensions_mut().insert(limit);
    response
}

/// Nothing can follow on this connection.
pub fn closing(mut response: Answer) -> Answer {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Refuses a request whose body was not read.
#[expect(clippy::disallowed_methods, reason = "a task that nothing waits for, of a connection that is closed next")]
pub fn unread(headers: &HeaderMap, body: Arriving, response: Answer) -> Answer {
    if body.is_end_stream() {
        return response;
    }
    // Who asked first (Expect: 100-continue) has sent nothing, and reading on would tell it to go on.
    if !headers.contains_key(header::EXPECT) {
        tokio::spawn(discard(body));
    }
    closing(response)
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
    // However it ends, the connection is closed next.
    let _ = timeout(LINGER, reading).await;
}
