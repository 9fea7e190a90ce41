//! What is kept, for whom, and for how long.

mod declarations;
mod model;

use std::sync::Arc;

use bytes::Bytes;
use hyper::header::{HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use kvs_runtime::Env;

use super::{ResponseCache, Reusable, Serving};
use crate::contract::Scope;
use crate::guest::clock::Clock;
use crate::guest::message::{Client, Incoming, Wanted};

const ACCEPT: HeaderName = HeaderName::from_static("accept");

/// A cache of this many bytes, for a guest that reads `accept`, and its clock.
fn cache(bytes: u64) -> (Arc<ResponseCache>, Arc<Clock>) {
    let env = Env::real();
    let clock = Arc::new(Clock::new(env.clone()));
    let cache = ResponseCache::new(bytes, Arc::clone(&clock), &env.random).unwrap();
    cache.serve(Arc::new(Wanted::new([ACCEPT])));
    (cache, clock)
}

fn request(method: &str, target: &str) -> Incoming {
    let client =
        Client { address: "192.0.2.7:49152".parse().ok(), tls_version: None, identity: None, turn: Arc::default() };
    Incoming {
        request: Request::builder().method(method).uri(target).body(Bytes::new()).unwrap(),
        client: Arc::new(client),
        id: HeaderValue::from_static("1"),
        principal: None,
        scope: Scope::Read,
        is_sampled: false,
        key_prefix: None,
        quota: None,
    }
}

fn accepting(value: &'static str) -> Incoming {
    let mut incoming = request("GET", "/a");
    incoming.request.headers_mut().insert(ACCEPT, HeaderValue::from_static(value));
    incoming
}

/// A call in this generation that declares reuse of its response.
fn called(
    cache: &Arc<ResponseCache>,
    serving: &Serving,
    to: &Incoming,
    keys: &[&str],
    until: Option<u64>,
) -> Box<Reusable> {
    let keys: Vec<_> = keys.iter().map(|key| (*key).to_owned()).collect();
    let headers = to.headers(&serving.of);
    cache.reusable(&to.record(&headers, 0), cache.declare(serving, &keys, until), 7).expect("it has no body")
}

fn response(status: StatusCode, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert("etag", HeaderValue::from_static("\"7\""));
    response
}

fn fill(cache: &Arc<ResponseCache>, to: &Incoming, body: impl Into<Bytes>) {
    let serving = cache.serving().expect("it is on");
    called(cache, &serving, to, &["a"], None).keep(&response(StatusCode::OK, body));
}

/// Status, length and body of what is kept.
fn kept(cache: &ResponseCache, incoming: &Incoming) -> Option<(StatusCode, usize, Bytes)> {
    let answer = cache.get(incoming)?;
    assert!(answer.read_sequence == 7 && !answer.appended && answer.sequel.is_none() && answer.reusable.is_none());
    let length = answer.response.bytes();
    let message = answer.response.message().unwrap();
    assert_eq!(message.headers()["etag"], "\"7\"");
    Some((message.status(), length, message.into_body()))
}

fn body(cache: &ResponseCache, incoming: &Incoming) -> Option<Bytes> {
    kept(cache, incoming).map(|(.., body)| body)
}

#[test]
fn response_is_given_until_its_key_changes() {
    let (cache, _) = cache(1 << 20);
    let get = request("GET", "/a");
    assert_eq!(kept(&cache, &get), None);
    fill(&cache, &get, "one");
    assert_eq!(kept(&cache, &get), Some((StatusCode::OK, 3, "one".into())));
    cache.announce("b");
    assert_eq!(body(&cache, &get), Some("one".into()));
    cache.announce("a");
    assert_eq!(kept(&cache, &get), None);
    fill(&cache, &get, "two");
    assert_eq!(body(&cache, &get), Some("two".into()));
}

#[test]
fn change_of_any_of_its_keys_ends_a_response() {
    let (cache, _) = cache(1 << 20);
    let get = request("GET", "/both");
    for key in ["a", "b"] {
        let serving = cache.serving().unwrap();
        called(&cache, &serving, &get, &["a", "b"], None).keep(&response(StatusCode::OK, "both"));
        assert!(kept(&cache, &get).is_some());
        cache.announce(key);
        assert!(kept(&cache, &get).is_none(), "{key} changed");
    }
}

#[test]
fn change_while_a_response_is_made_ends_it() {
    let (cache, _) = cache(1 << 20);
    let get = request("GET", "/a");
    let serving = cache.serving().unwrap();
    let late = called(&cache, &serving, &get, &["a"], None);
    cache.announce("a");
    fill(&cache, &get, "new");
    late.keep(&response(StatusCode::OK, "old"));
    assert_eq!(body(&cache, &get), Some("new".into()), "what is superseded took its place");
}

#[test]
fn response_ends_at_its_time() {
    let (cache, clock) = cache(1 << 20);
    let get = request("GET", "/a");
    let until = clock.now() + 3_600_000;
    let serving = cache.serving().unwrap();
    called(&cache, &serving, &get, &["a"], Some(until)).keep(&response(StatusCode::OK, "one"));
    clock.not_before(until - 60_000);
    assert!(kept(&cache, &get).is_some());
    clock.not_before(until);
    assert!(kept(&cache, &get).is_none());
}

#[test]
fn response_of_the_guest_before_is_not_given() {
    let (cache, _) = cache(1 << 20);
    let get = request("GET", "/a");
    fill(&cache, &get, "before");
    let serving = cache.serving().unwrap();
    let late = called(&cache, &serving, &get, &["a"], None);
    cache.serve(Arc::new(Wanted::new([ACCEPT])));
    assert_eq!(kept(&cache, &get), None);
    late.keep(&response(StatusCode::OK, "late"));
    assert_eq!(kept(&cache, &get), None, "a late fill crossed a swap");
    fill(&cache, &get, "after");
    assert_eq!(body(&cache, &get), Some("after".into()));
}

#[test]
fn headers_that_the_guest_reads_tell_requests_apart() {
    let (cache, _) = cache(1 << 20);
    fill(&cache, &accepting("text/html"), "html");
    assert_eq!(body(&cache, &accepting("text/html")), Some("html".into()));
    assert_eq!(kept(&cache, &accepting("text/plain")), None);
    assert_eq!(kept(&cache, &request("GET", "/a")), None);
    let mut other = accepting("text/html");
    other.request.headers_mut().insert("user-agent", HeaderValue::from_static("curl"));
    assert_eq!(body(&cache, &other), Some("html".into()), "it reads no other header");
    // A guest that reads none is given the same record for all of them, and its own response.
    cache.serve(Arc::default());
    assert_eq!(kept(&cache, &accepting("text/html")), None);
    fill(&cache, &accepting("text/plain"), "any");
    assert_eq!(body(&cache, &accepting("text/html")), Some("any".into()));
}

#[test]
fn clients_share_no_response_that_can_differ() {
    let (cache, _) = cache(1 << 20);
    let by = |principal: Option<&str>, scope, key_prefix: Option<&str>| Incoming {
        principal: principal.map(Into::into),
        scope,
        key_prefix: key_prefix.map(Into::into),
        ..request("GET", "/a")
    };
    let grants =
        [Scope::Read, Scope::Write, Scope::Admin].map(|scope| [None, Some("a"), Some("b")].map(|of| (scope, of)));
    let clients = || {
        [None, Some("eve"), Some("adam")]
            .into_iter()
            .flat_map(|principal| grants.as_flattened().iter().map(move |(scope, of)| by(principal, *scope, *of)))
    };
    for (number, client) in clients().enumerate() {
        assert_eq!(kept(&cache, &client), None);
        fill(&cache, &client, number.to_string());
    }
    for (number, client) in clients().enumerate() {
        assert_eq!(body(&cache, &client), Some(number.to_string().into()));
    }
}

#[test]
fn head_keeps_head_and_length() {
    let (cache, _) = cache(1 << 20);
    fill(&cache, &request("HEAD", "/a"), "value");
    assert_eq!(kept(&cache, &request("GET", "/a")), None, "a response to HEAD was given to GET");
    assert_eq!(kept(&cache, &request("HEAD", "/a")), Some((StatusCode::OK, 5, Bytes::new())));
    // An error can become a problem, of another length.
    let head = request("HEAD", "/b");
    let serving = cache.serving().unwrap();
    called(&cache, &serving, &head, &["b"], None).keep(&response(StatusCode::NOT_FOUND, "no such key\n"));
    assert_eq!(kept(&cache, &head), Some((StatusCode::NOT_FOUND, 12, "no such key\n".into())));
}

#[test]
fn request_with_a_body_is_not_reused() {
    let (cache, _) = cache(1 << 20);
    fill(&cache, &request("GET", "/a"), "value");
    let mut with_body = request("GET", "/a");
    *with_body.request.body_mut() = "body".into();
    assert_eq!(kept(&cache, &with_body), None);
}

#[test]
fn cache_evicts_and_does_not_grow() {
    const BYTES: u64 = 1 << 20;
    let (cache, _) = cache(BYTES);
    for number in 0..20_000 {
        fill(&cache, &request("GET", &format!("/{number}")), "x".repeat(number % 500));
        assert!(cache.responses.weight() <= BYTES);
    }
    assert!(cache.evictions.get() > 15_000 && cache.responses.weight() > BYTES / 2);
}

#[test]
fn response_beyond_a_sixteenth_is_not_kept() {
    let (cache, _) = cache(1 << 20);
    let get = request("GET", "/a");
    fill(&cache, &get, "x".repeat(1 << 16));
    assert_eq!(kept(&cache, &get), None);
    for number in 0..200 {
        let get = request("GET", &format!("/{number}"));
        fill(&cache, &get, "x".repeat((1 << 16) - 1_000));
        assert!(kept(&cache, &get).is_some(), "the largest is kept");
    }
}

#[test]
fn cache_of_no_bytes_keeps_nothing() {
    let (cache, _) = cache(0);
    assert!(cache.serving().is_none() && cache.get(&request("GET", "/a")).is_none());
    assert_eq!((cache.misses.get(), cache.responses.len()), (0, 0));
}
