//! Compaction of a log in NATS JetStream, by the server and by hand.

use serde_json::Value;

use super::{Nodes, Server, WELL, args, becomes_ready, get, printed, put, put_until, stand_by, start, texts, txlog};
use crate::support::readiness::UP_TO_DATE;
use crate::support::requests::shows;
use crate::support::wire::Connection;

/// Names of the streams of snapshots.
fn snapshots(nodes: &Nodes) -> Vec<String> {
    let answer: Value =
        serde_json::from_str(&nodes.api("STREAM.NAMES", r#"{"subject":"kvs.x.snap.*"}"#)).expect("it is JSON");
    let names = answer["streams"].as_array().into_iter().flatten();
    names.map(|name| name.as_str().expect("it is text").to_owned()).collect()
}

fn compact(nodes: &Nodes) {
    printed(txlog(nodes, &["compact"]));
}

/// Writes some keys several times, and deletes one.
fn write(server: &Server, round: u32) {
    for number in 0..40 {
        assert!([200, 201].contains(&put(server, &format!("key-{}", number % 10), &format!("{round}-{number}"))));
    }
    put(server, "deleted", "x");
    assert_eq!(Connection::open(server.address()).ask("DELETE", "/v1/deleted", b"").status, 200);
}

fn has_all(server: &Server, round: u32) {
    for number in 0..10 {
        assert_eq!(get(server, &format!("key-{number}")), (200, format!("{round}-{}", 30 + number)));
    }
    assert_eq!(get(server, "deleted").0, 404);
}

#[test]
fn compacted_log_is_followed_restarted_verified_and_compacted_again() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    write(&server, 0);
    let standby = stand_by(&nodes);
    becomes_ready(&standby, 200, UP_TO_DATE);
    compact(&nodes);
    assert_eq!(snapshots(&nodes).len(), 1);
    let first = nodes.first("x");
    assert!(first > 20, "{first}");
    // Both go on, and one that starts begins with the snapshot.
    write(&server, 1);
    shows(&standby, "key-9", 200, "1-39");
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask_for_head("GET", "/v1?watch&since=1", &[]).status, 410);
    let args = args(&nodes);
    let server = server.kill();
    becomes_ready(&standby, 200, WELL);
    has_all(&standby, 1);
    let server = server.restart(&[&texts(&args)[..], &["--standby"]].concat());
    becomes_ready(&server, 200, UP_TO_DATE);
    compact(&nodes);
    assert!(nodes.first("x") > first && snapshots(&nodes).len() == 1);
    write(&standby, 2);
    assert!(printed(txlog(&nodes, &["verify"])).contains("the log is sound: "));
    standby.terminate();
    becomes_ready(&server, 200, WELL);
    has_all(&server, 2);
    let server = server.terminate().restart(&texts(&args));
    has_all(&server, 2);
    write(&server, 3);
    has_all(&server, 3);
}

#[test]
fn server_compacts_log_that_has_grown() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    let value = "x".repeat(1 << 20);
    for number in 0..68 {
        assert!([200, 201].contains(&put(&server, &format!("key-{}", number % 2), &value)));
    }
    server.says("compacted the log: 2 entries up to sequence ");
    becomes_ready(&server, 200, WELL);
    // The messages stay until the next snapshot.
    assert_eq!((snapshots(&nodes).len(), nodes.first("x")), (1, 1));
    let server = server.kill().restart(&texts(&args(&nodes)));
    assert_eq!(get(&server, "key-1"), (200, value));
}

#[test]
fn log_without_its_snapshot_is_never_empty_store() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    write(&server, 0);
    compact(&nodes);
    assert_eq!(put(&server, "a", "1"), 201);
    let stream = snapshots(&nodes).pop().expect("there is one");
    assert!(nodes.api(&format!("STREAM.DELETE.{stream}"), "").contains("\"success\":true"));
    let reason = "frames of the log in the stream KVS-x-00";
    server.kill().refuses(&texts(&args(&nodes))).with(1, &[reason, "no snapshot has their entries"]);
}

#[test]
fn full_stream_has_room_after_compaction() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    let value = "x".repeat(10 << 10);
    nodes.limit("x", Some(200 << 10));
    // 507, or 503 while small frames still fit.
    let accepted = (0..).take_while(|number| put(&server, &format!("full{number}"), &value) == 201).count();
    assert!((1..20).contains(&accepted), "{accepted} values fit");
    for number in 0..20 {
        assert_ne!(put(&server, &format!("more{number}"), &value), 201, "there is room");
    }
    compact(&nodes);
    put_until(&server, 201, "again", &value);
}
