//! Lists over HTTP: pages, cursors, groups, and errors as problem documents.

use serde_json::{Value, json};

use crate::support::server::Server;
use crate::support::wire::{Connection, Response, long};

fn list(client: &mut Connection, query: &str) -> Value {
    let response = client.ask("GET", &format!("/v1?{query}"), b"");
    assert_eq!((response.status, response.header("content-type")), (200, Some("application/json")), "{query}");
    serde_json::from_slice(&response.body).expect("JSON")
}

#[test]
fn list_has_all_keys_also_after_restart() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(list(&mut client, ""), json!({"keys": [], "list_complete": true}));
    for (key, value) in [("b", &b"text"[..]), ("a/2", b"\xff\x00"), ("a/1", b""), ("ä", b"umlaut")] {
        assert_eq!(client.ask("PUT", &long(key), value).status, 201);
    }
    client.ask("PUT", "/v1/later?ttl=3600", b"value");
    client.ask("DELETE", "/v1/b", b"");
    let server = server.terminate().restart(&[]);
    let mut client = Connection::open(server.address());
    let mut page = list(&mut client, "values=true");
    let expires = page["keys"][2].as_object_mut().and_then(|entry| entry.remove("expires"));
    assert!(expires.and_then(|expires| expires.as_u64()) > Some(1_700_000_000_000));
    let expected = json!({"keys": [
        {"key": "a/1", "etag": "\"3\"", "size": 0, "value": ""},
        {"key": "a/2", "etag": "\"2\"", "size": 2, "value_base64": "/wA="},
        {"key": "later", "etag": "\"5\"", "size": 5, "value": "value"},
        {"key": "ä", "etag": "\"4\"", "size": 6, "value": "umlaut"},
    ], "list_complete": true});
    assert_eq!(page, expected);
    let groups = json!({"keys": [], "prefixes": ["a/"], "list_complete": true});
    assert_eq!(list(&mut client, "prefix=a&delimiter=/"), groups);
    let head = client.ask("HEAD", "/v1", b"");
    assert_eq!((head.status, head.body.len()), (200, 0));
}

#[test]
fn pagination_lists_every_key_once_during_changes() {
    let server = Server::start(&["--durability", "os"]);
    let mut client = Connection::open(server.address());
    for n in 0..300 {
        client.ask("PUT", &format!("/v1/key{n:03}"), b"value");
    }
    let (mut query, mut seen) = ("prefix=key&limit=7".to_owned(), Vec::new());
    loop {
        let page = list(&mut client, &query);
        let names = page["keys"].as_array().expect("a list").iter().map(|entry| entry["key"].as_str().expect("text"));
        seen.extend(names.map(str::to_owned));
        // Deletes the first listed key, and puts one that sorts before all remaining ones.
        let [first, .., last] = page["keys"].as_array().expect("a list").as_slice() else { panic!("a page of few") };
        client.ask("DELETE", &format!("/v1/{}", first["key"].as_str().expect("text")), b"");
        client.ask("PUT", &format!("/v1/{}-", last["key"].as_str().expect("text")), b"value");
        match page["cursor"].as_str() {
            Some(cursor) => query = format!("prefix=key&limit=7&cursor={cursor}"),
            None => break,
        }
    }
    seen.retain(|name| !name.ends_with('-'));
    assert_eq!(seen, (0..300).map(|n| format!("key{n:03}")).collect::<Vec<_>>());
}

#[test]
fn invalid_list_parameter_is_400_with_its_name() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for (query, expected) in [
        ("limit=0", "query parameter `limit` must be a whole number from 1 to 1000"),
        ("limit=5&limit=5", "query parameter `limit` was given twice"),
        ("cursor=nonsense", "query parameter `cursor` must be one that such a list has given"),
        ("values=1", "query parameter `values` must be true or false"),
        ("delimiter", "query parameter `delimiter` must be at least one character"),
        ("perfix=a", "unknown query parameter `perfix`"),
    ] {
        client.ask("GET", &format!("/v1?{query}"), b"").says(400, expected);
    }
    for method in ["PUT", "PATCH"] {
        let refused = client.ask(method, "/v1", b"");
        refused.says(405, "the list of keys has GET, HEAD, QUERY, POST and DELETE");
        assert_eq!(refused.header("allow"), Some("GET, HEAD, QUERY, POST, DELETE"));
    }
}

#[test]
fn errors_are_problem_documents_on_request() {
    let server = Server::start(&["--max-value-bytes", "10"]);
    let mut client = Connection::open(server.address());
    let accept = [("accept", "application/problem+json, */*")];
    let problem = |response: Response, status: u16, code: &str, title: &str, detail: &str| {
        assert_eq!((response.status, response.header("content-type")), (status, Some("application/problem+json")));
        let problem: Value = serde_json::from_slice(&response.body).expect("JSON");
        assert_eq!(
            problem,
            json!({"type": "about:blank", "title": title, "status": status, "code": code, "detail": detail})
        );
        assert_eq!(response.header("kvs-error"), Some(code));
    };
    problem(client.ask_with("GET", "/v1/a", &accept, b""), 404, "no_such_key", "Not Found", "no such key");
    let refused = client.ask_with("GET", "/v1/%2e", &accept, b"");
    problem(refused, 400, "malformed", "Bad Request", "key has a `.` segment");
    client.ask_with("GET", "/v1/a", &[("accept", "application/json")], b"").says(404, "no such key");
    // The same for requests that the host rejects.
    let refused = client.ask_with("PUT", "/v1/a", &accept, &[b'x'; 11]);
    problem(refused, 413, "too_large", "Payload Too Large", "the body is 11 bytes, at most 10 are allowed");
}
