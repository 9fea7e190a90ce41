use kvs_kit::testing::{Served, header_of, request};
use serde_json::Value;

use super::*;

type Service = Served<Locks>;

/// Asks for a lock. The response is its status and what it says of the holder.
fn ask(guest: &mut Service, method: &str, query: &str) -> (u16, Value) {
    let response = guest.handle(request(method, &format!("/locks/a?{query}"), ""));
    let state = serde_json::from_slice(&response.body).unwrap_or_default();
    (response.status, state)
}

fn token(state: &Value) -> u64 {
    state["held"]["token"].as_str().expect("it is held").parse().expect("a number")
}

/// Asks for a lock and gets it.
fn acquires(guest: &mut Service, query: &str) -> u64 {
    let (status, state) = ask(guest, "POST", query);
    assert_eq!(status, 200, "{query}");
    token(&state)
}

#[test]
fn lock_has_one_holder_until_it_is_released_or_expires() {
    let mut guest = Service::default();
    let first = acquires(&mut guest, "owner=a&ttl=10s");
    assert_eq!(acquires(&mut guest, "owner=a&ttl=10s"), first, "a request that is sent again");
    assert_eq!(ask(&mut guest, "POST", "owner=b").0, 409);
    assert_eq!(ask(&mut guest, "DELETE", "owner=b").0, 409);
    assert_eq!(ask(&mut guest, "DELETE", "owner=a").1["held"], Value::Null);
    let second = acquires(&mut guest, "owner=b&ttl=10s");
    guest.now_ms = 9_999;
    assert_eq!(ask(&mut guest.rebuilt(), "POST", "owner=a").0, 409);
    guest.now_ms = 10_000;
    assert_eq!(ask(&mut guest, "PUT", "owner=b").0, 409);
    let third = acquires(&mut guest, "owner=a");
    assert!(first < second && second < third, "{first} {second} {third}");
}

#[test]
fn renewal_keeps_the_token() {
    let mut guest = Service::default();
    let granted = acquires(&mut guest, "owner=a&ttl=10s");
    guest.now_ms = 5_000;
    let (status, state) = ask(&mut guest, "PUT", "owner=a&ttl=10s");
    assert_eq!((status, token(&state), state["held"]["expires"].as_u64()), (200, granted, Some(15_000)));
    guest.now_ms = 14_999;
    assert_eq!(token(&ask(&mut guest.rebuilt(), "GET", "").1), granted);
}

#[test]
fn waiters_get_the_lock_in_their_order() {
    let mut guest = Service::default();
    acquires(&mut guest, "owner=a");
    for owner in ["c", "b", "c"] {
        assert_eq!(ask(&mut guest, "POST", &format!("owner={owner}&wait=60s")).0, 409);
        assert_eq!(guest.log.waits_for.as_deref(), Some("\u{1}lock/{a}"));
    }
    assert_eq!(ask(&mut guest, "GET", "").1["waiting"], serde_json::json!(["c", "b"]));
    assert_eq!(ask(&mut guest, "DELETE", "owner=a").1["held"], Value::Null);
    // Who is before them in time is not before them in the queue.
    for owner in ["a", "b"] {
        assert_eq!(ask(&mut guest, "POST", &format!("owner={owner}&wait=60s")).0, 409, "{owner}");
    }
    let first = acquires(&mut guest, "owner=c&wait=60s");
    ask(&mut guest, "DELETE", "owner=c");
    assert!(acquires(&mut guest, "owner=b&wait=60s") > first);
    assert_eq!(ask(&mut guest, "GET", "").1["waiting"], serde_json::json!(["a"]));
}

#[test]
fn waiter_that_does_not_claim_the_lock_is_passed_over() {
    let mut guest = Service::default();
    acquires(&mut guest, "owner=a&ttl=10s");
    for owner in ["gone", "b"] {
        ask(&mut guest, "POST", &format!("owner={owner}&wait=60s"));
    }
    guest.now_ms = 10_000;
    guest.tick();
    assert_eq!(ask(&mut guest, "POST", "owner=b&wait=60s").0, 409);
    guest.now_ms += CLAIM_MS - 1;
    assert_eq!(ask(&mut guest, "POST", "owner=b&wait=60s").0, 409);
    guest.now_ms += 1;
    guest.tick();
    acquires(&mut guest, "owner=b&wait=60s");
    assert_eq!(ask(&mut guest, "GET", "").1["waiting"], serde_json::json!([]));
}

