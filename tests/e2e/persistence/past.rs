//! `kvs serve --read-only --until`: serves a log as of the past, without changing it.

use std::fs;
use std::path::Path;

use crate::support::server::{Server, kvs, serve_refused};
use crate::support::wire::Connection;

/// The names and contents of the files of a log.
fn files(data: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(data.join("log")).expect("there is a log");
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("it can be read"))
        .map(|entry| {
            let content = fs::read(entry.path()).expect("it can be read");
            (entry.file_name().into_string().expect("it is text"), content)
        })
        .collect();
    files.sort_unstable();
    files
}

fn has(server: &Server, value: Option<&str>) {
    let response = Connection::open(server.address()).ask("GET", "/v1/key", b"");
    match value {
        Some(value) => assert_eq!((response.status, response.text()), (200, value)),
        None => assert_eq!(response.status, 404),
    }
}

#[test]
fn log_is_served_as_of_past_and_unchanged() {
    let server = Server::start(&["--retain", "1h"]);
    let mut client = Connection::open(server.address());
    let first = client.ask("PUT", "/v1/key", b"first").etag().expect("it has a sequence");
    let second = client.ask("PUT", "/v1/key", b"second").etag().expect("it has a sequence");
    assert_eq!(client.ask("DELETE", "/v1/key", b"").status, 200);
    let stopped = server.terminate();
    let before = files(stopped.data());

    let server = stopped.restart(&["--read-only", "--until", &first.to_string()]);
    has(&server, Some("first"));
    let mut client = Connection::open(server.address());
    let refused = client.ask("PUT", "/v1/key", b"third");
    assert_eq!((refused.status, refused.header("kvs-error")), (403, Some("read_only")), "{}", refused.text());
    has(&server, Some("first"));
    let ready = Connection::open(server.admin()).ask("GET", "/readyz", b"");
    assert!(ready.text().contains(&format!("read-only, up to sequence {first}")), "{}", ready.text());
    let switched = Connection::open(server.admin()).ask("PUT", "/read-only", b"");
    switched.says(409, "this server was started with --read-only, and changes nothing in the data directory");
    assert!(!server.data().join("read-only").exists());

    let server = server.terminate().restart(&["--read-only", "--until", &second.to_string()]);
    has(&server, Some("second"));
    let server = server.terminate().restart(&["--read-only", "--until", "2020-01-01T00:00:00Z"]);
    has(&server, None);
    let server = server.terminate().restart(&["--read-only"]);
    has(&server, None);
    let stopped = server.terminate();
    assert_eq!(files(stopped.data()).len(), before.len());
    assert!(files(stopped.data()) == before, "the log was changed");

    let refused = stopped.refuses(&["--read-only", "--until", &(second + 2).to_string()]);
    refused.with(1, &[&format!("sequence {} is not in the log, which ends with {}", second + 2, second + 1)]);

    // The next writer continues where the last one ended.
    let server = stopped.restart(&[]);
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/key", b"third").etag(), Some(second + 2));
}

#[test]
fn compacted_state_is_not_served() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let sequences: Vec<_> =
        (0..3).map(|_| client.ask("PUT", "/v1/key", b"value").etag().expect("it has a sequence")).collect();
    let stopped = server.terminate();
    let compacted = kvs().args(["txlog", "compact", "--data-dir"]).arg(stopped.data()).output();
    assert!(compacted.expect("the binary can be started").status.success());
    let refused = stopped.refuses(&["--read-only", "--until", &sequences[0].to_string()]);
    let text =
        format!("the state at sequence {} is not retained: entries from before it were compacted since", sequences[0]);
    refused.with(1, &[&text, &format!("it can be had from sequence {}", sequences[2])]);
    let server = stopped.restart(&["--read-only", "--until", &sequences[2].to_string()]);
    has(&server, Some("value"));
}

#[test]
fn point_in_time_needs_read_only() {
    serve_refused(&["--until", "5"]).with(2, &["--read-only"]);
    serve_refused(&["--until", "5", "--standby"]).with(2, &["--until", "--standby"]);
    serve_refused(&["--until", "5", "--listen-when-primary", "127.0.0.1:9"]).with(2, &["--until"]);
    serve_refused(&["--read-only", "--standby"]).with(2, &["--standby"]);
}
