//! Reading of request bodies, with limits of size, time and rate.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::StatusCode;
use hyper::body::{Body, Incoming as Arriving};
use hyper::header::HeaderMap;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::Limits;
use super::budget::Charge;
use super::frames::SMALL_DATA;
use super::metrics::Limit;
use super::rejection::Rejection;

/// Maximum number of parts of a body that are smaller than 16 bytes, as in chunks of a byte each. A part costs as much as a
/// kilobyte.
pub const SMALL_PARTS: u32 = 10_000;

/// Time before the minimum rate applies.
const GRACE: Duration = Duration::from_secs(2);

/// Reads a body completely.
pub async fn read(
    headers: &HeaderMap,
    mut body: Arriving,
    limits: &Limits,
    deadline: Instant,
    charge: &mut Charge,
    head_bytes: usize,
) -> Result<Bytes, Rejection> {
    if body.is_end_stream() {
        return Ok(Bytes::new());
    }
    let limit = limits.body_bytes;
    if let Some(announced) = body.size_hint().exact()
        && announced > limit
    {
        let reason = format!("the body is {announced} bytes, at most {limit} are allowed");
        return Err(too_large(reason).with_unread(headers, body));
    }
    let begun = Instant::now();
    let (mut whole, mut small_parts) = (Bytes::new(), 0);
    loop {
        let pace = begun + GRACE + Duration::from_secs_f64(whole.len() as f64 / limits.body_rate as f64);
        let frame = match timeout_at(deadline.min(pace), body.frame()).await {
            Ok(None) => return Ok(whole),
            Ok(Some(Ok(frame))) => frame,
            // The client gets this response only if just the framing was invalid.
            Ok(Some(Err(error))) => {
                debug!("body: {error}");
                let reason = "the body is malformed or incomplete";
                return Err(Rejection::new(StatusCode::BAD_REQUEST, reason).closing());
            }
            Err(_) => {
                let late = Rejection::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time");
                return Err(late.of_limit(Limit::BodyTimeout).closing());
            }
        };
        // Trailers are ignored.
        let Ok(data) = frame.into_data() else { continue };
        if (whole.len() + data.len()) as u64 > limit {
            let reason = format!("the body exceeds {limit} bytes");
            return Err(too_large(reason).with_unread(headers, body));
        }
        small_parts += u32::from(data.len() < SMALL_DATA);
        if small_parts > SMALL_PARTS {
            let reason = format!("the body has more than {SMALL_PARTS} parts of less than {SMALL_DATA} bytes");
            return Err(Rejection::new(StatusCode::BAD_REQUEST, reason).with_unread(headers, body));
        }
        if charge.hold(head_bytes + whole.len() + data.len()).is_err() {
            return Err(full().with_unread(headers, body));
        }
        if whole.is_empty() {
            whole = data;
        } else {
            // In place, unless the buffer is shared.
            let mut grown = whole.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
            grown.extend_from_slice(&data);
            whole = grown.freeze();
        }
    }
}

/// Returns the rejection of a request when the budget of bytes in flight is used up.
pub fn full() -> Rejection {
    let reason = "too many bytes of requests and responses are in flight";
    Rejection::new(StatusCode::SERVICE_UNAVAILABLE, reason).of_limit(Limit::InflightBytes)
}

fn too_large(reason: String) -> Rejection {
    Rejection::new(StatusCode::PAYLOAD_TOO_LARGE, reason).of_limit(Limit::ValueBytes)
}
