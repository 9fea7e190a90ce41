//! Lingering close: the body of a rejected request is still read for a moment, so that the client gets the response. Closing a
//! socket with unread bytes resets it, and the response is lost.

use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming as Arriving;
use hyper::header::{self, HeaderMap};
use tokio::time::{sleep, timeout};

/// Maximum bytes, number of parts, and time: a client can send its body in chunks of a byte.
const MAX_BYTES: usize = 16 << 20;
const MAX_PARTS: usize = 10_000;
const MAX_TIME: Duration = Duration::from_secs(2);
/// Time within which a response has begun.
const RESPONDING: Duration = Duration::from_millis(50);

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
    let mut body = Limited::new(body, MAX_BYTES);
    let reading = async {
        for _ in 0..MAX_PARTS {
            match body.frame().await {
                Some(Ok(_)) => {}
                None | Some(Err(_)) => break,
            }
        }
    };
    // The result is irrelevant: the connection is about to close.
    let _ = timeout(MAX_TIME, reading).await;
}