#[test]
fn wait_that_is_over_does_not_begin_again() {
    let mut guest = Service::default();
    acquires(&mut guest, "owner=a&ttl=1h");
    ask(&mut guest, "POST", "owner=b&wait=5s");
    guest.now_ms = 5_000;
    let appended = guest.log.entries.len();
    assert_eq!(ask(&mut guest, "POST", "owner=b&wait=5s").0, 409);
    assert_eq!(guest.log.entries.len(), appended);
    guest.now_ms += CLAIM_MS;
    guest.tick();
    assert_eq!(ask(&mut guest, "GET", "").1["waiting"], serde_json::json!([]));
}

#[test]
fn waiter_that_asks_again_keeps_its_place() {
    let mut guest = Service::default();
    acquires(&mut guest, "owner=a&ttl=1h");
    let mut wait = |now_ms, request_id: &str, query: &str| {
        (guest.now_ms, guest.request_id) = (now_ms, Some(request_id.to_owned()));
        guest.tick();
        assert_eq!(ask(&mut guest, "POST", query).0, 409);
    };
    wait(0, "1", "owner=b&wait=30s");
    wait(10_000, "2", "owner=c&wait=300s");
    // The last call of the first wait, and those of three more.
    for (now_ms, request_id) in [(30_000, "1"), (30_100, "3"), (60_100, "3"), (60_200, "4"), (90_300, "5")] {
        wait(now_ms, request_id, "owner=b&wait=30s");
    }
    for mut guest in [guest.rebuilt(), guest] {
        assert_eq!(ask(&mut guest, "GET", "").1["waiting"], serde_json::json!(["b", "c"]));
        ask(&mut guest, "DELETE", "owner=a");
        acquires(&mut guest, "owner=b&wait=30s");
    }
}

#[test]
fn queue_has_a_limit() {
    let mut guest = Service::default();
    acquires(&mut guest, "owner=a");
    for n in 0..MAX_WAITERS {
        assert_eq!(ask(&mut guest, "POST", &format!("owner=w{n}&wait=60s")).0, 409);
    }
    let response = guest.handle(request("POST", "/locks/a?owner=b&wait=60s", ""));
    assert_eq!((response.status, header_of(&response, "kvs-error")), (429, Some("too_many_waiters")));
    assert_eq!(ask(&mut guest, "POST", "owner=w1&wait=60s").0, 409, "who waits already");
}

#[test]
fn malformed_request_is_rejected() {
    let mut guest = Service::default();
    for (method, target, status) in [
        ("POST", "/locks/a", 400),
        ("POST", "/locks/a?owner=", 400),
        ("POST", "/locks/a?owner=b&ttl=0", 400),
        ("POST", "/locks/a?owner=b&ttl=86401", 400),
        ("POST", "/locks/a?owner=b&token=1", 400),
        ("POST", "/locks/%zz?owner=b", 400),
        ("PUT", "/locks/a?owner=b", 409),
        ("BREW", "/locks/a?owner=b", 405),
        ("POST", "/locks/", 404),
    ] {
        assert_eq!(guest.ask(method, target, "").0, status, "{method} {target}");
    }
    assert!(guest.log.entries.is_empty());
}

#[test]
fn keys_of_a_lock_are_in_the_shard_of_its_requests() {
    for (target, key) in [("/locks/a?owner=b", "\u{1}lock/{a}"), ("/locks/%7D", "\u{1}lock/{%7D}")] {
        assert!(matches!(Locks::route("POST", target), Target::Key(route) if route == key), "{target}");
    }
    assert!(matches!(Locks::route("GET", "/v1/a"), Target::Key(key) if key == "a"));
}
