//! Backups of a log in NATS JetStream: restored into files, and into a stream of another name.

use std::path::PathBuf;

use super::{printed, refuses, start};
use crate::support::backup::{done, large, restore, restored, take, temporary};
use crate::support::nats::Nodes;
use crate::support::readiness::{UP_TO_DATE, WELL, becomes_ready};
use crate::support::requests::{get, put, shows};
use crate::support::server::{Server, kvs, refused};
use crate::support::wire::Connection;

#[test]
fn backup_of_a_running_server_is_restored_into_files() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    becomes_ready(&server, 200, WELL);
    assert_eq!((put(&server, "a", "1"), put(&server, "a", "2"), put(&server, "b", "3")), (201, 201, 201));
    let files = temporary();
    let [full, rest] = ["full", "rest"].map(|name| files.path().join(name));
    let end = take(&server, &full, &[]);
    assert_eq!(put(&server, "c", "4"), 201);
    assert!(take(&server, &rest, &["--since", &end.to_string()]) > end);
    let in_files = restored(&[full, rest], &[]);
    assert_eq!(["a", "b", "c"].map(|key| get(&in_files, key)), ["2", "3", "4"].map(|value| (200, value.to_owned())));
}

/// `kvs serve` of the log with this name.
fn serve(nodes: &Nodes, name: &str, more: &[&str]) -> Server {
    let (url, monitors) = (nodes.url(name), nodes.monitors());
    Server::start(&[&["--txlog", &url, "--txlog-monitor", &monitors, "--read-lease", "3s"], more].concat())
}

fn verified(nodes: &Nodes, name: &str) -> String {
    let mut verify = kvs();
    verify.args(["txlog", "verify", "--txlog", &nodes.url(name)]);
    printed(verify)
}

#[test]
fn backup_moves_a_log_between_files_and_streams() {
    // A compacted log in files, with an incarnation.
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for n in 0..30 {
        client.ask("PUT", &format!("/v1/key-{}", n % 10), format!("{n}").as_bytes());
    }
    client.ask("PUT", "/v1/typed?ttl=1000", b"\xff");
    assert_eq!(client.ask("DELETE", "/v1/key-3", b"").status, 200);
    let stopped = server.terminate();
    for command in ["compact", "fork"] {
        let mut txlog = kvs();
        txlog.args(["txlog", command, "--data-dir"]).arg(stopped.data());
        done(txlog);
    }
    let server = stopped.restart(&[]);
    let forked = Connection::open(server.address()).ask("PUT", "/v1/forked", b"1").etag().expect("it is written");
    let files = temporary();
    let [full, rest, whole, later] = ["full", "rest", "whole", "later"].map(|name| files.path().join(name));
    assert_eq!(take(&server, &full, &[]), forked);
    assert_eq!((put(&server, "rest", "1"), take(&server, &rest, &["--since", &forked.to_string()])), (201, forked + 1));
    drop(server);

    let nodes = Nodes::start(3);
    let into = |files: &[PathBuf], name: &str| restore(files, &["--txlog", &nodes.url(name)]);
    done(into(&[full.clone(), rest], "moved"));
    assert!(verified(&nodes, "moved").starts_with("the log is sound: "));
    let server = serve(&nodes, "moved", &[]);
    becomes_ready(&server, 200, WELL);
    assert_eq!((get(&server, "key-4"), get(&server, "rest")), ((200, "24".into()), (200, "1".into())));
    assert_eq!(get(&server, "key-3").0, 404);
    let mut client = Connection::open(server.address());
    let typed = client.ask("GET", "/v1/typed", b"");
    assert_eq!((typed.status, typed.body), (200, b"\xff".to_vec()));
    // Tags and positions of the common history hold, those of the lost future do not.
    let lost = forked + 2;
    assert_eq!(client.ask_with("PUT", "/v1/rest", &[("if-match", &format!("\"{lost}\""))], b"").status, 412);
    assert_eq!(client.ask_for_head("GET", &format!("/v1?watch&since={lost}"), &[]).status, 410);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask_for_head("GET", &format!("/v1?watch&since={}", forked + 1), &[]).status, 200);
    let position = Connection::open(server.address()).ask("GET", "/v1", b"");
    assert_eq!(position.header("kvs-position"), Some(&*(forked + 1).to_string()), "{:?}", position.headers);
    let mut client = Connection::open(server.address());
    let next = client.ask_with("PUT", "/v1/rest", &[("if-match", &format!("\"{}\"", forked + 1))], b"2");
    let next = next.etag().expect("it is written");
    assert!(next > forked + (1 << 40), "{next}");

    // A standby has the same, and takes over.
    let standby = serve(&nodes, "moved", &["--standby", "--stale-reads"]);
    becomes_ready(&standby, 200, UP_TO_DATE);
    shows(&standby, "rest", 200, "2");
    server.terminate();
    becomes_ready(&standby, 200, WELL);
    assert_eq!((get(&standby, "key-4"), put(&standby, "rest", "3")), ((200, "24".into()), 201));
    assert_eq!(take(&standby, &later, &["--since", &next.to_string()]), next + 1);
    assert_eq!(take(&standby, &whole, &[]), next + 1);
    let in_files = restored(&[whole], &[]);
    assert_eq!((get(&in_files, "rest"), get(&in_files, "key-4")), ((200, "3".into()), (200, "24".into())));

    let twice = "there is a stream KVS-moved-00 already: a backup is restored under a new name; give another";
    refused(into(&[full], "moved")).with(1, &[twice]);
    assert_eq!(put(&standby, "rest", "4"), 201);
}

#[test]
fn restore_that_is_not_completed_leaves_no_log() {
    let server = large();
    let files = temporary();
    let full = files.path().join("full");
    take(&server, &full, &[]);
    let nodes = Nodes::start_with(1, "max_payload: 8MB\njetstream { store_dir: STORE, max_file_store: 8MB }\n");
    let restored = || restore(std::slice::from_ref(&full), &["--txlog", &nodes.url("x")]);
    refused(restored()).with(1, &["cannot restore into the stream KVS-x-00", "the stream is full"]);
    let mut verify = kvs();
    verify.args(["txlog", "verify", "--txlog", &nodes.url("x")]);
    refused(verify).with(1, &["there is no stream KVS-x-00"]);

    // As a restore leaves it that was killed.
    let config = r#"{"name":"KVS-x-00","subjects":["kvs.x.00"],"metadata":{"kvs-restoring":"1"}}"#;
    assert!(!nodes.api("STREAM.CREATE.KVS-x-00", config).contains("\"error\""));
    let reason = "a restore into the stream KVS-x-00 was not completed; delete the stream, and restore again";
    refused(restored()).with(1, &[reason]);
    refuses(&nodes, &["--allow-unsafe-txlog"]).with(1, &[reason]);
}
