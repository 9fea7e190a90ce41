//! Operations on numbers and expiries, reads of several values, a list followed by a watch, and deletes by prefix.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::events::Events;
use crate::support::server::{PATIENCE, Server};
use crate::support::tokens::Tokens;
use crate::support::wire::{Connection, Response};

fn read(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{}", response.text());
    serde_json::from_slice(&response.body).expect("JSON")
}

#[test]
fn concurrent_additions_all_count_and_survive() {
    let server = Server::start(&[]);
    thread::scope(|scope| {
        for _ in 0..4 {
            let mut client = Connection::open(server.address());
            scope.spawn(move || {
                for n in 0..50 {
                    let sum = client.ask("POST", "/v1/visits?op=add&delta=2", b"");
                    assert_eq!(sum.status, 200, "{}", sum.text());
                    let operations = json!([{"op": "add", "key": "visits", "delta": -1}]).to_string();
                    assert_eq!(client.ask("POST", "/v1", operations.as_bytes()).status, 200, "{n}");
                }
            });
        }
    });
    let server = server.kill().restart(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("GET", "/v1/visits", b"").text(), "200");
    // Cached responses are invalidated by it.
    for sum in 201..210 {
        assert_eq!(client.ask("POST", "/v1/visits?op=add&delta=1", b"").text(), sum.to_string());
        assert_eq!(client.ask("GET", "/v1/visits", b"").text(), sum.to_string());
    }
}

#[test]
fn additions_to_other_values_are_rejected() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/text", b"one");
    client.ask("PUT", "/v1/large", b"9223372036854775807");
    for (key, code) in [("text", "not_a_number"), ("large", "number_out_of_range")] {
        let refused = client.ask("POST", &format!("/v1/{key}?op=add&delta=1"), b"");
        assert_eq!((refused.status, refused.header("kvs-error")), (409, Some(code)));
        let operations = json!([{"op": "get", "key": key}, {"op": "add", "key": key, "delta": 1}]).to_string();
        let accept = [("accept", "application/problem+json")];
        let refused = client.ask_with("POST", "/v1", &accept, operations.as_bytes());
        let problem: Value = serde_json::from_slice(&refused.body).expect("JSON");
        assert_eq!((refused.status, &problem["code"], &problem["operation"]), (409, &json!(code), &json!(1)));
    }
    client.ask("POST", "/v1/a?op=add", b"").says(400, "query parameter `delta` is missing: op=add needs it");
    client.ask("POST", "/v1/a", b"").says(405, "POST of a key needs the query parameter `op`: add or touch");
}

#[test]
fn touched_value_survives_its_first_expiry() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for key in ["kept", "gone"] {
        let put = client.ask_with("PUT", &format!("/v1/{key}?ttl=2500ms"), &[("content-type", "text/html")], b"value");
        assert_eq!((put.status, put.header("kvs-created")), (201, Some("true")));
    }
    let touched = client.ask("POST", "/v1/kept?op=touch&ttl=1h", b"");
    assert_eq!((touched.status, touched.etag()), (200, Some(3)));
    let until = Instant::now() + PATIENCE;
    while client.ask("GET", "/v1/gone", b"").status == 200 {
        assert!(Instant::now() < until, "it never expires");
        thread::sleep(Duration::from_millis(50));
    }
    let kept = client.ask("GET", "/v1/kept", b"");
    assert_eq!((kept.status, kept.text(), kept.header("content-type")), (200, "value", Some("text/html")));
    assert_eq!(client.ask("POST", "/v1/gone?op=touch&ttl=1h", b"").header("kvs-error"), Some("no_such_key"));
}

#[test]
fn delete_reports_what_it_deleted() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"1").header("kvs-created"), Some("true"));
    assert_eq!(client.ask("PUT", "/v1/a", b"2").header("kvs-created"), Some("false"));
    let deleted = client.ask("DELETE", "/v1/a", b"");
    assert_eq!((deleted.header("kvs-deleted"), deleted.header("kvs-sequence")), (Some("\"2\""), Some("3")));
    let deleted = client.ask("DELETE", "/v1/a", b"");
    assert_eq!(
        (deleted.status, deleted.header("kvs-deleted"), deleted.header("kvs-sequence")),
        (200, Some("none"), None)
    );
}

#[test]
fn several_values_are_read_from_all_shards() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let keys: Vec<_> = (0..1_000).map(|n| format!("key-{n}")).collect();
    let tags: BTreeMap<_, _> = (0..1_000)
        .step_by(10)
        .map(|n| (n, client.ask("PUT", &format!("/v1/key-{n}"), n.to_string().as_bytes()).etag().expect("a tag")))
        .collect();
    let expected = |n: usize| match tags.get(&n) {
        Some(tag) => {
            json!({"key": keys[n], "etag": format!("\"{tag}\""), "size": n.to_string().len(), "value": n.to_string()})
        }
        None => json!({"key": keys[n], "etag": null}),
    };
    let values = read(&client.ask("QUERY", "/v1", json!(keys).to_string().as_bytes()));
    assert_eq!(values, json!({"keys": (0..1_000).map(expected).collect::<Vec<_>>()}));
    let values = read(&client.ask("GET", "/v1?key=key-11&key=key-10", b""));
    assert_eq!(values, json!({"keys": [expected(11), expected(10)]}));
    // The same request after a change.
    client.ask("PUT", "/v1/key-11", b"new");
    assert_eq!(read(&client.ask("GET", "/v1?key=key-11&key=key-10", b""))["keys"][0]["value"], "new");
    let (long, short) = ("x".repeat(700_000), "x".repeat(400_000));
    client.ask("PUT", "/v1/long", long.as_bytes());
    client.ask("PUT", "/v1/short", short.as_bytes());
    assert_eq!(client.ask("GET", "/v1?key=long&key=short", b"").status, 413);
    client.ask("QUERY", "/v1", br#"["a", ""]"#).says(400, "key 1: key is empty");
}

