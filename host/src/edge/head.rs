//! Validation of request heads.
//!
//! hyper has parsed the head: every line of it is well-formed. The remaining rules prevent request smuggling and other
//! ambiguities between servers, and enforce the limits.

use std::net::Ipv6Addr;

use hyper::header::{self, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, StatusCode, Version};

use super::Limits;
use super::metrics::Limit;
use super::refusal::{Refusal, beyond, closing, refuse};

/// Transfer coding of a body of unknown length.
const CHUNKED: &[u8] = b"chunked";

/// Returns whether a request with this method reads only: GET, HEAD, OPTIONS, TRACE, and QUERY, a GET with a body.
pub fn is_safe(method: &Method) -> bool {
    method.is_safe() || method.as_str() == "QUERY"
}

/// Checks the head of a request.
pub fn check(head: &Parts, limits: &Limits) -> Result<(), Refusal> {
    let bad = |reason| Err(closing(refuse(StatusCode::BAD_REQUEST, reason)).into());
    if let Some(reason) = ambiguous(head) {
        return bad(reason);
    }
    if !head
        .headers
        .get_all(header::TRANSFER_ENCODING)
        .iter()
        .all(|value| value.as_bytes().eq_ignore_ascii_case(CHUNKED))
    {
        let reason = "the only supported transfer coding is chunked";
        return Err(closing(refuse(StatusCode::NOT_IMPLEMENTED, reason)).into());
    }
    if head.method == Method::CONNECT {
        return Err(closing(refuse(StatusCode::NOT_IMPLEMENTED, "CONNECT is not supported")).into());
    }
    let target = head.uri.path_and_query().map_or("", |target| target.as_str());
    if !target.starts_with('/') {
        return bad("the request target must be a path that starts with a slash");
    }
    if target.len() > limits.target_bytes {
        let refusal = refuse(StatusCode::URI_TOO_LONG, "the request target is too long");
        return Err(closing(beyond(Limit::TargetBytes, refusal)).into());
    }
    // For HTTP/1.1 hyper enforces this limit itself.
    if head.headers.len() > limits.headers {
        return Err(
            closing(refuse(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "the request has too many headers")).into()
        );
    }
    if bytes(head) > limits.header_bytes {
        let refusal = refuse(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "the request head is too large");
        return Err(closing(beyond(Limit::HeaderBytes, refusal)).into());
    }
    Ok(())
}

/// Returns an ambiguity that a proxy could interpret differently (RFC 9112, section 3.2; RFC 9113, section 8.3.1).
fn ambiguous(head: &Parts) -> Option<&'static str> {
    let mut hosts = head.headers.get_all(header::HOST).iter();
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
    if head.headers.get_all(header::TRANSFER_ENCODING).iter().nth(1).is_some() {
        return Some("at most one Transfer-Encoding header is allowed");
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
    let Ok(text) = str::from_utf8(text) else { return false };
    let (host, port) = match text.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((address, port))) if address.parse::<Ipv6Addr>().is_ok() => ("", port),
        Some(_) => return false,
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    // The characters of names, without those that start a path, a user or a port.
    let in_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%".contains(&byte);
    let is_escape =
        |rest: &str| rest.as_bytes().get(..2).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit));
    let is_port =
        |port: &str| port.is_empty() || (port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok());
    host.bytes().all(in_name)
        && host.split('%').skip(1).all(is_escape)
        && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port))
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
