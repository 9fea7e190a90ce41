//! Several shards are one store, for any number of shards, and when one of them fails.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use crate::support::guests::{DEFAULT_GUEST, built, component, guest};
use crate::support::load::SaysOver;
use crate::support::metrics::Metrics;
use crate::support::server::{PATIENCE, Server, serve_refused};
use crate::support::swap::{serving, swaps};
use crate::support::wire::Connection;

/// Enough that each of a few shards has some.
fn keys() -> impl Iterator<Item = String> {
    (0..64).map(|n| format!("key-{n:02}"))
}

#[track_caller]
fn puts(client: &mut Connection, value: &str) {
    for key in keys() {
        assert_eq!(
            client.ask("PUT", &format!("/v1/{key}"), format!("{value} of {key}").as_bytes()).status,
            201,
            "{key}"
        );
    }
}

#[track_caller]
fn holds(client: &mut Connection, path: &str, value: &str) {
    let answer = client.ask("GET", path, b"");
    assert_eq!((answer.status, answer.text()), (200, value), "{path}");
}

#[test]
fn number_of_shards_can_change_at_every_start() {
    let mut server = Server::start(&["--shards", "1"]);
    let mut deleted = Vec::<String>::new();
    for (round, shards) in ["2", "7", "16", "1"].into_iter().enumerate() {
        let mut client = Connection::open(server.address());
        puts(&mut client, &format!("round {round}"));
        for key in &deleted {
            assert_eq!(client.ask("DELETE", key, b"").status, 200);
        }
        server = server.kill().restart(&["--shards", shards]);
        client = Connection::open(server.address());
        for key in keys() {
            let (path, value) = (format!("/v1/{key}"), format!("round {round} of {key}"));
            let found = client.ask("GET", &path, b"");
            if deleted.contains(&path) {
                assert_eq!(found.status, 404, "{path} in {shards} shards");
            } else {
                assert_eq!((found.status, found.text()), (200, value.as_str()), "{path} in {shards} shards");
            }
        }
        deleted.push(format!("/v1/key-{round:02}"));
    }
}

#[test]
fn list_merges_all_shards() {
    let server = Server::start(&["--shards", "7"]);
    let mut client = Connection::open(server.address());
    // Pages end at a number of keys, or, at a different key in each shard, at their size.
    for (limit, value) in [("limit=10", "value".to_owned()), ("limit=1000", "x".repeat(200_000))] {
        puts(&mut client, &value);
        let (mut listed, mut query) = (Vec::new(), format!("{limit}&values=true"));
        loop {
            let page = client.ask("GET", &format!("/v1?{query}"), b"");
            assert_eq!(page.status, 200, "{}", page.text());
            let page: serde_json::Value = serde_json::from_str(page.text()).expect("JSON");
            let entries = page["keys"].as_array().expect("keys");
            listed.extend(entries.iter().map(|entry| (entry["key"].to_string(), entry["value"].to_string())));
            let Some(cursor) = page["cursor"].as_str() else { break };
            query = format!("{limit}&values=true&cursor={cursor}");
        }
        let names: Vec<_> = listed.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names, keys().map(|key| format!("\"{key}\"")).collect::<Vec<_>>());
        let expected = keys().map(|key| format!("\"{value} of {key}\""));
        assert!(listed.into_iter().map(|(_, value)| value).eq(expected), "values are not those of their keys");
    }
}

#[test]
fn cross_shard_transaction_is_422() {
    let server = Server::start(&["--shards", "4"]);
    let mut client = Connection::open(server.address());
    let puts = |key: &dyn Fn(u32) -> String| {
        let puts: Vec<_> = (0..16).map(|n| serde_json::json!({"op": "put", "key": key(n), "value": "1"})).collect();
        serde_json::to_vec(&puts).expect("JSON")
    };
    let refused = client.ask("POST", "/v1", &puts(&|n| format!("{n}")));
    assert_eq!(refused.status, 422);
    assert!(refused.text().contains("{tag}"), "{}", refused.text());
    assert_eq!(client.ask("GET", "/v1/0", b"").status, 404);
    assert_eq!(client.ask("POST", "/v1", &puts(&|n| format!("{{cart7}}:{n}"))).status, 200);
    assert_eq!(client.ask("GET", "/v1/%7Bcart7%7D:15", b"").status, 200);
    assert_eq!(client.ask("POST", "/v1", b"[").status, 400);
}

