//! Long polls, over swaps, traps and the stop of the server.

use std::time::{Duration, Instant};

use crate::support::guests::{DEFAULT_GUEST, component, guest};
use crate::support::metrics::{Metrics, until};
use crate::support::server::Server;
use crate::support::swap::swaps;
use crate::support::wire::{Connection, Response};

/// Longer than a response takes that must not come.
const A_WHILE: Duration = Duration::from_millis(200);

/// Sends a long poll, and waits until the server counts it as waiting. `None`: the client has no value.
fn waits(server: &Server, target: &str, etag: Option<u64>) -> Connection {
    let mut client = asks(server, target, etag);
    assert!(client.is_silent_for(A_WHILE), "it does not wait");
    client
}

fn asks(server: &Server, target: &str, etag: Option<u64>) -> Connection {
    let mut client = Connection::open(server.address());
    let condition = etag.map(|etag| format!("if-none-match: \"{etag}\"\r\n")).unwrap_or_default();
    client.send(format!("GET {target} HTTP/1.1\r\nhost: kvs\r\n{condition}\r\n"));
    client
}

fn is_new(response: &Response, value: &str, etag: u64) {
    assert_eq!((response.status, response.text(), response.etag()), (200, value, Some(etag)));
}

#[test]
fn change_answers_long_polls() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let mut first = waits(&server, "/v1/a?wait=300s", None);
    client.ask("PUT", "/v1/ab", b"");
    client.ask("PUT", "/v1/b", b"");
    assert!(first.is_silent_for(A_WHILE), "another key is none of its business");
    client.ask("PUT", "/v1/a", b"first");
    is_new(&first.read(), "first", 3);

    let mut second = waits(&server, "/v1/key/a?wait=300s", Some(3));
    client.ask("PUT", "/v1/a", b"second");
    is_new(&second.read(), "second", 4);

    let mut deleted = waits(&server, "/v1/a?wait=300s", Some(4));
    client.ask("DELETE", "/v1/a", b"");
    deleted.read().says(404, "no such key");

    assert_eq!(client.ask("PUT", "/v1/a?ttl=1", b"short").etag(), Some(6));
    let mut expired = waits(&server, "/v1/a?wait=300s", Some(6));
    expired.read().says(404, "no such key");

    let mut in_a_transaction = waits(&server, "/v1/a?wait=300s", None);
    client.ask("POST", "/v1", br#"[{"op":"put","key":"{a}b","value":""},{"op":"put","key":"a","value":"all"}]"#);
    is_new(&in_a_transaction.read(), "all", 9);
}

#[test]
fn outdated_client_does_not_wait() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/a", b"value");
    is_new(&asks(&server, "/v1/a?wait=300s", None).read(), "value", 1);
    is_new(&asks(&server, "/v1/a?wait=300s", Some(7)).read(), "value", 1);
    asks(&server, "/v1/b?wait=300s", Some(1)).read().says(404, "no such key");
}

#[test]
fn expired_wait_is_304() {
    // Longer than the request timeout.
    let server = Server::start(&["--request-timeout", "2s"]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/a", b"value");
    let begun = Instant::now();
    let (mut there, mut absent) = (asks(&server, "/v1/a?wait=3s", Some(1)), asks(&server, "/v1/b?wait=3s", None));
    let unchanged = there.read();
    assert_eq!((unchanged.status, unchanged.etag()), (304, Some(1)));
    absent.read().says(404, "no such key");
    assert!(begun.elapsed() >= Duration::from_secs(3));
}

#[test]
fn max_wait_limits_wait() {
    let server = Server::start(&["--max-wait", "1ms"]);
    asks(&server, "/v1/a?wait=300s", None).read().says(404, "no such key");
}

#[test]
fn invalid_wait_is_400() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let unfit = "query parameter `wait` must be a duration like 60, 60s, 500ms, 5m, 1h or 30d, from 1ms to 300s";
    for query in ["wait", "wait=", "wait=ten", "wait=0s", "wait=301", "wait=-1s", "wait=6m", "wait=1.5"] {
        client.ask("GET", &format!("/v1/a?{query}"), b"").says(400, unfit);
    }
    client.ask("GET", "/v1/a?wait=1s&wait=1s", b"").says(400, "query parameter `wait` was given twice");
    client.ask("DELETE", "/v1/a?wait=1s", b"").says(400, "unknown query parameter `wait`");
}

