//! The response cache: only valid declarations are reused, while they are current, and hits are checked like calls.

use std::fs;
use std::time::{Duration, Instant};

use crate::support::guests::{DEFAULT_GUEST, copy_of, guest};
use crate::support::metrics::{Metrics, until};
use crate::support::server::{PATIENCE, Server};
use crate::support::swap::swaps;
use crate::support::tokens::Tokens;
use crate::support::wire::{Connection, Response, get};

const HITS: &str = "kvs_response_cache_hits_total";
const VOID: &str = "kvs_response_cache_void_declarations_total";
const CALLS: &str = "kvs_guest_call_duration_seconds_count";

/// Returns the change of a metric during `work`.
fn moves(server: &Server, name: &str, work: impl FnOnce()) -> f64 {
    let before = Metrics::of(server).get(name);
    work();
    Metrics::of(server).get(name) - before
}

/// A response without the headers that differ between requests.
fn content(response: &Response) -> (u16, Vec<(String, String)>, Vec<u8>) {
    let differs = |name: &str| matches!(name, "x-request-id" | "date");
    let headers = response.headers.iter().filter(|(name, _)| !differs(name)).cloned().collect();
    (response.status, headers, response.body.clone())
}

#[test]
fn reads_of_key_are_hits_until_change() {
    for shards in ["1", "4"] {
        let server = Server::start(&["--shards", shards]);
        let mut client = Connection::open(server.address());
        let problems = [("accept", "application/problem+json")];
        for path in ["/v1/a", "/v1/b", "/v1/c", "/v1/d", "/v1/e"] {
            let transaction = format!(r#"[{{"op":"put","key":"{}","value":"third"}}]"#, &path[4..]);
            for (method, target, body, status, value) in [
                ("DELETE", path, "", 404, None),
                ("PUT", path, "one", 200, Some("one")),
                ("PUT", path, "another", 200, Some("another")),
                ("POST", "/v1", &transaction, 200, Some("third")),
                ("DELETE", path, "", 404, None),
            ] {
                assert!(client.ask(method, target, body.as_bytes()).status < 300, "{method} {target}");
                for method in ["GET", "HEAD"] {
                    for headers in [&[][..], &problems] {
                        let first = client.ask_with(method, path, headers, b"");
                        let mut second = None;
                        let hits = moves(&server, HITS, || second = Some(client.ask_with(method, path, headers, b"")));
                        let second = second.expect("it is answered");
                        assert_eq!(content(&first), content(&second), "{method} {path}");
                        assert_eq!((first.status, hits), (status, 1.0), "{method} {path} in {shards} shards");
                        assert_ne!(first.header("x-request-id"), second.header("x-request-id"));
                        if let (Some(value), "GET") = (value, method) {
                            assert_eq!(first.text(), value);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn expired_value_is_not_reused() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a?ttl=2", b"value").status, 201);
    let expires = Instant::now() + Duration::from_secs(2);
    for number in 0.. {
        let asked = Instant::now();
        // Differs from all earlier requests, so the guest is called.
        let fresh = client.ask_with("GET", "/v1/a", &[("if-range", &format!("\"{number}\""))], b"");
        let reused = client.ask("GET", "/v1/a", b"");
        assert!(fresh.status == 200 || reused.status == 404, "it came back after its time");
        assert!(asked < expires || reused.status == 404, "it is given after its time");
        if reused.status == 404 {
            break;
        }
        assert!(expires.elapsed() < PATIENCE);
    }
    assert!(Metrics::of(&server).get(HITS) > 0.0);
}

#[test]
fn declaration_of_call_with_effects_is_void() {
    let server = Server::start(&[guest(), "--shards", "4"]);
    let mut client = Connection::open(server.address());
    let deeds = ["none", "config", "print", "log", "count", "timer"].map(|deed| format!("{deed}/{{own}}a"));
    for path in deeds.into_iter().chain(["none/{own}a,{own}b".to_owned(), "none/{own}a/3600000".to_owned()]) {
        let path = format!("/reuse/{path}");
        let mut bodies = Vec::new();
        let hits = moves(&server, HITS, || bodies.extend([get(&mut client, &path).body, get(&mut client, &path).body]));
        assert_eq!((hits, &bodies[0]), (1.0, &bodies[1]), "{path}");
    }
    let others = (0..100).map(|n| format!("none/{{own}}a,{{other-{n}}}")).find(|path| {
        // A key that another shard owns, as most are.
        moves(&server, VOID, || drop(get(&mut client, &format!("/reuse/{path}")))) > 0.0
    });
    let too_many = format!("none/{}", vec!["{own}a"; 101].join(","));
    let deeds = [
        "append",
        "append-nothing",
        "wait",
        "peer",
        "tls",
        "identity",
        "request-id",
        "wall-clock",
        "monotonic-clock",
        "random",
        "seed",
    ];
    let deeds = deeds.iter().map(|deed| format!("{deed}/{{own}}a"));
    for path in deeds.chain([too_many, others.expect("a key of another shard")]) {
        let path = format!("/reuse/{path}");
        // A request that waits is handled again.
        let mut hits = 0.0;
        let void = moves(&server, VOID, || {
            hits =
                moves(&server, HITS, || (0..2).for_each(|_| assert_eq!(get(&mut client, &path).status, 200, "{path}")));
        });
        assert!(hits == 0.0 && void >= 2.0, "{path}: {hits} hits, {void} void");
    }
    let void = moves(&server, VOID, || drop(client.ask_for_head("HEAD", "/reuse/subscribe/{own}a", &[])));
    assert_eq!(void, 1.0);
    // Declares nothing: an empty key, or a time that has passed.
    for path in ["/reuse/none/", "/reuse/none/{own}a,", "/reuse/none/{own}a/0"] {
        let hits = moves(&server, HITS, || (0..2).for_each(|_| assert_eq!(get(&mut client, path).status, 200)));
        assert_eq!(hits, 0.0, "{path}");
    }
}

#[test]
fn response_is_not_reused_for_other_client_or_grant() {
    let tokens = Tokens::new();
    let clients = [
        ["twin", "--scope", "read", "--path-prefix", "/reuse/none/{own}a"],
        ["twin-b", "--scope", "read", "--path-prefix", "/reuse/none/{own}b"],
        ["twin-c", "--scope", "write", "--path-prefix", "/reuse/none"],
        ["other", "--scope", "read", "--path-prefix", "/reuse/none"],
    ]
    .map(|args| tokens.add(&args));
    // Tokens of one name are written by hand.
    let text = fs::read_to_string(tokens.file()).expect("it is there");
    fs::write(tokens.file(), text.replace("twin-b", "twin").replace("twin-c", "twin")).expect("it can be written");
    let server = Server::start(&[guest(), "--tokens", &tokens.file(), "--admin-open"]);
    let mut client = Connection::open(server.address());
    let mut ask = |token: &str, key: &str| {
        let bearer = format!("Bearer {token}");
        client.ask_with("GET", &format!("/reuse/none/{{own}}{key}"), &[("authorization", &bearer)], b"")
    };
    let [one, prefix, scope, name] = &clients;
    let first = ask(one, "a");
    assert_eq!((first.status, ask(one, "a").body), (200, first.body.clone()));
    assert_eq!(ask(prefix, "a").status, 403, "a prefix was not enforced on a hit");
    assert_eq!(ask("kvs_unknown", "a").status, 401);
    for other in [scope, name] {
        let answer = ask(other, "a");
        assert!(answer.status == 200 && answer.body != first.body, "it was given the response of another");
    }
}

#[test]
fn response_of_swapped_out_guest_is_not_reused() {
    let server = Server::start(&["--probation", "10ms"]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"value").status, 201);
    for _ in 0..2 {
        let calls = moves(&server, CALLS, || {
            (0..3).for_each(|_| assert_eq!(client.ask("GET", "/v1/a", b"").text(), "value"));
        });
        assert_eq!(calls, 1.0);
        swaps(&server, &copy_of(DEFAULT_GUEST));
    }
}

#[test]
fn hits_continue_while_guest_is_rebuilt() {
    let server = Server::start(&[guest(), "--guest-config", "fault=apply-traps-on-poison"]);
    let mut client = Connection::open(server.address());
    let kept = get(&mut client, "/reuse/none/{own}a");
    assert_eq!(client.ask("PUT", "/store/poison", b"").status, 201);
    assert_eq!(get(&mut client, "/trap").status, 500);
    until(&server, "a rebuild failed", |now| now.find("kvs_guest_rebuilds_total{outcome=\"failed\"}") > Some(0.0));
    assert_eq!(get(&mut client, "/reuse/none/{own}a").body, kept.body);
    until(&server, "the shard is down", |now| now.get("kvs_guest_shards_down") == 1.0);
    assert_eq!(get(&mut client, "/reuse/none/{own}a").body, kept.body);
    assert_eq!(get(&mut client, "/handled").status, 503);
}

#[test]
fn flood_of_targets_evicts_and_does_not_grow() {
    let server = Server::start(&["--response-cache-bytes", "256KiB"]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/large", &vec![b'x'; 16 << 10]).status, 201);
    let hits = moves(&server, HITS, || (0..2).for_each(|_| drop(client.ask("GET", "/v1/large", b""))));
    assert_eq!(hits, 0.0, "more than a sixteenth was kept");
    for number in 0..2_000 {
        assert_eq!(client.ask("GET", &format!("/v1/nothing-{number}"), b"").status, 404);
    }
    let metrics = Metrics::of(&server);
    let bytes = metrics.get("kvs_response_cache_bytes");
    assert!((100_000.0..=262_144.0).contains(&bytes), "{bytes} bytes");
    assert!(metrics.get("kvs_response_cache_evictions_total") > 1_000.0);
    assert_eq!(metrics.get("kvs_response_cache_misses_total"), 2_002.0);
}

#[test]
fn disabled_cache_keeps_nothing() {
    let server = Server::start(&["--response-cache-bytes", "0"]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"value").status, 201);
    let calls =
        moves(&server, CALLS, || (0..3).for_each(|_| assert_eq!(client.ask("GET", "/v1/a", b"").text(), "value")));
    assert_eq!((calls, Metrics::of(&server).get("kvs_response_cache_bytes")), (3.0, 0.0));
}
