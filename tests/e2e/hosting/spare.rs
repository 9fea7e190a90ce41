//! Hot spares: after a trap the spare serves at once, with all data, and only the request that trapped fails. A spare that
//! traps itself is dropped.
//!
//! The guests are `brittle`, which traps after handling a request, and `unruly`, which traps in `apply` on an entry.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::support::guests::{brittle, component, copy_of, guest};
use crate::support::load::{SaysOver, count};
use crate::support::metrics::{Metrics, counts, until};
use crate::support::server::Server;
use crate::support::swap::{swap, swaps};
use crate::support::wire::{Connection, get};

const SPARE: &str = "kvs_guest_promotions_total{cause=\"spare\"}";
const REBUILT: &str = "kvs_guest_rebuilds_total{outcome=\"done\"}";
const BUILT: &str = "kvs_guest_spare_builds_total{outcome=\"done\"}";
const FAILED: &str = "kvs_guest_spare_builds_total{outcome=\"failed\"}";

/// Stores this many keys, `0` and so on, with their names as their values.
fn store(server: &Server, keys: usize) {
    let mut client = Connection::open(server.address());
    for first in (0..keys).step_by(1_000) {
        let operations =
            (first..(first + 1_000).min(keys)).map(|key| format!(r#"{{"op":"put","key":"{key}","value":"{key}"}}"#));
        let body = format!("[{}]", operations.collect::<Vec<_>>().join(","));
        let answer = client.ask("POST", "/v1", body.as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

/// Waits until every shard has a spare.
fn is_ready(server: &Server, shards: usize) {
    counts(server, "kvs_guest_spares", shards as f64);
}

#[test]
fn trap_with_spare_costs_only_its_request() {
    let keys = 100_000;
    let traps = 5;
    for with_spare in [true, false] {
        let args = [brittle(), "--shards", "1", "--spare"];
        let server = Server::start(if with_spare { &args } else { &args[..3] });
        store(&server, keys);
        let is_over = AtomicBool::new(false);
        let (mut last, mut answered) = (None, 0);
        thread::scope(|scope| {
            let asking = (0..4).map(|client| {
                let (server, is_over) = (&server, &is_over);
                scope.spawn(move || {
                    let mut connection = Connection::open(server.address());
                    let mut answered = 0;
                    while !is_over.load(Ordering::Relaxed) {
                        let key = (answered * 4 + client) % keys;
                        assert_eq!(get(&mut connection, &format!("/v1/{key}")).text(), key.to_string());
                        let path = format!("/v1/of-{client}");
                        assert!(matches!(connection.ask("PUT", &path, b"value").status, 200 | 201));
                        answered += 1;
                    }
                    answered
                })
            });
            let asking: Vec<_> = asking.collect();
            let over = SaysOver(&is_over);
            let mut client = Connection::open(server.address());
            for trap in 0..traps {
                if with_spare {
                    is_ready(&server, 1);
                }
                let value = trap.to_string();
                client.ask("PUT", "/trap/v1/trapped", value.as_bytes()).says(500, "the store failed on this request");
                // Entries appended before the trap are there.
                assert_eq!(get(&mut client, "/v1/trapped").text(), value);
                last = Some(value);
            }
            drop(over);
            answered = asking.into_iter().map(|asking| asking.join().expect("all is answered")).sum::<usize>();
        });
        assert!(answered > 0);
        let metrics = Metrics::of(&server);
        let (spares, rebuilds) = if with_spare { (traps, 0) } else { (0, traps) };
        let counted = [SPARE, REBUILT, "kvs_guest_traps_total"].map(|name| metrics.get(name) as usize);
        assert_eq!(counted, [spares, rebuilds, traps]);
        let mut client = Connection::open(server.address());
        assert_eq!(Some(get(&mut client, "/v1/trapped").text()), last.as_deref());
        assert_eq!(get(&mut client, "/v1?limit=1").status, 200);
        server.terminate();
    }
}

/// A trap in one shard takes only its spare.
#[test]
fn each_shard_has_its_spare() {
    let server = Server::start(&[brittle(), "--shards", "4", "--spare"]);
    let mut client = Connection::open(server.address());
    for key in 0..100 {
        assert_eq!(client.ask("PUT", &format!("/v1/{key}"), key.to_string().as_bytes()).status, 201);
    }
    for round in 1..=8 {
        is_ready(&server, 4);
        client.ask("GET", &format!("/trap/v1/{round}"), b"").says(500, "the store failed on this request");
        counts(&server, SPARE, f64::from(round));
        for key in 0..100 {
            assert_eq!(get(&mut client, &format!("/v1/{key}")).text(), key.to_string());
        }
    }
    is_ready(&server, 4);
    let metrics = Metrics::of(&server);
    assert_eq!([REBUILT, BUILT].map(|name| metrics.get(name)), [0.0, 12.0]);
}

/// Traps that come faster than a spare is built wait for the one that is being built, and are counted as rebuilds.
#[test]
fn trap_before_spare_is_ready_is_rebuild() {
    let server = Server::start(&[brittle(), "--shards", "1", "--spare"]);
    store(&server, 20_000);
    let mut client = Connection::open(server.address());
    let traps = 20;
    for trap in 0..traps {
        client.ask("PUT", "/trap/v1/a", trap.to_string().as_bytes()).says(500, "the store failed on this request");
        assert_eq!(get(&mut client, "/v1/a").text(), trap.to_string());
    }
    let metrics = until(&server, "all are counted", |now| now.get(SPARE) + now.get(REBUILT) == f64::from(traps));
    assert!(metrics.get(REBUILT) > 0.0, "{traps} traps one after the other met a spare each");
    is_ready(&server, 1);
}

#[test]
fn memory_and_handles_stay_flat_over_promotions() {
    let promotions = count("KVS_TEST_PROMOTIONS", 150);
    let server = Server::start(&[brittle(), "--shards", "1", "--spare"]);
    let mut client = Connection::open(server.address());
    let held = || {
        let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        let handles = fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("it runs").count();
        (kib.and_then(|kib| kib.parse::<u64>().ok()).expect("a size"), handles)
    };
    let mut before = None;
    for round in 0..promotions {
        is_ready(&server, 1);
        if round == promotions / 3 {
            before = Some(held());
        }
        client.ask("PUT", "/trap/v1/a", round.to_string().as_bytes()).says(500, "the store failed on this request");
        assert_eq!(get(&mut client, "/v1/a").text(), round.to_string());
    }
    is_ready(&server, 1);
    let (before, after) = (before.expect("it was measured"), held());
    assert_eq!(Metrics::of(&server).get(SPARE), promotions as f64);
    assert!(after.0 < before.0 + (16 << 10), "the server grew from {} to {} KiB", before.0, after.0);
    assert!(after.1 <= before.1 + 4, "it has {} files open, and had {}", after.1, before.1);
}

fn readyz(server: &Server) -> (u16, String) {
    let answer = Connection::open(server.admin()).ask("GET", "/readyz", b"");
    (answer.status, answer.text().to_owned())
}

/// The spare reports the entry that the guest cannot apply, while the server stays ready. When the serving instance traps
/// too, the server is not ready.
#[test]
fn spare_that_traps_is_left_out() {
    let args = [guest(), "--shards", "1", "--spare", "--guest-config", "fault=apply-traps-on-poison"];
    let server = Server::start(&args);
    let mut client = Connection::open(server.address());
    is_ready(&server, 1);
    for key in ["{own}a", "{own}poison", "{own}b"] {
        assert_eq!(client.ask("PUT", &format!("/store/{key}"), b"value").status, 201);
    }
    let named = "[+]spare ok, but shard 0 of 1 has no spare: apply of entry 2 failed";
    until(&server, "the spare is left out", |now| now.get("kvs_guest_spares") == 0.0 && now.get(FAILED) >= 2.0);
    let report = readyz(&server);
    assert!(report.0 == 200 && report.1.contains(named), "{report:?}");
    let status = Connection::open(server.admin()).ask("GET", "/guest", b"");
    let status: serde_json::Value = serde_json::from_slice(&status.body).expect("JSON");
    assert!(status["spares"][0]["lack"].as_str().is_some_and(|lack| lack.contains("entry 2 ")), "{status}");
    assert_eq!(get(&mut client, "/store/{own}poison").text(), "value");
    assert_eq!(client.ask("PUT", "/store/{own}c", b"value").status, 201);
    assert_eq!(Metrics::of(&server).get("kvs_guest_traps_total"), 0.0);

    client.ask("GET", "/trap", b"").says(500, "the store failed on this request");
    until(&server, "it is not ready", |_| readyz(&server).0 == 503);
    let report = readyz(&server).1;
    assert!(report.contains("[-]guest shard 0 of 1 has had no instance since 20"), "{report}");
    assert!(report.contains("apply of entry 2 failed"), "{report}");
    let metrics = Metrics::of(&server);
    assert_eq!([SPARE, REBUILT].map(|name| metrics.get(name)), [0.0, 0.0]);
    // Pauses double, so that there are few attempts during a test.
    let attempts = metrics.get(FAILED) + metrics.get("kvs_guest_rebuilds_total{outcome=\"failed\"}");
    assert!(attempts < 100.0, "{attempts} attempts");
}

/// A swap drops the spares, and the new guest gets spares after its probation. After a rollback the previous guest gets them.
#[test]
fn swap_replaces_spares() {
    let server = Server::start(&[brittle(), "--shards", "1", "--spare", "--probation", "300ms"]);
    store(&server, 1_000);
    let mut client = Connection::open(server.address());
    is_ready(&server, 1);
    swaps(&server, &copy_of(brittle()));
    is_ready(&server, 1);
    client.ask("PUT", "/trap/v1/a", b"value").says(500, "the store failed on this request");
    counts(&server, SPARE, 1.0);
    assert_eq!(get(&mut client, "/v1/a").text(), "value");
    assert_eq!(get(&mut client, "/v1/999").text(), "999");

    let server = Server::start(&["--shards", "1", "--spare", "--probation", "1h"]);
    store(&server, 1_000);
    is_ready(&server, 1);
    thread::scope(|scope| {
        let swapping = scope.spawn(|| swap(&server, &component(guest())).status);
        server.says("another guest serves, on probation");
        assert_eq!(Metrics::of(&server).get("kvs_guest_spares"), 0.0);
        let mut client = Connection::open(server.address());
        assert_eq!(client.ask("PUT", "/store/{own}a", b"later").status, 201);
        client.ask("GET", "/trap", b"").says(500, "the store failed on this request");
        assert_eq!(swapping.join().expect("it is answered"), 422);
    });
    is_ready(&server, 1);
    let mut client = Connection::open(server.address());
    assert_eq!(get(&mut client, "/v1/{own}a").text(), "later");
    let metrics = Metrics::of(&server);
    let causes = ["swap", "rollback", "spare", "rebuild"];
    let causes = causes.map(|cause| metrics.get(&format!("kvs_guest_promotions_total{{cause=\"{cause}\"}}")));
    assert_eq!(causes, [1.0, 1.0, 0.0, 0.0]);
}
