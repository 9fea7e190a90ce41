//! Lingering close: the body of a rejected request is still read for a moment, so that the client gets the response. Closing a
//! socket with unread bytes resets it, and the response is lost.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming as Arriving;
use hyper::header::{self, HeaderMap};
use tokio::time::{sleep, timeout};

use super::body::SMALL_PARTS;
use super::frames::SMALL_DATA;

/// A proxy may read a response only when it has sent the whole body.
const MAX_TIME: Duration = Duration::from_secs(5);
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

async fn discard(mut body: Arriving) {
    let reading = async {
        let mut small_parts = 0;
        while let Some(Ok(frame)) = body.frame().await {
            small_parts += u32::from(frame.data_ref().is_none_or(|data| data.len() < SMALL_DATA));
            if small_parts > SMALL_PARTS {
                break;
            }
        }
    };
    // The result is irrelevant: the connection is about to close.
    let _ = timeout(MAX_TIME, reading).await;
}
