//! Hostile guests: none stops the host, exceeds its limits, blocks other clients, or corrupts the log.
//!
//! The guest is `tests/guests/unruly`, as in the suite `unruly`, which tests the report of each failure. Here the same checks
//! run after each of them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::guests::guest;
use crate::support::memory::peak;
use crate::support::metrics::Metrics;
use crate::support::server::{PATIENCE, Server, serve_refused};
use crate::support::wire::{Connection, get};

/// Memory of the host without that of the guest, at most, in KiB.
const BOUND: u64 = 100 << 10;
/// Memory limit of the guest in these tests, in MiB.
const MEMORY: u64 = 64;

/// Triggers a failure, and then checks everything that must hold after it.
#[track_caller]
fn survives(harm: &str, args: &[&str], method: &str, path: &str, status: u16) {
    let server = Server::start(&[&[guest(), "--guest-max-memory-bytes", "64MiB"], args].concat());
    let before = peak(&server);
    let mut model = BTreeMap::new();
    let mut put = |client: &mut Connection, key: &str| {
        assert_eq!(client.ask("PUT", &format!("/store/{key}"), key.as_bytes()).status, 201, "{harm}: {key}");
        model.insert(key.to_owned(), key.as_bytes().to_vec());
    };
    let mut client = Connection::open(server.address());
    put(&mut client, "before");
    for round in 0..3 {
        let got = Connection::open(server.address()).ask(method, path, b"harm");
        assert_eq!(got.status, status, "{harm}: {}", String::from_utf8_lossy(&got.body[..got.body.len().min(200)]));
        // Other clients, on existing and on new connections.
        put(&mut client, &format!("after {round}").replace(' ', "-"));
        put(&mut Connection::open(server.address()), &format!("new-{round}"));
    }
    let grown = peak(&server).saturating_sub(before);
    assert!(grown < (MEMORY << 10) + BOUND, "{harm}: the host grew by {grown} KiB");

    let others = ["harm", "{own}often"];
    let server = server.terminate().restart(&[]);
    let mut client = Connection::open(server.address());
    for (key, value) in &model {
        let got = client.ask("GET", &format!("/v1/{key}"), b"");
        assert_eq!((got.status, &got.body), (200, value), "{harm}: {key}");
    }
    let extra = others.iter().filter(|key| client.ask("GET", &format!("/v1/{key}"), b"").status == 200).count();
    let line = server.says("serving on");
    let keys = format!("keys={}", model.len() + extra);
    assert!(line.contains(&keys), "{harm}: the log holds more than was appended, {keys} were expected: {line}");
}

#[test]
fn traps_and_exits_cost_one_request() {
    survives("a trap before append", &[], "GET", "/trap", 500);
    survives("a trap after append", &[], "PUT", "/store-and-trap/harm", 500);
    survives("a panic", &[], "GET", "/panic", 500);
    survives("an exit", &[], "GET", "/exit", 500);
    survives("a sleep", &[], "GET", "/sleep", 500);
}

#[test]
fn endless_calls_cost_one_request() {
    let hasty = ["--guest-cpu-limit", "200ms"];
    survives("an endless loop", &hasty, "GET", "/loop", 500);
    survives("an endless recursion", &[], "GET", "/recurse", 500);
    survives("endless growth", &[], "GET", "/grow", 500);
    survives("endless output", &hasty, "GET", "/print-for-ever", 500);
    survives("a flood of handles", &[], "GET", "/hold-handles", 500);
}

#[test]
fn invalid_responses_cost_one_request() {
    survives("a status that is none", &[], "GET", "/status/9", 500);
    survives("a header that is none", &[], "GET", "/header/in(valid)", 500);
    survives("more headers than HTTP has", &[], "GET", "/many-headers/40000", 500);
    survives("an answer that depends on the future", &[], "GET", "/read-sequence/18446744073709551615", 200);
    survives("an answer that rests on nothing", &[], "PUT", "/store-early/harm", 201);
}

#[test]
fn invalid_lengths_and_text_cost_one_request() {
    for lie in ["body", "headers", "header-name", "append-value", "append-metadata", "append-key"] {
        survives(lie, &[], "GET", &format!("/lie/{lie}"), 500);
    }
}

