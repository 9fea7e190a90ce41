//! Earlier states of a log in a database, and how long compaction retains them.

use serde_json::json;

use crate::support::backup::done;
use crate::support::postgres::database::Database;
use crate::support::postgres::start;
use crate::support::requests::{get, put};
use crate::support::server::{Server, Stopped, kvs};
use crate::support::wire::Connection;

/// Serves the log as it was.
fn look(stopped: Stopped, url: &str, until: &str) -> Server {
    stopped.restart(&["--txlog", url, "--read-only", "--until", until])
}

#[test]
fn log_is_served_as_it_was_and_not_changed() {
    let database = Database::start();
    let url = database.url();
    let server = start(&url);
    assert_eq!((put(&server, "key", "1"), put(&server, "key", "2")), (201, 201));
    assert_eq!(Connection::open(server.address()).ask("DELETE", "/v1/key", b"").status, 200);
    let rows = "SELECT count(*), max(sequence), (SELECT last FROM kvs.writer) FROM kvs.transactions";
    let before = database.sql(rows);
    let server = look(server.terminate(), &url, "1");
    assert_eq!(get(&server, "key"), (200, "1".into()));
    assert_eq!(put(&server, "key", "3"), 403);
    let server = look(server.terminate(), &url, "2");
    assert_eq!(get(&server, "key"), (200, "2".into()));
    let server = look(server.terminate(), &url, "2020-01-01T00:00:00Z");
    assert_eq!(get(&server, "key").0, 404);
    let stopped = server.terminate();
    assert_eq!(database.sql(rows), before);

    let mut compact = kvs();
    compact.args(["txlog", "compact", "--txlog", &url]);
    done(compact);
    let refused = stopped.refuses(&["--txlog", &url, "--read-only", "--until", "1"]);
    refused.with(1, &["the state at sequence 1 is not retained", "it can be had from sequence 3"]);
    let server = look(stopped, &url, "3");
    assert_eq!(get(&server, "key").0, 404);
}

#[test]
fn superseded_rows_are_retained_for_their_time() {
    let database = Database::start();
    let url = database.url();
    // A pass over all rows takes longer than a second on a busy machine.
    let server = Server::start(&["--txlog", &url, "--txlog-timeout", "30s", "--retain", "1h"]);
    let mut client = Connection::open(server.address());
    let mut write = |round: u64| {
        let puts = (0..1_000).map(|n| json!({"op": "put", "key": format!("{n}"), "value": format!("{round}")}));
        let puts = json!(puts.collect::<Vec<_>>()).to_string();
        assert_eq!(client.ask("POST", "/v1", puts.as_bytes()).status, 200);
    };
    (0..2).for_each(&mut write);
    database.sql("UPDATE kvs.transactions SET time = time - 7200000");
    (2..101).for_each(&mut write);
    // Of the part that is older than an hour the last value of each key is left; nothing else is dropped.
    database.becomes("SELECT count(*) FROM kvs.transactions", "100000");
    let stopped = server.terminate();
    let refused = stopped.refuses(&["--txlog", &url, "--read-only", "--until", "1500"]);
    refused.with(1, &["the state at sequence 1500 is not retained", "it can be had from sequence 2000"]);
    let server = look(stopped, &url, "2000");
    assert_eq!((get(&server, "7"), get(&server, "700")), ((200, "1".into()), (200, "1".into())));
    let server = look(server.terminate(), &url, "50500");
    assert_eq!((get(&server, "7"), get(&server, "700")), ((200, "50".into()), (200, "49".into())));
}