#[test]
fn slow_call_delays_only_its_shard() {
    let server = Server::start(&[guest(), "--shards", "4", "--guest-cpu-limit", "1h"]);
    let mut busy = Connection::open(server.address());
    busy.send("GET /loop-aloud HTTP/1.1\r\nhost: kvs\r\n\r\n");
    server.says("going round in circles");
    let clients: Vec<_> = keys()
        .map(|key| {
            let mut client = Connection::open(server.address());
            client.send(format!("GET /store/{key} HTTP/1.1\r\nhost: kvs\r\n\r\n"));
            client
        })
        .collect();
    let begun = Instant::now();
    loop {
        let metrics = Metrics::of(&server);
        let answered = metrics.find("kvs_http_requests_total{method=\"GET\",status=\"404\"}").unwrap_or(0.0);
        if answered + metrics.get("kvs_guest_queue_length") == clients.len() as f64 {
            // The busy shard has some of them, the other three the rest.
            assert!((16.0..64.0).contains(&answered), "{answered} were answered");
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{answered} were answered");
    }
}

#[test]
fn append_to_key_of_another_shard_is_rejected() {
    let server = Server::start(&[guest(), "--shards", "4"]);
    let mut client = Connection::open(server.address());
    let (mut taken, mut refused) = (Vec::new(), 0);
    // All requests are for the same shard.
    for key in keys() {
        match client.ask("PUT", &format!("/append-to/{key}"), b"").text() {
            text if text.starts_with("Ok") => taken.push(key),
            text if text.contains("ReadOnly") => refused += 1,
            text => panic!("{key}: {text}"),
        }
    }
    assert!(!taken.is_empty() && refused > 16, "{taken:?} were taken, {refused} refused");
    let server = server.kill().restart(&[guest(), "--shards", "4"]);
    let mut client = Connection::open(server.address());
    for key in keys() {
        let status = if taken.contains(&key) { 200 } else { 404 };
        assert_eq!(client.ask("GET", &format!("/store/{key}"), b"").status, status, "{key}");
    }
}

#[test]
fn trap_in_route_costs_that_request() {
    let server = Server::start(&[guest(), "--shards", "4"]);
    let mut client = Connection::open(server.address());
    for _ in 0..3 {
        client.ask("GET", "/route-traps", b"").says(500, "the store failed on this request");
        server.says("the guest trapped in route");
        assert_eq!(client.ask("PUT", "/store/a", b"value").status, 201);
    }
    assert_eq!(Metrics::of(&server).get("kvs_guest_traps_total"), 3.0);
    // No state was lost, so there is no rebuild.
    assert_eq!(Metrics::of(&server).get("kvs_guest_rebuilds_total{outcome=\"done\"}"), 0.0);
}

#[test]
fn broadcast_reaches_all_shards() {
    let server = Server::start(&[guest(), "--shards", "4"]);
    let mut client = Connection::open(server.address());
    let before = Metrics::of(&server).get("kvs_guest_call_duration_seconds_count");
    assert_eq!(client.ask("GET", "/all-shards", b"").status, 404);
    assert_eq!(Metrics::of(&server).get("kvs_guest_call_duration_seconds_count") - before, 4.0);
}

#[test]
fn trap_rebuilds_only_its_shard() {
    let server = Server::start(&[guest(), "--shards", "4"]);
    let mut client = Connection::open(server.address());
    for key in keys() {
        assert_eq!(client.ask("PUT", &format!("/store/{key}"), key.as_bytes()).status, 201);
    }
    client.ask("PUT", "/store-and-trap/key-00", b"after").says(500, "the store failed on this request");
    holds(&mut client, "/store/key-00", "after");
    for key in keys().skip(1) {
        holds(&mut client, &format!("/store/{key}"), &key);
    }
    let rebuilt = server.says("the guest is rebuilt");
    let entries = rebuilt.split_once("entries=").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    assert!(entries.is_some_and(|entries: u32| (1..64).contains(&entries)), "its own entries and no others: {rebuilt}");
}

#[test]
fn trap_on_probation_rolls_back_all_shards() {
    let server = Server::start(&["--shards", "4", "--probation", "1h"]);
    let mut client = Connection::open(server.address());
    puts(&mut client, "before");
    for (round, trap) in ["/trap", "/route-traps"].into_iter().enumerate() {
        thread::scope(|scope| {
            let swap =
                scope.spawn(|| Connection::open(server.admin()).ask("PUT", "/guest", &component(guest())).status);
            server.says_again("another guest serves, on probation", round + 1);
            for key in keys().take(32) {
                let value = format!("{trap} of {key}");
                assert_eq!(client.ask("PUT", &format!("/store/{key}"), value.as_bytes()).status, 201);
            }
            client.ask("GET", trap, b"").says(500, "the store failed on this request");
            assert_eq!(swap.join().expect("it is answered"), 422);
        });
        assert_eq!(serving(&server), "kvs");
        for key in keys().take(32) {
            holds(&mut client, &format!("/v1/{key}"), &format!("{trap} of {key}"));
        }
        for key in keys().skip(32) {
            holds(&mut client, &format!("/v1/{key}"), &format!("before of {key}"));
        }
    }
}

#[test]
fn request_is_rerouted_after_swap() {
    let server = Server::start(&["--shards", "4", "--probation", "1ms"]);
    puts(&mut Connection::open(server.address()), "value");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..8 {
            let (server, stop) = (&server, &stop);
            scope.spawn(move || {
                let mut client = Connection::open(server.address());
                for key in keys().collect::<Vec<_>>().iter().cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
                    // The built-in guest does not have this path, and the other one returns the value.
                    let answer = client.ask("GET", &format!("/store/{key}"), b"");
                    assert!(answer.status == 200 || answer.text().contains("unknown path"), "{}", answer.text());
                }
            });
        }
        let _over = SaysOver(&stop);
        for file in [guest(), DEFAULT_GUEST].iter().cycle().take(20) {
            swaps(&server, &component(file));
        }
    });
}

#[test]
fn guest_without_routing_runs_in_one_shard_only() {
    static GUEST: LazyLock<String> = LazyLock::new(|| built("single"));
    let server = Server::start(&[&GUEST, "--shards", "1"]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"value").status, 201);
    holds(&mut client, "/v1/a", "value");
    let stopped = server.kill();

    let why = "it does not export kvs:store/sharding@0.2.0, so it runs in one shard, and this server has 4 (--shards)";
    stopped.refuses(&[&GUEST, "--shards", "4"]).with(1, &["single_guest.wasm cannot be run as a guest", why]);
    let server = stopped.restart(&["--shards", "4"]);
    let refused = Connection::open(server.admin()).ask("PUT", "/guest", &component(&GUEST));
    assert_eq!(refused.status, 422);
    assert!(refused.text().contains(why), "{}", refused.text());
    assert_eq!(serving(&server), "kvs");
    let server = server.terminate().restart(&["--shards", "1"]);
    swaps(&server, &component(&GUEST));
    assert_eq!(serving(&server), "single");
}

#[test]
fn invalid_number_of_shards_is_rejected() {
    for shards in ["0", "65", "many"] {
        serve_refused(&["--shards", shards]).with(2, &["--shards", shards]);
    }
}
