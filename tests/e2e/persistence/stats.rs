//! Statistics of stored keys, of a running server and of an offline log.

use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::backup::done;
use crate::support::log::kvs_at;
use crate::support::server::{Server, kvs, refused};
use crate::support::tokens::Tokens;
use crate::support::wire::Connection;

/// `kvs stats`, of this server.
fn stats(server: &Server, args: &[&str]) -> Command {
    let mut command = kvs();
    command.arg("stats").args(args).env("KVS_ADMIN", server.admin().to_string());
    command
}

fn json_of(command: Command) -> Value {
    serde_json::from_str(&done(command)).expect("it is an object")
}

/// A server with some keys, of which one was overwritten, one deleted, and one will expire.
fn server() -> Server {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for (key, bytes) in
        [("user%2F1", 30), ("user%2F2", 20), ("job%2F1", 100), ("job%2F1", 10), ("a%E2%80%AE", 5), ("gone", 7)]
    {
        assert_eq!(client.ask("PUT", &format!("/v1/{key}"), &vec![b'v'; bytes]).status, 201);
    }
    assert_eq!(client.ask("DELETE", "/v1/gone", b"").status, 200);
    assert_eq!(client.ask("PUT", "/v1/lock?ttl=3600", b"v").status, 201);
    server
}

/// Statistics of [`server`].
fn expected() -> Value {
    json!({
        "prefix": "", "delimiter": "/", "sequence": "8", "exact": true, "passes": 1,
        "live": { "keys": 5, "bytes": 36 + 26 + 15 + 9 + 5 },
        "with_ttl": { "keys": 1, "bytes": 5 },
        "log": { "entries": 8, "bytes": 36 + 26 + 15 + 9 + 5 + 105 + 11 + 4 },
        "garbage": { "entries": 3, "bytes": 105 + 11 + 4 },
        "largest_keys": [
            { "key": "user/1", "bytes": 36, "sequence": "1" },
            { "key": "user/2", "bytes": 26, "sequence": "2" },
            { "key": "job/1", "bytes": 15, "sequence": "4" },
            { "key": "a\u{202e}", "bytes": 9, "sequence": "5" },
            { "key": "lock", "bytes": 5, "sequence": "8" },
        ],
        "largest_prefixes": [
            { "prefix": "user/", "keys": 2, "bytes": 62 },
            { "prefix": "job/", "keys": 1, "bytes": 15 },
        ],
        "other_prefixes": { "prefixes": 0, "keys": 0, "bytes": 0 },
        "without_delimiter": { "keys": 2, "bytes": 14 },
    })
}

#[test]
fn statistics_count_stored_keys() {
    let server = server();
    assert_eq!(json_of(stats(&server, &["--output", "json"])), expected());
    let some = json_of(stats(&server, &["--output", "json", "--prefix", "user/", "--delimiter", "2", "--top", "1"]));
    assert_eq!(some["live"], json!({ "keys": 2, "bytes": 62 }));
    assert_eq!(some["largest_keys"], json!([{ "key": "user/1", "bytes": 36, "sequence": "1" }]));
    assert_eq!(some["largest_prefixes"], json!([{ "prefix": "user/2", "keys": 1, "bytes": 26 }]));
    assert_eq!(some["without_delimiter"], json!({ "keys": 1, "bytes": 36 }));
    let text = done(stats(&server, &[]));
    for line in [
        "    5   91 B  live keys",
        "36 B         1  \"user/1\"",
        " 9 B         5  \"a\\u{202e}\"",
        "   2   62 B  \"user/\"",
    ] {
        assert!(text.lines().any(|found| found.trim() == line.trim()), "{line:?} is not in {text}");
    }
    assert!(text.contains("\nas of sequence 8\n"), "{text}");
}

