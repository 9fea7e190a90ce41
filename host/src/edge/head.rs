//! What the head of a request must be, before anything is done for it.
//!
//! hyper has parsed it: every line of it is well-formed. What is left are the rules that tell one request from two, or one
//! server's reading from another's, and our limits.

use hyper::header::{self, HeaderMap};
use hyper::http::request::Parts;
use hyper::{Method, StatusCode, Version};

use super::Limits;
use super::metrics::Limit;
use super::refusal::{Refusal, beyond, closing, refuse};

pub fn check(head: &Parts, limits: &Limits) -> Result<(), Refusal> {
    let bad = |reason| Err(closing(refuse(StatusCode::BAD_REQUEST, reason)).into());
    if head.version == Version::HTTP_11 && !one_host(&head.headers) {
        return bad("a request names one Host");
    }
    if head.method == Method::CONNECT {
        return Err(closing(refuse(StatusCode::NOT_IMPLEMENTED, "this server is no proxy")).into());
    }
    let target = head.uri.path_and_query().map_or("", |target| target.as_str());
    if !target.starts_with('/') {
        return bad("the target is a path that starts with a slash");
    }
    if target.len() > limits.target_bytes {
        let refusal = refuse(StatusCode::URI_TOO_LONG, "the target of the request is too long");
        return Err(closing(beyond(Limit::TargetBytes, refusal)).into());
    }
    if head_bytes(target, &head.headers) > limits.header_bytes {
        let refusal = refuse(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "the head of the request is too large");
        return Err(closing(beyond(Limit::HeaderBytes, refusal)).into());
    }
    Ok(())
}

fn one_host(headers: &HeaderMap) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    // Letters, digits and what else names, addresses and ports are made of; nothing that starts a path or a user.
    host.as_bytes().iter().all(|byte| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:[]".contains(byte))
}

/// The size of a request's head, near enough. hyper's own limit is one of its buffer, which it may pass by a read.
fn head_bytes(target: &str, headers: &HeaderMap) -> usize {
    target.len() + headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>()
}
