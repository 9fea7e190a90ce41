//! Validation of request heads.
//!
//! hyper has parsed the head: every line of it is well-formed. The remaining rules prevent request smuggling and other
//! ambiguities between servers, and enforce the limits.

use std::net::Ipv6Addr;

use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, StatusCode, Version};

use super::Limits;
use super::metrics::Limit;
use super::rejection::Rejection;

/// Transfer coding of a body of unknown length.
const CHUNKED: &[u8] = b"chunked";

/// Returns the values of a header of a request, found by a scan: requests have few headers, and a lookup hashes the name.
pub fn values(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &HeaderValue> {
    headers.iter().filter(move |(other, _)| **other == name).map(|(_, value)| value)
}

/// Returns whether a request with this method reads only: GET, HEAD, OPTIONS, TRACE, and QUERY, a GET with a body.
pub fn is_safe(method: &Method) -> bool {
    method.is_safe() || method.as_str() == "QUERY"
}

/// Rejects a request that another server could parse differently, on any listener.
pub fn check_framing(head: &Parts) -> Result<(), Rejection> {
    if let Some(reason) = ambiguous(head) {
        return Err(closing(StatusCode::BAD_REQUEST, reason));
    }
    let mut codings = values(&head.headers, header::TRANSFER_ENCODING);
    let (coding, another) = (codings.next(), codings.next());
    if another.is_some() {
        return Err(closing(StatusCode::BAD_REQUEST, "at most one Transfer-Encoding header is allowed"));
    }
    if coding.is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(CHUNKED)) {
        let reason = "the only supported transfer coding is chunked";
        return Err(closing(StatusCode::NOT_IMPLEMENTED, reason));
    }
    if head.method == Method::CONNECT {
        return Err(closing(StatusCode::NOT_IMPLEMENTED, "CONNECT is not supported"));
    }
    Ok(())
}

/// Checks the head of a request.
pub fn check(head: &Parts, limits: &Limits) -> Result<(), Rejection> {
    check_framing(head)?;
    let target = head.uri.path_and_query().map_or("", |target| target.as_str());
    if !target.starts_with('/') {
        let reason = "the request target must be a path that starts with a slash";
        return Err(closing(StatusCode::BAD_REQUEST, reason));
    }
    if target.len() > limits.target_bytes {
        let too_long = closing(StatusCode::URI_TOO_LONG, "the request target is too long");
        return Err(too_long.of_limit(Limit::TargetBytes));
    }
    // For HTTP/1.1 hyper enforces this limit itself.
    if head.headers.len() > limits.headers {
        return Err(closing(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "the request has too many headers"));
    }
    if bytes(head) > limits.header_bytes {
        let too_large = closing(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "the request head is too large");
        return Err(too_large.of_limit(Limit::HeaderBytes));
    }
    Ok(())
}

fn closing(status: StatusCode, reason: &'static str) -> Rejection {
    Rejection::new(status, reason).closing()
}

/// Returns an ambiguity that a proxy could interpret differently (RFC 9112, section 3.2; RFC 9113, section 8.3.1).
fn ambiguous(head: &Parts) -> Option<&'static str> {
    let mut hosts = values(&head.headers, header::HOST);
    let (host, another) = (hosts.next(), hosts.next());
    let authority = head.uri.authority().map(|authority| authority.as_str().as_bytes());
    let http2 = head.version == Version::HTTP_2;
    if another.is_some() || (host.is_none() && head.version == Version::HTTP_11) {
        return Some("exactly one Host header is required");
    }
    let host = host.map(HeaderValue::as_bytes);
    if !host.is_none_or(is_authority) || !authority.is_none_or(is_authority) {
        return Some("the Host header must be a name or an address, and optionally a port");
    }
    if head
        .uri
        .scheme_str()
        .is_some_and(|scheme| !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("https"))
    {
        return Some("the scheme of the request target must be http or https");
    }
    if !http2 {
        return None;
    }
    match (host, authority) {
        (None | Some(b""), None) => return Some("an authority is required"),
        // In HTTP/1.1 the absolute form has precedence over the Host header.
        (Some(host), Some(authority)) if !host.eq_ignore_ascii_case(authority) => {
            return Some("Host and :authority differ");
        }
        _ => {}
    }
    // HTTP/1.1 strips it, HTTP/2 forbids it.
    let padded = |value: &HeaderValue| value.as_bytes().trim_ascii().len() < value.len();
    head.headers.values().any(padded).then_some("a header value begins or ends with white space")
}

/// Returns whether a text is `uri-host [ ":" port ]` (RFC 3986, section 3.2.2), which can be empty. `IPvFuture` is rejected.
fn is_authority(text: &[u8]) -> bool {
    if let [b'[', rest @ ..] = text {
        let address = str::from_utf8(rest).ok().and_then(|rest| rest.split_once(']'));
        return address.is_some_and(|(address, port)| address.parse::<Ipv6Addr>().is_ok() && is_port(port.as_bytes()));
    }
    let (host, port) = text.split_at(text.iter().position(|byte| *byte == b':').unwrap_or(text.len()));
    is_name(host) && is_port(port)
}

/// Returns whether a text has only the characters of names, without those that start a path, a user or a port.
fn is_name(mut text: &[u8]) -> bool {
    while let [byte, rest @ ..] = text {
        text = match (byte, rest) {
            (b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z', rest) => rest,
            (b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+', rest) => rest,
            (b',' | b';' | b'=', rest) => rest,
            (b'%', [high, low, rest @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => rest,
            _ => return false,
        };
    }
    true
}

/// Returns whether a text is a colon and a port, which can be missing, or nothing.
fn is_port(text: &[u8]) -> bool {
    let Some((colon, digits)) = text.split_first() else { return true };
    let add = |number: u16, digit: &u8| {
        let digit = digit.is_ascii_digit().then(|| u16::from(digit - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    };
    *colon == b':' && digits.iter().try_fold(0, add).is_some()
}

/// Returns the approximate size of a request head. The limit of hyper is that of its buffer, which one read may exceed.
pub fn bytes(head: &Parts) -> usize {
    let target = head.uri.path_and_query().map_or(0, |target| target.as_str().len());
    target + head.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authority_is_a_host_and_a_port() {
        for (text, valid) in [
            ("", true),
            ("kvs", true),
            ("kvs.example.org.", true),
            ("kvs:8080", true),
            ("kvs:", true),
            (":80", true),
            ("127.0.0.1:1", true),
            ("[::1]", true),
            ("[::1]:65535", true),
            ("a%2db_~!$&'()*+,;=", true),
            ("a:80:80", false),
            ("a:b", false),
            ("a:+1", false),
            ("a:65536", false),
            ("[::1", false),
            ("::1", false),
            ("[::1]80", false),
            ("[::1]:80:80", false),
            ("[kvs]", false),
            ("[fe80::1%25eth0]", false),
            ("a%2", false),
            ("a%zz", false),
            ("user@kvs", false),
            ("kvs/v1", false),
            ("kvs?x", false),
            ("kvs#x", false),
            ("k vs", false),
            ("k\"vs", false),
            ("k\\vs", false),
            ("kvs,\u{e4}", false),
        ] {
            assert_eq!(is_authority(text.as_bytes()), valid, "{text}");
        }
    }
}
