//! Consistency of reads on a standby: they are stale by design, so they are served only when the client or the operator accepts
//! stale reads, and their age is in the response.
//!
//! Owns: the headers of requests and responses. Must never know: the replication of a standby.

use std::time::Duration;

use hyper::StatusCode;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use super::head;
use super::problem::NOT_PRIMARY;
use super::rejection::Rejection;

/// Request header: the consistency that the client requires.
const CONSISTENCY: HeaderName = HeaderName::from_static("kvs-consistency");
/// Response header: maximum staleness of the response, in milliseconds.
const STALE_AGE: HeaderName = HeaderName::from_static("kvs-stale-age-ms");
/// Response header of a rejection: URL of the primary.
const PRIMARY: HeaderName = HeaderName::from_static("kvs-primary");

/// Returns whether a client accepts stale reads; None if it has no preference.
pub fn accepts_stale(headers: &HeaderMap) -> Result<Option<bool>, Rejection> {
    let mut given = head::values(headers, CONSISTENCY).map(HeaderValue::as_bytes);
    match (given.next(), given.next()) {
        (None, _) => Ok(None),
        (Some(b"stale"), None) => Ok(Some(true)),
        (Some(b"strong"), None) => Ok(Some(false)),
        _ => Err(Rejection::new(StatusCode::BAD_REQUEST, "kvs-consistency is stale or strong, once")),
    }
}

/// Rejects a request that only the primary serves, with the URL of the primary if it is known.
pub fn not_primary(reason: &str, is_read: bool, primary: Option<&str>) -> Rejection {
    let mut line = reason.to_owned();
    if is_read {
        line += ", and consistent reads; kvs-consistency: stale asks for a stale one";
    }
    let url = primary.and_then(|primary| HeaderValue::from_str(primary).ok());
    if let (Some(primary), Some(_)) = (primary, &url) {
        line += &format!("; the primary is {primary}");
    }
    let rejection = Rejection::new(StatusCode::SERVICE_UNAVAILABLE, line).with_code(NOT_PRIMARY);
    match url {
        Some(url) => rejection.with_header(PRIMARY, url),
        None => rejection,
    }
}

/// Adds the age of a stale read.
pub fn set_age(headers: &mut HeaderMap, age: Duration) {
    headers.insert(STALE_AGE, HeaderValue::from(u64::try_from(age.as_millis()).unwrap_or(u64::MAX)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consistency_is_stale_or_strong_once() {
        let asked = |values: &[&'static str]| {
            let headers = values.iter().map(|value| (CONSISTENCY, HeaderValue::from_static(value))).collect();
            accepts_stale(&headers).map_err(|rejection| rejection.status())
        };
        assert_eq!(asked(&[]), Ok(None));
        assert_eq!(asked(&["stale"]), Ok(Some(true)));
        assert_eq!(asked(&["strong"]), Ok(Some(false)));
        for malformed in [&[""][..], &["Stale"], &["eventual"], &["stale, strong"], &["stale", "stale"]] {
            assert_eq!(asked(malformed), Err(StatusCode::BAD_REQUEST), "{malformed:?}");
        }
    }

    #[test]
    fn rejection_names_the_primary_where_it_is_known() {
        let known = not_primary("this server stands by", false, Some("http://10.0.0.1:8080"));
        assert_eq!(known.headers()[PRIMARY], "http://10.0.0.1:8080");
        assert_eq!(known.reason(), "this server stands by; the primary is http://10.0.0.1:8080");
        // The URL comes from a file or a database.
        for unfit in [None, Some("http://a\r\nb: c")] {
            let unknown = not_primary("this server stands by", false, unfit);
            assert!(!unknown.headers().contains_key(PRIMARY));
            assert_eq!(unknown.reason(), "this server stands by");
        }
    }
}
