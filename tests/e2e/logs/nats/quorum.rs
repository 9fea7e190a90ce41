//! Loss of the quorum of the engine, or of its space: the node that is left answers what it has, and nobody believes it.

use std::time::{Duration, Instant};

use super::{args, put, refuses, stand_by, start, texts};
use crate::support::nats::Nodes;
use crate::support::readiness::{UP_TO_DATE, becomes_ready};
use crate::support::server::{PATIENCE, Server};
use crate::support::wire::Connection;

/// Longer than a primary waits for frames that a node without a leader lacks.
const LONG: u64 = 20_000;

/// Age of what a standby answers, in milliseconds.
fn age(standby: &Server) -> u64 {
    let mut connection = Connection::open(standby.address());
    let answer = connection.ask_with("GET", "/v1/a", &[("kvs-consistency", "stale")], b"");
    assert_eq!((answer.status, answer.text()), (200, "1"));
    answer.header("kvs-stale-age-ms").expect("a standby states the age").parse().expect("it is a number")
}

#[test]
fn lost_quorum_makes_reads_of_standby_older_and_ends_no_server() {
    let mut nodes = Nodes::start(3);
    let primary = start(&nodes);
    assert_eq!(put(&primary, "a", "1"), 201);
    let standby = stand_by(&nodes);
    becomes_ready(&standby, 200, UP_TO_DATE);
    let leader = nodes.leader("x");
    let follower = (leader + 1) % 3;
    nodes.kill(leader);
    nodes.kill(follower);
    let begun = Instant::now();
    while age(&standby) < LONG {
        assert!(begun.elapsed() < PATIENCE, "a node without a leader is believed");
        std::thread::sleep(Duration::from_millis(200));
    }
    nodes.restart(leader);
    nodes.restart(follower);
    // Either can be the primary now.
    let begun = Instant::now();
    while ![&primary, &standby].iter().any(|server| put(server, "b", "2") == 201) {
        assert!(begun.elapsed() < PATIENCE, "writes do not come back");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn start_over_full_stream_ends_with_its_reason() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    assert_eq!(put(&server, "a", "1"), 201);
    let killed = server.kill();
    nodes.limit("x", Some(0));
    let args = args(&nodes);
    let reason = "it cannot be claimed for 20s: the stream is full: raise its max_bytes";
    killed.refuses(&texts(&args)).with(1, &["cannot open the log in stream KVS-x-00", reason]);
    nodes.limit("x", None);
    // A claim that failed is no primary: this one waits for the lease of the one that was killed.
    let server = start(&nodes);
    assert_eq!(put(&server, "a", "2"), 201);
}

#[test]
fn cluster_without_room_for_replicas_gets_no_stream_with_one() {
    let nodes = Nodes::start(2);
    let reason = "cannot make the stream KVS-x-00 with 3 replicas: no suitable peers";
    refuses(&nodes, &["--allow-unsafe-txlog"]).with(1, &[reason]);
}