#[test]
fn excessive_host_calls_cost_one_request() {
    survives("a large write to stdout", &[], "GET", "/print-at-once", 500);
    survives("much randomness", &[], "GET", "/ask-for-randomness/4000000000", 500);
    survives("a group that is too large", &[], "GET", "/append-too-much", 200);
    survives(
        "many appends",
        &["--guest-max-appends", "1000000", "--request-timeout", "60s"],
        "GET",
        "/append-often/200000",
        200,
    );
}

#[test]
fn too_large_response_is_500_and_keeps_instance() {
    let server = Server::start(&[guest(), "--max-response-bytes", "1MiB"]);
    let mut client = Connection::open(server.address());
    assert_eq!(get(&mut client, "/body/1048576").body.len(), 1 << 20);
    assert_eq!(get(&mut client, "/body/1048577").text(), "the store gave an invalid response\n");
    assert_eq!(get(&mut client, "/handled").text(), "3", "the instance was not kept");
    let line = server.says("invalid response");
    assert!(line.contains("a body of 1048577 bytes, at most 1048576 are allowed"), "{line}");
}

#[test]
fn much_too_large_response_is_never_copied() {
    let server = Server::start(&[guest(), "--max-response-bytes", "1MiB"]);
    let mut client = Connection::open(server.address());
    let before = peak(&server);
    get(&mut client, "/body/300000000").says(500, "the store failed on this request");
    let grown = peak(&server).saturating_sub(before);
    assert!(grown < 350 << 10, "300 MB in the guest cost the host {grown} KiB");
    server.says("the guest trapped");
    assert_eq!(get(&mut client, "/body/1000").body.len(), 1000);
}

#[test]
fn largest_value_fits_into_response() {
    let server = Server::start(&["--max-value-bytes", "2MiB", "--max-response-bytes", "1MiB"]);
    let mut client = Connection::open(server.address());
    let value = vec![b'x'; 2 << 20];
    assert_eq!(client.ask("PUT", "/v1/a", &value).status, 201);
    assert!(client.ask("GET", "/v1/a", b"").body == value);
}

#[test]
fn appends_per_call_are_limited() {
    let server = Server::start(&[guest(), "--guest-max-appends", "10"]);
    let mut client = Connection::open(server.address());
    assert_eq!(get(&mut client, "/append-often/11").text(), "10");
    assert_eq!(get(&mut client, "/append-often/5").text(), "5", "the next call has its own");
}