#[test]
fn wait_continues_over_swap_and_trap() {
    let server = Server::start(&["--probation", "300ms"]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/a", b"value");
    let mut first = waits(&server, "/v1/a?wait=300s", Some(1));
    let mut second = waits(&server, "/v1/b?wait=300s", None);
    swaps(&server, &component(guest()));
    assert_eq!(client.ask("GET", "/trap", b"").status, 500);
    swaps(&server, &component(DEFAULT_GUEST));
    assert!(first.is_silent_for(A_WHILE) && second.is_silent_for(A_WHILE), "nothing has happened to these");
    client.ask("PUT", "/v1/a", b"after");
    is_new(&first.read(), "after", 2);
    client.ask("PUT", "/v1/b", b"new");
    is_new(&second.read(), "new", 3);
}

#[test]
fn graceful_stop_ends_waits() {
    let server = Server::start(&["--drain-timeout", "10m"]);
    Connection::open(server.address()).ask("PUT", "/v1/a", b"value");
    let mut waiting = waits(&server, "/v1/a?wait=300s", Some(1));
    let stopped = server.terminate();
    assert_eq!(waiting.read().status, 304);
    drop(stopped);
}

#[test]
fn disconnected_client_frees_its_place() {
    let server = Server::start(&["--max-connections", "3"]);
    for _ in 0..3 {
        let waiting: Vec<_> = (0..3).map(|_| waits(&server, "/v1/a?wait=300s", None)).collect();
        drop(waiting);
    }
    Connection::open(server.address()).ask("GET", "/v1/a", b"").says(404, "no such key");
}

#[test]
fn many_waits_do_not_delay_others() {
    let places = ["--max-connections", "1100", "--max-connections-per-address", "1100", "--max-requests", "900"];
    let server = Server::start(&places);
    // Half of them for one key.
    let key = |n| if n % 2 == 0 { "/v1/same".to_owned() } else { format!("/v1/own{n}") };
    let mut waiting: Vec<_> = (0..1_000).map(|n| asks(&server, &format!("{}?wait=300s", key(n)), None)).collect();
    let mut client = Connection::open(server.address());
    for _ in 0..100 {
        assert_eq!(client.ask("PUT", "/v1/other", b"value").status, 201);
    }
    assert!(waiting.iter_mut().step_by(100).all(|client| client.is_silent_for(Duration::from_millis(1))));
    client.ask("PUT", "/v1/same", b"value");
    for n in (1..1_000).step_by(2) {
        client.ask("PUT", &key(n), b"value");
    }
    for client in &mut waiting {
        let answer = client.read();
        assert_eq!((answer.status, answer.text()), (200, "value"));
    }
}

#[test]
fn watches_and_long_polls_are_gauges_not_latency() {
    let server = Server::start(&["--guest-max-memory-bytes", "64MiB", "--shards", "2"]);
    let metrics = Metrics::of(&server);
    assert_eq!(metrics.get("kvs_guest_memory_limit_bytes"), f64::from(128 << 20));
    let mut watch = Connection::open(server.address());
    assert_eq!(watch.ask_for_head("GET", "/v1?watch", &[]).status, 200);
    let mut poll = Connection::open(server.address());
    poll.send("GET /v1/a?wait=300s HTTP/1.1\r\nhost: kvs\r\n\r\n");
    until(&server, "both are open", |now| {
        [now.get("kvs_watches"), now.get("kvs_http_requests_waiting_for_change")] == [1.0, 1.0]
    });
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", b"").status, 201);
    assert_eq!(poll.read().status, 200);
    drop(watch);
    let after = until(&server, "both have ended", |now| {
        [now.get("kvs_watches"), now.get("kvs_http_requests_waiting_for_change")] == [0.0, 0.0]
    });
    // Only the time to the head of the watch.
    let get = "{method=\"GET\"}";
    assert_eq!(after.get(&format!("kvs_http_request_duration_seconds_count{get}")), 1.0);
    assert_eq!(after.get("kvs_http_requests_total{method=\"GET\",status=\"200\"}"), 2.0);
}

#[test]
fn error_after_a_call_that_appended_is_unknown_outcome() {
    let server = Server::start(&["--request-timeout", "1s", "--guest-cpu-limit", "5s", guest(), "--shards", "1"]);
    let mut waiting = Connection::open(server.address());
    waiting.send("PUT /store-and-wait/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 0\r\n\r\n");
    assert!(waiting.is_silent_for(A_WHILE), "it does not wait");
    // The key changes, and the guest is not free for another call.
    let mut busy = Connection::open(server.address());
    busy.send("PUT /store-and-loop/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 0\r\n\r\n");
    let response = waiting.read();
    assert_eq!((response.status, response.header("kvs-error")), (500, Some("outcome_unknown")), "{}", response.text());
    assert!(response.text().ends_with("the store was not free in time\n"), "{}", response.text());
}
