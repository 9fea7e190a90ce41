//! The lock service, `guest/locks`: a lock has one holder at a time, with an increasing fencing token, under contention,
//! disconnects, a kill, and swaps with the built-in guest.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::support::guests::{DEFAULT_GUEST, built, component};
use crate::support::metrics::{Metrics, until};
use crate::support::server::Server;
use crate::support::swap::swaps;
use crate::support::wire::{Connection, Response};

const WAITING: &str = "kvs_http_requests_waiting_for_change";

fn locks() -> &'static str {
    static GUEST: LazyLock<String> = LazyLock::new(|| built("locks"));
    &GUEST
}

/// The state of a lock in a response.
fn state(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{}", response.text());
    serde_json::from_slice(&response.body).expect("JSON")
}

fn token(state: &Value) -> u64 {
    state["held"]["token"]
        .as_str()
        .and_then(|token| token.parse().ok())
        .unwrap_or_else(|| panic!("no token in {state}"))
}

fn inspect(server: &Server) -> Value {
    state(&Connection::open(server.address()).ask("GET", "/locks/a", b""))
}

/// Requests the lock, and waits until the server counts the request as waiting.
fn waits(server: &Server, owner: &str) -> Connection {
    let before = Metrics::of(server).get(WAITING);
    let mut client = Connection::open(server.address());
    client.send(format!(
        "POST /locks/a?owner={owner}&ttl=60s&wait=120s HTTP/1.1\r\nhost: kvs\r\ncontent-length: 0\r\n\r\n"
    ));
    until(server, "it waits", |now| now.get(WAITING) > before);
    client
}

/// Clients that acquire, hold and release the lock, let the lease expire, or disconnect while they wait.
fn contend(args: &[&str]) {
    const CLIENTS: u64 = 6;
    const GRANTS: u64 = 30;
    let server = Server::start(&[&[locks()], args].concat());
    let (held, newest, grants) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (server, held, newest, grants) = (&server, &held, &newest, &grants);
            scope.spawn(move || {
                let mut connection = Connection::open(server.address());
                for n in 0.. {
                    if grants.load(Ordering::Relaxed) >= GRANTS {
                        break;
                    }
                    let owner = format!("c{client}-{n}");
                    if n % 8 == 7 {
                        let mut leaving = Connection::open(server.address());
                        leaving.send(format!(
                            "POST /locks/a?owner={owner}&ttl=60s&wait=2s HTTP/1.1\r\nhost: kvs\r\ncontent-length: 0\r\n\r\n"
                        ));
                        // Either it holds the lock and releases it, or it disconnects while waiting.
                        if leaving.is_silent_for(Duration::from_millis(5)) {
                            leaving.finish();
                        }
                        if leaving.read().status == 200 {
                            enter(held, newest, &inspect(server), &owner);
                            held.store(false, Ordering::SeqCst);
                            assert_eq!(release(&mut connection, &owner), 200);
                        }
                        continue;
                    }
                    let expires = n % 8 == 3;
                    let ttl = if expires { "200ms" } else { "60s" };
                    let target = format!("/locks/a?owner={owner}&ttl={ttl}&wait=120s");
                    let granted = state(&connection.ask("POST", &target, b""));
                    grants.fetch_add(1, Ordering::Relaxed);
                    // Only the server knows whether the lease has expired.
                    if expires {
                        assert!(newest.fetch_max(token(&granted), Ordering::SeqCst) < token(&granted));
                        continue;
                    }
                    enter(held, newest, &granted, &owner);
                    held.store(false, Ordering::SeqCst);
                    assert_eq!(release(&mut connection, &owner), 200);
                }
            });
        }
    });
    server.terminate();
}

/// Checks that a grant is the only one and the newest.
#[track_caller]
fn enter(held: &AtomicBool, newest: &AtomicU64, granted: &Value, owner: &str) {
    assert_eq!(granted["held"]["owner"], owner);
    assert!(!held.swap(true, Ordering::SeqCst), "{owner} is the second holder");
    let before = newest.fetch_max(token(granted), Ordering::SeqCst);
    assert!(before < token(granted), "token {} after {before}", token(granted));
}

fn release(client: &mut Connection, owner: &str) -> u16 {
    client.ask("DELETE", &format!("/locks/a?owner={owner}"), b"").status
}

#[test]
fn contended_lock_has_one_holder_and_growing_tokens() {
    contend(&[]);
}

#[test]
fn contended_lock_has_one_holder_in_four_shards() {
    contend(&["--shards", "4"]);
}