#[test]
fn size_of_group_is_limited() {
    let server = Server::start(&["--guest-max-append-bytes", "1KiB"]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", &[b'x'; 900]).status, 201);
    assert_eq!(client.ask("PUT", "/v1/a", &[b'y'; 1024]).status, 413);
    assert!(client.ask("GET", "/v1/a", b"").body == [b'x'; 900]);
    server.terminate();
}

/// The guest traps in each `apply`: requests fail, but no acknowledged write is lost.
#[test]
fn trap_in_apply_costs_no_acknowledged_write() {
    let args = [guest(), "--guest-config", "fault=apply-traps", "--request-timeout", "1s"];
    let server = Server::start(&args);
    let mut client = Connection::open(server.address());
    let keys = ["{own}before", "{own}and-this"];
    for key in keys {
        assert_eq!(client.ask("PUT", &format!("/store/{key}"), key.as_bytes()).status, 201);
    }
    assert_eq!(client.ask("PUT", "/store-and-trap/{own}harm", b"{own}harm").status, 500);
    server.says("the guest cannot be rebuilt");
    let before = peak(&server);
    for _ in 0..3 {
        // Other requests are answered, if with an error, and the admin listener responds.
        assert_eq!(Connection::open(server.address()).ask("GET", "/store/{own}before", b"").status, 503);
        assert_eq!(Connection::open(server.admin()).ask("GET", "/livez", b"").status, 200);
    }
    let grown = peak(&server).saturating_sub(before);
    assert!(grown < BOUND, "instances that could not be rebuilt took {grown} KiB");
    holds(server, &keys.into_iter().chain(["{own}harm"]).collect::<Vec<_>>());
}

/// One of four shards cannot be rebuilt: it is reported, its requests are rejected at once, and the others continue to serve.
#[test]
fn shard_that_cannot_be_rebuilt_is_reported() {
    let fault = "fault=apply-traps";
    let args = [guest(), "--guest-config", fault, "--shards", "4", "--request-timeout", "1h"];
    let server = Server::start(&args);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/store-and-trap/{own}harm", b"{own}harm").status, 500);
    let begun = Instant::now();
    let report = loop {
        let report = Connection::open(server.admin()).ask("GET", "/readyz", b"");
        if report.status == 503 {
            break report.text().to_owned();
        }
        assert!(begun.elapsed() < PATIENCE, "it is ready for ever: {}", report.text());
        std::thread::sleep(Duration::from_millis(20));
    };
    let (shard, _) = report.split_once("[-]guest shard ").and_then(|(_, rest)| rest.split_once(' ')).expect(&report);
    let number: u64 = shard.parse().expect(&report);
    for expected in ["of 4 has had no instance since 20", "apply of entry 1 ", "[+]log ok", "[+]edge ok"] {
        assert!(report.contains(expected), "{expected:?} is not in {report}");
    }
    assert_eq!(Metrics::of(&server).get("kvs_guest_shards_down"), 1.0);
    let status = Connection::open(server.admin()).ask("GET", "/guest", b"");
    let status: serde_json::Value = serde_json::from_slice(&status.body).expect("JSON");
    assert_eq!(status["shards_down"][0]["shard"], number);
    assert!(status["shards_down"][0]["reason"].as_str().is_some_and(|reason| reason.contains("entry 1 ")), "{status}");
    // If it waited for the shard, it would take an hour.
    client.ask("GET", "/store/{own}harm", b"").says(503, "the store is down: its guest is being rebuilt");
    let statuses: Vec<_> = (0..40).map(|n| client.ask("GET", &format!("/store/{n}"), b"").status).collect();
    assert!(statuses.contains(&503) && statuses.contains(&404), "{statuses:?}");
}

#[test]
fn trap_in_tick_costs_no_request() {
    let server = Server::start(&[guest(), "--guest-config", "fault=tick-traps", "--request-timeout", "30s"]);
    let mut client = Connection::open(server.address());
    let before = peak(&server);
    let keys: Vec<_> = (0..200).map(|n| format!("key-{n}")).collect();
    for (n, key) in keys.iter().enumerate() {
        assert_eq!(client.ask("PUT", &format!("/store/{key}"), key.as_bytes()).status, 201);
        // Each new instance has all data stored before.
        let earlier = &keys[n / 2];
        assert_eq!(get(&mut client, &format!("/store/{earlier}")).text(), *earlier);
        if n % 100 == 50 {
            server.says_again("the guest trapped in tick", 1 + n / 100);
        }
    }
    let grown = peak(&server).saturating_sub(before);
    assert!(grown < BOUND, "the host grew by {grown} KiB");
    holds(server, &keys);
}

/// Checks that the log has exactly these keys, each with its name as its value.
#[track_caller]
fn holds(server: Server, keys: &[impl AsRef<str>]) {
    let server = server.terminate().restart(&[]);
    let mut client = Connection::open(server.address());
    for key in keys.iter().map(AsRef::as_ref) {
        assert_eq!(client.ask("GET", &format!("/v1/{key}"), b"").text(), key);
    }
    let (line, count) = (server.says("serving on"), format!(" keys={} ", keys.len()));
    assert!(line.contains(&count), "the log holds more than was appended, {count}were expected: {line}");
    server.terminate();
}

#[test]
fn guest_output_is_limited_over_many_calls() {
    let server = Server::start(&[guest(), "--guest-log-bytes", "1KiB", "--guest-log-line-bytes", "100"]);
    let mut client = Connection::open(server.address());
    let long = "y".repeat(250);
    get(&mut client, &format!("/print/{long}"));
    server.says(&"y".repeat(50));
    let begun = std::time::Instant::now();
    for _ in 0..200 {
        get(&mut client, "/print/a-line-of-thirty-characters-or-so");
    }
    let seconds = begun.elapsed().as_secs() as usize + 2;
    // A line after all of them, in another second.
    let said = (0..100_000).any(|n| {
        get(&mut client, &format!("/print/last-{n}"));
        server.stderr().iter().any(|line| line.contains("last-"))
    });
    assert!(said, "it never speaks again");
    let lines = server.stderr();
    assert!(lines.iter().filter(|line| line.contains("a-line-of-thirty")).count() <= 30 * seconds);
    assert!(lines.iter().any(|line| line.contains("output beyond 1024 bytes in 1s is dropped")));
    let longest = lines.iter().flat_map(|line| line.split(' ')).map(|word| word.matches('y').count()).max();
    assert_eq!(longest, Some(100), "a line is not cut where it should be");
}

#[test]
fn guest_that_never_starts_is_rejected() {
    let args = [guest(), "--guest-config", "fault=start-loops", "--guest-cpu-limit", "100ms"];
    serve_refused(&args).with(1, &["the guest does not start", "longer than 100ms", "circle"]);
}

#[test]
fn guest_with_too_many_parts_is_rejected() {
    serve_refused(&["--guest-max-table-elements", "2"]).with(1, &["the guest does not start", "table"]);
    serve_refused(&["--guest-max-instances", "1"]).with(1, &["the guest does not start", "instance"]);
}

#[test]
fn guest_near_memory_limit_rejects_writes_and_reads() {
    let args = ["--guest-max-memory-bytes", "12MiB", "--request-timeout", "30s"];
    let server = Server::start(&args);
    let mut client = Connection::open(server.address());
    let value = vec![b'x'; 100 << 10];
    let path = |n: usize| format!("/v1/{n}");
    let stored = (0..1_000).find(|&n| match client.ask("PUT", &path(n), &value).status {
        201 => false,
        507 => true,
        status => panic!("{status} after {n} values"),
    });
    let stored = stored.expect("12 MiB hold no 100 MB");
    assert!(stored > 40, "refused after {stored} values of 100 KiB");
    server.says("until keys are deleted, writes are refused");

    // Repeated attempts do not trap.
    for n in 0..20 {
        client.ask("PUT", &path(stored), &vec![b'y'; 1 << 20]).says(507, FULL);
        assert!(client.ask("GET", &path(n % stored), b"").body == value);
    }
    client.ask("GET", &path(stored), b"").says(404, "no such key");

    // The same after a restart; then deletes free space.
    let server = server.terminate().restart(&args);
    let mut client = Connection::open(server.address());
    assert!((0..stored).all(|n| client.ask("GET", &path(n), b"").body == value));
    let more = (stored..1_000).find(|&n| client.ask("PUT", &path(n), &value).status == 507).expect("still 12 MiB");
    // Half of them, so that some are in the shard that rejected writes.
    for n in 0..stored / 2 {
        assert_eq!(client.ask("DELETE", &path(n), b"").status, 200);
    }
    let again = (0..1_000_000).any(|_| client.ask("PUT", &path(more), &value).status == 201);
    assert!(again, "half was deleted, and nothing is taken");
    assert!(client.ask("GET", &path(more), b"").body == value);
    assert!(!server.stderr().iter().any(|line| line.contains("trapped")), "{:?}", server.stderr());
    server.terminate();
}

const FULL: &str = "no room is left, on disk or in memory; nothing was stored";

/// Values that are six times as long in JSON, unless they are base64.
#[test]
fn list_with_values_fits_into_instance_and_router() {
    for (shards, bytes) in [("1", 100 << 10), ("16", 1 << 20)] {
        let server = Server::start(&["--guest-max-memory-bytes", "64MiB", "--shards", shards]);
        let mut client = Connection::open(server.address());
        let value = vec![1_u8; bytes];
        // One instance until it is full; of many, each has about two values.
        let most = if shards == "1" { 10_000 } else { 32 };
        let stored = (0..most).find(|n| match client.ask("PUT", &format!("/v1/{n}"), &value).status {
            201 => false,
            507 => true,
            status => panic!("{status} after {n} values"),
        });
        assert_eq!(stored.is_some(), shards == "1");
        let (mut listed, mut target) = (0, "/v1?values=true".to_owned());
        loop {
            let response = get(&mut client, &target);
            assert_eq!(response.status, 200, "{} with {shards} shards: {}", target, response.text());
            let page: Value = serde_json::from_slice(&response.body).expect("JSON");
            listed += page["keys"].as_array().expect("keys").len();
            let Some(cursor) = page["cursor"].as_str() else { break };
            target = format!("/v1?values=true&cursor={cursor}");
        }
        assert_eq!(listed, stored.unwrap_or(most));
        assert_eq!(Metrics::of(&server).get("kvs_guest_traps_total"), 0.0);
    }
}