#[test]
fn query_counts_as_read() {
    let tokens = Tokens::new();
    let reader = format!("Bearer {}", tokens.add(&["reader"]));
    let server = Server::start(&["--tokens", &tokens.file()]);
    let mut client = Connection::open(server.address());
    let values = client.ask_with("QUERY", "/v1", &[("authorization", &reader)], br#"["a"]"#);
    assert_eq!(read(&values), json!({"keys": [{"key": "a", "etag": null}]}));
    assert_eq!(client.ask_with("DELETE", "/v1?prefix=a", &[("authorization", &reader)], b"").status, 403);
}

#[test]
fn watch_from_list_position_misses_nothing() {
    let server = Server::start(&["--durability", "os"]);
    let address = server.address();
    let seen = thread::scope(|scope| {
        let writing = scope.spawn(move || {
            let mut client = Connection::open(address);
            (0..600).for_each(|n| drop(client.ask("PUT", &format!("/v1/a%2F{n:04}"), b"value")));
        });
        let mut client = Connection::open(address);
        // During the puts, unless the machine is overloaded.
        while read(&client.ask("GET", "/v1?count=true&prefix=a/", b""))["count"].as_u64() < Some(100) {}
        let first = client.ask("GET", "/v1?prefix=a/&limit=100", b"");
        let position = first.header("kvs-position").expect("a position").to_owned();
        let (mut page, mut seen) = (read(&first), BTreeSet::new());
        loop {
            seen.extend(page["keys"].as_array().expect("a list").iter().map(|entry| entry["key"].clone().to_string()));
            let Some(cursor) = page["cursor"].as_str() else { break };
            let next = client.ask("GET", &format!("/v1?prefix=a/&limit=100&cursor={cursor}"), b"");
            assert_eq!(next.header("kvs-position"), None);
            page = read(&next);
        }
        writing.join().expect("all is written");
        client.ask("PUT", "/v1/end", b"");
        client.ask("DELETE", "/v1/a%2F0000", b"");
        client.ask("PUT", "/v1/end", b"");
        let mut events =
            Events::open(&server, &format!("/v1?watch&prefix=a/&key=end&puts-only=true&since={position}"), &[]);
        let mut ends = 0;
        while ends < 2 {
            let event = events.next().expect("the stream continues");
            assert_ne!(event.data["key"], "a/0000");
            match event.data["key"].as_str() {
                Some("end") => ends += 1,
                _ => drop(seen.insert(event.data["key"].to_string())),
            }
        }
        seen
    });
    assert_eq!(seen.len(), 600);
}

#[test]
fn lists_are_reversible_and_bounded() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    (0..100).for_each(|n| drop(client.ask("PUT", &format!("/v1/key{n:02}"), b"value")));
    let (mut keys, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = read(&client.ask("GET", &format!("/v1?reverse=true&start=key10&end=key90&limit=7{cursor}"), b""));
        keys.extend(page["keys"].as_array().expect("a list").iter().map(|entry| entry["key"].clone()));
        let Some(next) = page["cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(keys, (10..90).rev().map(|n| json!(format!("key{n:02}"))).collect::<Vec<_>>());
    let count = client.ask("GET", "/v1?count=true&prefix=key&start=key5", b"");
    assert_eq!((read(&count), count.header("kvs-position")), (json!({"count": 50}), Some("100")));
}

#[test]
fn prefix_is_deleted_page_by_page() {
    let server = Server::start(&["--durability", "os"]);
    let mut client = Connection::open(server.address());
    (0..500).for_each(|n| drop(client.ask("PUT", &format!("/v1/a%2F{n}"), b"value")));
    client.ask("PUT", "/v1/b", b"value");
    let (mut deleted, mut pages, mut cursor) = (0, 0, String::new());
    loop {
        let page = read(&client.ask("DELETE", &format!("/v1?prefix=a/&limit=50{cursor}"), b""));
        deleted += page["deleted"].as_u64().expect("a number");
        pages += 1;
        let Some(next) = page["cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert!(deleted == 500 && pages > 2, "{deleted} in {pages} pages");
    let server = server.terminate().restart(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(read(&client.ask("GET", "/v1?count=true", b"")), json!({"count": 1}));
    let refused = client.ask("DELETE", "/v1", b"");
    refused.says(400, "query parameter `prefix` is missing: it names the keys to delete; `prefix=` is all of them");
}

#[test]
fn every_error_has_code_and_503_retry_after() {
    let server = Server::start(&["--max-requests", "1"]);
    let mut waiting = Connection::open(server.address());
    let mut client = Connection::open(server.address());
    for (method, path, body, code) in [
        ("GET", "/v1/missing", &b""[..], "no_such_key"),
        ("GET", "/nowhere", b"", "unknown_path"),
        ("BREW", "/v1/a", b"", "method_not_allowed"),
        ("GET", "/v1?limit=0", b"", "malformed"),
        ("POST", "/v1", br#"[{"op":"check","key":"a","value":"x"}]"#, "check_failed;operation=0"),
    ] {
        assert_eq!(client.ask(method, path, body).header("kvs-error"), Some(code), "{method} {path}");
    }
    // A request without its body occupies the only place.
    waiting.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 5\r\n\r\n");
    let until = Instant::now() + PATIENCE;
    let full = loop {
        let response = client.ask("GET", "/v1/missing", b"");
        if response.status == 503 {
            break response;
        }
        assert!(Instant::now() < until, "it is never full");
    };
    assert_eq!((full.header("kvs-error"), full.header("retry-after")), (Some("unavailable"), Some("1")));
}