#[test]
fn waiters_are_served_in_order() {
    let server = Server::start(&[locks()]);
    let mut client = Connection::open(server.address());
    let mut newest = token(&state(&client.ask("POST", "/locks/a?owner=first", b"")));
    let waiting: Vec<_> = ["d", "c", "b"].into_iter().map(|owner| (owner, waits(&server, owner))).collect();
    assert_eq!(inspect(&server)["waiting"], serde_json::json!(["d", "c", "b"]));
    assert_eq!(release(&mut client, "first"), 200);
    for (owner, mut waiter) in waiting {
        let granted = state(&waiter.read());
        assert_eq!(granted["held"]["owner"], owner);
        assert!(token(&granted) > newest);
        newest = token(&granted);
        assert_eq!(release(&mut client, owner), 200);
    }
    assert_eq!(inspect(&server)["held"], Value::Null);
}

#[test]
fn disconnected_waiter_never_gets_lock() {
    let server = Server::start(&[locks()]);
    let mut client = Connection::open(server.address());
    client.ask("POST", "/locks/a?owner=holder&ttl=60s", b"");
    let mut half_closed = waits(&server, "half-closed");
    let closed = waits(&server, "closed");
    let mut patient = waits(&server, "patient");
    half_closed.finish();
    half_closed.read().says(408, "the connection was closed on the side of the client, which waited for a change");
    drop(closed);
    until(&server, "they have left", |now| now.get(WAITING) == 1.0);
    let before = token(&inspect(&server));
    assert_eq!(release(&mut client, "holder"), 200);
    let granted = state(&patient.read());
    assert_eq!(granted["held"]["owner"], "patient");
    // Every grant is an entry that puts the key of the lock; those that were only offers have no token.
    assert!(token(&granted) > before);
    assert_eq!(granted["waiting"], serde_json::json!([]));
    for owner in ["closed", "half-closed"] {
        assert_eq!(release(&mut client, owner), 409, "{owner} holds the lock");
    }
}

#[test]
fn lease_ends_in_time_for_waiters() {
    let server = Server::start(&[locks()]);
    let mut client = Connection::open(server.address());
    client.ask("POST", "/locks/a?owner=holder&ttl=300ms", b"");
    assert_eq!(state(&waits(&server, "b").read())["held"]["owner"], "b");
    let lost = client.ask("PUT", "/locks/a?owner=holder", b"");
    assert_eq!((lost.status, lost.header("kvs-error")), (409, Some("lock_not_held")));
}

#[test]
fn lock_and_queue_survive_kill() {
    let server = Server::start(&[locks()]);
    let mut client = Connection::open(server.address());
    let granted = token(&state(&client.ask("POST", "/locks/a?owner=holder&ttl=60s", b"")));
    let waiting = [waits(&server, "b"), waits(&server, "c")];
    // The response waits until its data is durable.
    assert_eq!(inspect(&server)["waiting"], serde_json::json!(["b", "c"]));
    let server = server.kill().restart(&[locks()]);
    drop(waiting);
    assert_eq!(token(&inspect(&server)), granted);
    assert_eq!(inspect(&server)["waiting"], serde_json::json!(["b", "c"]));
    // They reconnect in another order, and keep their places.
    let (mut c, mut b) = (waits(&server, "c"), waits(&server, "b"));
    let mut client = Connection::open(server.address());
    assert_eq!(release(&mut client, "holder"), 200);
    let next = token(&state(&b.read()));
    assert!(next > granted);
    assert_eq!(release(&mut client, "b"), 200);
    assert!(token(&state(&c.read())) > next);
}

#[test]
fn swaps_keep_locks_and_values() {
    let server = Server::start(&["--probation", "100ms"]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"of the default guest").status, 201);
    swaps(&server, &component(locks()));
    let granted = token(&state(&client.ask("POST", "/locks/a?owner=holder&ttl=1h", b"")));
    assert_eq!(client.ask("GET", "/v1/a", b"").text(), "of the default guest");
    assert_eq!(client.ask("PUT", "/v1/b", b"of the lock service").status, 201);

    swaps(&server, &component(DEFAULT_GUEST));
    assert_eq!(client.ask("GET", "/locks/a", b"").status, 404);
    assert_eq!(client.ask("GET", "/v1?count=true", b"").text(), r#"{"count":2}"#);
    assert_eq!(client.ask("GET", "/v1/b", b"").text(), "of the lock service");
    assert_eq!(client.ask("DELETE", "/v1?prefix=", b"").status, 200);

    swaps(&server, &component(locks()));
    assert_eq!(token(&inspect(&server)), granted);
    assert_eq!(client.ask("POST", "/locks/a?owner=b", b"").status, 409);
    assert_eq!(client.ask("GET", "/v1/a", b"").status, 404);
}
