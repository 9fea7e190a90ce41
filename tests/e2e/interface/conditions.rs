//! Conditional requests and ranges over HTTP (RFC 9110, sections 13 and 14).

use std::thread;

use crate::support::guests::{DEFAULT_GUEST, copy_of};
use crate::support::log::{is_compactable, kvs_at};
use crate::support::server::Server;
use crate::support::swap::swaps;
use crate::support::wire::Connection;

#[test]
fn etag_survives_compaction_restart_and_swap() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for n in 0..10 {
        assert_eq!(client.ask("PUT", "/v1/a", n.to_string().as_bytes()).etag(), Some(2 * n + 1));
        assert_eq!(client.ask("PUT", "/v1/gone", b"value").status, 201);
    }
    client.ask("DELETE", "/v1/gone", b"");
    let stopped = server.terminate();
    if is_compactable() {
        let mut compact = kvs_at(stopped.data());
        compact.args(["txlog", "compact"]);
        assert!(compact.status().expect("the binary under test can be started").success());
    }
    let server = stopped.restart(&["--probation", "1ms"]);
    let mut client = Connection::open(server.address());
    let same = |client: &mut Connection| {
        let unchanged = client.ask_with("GET", "/v1/a", &[("if-none-match", "\"19\"")], b"");
        assert_eq!((unchanged.status, unchanged.etag()), (304, Some(19)));
    };
    same(&mut client);
    swaps(&server, &copy_of(DEFAULT_GUEST));
    same(&mut client);
    // No earlier tag is assigned again, although its value was deleted.
    assert_eq!(client.ask("PUT", "/v1/gone", b"again").etag(), Some(22));
}

#[test]
fn if_none_match_star_creates_once() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let create = [("if-none-match", "*")];
    assert_eq!(client.ask_with("PUT", "/v1/a", &create, b"first").status, 201);
    let refused = client.ask_with("PUT", "/v1/a", &create, b"second");
    refused.says(412, "if-none-match does not hold: the key has the etag \"1\"");
    assert_eq!(refused.etag(), Some(1));
    assert_eq!(client.ask("GET", "/v1/a", b"").text(), "first");
    assert_eq!(client.ask("DELETE", "/v1/a", b"").status, 200);
    assert_eq!(client.ask_with("PUT", "/v1/a", &create, b"third").status, 201);
}

#[test]
fn if_match_changes_only_that_version() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/a", b"1");
    let seen = |tag| [("If-Match", tag)];
    assert_eq!(client.ask_with("PUT", "/v1/a", &seen("\"0\", \"1\""), b"2").etag(), Some(2));
    assert_eq!(client.ask_with("PUT", "/v1/a", &seen("\"1\""), b"3").status, 412);
    assert_eq!(client.ask_with("DELETE", "/v1/a", &seen("\"1\""), b"").status, 412);
    assert_eq!(client.ask_with("DELETE", "/v1/a", &seen("W/\"2\""), b"").status, 412);
    assert_eq!(client.ask("GET", "/v1/a", b"").text(), "2");
    assert_eq!(client.ask_with("DELETE", "/v1/a", &seen("\"2\""), b"").status, 200);
    client.ask_with("PUT", "/v1/a", &seen("*"), b"4").says(412, "if-match does not hold: there is no such key");
    let malformed = client.ask_with("PUT", "/v1/a", &seen("2"), b"5");
    malformed.says(400, "if-match is malformed: it is `*`, or entity tags like \"5\", separated by commas");
    client.ask("GET", "/v1/a", b"").says(404, "no such key");
}

#[test]
fn one_of_many_if_match_succeeds() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/count", b"0");
    let increments = 40;
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut client = Connection::open(server.address());
                let mut done = 0;
                while done < increments {
                    let seen = client.ask("GET", "/v1/count", b"");
                    let tag = seen.header("etag").expect("a value has one").to_owned();
                    let next = seen.text().parse::<u32>().expect("a number") + 1;
                    let put = client.ask_with("PUT", "/v1/count", &[("if-match", &tag)], next.to_string().as_bytes());
                    assert!(matches!(put.status, 201 | 412), "{}", put.status);
                    done += u32::from(put.status == 201);
                }
            });
        }
    });
    assert_eq!(client.ask("GET", "/v1/count", b"").text(), (4 * increments).to_string());
}

#[test]
fn if_none_match_is_304_also_after_restart() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/a", b"value");
    let server = server.terminate().restart(&[]);
    let mut client = Connection::open(server.address());
    for method in ["GET", "HEAD"] {
        let unchanged = client.ask_with(method, "/v1/a", &[("if-none-match", "\"0\", \"1\"")], b"");
        assert_eq!((unchanged.status, unchanged.etag()), (304, Some(1)));
        assert_eq!(unchanged.header("content-length"), None, "{method}: not the length of the value");
        // With a body, this response would begin with it.
        let changed = client.ask_with(method, "/v1/a", &[("if-none-match", "\"0\"")], b"");
        assert_eq!((changed.status, changed.header("content-length")), (200, Some("5")));
    }
}

#[test]
fn ranges_return_parts() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let value: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    client.ask("PUT", "/v1/a", &value);
    let whole = client.ask("HEAD", "/v1/a", b"");
    assert_eq!((whole.header("accept-ranges"), whole.header("content-length")), (Some("bytes"), Some("100000")));
    let mut had = Vec::new();
    while had.len() < value.len() {
        let range = format!("bytes={}-{}", had.len(), had.len() + 29_999);
        let part = client.ask_with("GET", "/v1/a", &[("range", &range), ("if-range", "\"1\"")], b"");
        let last = value.len().min(had.len() + 30_000) - 1;
        assert_eq!((part.status, part.etag()), (206, Some(1)));
        assert_eq!(part.header("content-range"), Some(&*format!("bytes {}-{last}/100000", had.len())));
        had.extend(part.body);
    }
    assert!(had == value, "the parts are not the whole");

    let beyond = client.ask_with("GET", "/v1/a", &[("range", "bytes=100000-")], b"");
    beyond.says(416, "the value has 100000 bytes, and the range begins after them");
    assert_eq!(beyond.header("content-range"), Some("bytes */100000"));
    // The client has no part of another value.
    let changed = client.ask_with("GET", "/v1/a", &[("range", "bytes=0-9"), ("if-range", "\"7\"")], b"");
    assert_eq!((changed.status, changed.body.len()), (200, 100_000));
}

#[test]
fn conditions_of_requests_for_many_keys_are_rejected() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"value").status, 201);
    for condition in ["if-match", "if-none-match"] {
        for (method, path, body) in
            [("POST", "/v1", &b"[{\"op\": \"delete\", \"key\": \"a\"}]"[..]), ("DELETE", "/v1?prefix=a", b"")]
        {
            let response = client.ask_with(method, path, &[(condition, "\"999\"")], body);
            response.says(
                400,
                "if-match and if-none-match go with requests of one key; a transaction has the operation `check`",
            );
        }
    }
    assert_eq!(client.ask("GET", "/v1/a", b"").text(), "value");
}
