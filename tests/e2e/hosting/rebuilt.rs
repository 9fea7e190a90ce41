//! What a rebuild shows: a guest that keeps state outside of the log counts less after it.

use std::fs;

use crate::support::guests::guest;
use crate::support::metrics::{Metrics, counts, until};
use crate::support::server::Server;
use crate::support::swap::swaps;
use crate::support::wire::{Connection, get};

const DIFFERING: &str = "kvs_guest_rebuilds_differing_total";
const REBUILT: &str = "kvs_guest_rebuilds_total{outcome=\"done\"}";

/// A server with a key in the log, which was counted.
fn start(args: &[&str]) -> (Server, Connection) {
    let server = Server::start(&[&[guest()], args].concat());
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/store/{own}a", b"value").status, 201);
    counts(&server, "kvs_store_keys", 1.0);
    (server, client)
}

#[test]
fn state_outside_of_the_log_is_reported_after_a_trap() {
    let (server, mut client) = start(&["--shards", "1"]);
    assert_eq!(get(&mut client, "/trap").status, 500);
    counts(&server, REBUILT, 1.0);
    assert_eq!(Metrics::of(&server).get(DIFFERING), 0.0, "it kept everything in the log");

    assert_eq!(get(&mut client, "/hide/{own}b").status, 200);
    counts(&server, "kvs_store_keys", 2.0);
    assert_eq!(get(&mut client, "/trap").status, 500);
    counts(&server, REBUILT, 2.0);
    assert_eq!(Metrics::of(&server).get(DIFFERING), 1.0);
    let line = server.says("statistics differ after a rebuild");
    for part in ["1 keys and 0 bytes, and 2 keys and 0 bytes before it", "guest=\"unruly\""] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}

#[test]
fn state_outside_of_the_log_is_reported_when_the_spare_serves() {
    let (server, mut client) = start(&["--shards", "1", "--spare"]);
    counts(&server, "kvs_guest_spares", 1.0);
    assert_eq!(get(&mut client, "/hide/{own}b").status, 200);
    counts(&server, "kvs_store_keys", 2.0);
    assert_eq!(get(&mut client, "/trap").status, 500);
    counts(&server, "kvs_guest_promotions_total{cause=\"spare\"}", 1.0);
    counts(&server, DIFFERING, 1.0);
}

#[test]
fn state_outside_of_the_log_is_reported_after_a_swap_to_the_same_guest() {
    let (server, mut client) = start(&["--shards", "1", "--probation", "1ms"]);
    assert_eq!(get(&mut client, "/hide/{own}b").status, 200);
    counts(&server, "kvs_store_keys", 2.0);
    swaps(&server, &fs::read(guest()).expect("the guest is built"));
    counts(&server, DIFFERING, 1.0);
}

/// Counts of different states are not compared.
#[test]
fn changes_after_the_count_are_no_difference() {
    let (server, mut client) = start(&["--shards", "1"]);
    for n in 0..3 {
        // Each key is stored a moment before the trap, whenever the guest was counted.
        assert_eq!(client.ask("PUT", &format!("/store/{{own}}{n}"), b"value").status, 201);
        assert_eq!(get(&mut client, "/trap").status, 500);
        let in_trap = client.ask("PUT", &format!("/store-and-trap/{{own}}in-trap-{n}"), b"value");
        assert_eq!(in_trap.status, 500);
        assert_eq!(get(&mut client, "/handled").status, 200);
    }
    until(&server, "all are counted", |metrics| metrics.get("kvs_store_keys") == 7.0);
    assert_eq!(Metrics::of(&server).get(DIFFERING), 0.0);
}