#[test]
fn statistics_of_offline_log_are_equal() {
    let stopped = server().terminate();
    let offline = |args: &[&str]| {
        let mut command = kvs_at(stopped.data());
        command.args(["txlog", "stats"]).args(args);
        command
    };
    assert_eq!(json_of(offline(&["--output", "json"])), expected());
    assert!(done(offline(&["--prefix", "job/"])).contains("as of sequence 8"));
    refused(offline(&["--top", "1001"])).with(2, &["--top", "1001"]);
    refused(offline(&["--delimiter", ""])).with(2, &["--delimiter"]);
    let mut missing = kvs();
    missing.args(["txlog", "stats", "--data-dir", "/nonexistent"]);
    refused(missing).with(1, &["there is no log in /nonexistent"]);
}

#[test]
fn statistics_are_rejected_without_token_or_valid_query() {
    let tokens = Tokens::new();
    let [reader, scraper, admin] = ["read", "metrics", "admin"].map(|scope| tokens.add(&[scope, "--scope", scope]));
    let server = Server::start(&["--tokens", &tokens.file()]);
    let ask = |token: &str| {
        let headers = [("authorization", &*format!("Bearer {token}"))];
        Connection::open(server.admin()).ask_for_head("GET", "/stats", &headers).status
    };
    assert_eq!(Connection::open(server.admin()).ask("GET", "/stats", b"").status, 401);
    assert_eq!((ask(&reader), ask(&scraper), ask(&admin)), (403, 403, 200));

    let server = Server::start(&[]);
    let ask = |method: &str, target: &str| Connection::open(server.admin()).ask(method, target, b"");
    for query in ["top=0", "top=1001", "top=x", "delimiter=", "prefix=a&prefix=b", "key=a", "prefix"] {
        let reason =
            "malformed query; there are prefix=PREFIX, delimiter=TEXT, which is not empty, and top=COUNT, 1 to 1000";
        ask("GET", &format!("/stats?{query}")).says(400, reason);
    }
    let empty =
        Connection::open(server.admin()).ask_for_head("GET", "/stats?top=1000&delimiter=%3A&prefix=%C3%A9", &[]);
    assert_eq!((empty.status, empty.header("content-type")), (200, Some("application/json")));
    let post = ask("POST", "/stats");
    assert_eq!((post.status, post.header("allow")), (405, Some("GET")));
}

#[test]
fn one_scan_of_log_runs_and_ends_with_its_client() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for key in 0..32 {
        assert_eq!(client.ask("PUT", &format!("/v1/{key}"), &vec![b'v'; 1 << 20]).status, 201);
    }
    let request = "GET /stats HTTP/1.1\r\nhost: kvs\r\n\r\n";
    let is_rejected = (0..50).any(|_| {
        let [mut first, mut second] = [(); 2].map(|()| Connection::open(server.admin()));
        first.send(request);
        second.send(request);
        let mut statuses = [&mut first, &mut second].map(|client| client.try_read(true).expect("it responds").status);
        statuses.sort_unstable();
        assert!(matches!(statuses, [200, 200 | 409]), "{statuses:?}");
        statuses == [200, 409]
    });
    assert!(is_rejected, "no two scans met");
    // Of the last, a part is sent before the client leaves.
    for (target, name) in
        [("/stats", "scan for statistics"), ("/history?key=none", "history"), ("/history?key=0", "history")]
    {
        let stopped = format!("the {name} failed: the client disconnected");
        let count = || server.stderr().iter().filter(|line| line.contains(&stopped)).count();
        let before = count();
        let is_stopped = (0..100).any(|_| {
            let mut leaves = Connection::open(server.admin());
            leaves.send(format!("GET {target} HTTP/1.1\r\nhost: kvs\r\n\r\n"));
            // Neither before the request is read, nor after its response.
            thread::sleep(Duration::from_millis(5));
            drop(leaves);
            thread::sleep(Duration::from_millis(50));
            count() > before
        });
        assert!(is_stopped, "no scan for {target} ended with its client");
    }
    assert_eq!(Connection::open(server.admin()).ask_for_head("GET", "/stats", &[]).status, 200);
}
