//! Transactions over HTTP.

use std::thread;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::server::Server;
use crate::support::wire::{Connection, Response};

fn post(client: &mut Connection, operations: &Value) -> Response {
    client.ask("POST", "/v1", operations.to_string().as_bytes())
}

fn given(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{}", response.text());
    assert_eq!(response.header("content-type"), Some("application/json"));
    serde_json::from_slice(&response.body).expect("JSON")
}

#[test]
fn transaction_is_atomic_and_survives_kill() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/{x}a", b"1");
    let operations = json!([
        {"op": "check", "key": "{x}a", "etag": "\"1\""},
        {"op": "check", "key": "{x}b", "etag": null},
        {"op": "get", "key": "{x}a"},
        {"op": "put", "key": "{x}b", "value": "1", "content_type": "text/plain"},
        {"op": "put", "key": "{x}c/d", "value_base64": "/w==", "ttl": 3600},
        {"op": "delete", "key": "{x}a"},
    ]);
    let response = post(&mut client, &operations);
    let mut results = given(&response);
    let expires = results[4].as_object_mut().and_then(|result| result.remove("expires"));
    assert!(expires.is_some());
    let expected = json!([
        {"op": "check", "key": "{x}a", "etag": "\"1\""},
        {"op": "check", "key": "{x}b", "etag": null},
        {"op": "get", "key": "{x}a", "etag": "\"1\"", "value": "1"},
        {"op": "put", "key": "{x}b", "etag": "\"2\""},
        {"op": "put", "key": "{x}c/d", "etag": "\"3\""},
        {"op": "delete", "key": "{x}a", "etag": null},
    ]);
    assert_eq!(results, expected);
    let server = server.kill().restart(&[]);
    let mut client = Connection::open(server.address());
    let got = client.ask("GET", "/v1/{x}b", b"");
    assert_eq!((got.text(), got.etag(), got.header("content-type")), ("1", Some(2), Some("text/plain")));
    assert_eq!(client.ask("GET", "/v1/key/{x}c/d", b"").body, b"\xff");
    assert_eq!(client.ask("GET", "/v1/{x}a", b"").status, 404);
}

#[test]
fn failed_check_is_named_and_changes_nothing() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let operations = json!([{"op": "put", "key": "{x}a", "value": ""}, {"op": "check", "key": "{x}b", "etag": "*"}]);
    post(&mut client, &operations).says(409, "operation 1: the check of `{x}b` failed: there is no such key");
    assert_eq!(client.ask("GET", "/v1/{x}a", b"").status, 404);
    assert_eq!(client.ask("PUT", "/v1/next", b"").etag(), Some(1), "something was appended");
}

#[test]
fn malformed_transaction_is_400_with_position() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let deep = "[".repeat(1_000_000);
    for (body, expected) in [
        ("nonsense", "expected ident at line 1 column 2"),
        (&deep, "operation 0: invalid type: sequence, expected an operation at line 1 column 1"),
        (
            r#"[{"op": "get", "key": "a"}, {"op": "get", "kex": "a"}]"#,
            "operation 1: unknown field `kex`, expected one of `op`, `key`, `value`, `value_base64`, `content_type`, \
             `json`, `ttl`, `delta`, `etag` at line 1 column 47",
        ),
        (r#"[{"op": "put", "key": "a"}]"#, "operation 0: `value` or `value_base64` is missing"),
        (r#"[{"op": "get", "key": "a/.."}]"#, "operation 0: key has a `..` segment"),
    ] {
        client.ask("POST", "/v1", body.as_bytes()).says(400, expected);
    }
    client.ask("POST", "/v1?prefix=a", b"[]").says(400, "unknown query parameter `prefix`");
    assert_eq!(given(&client.ask("POST", "/v1", b"[]")), json!([]));
    let many = vec![json!({"op": "delete", "key": "a"}); 1_001];
    let refused = post(&mut client, &Value::Array(many[1..].to_vec()));
    assert_eq!(given(&refused).as_array().map(Vec::len), Some(1_000));
    let refused = post(&mut client, &Value::Array(many));
    assert_eq!(refused.status, 400);
    assert!(refused.text().starts_with("at most 1000 operations are allowed"), "{}", refused.text());
}

#[test]
fn transaction_size_is_limited() {
    let server = Server::start(&["--max-value-bytes", "8MiB"]);
    let mut client = Connection::open(server.address());
    let operations = json!([{"op": "put", "key": "a", "value": "x".repeat(1 << 20)}]).to_string();
    let expected = format!("the transaction is {} bytes, at most 1048576 are allowed", operations.len());
    client.ask("POST", "/v1", operations.as_bytes()).says(413, &expected);
}

#[test]
fn transfers_conserve_total_over_kills() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let key = |account: u8| format!("{{bank}}{account}");
    let path = |account| format!("/v1/{}", key(account));
    for account in 0..4 {
        client.ask("PUT", &path(account), b"100");
    }
    thread::scope(|scope| {
        for teller in 0..4_u64 {
            let address = server.address();
            scope.spawn(move || {
                let Ok(mut client) = Connection::try_open(address) else { return };
                let mut dice = fastrand::Rng::with_seed(teller);
                loop {
                    let (from, to) = (dice.u8(0..4), dice.u8(0..4));
                    let mut seen = |account| {
                        let got = client.try_ask("GET", &path(account), b"").ok()?;
                        Some((got.header("etag")?.to_owned(), got.text().parse::<i64>().ok()?))
                    };
                    let (Some((from_tag, has)), Some((to_tag, gets))) = (seen(from), seen(to)) else { return };
                    let amount = dice.i64(1..10);
                    let mut operations = json!([
                        {"op": "check", "key": key(from), "etag": from_tag},
                        {"op": "check", "key": key(to), "etag": to_tag},
                        {"op": "put", "key": key(from), "value": (has - amount).to_string()},
                    ]);
                    if from != to {
                        let put = json!({"op": "put", "key": key(to), "value": (gets + amount).to_string()});
                        operations.as_array_mut().expect("a list").push(put);
                    } else {
                        continue;
                    }
                    let Ok(moved) = client.try_ask("POST", "/v1", operations.to_string().as_bytes()) else { return };
                    assert!(matches!(moved.status, 200 | 409), "{}", moved.status);
                }
            });
        }
        // Transfers have changed the accounts: four sequences for their creation, and two for each transfer.
        while client.ask("GET", &path(0), b"").etag() < Some(200) {}
        server.signal(Signal::KILL);
    });
    let server = server.ends().1.restart(&[]);
    let mut client = Connection::open(server.address());
    let total: i64 =
        (0..4).map(|account| client.ask("GET", &path(account), b"").text().parse::<i64>().expect("a number")).sum();
    assert_eq!(total, 400);
}
