//! The REST interface, version 1: paths, headers, and general rules of HTTP.

use crate::support::server::Server;
use crate::support::wire::{Connection, long, short};

#[test]
fn short_and_long_path_are_same_key() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for key in
        ["plain", "a b", "a/b", "/", "a//b/", "%2F", "100%", "ключ", "🦀", "key", "key/key", "~.-_", "...", "?#&"]
    {
        assert_eq!(client.ask("PUT", &short(key), b"short").status, 201, "{key}");
        assert_eq!(client.ask("GET", &long(key), b"").body, b"short", "{key}");
        assert_eq!(client.ask("PUT", &long(key), b"long").status, 201, "{key}");
        assert_eq!(client.ask("GET", &short(key), b"").body, b"long", "{key}");
        assert_eq!(client.ask("DELETE", &short(key), b"").status, 200, "{key}");
        assert_eq!(client.ask("GET", &long(key), b"").status, 404, "{key}");
    }
}

#[test]
fn similar_keys_are_different_keys() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    // Case, composition, white space, escapes of escapes.
    let alike = ["a", "A", "\u{e4}", "a\u{308}", "a ", " a", "a\u{a0}", "a%20", "a%2520", "a+", "/a", "a/", "%61"];
    for key in alike {
        assert_eq!(client.ask("PUT", &short(key), key.as_bytes()).status, 201, "{key:?}");
    }
    for key in alike {
        assert_eq!(client.ask("GET", &short(key), b"").body, key.as_bytes(), "{key:?}");
    }
}

#[test]
fn etag_is_sequence_and_survives_restart() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"1").header("etag"), Some("\"1\""));
    assert_eq!(client.ask("PUT", "/v1/b", b"2").header("etag"), Some("\"2\""));
    assert_eq!(client.ask("PUT", "/v1/a", b"3").header("etag"), Some("\"3\""));
    assert_eq!(client.ask("DELETE", "/v1/b", b"").status, 200);

    let server = server.terminate().restart(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("GET", "/v1/a", b"").header("etag"), Some("\"3\""));
    let next = client.ask("PUT", "/v1/c", b"5").etag();
    assert!(next > Some(4), "a sequence is never given twice, but after 4 came {next:?}");
}

#[test]
fn content_type_is_stored() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let mut put = |path: &str, content_type: &str| {
        client.send(format!("PUT {path} HTTP/1.1\r\nhost: kvs\r\n{content_type}content-length: 2\r\n\r\n{{}}"));
        assert_eq!(client.read().status, 201, "{content_type}");
    };
    put("/v1/json", "Content-Type: application/json; charset=utf-8\r\n");
    put("/v1/none", "");
    // The default of curl -d.
    put("/v1/curl", "Content-Type: application/x-www-form-urlencoded\r\n");
    put("/v1/over", "Content-Type: image/png\r\n");
    put("/v1/over", "");

    let check = |server: &Server| {
        let mut client = Connection::open(server.address());
        for (path, content_type) in [
            ("/v1/json", "application/json; charset=utf-8"),
            ("/v1/none", "application/octet-stream"),
            ("/v1/curl", "application/octet-stream"),
            ("/v1/over", "application/octet-stream"),
        ] {
            assert_eq!(client.ask("GET", path, b"").header("content-type"), Some(content_type), "{path}");
        }
    };
    check(&server);
    check(&server.terminate().restart(&[]));
}

#[test]
fn invalid_content_type_stores_nothing() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client
        .ask_with("PUT", "/v1/a", &[("content-type", "0")], b"value")
        .says(400, "content-type is malformed: it is a type like text/plain, and parameters like ; charset=utf-8");
    client.ask("GET", "/v1/a", b"").says(404, "no such key");
}

#[test]
fn browser_does_not_execute_values() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/a", b"<script>alert(1)</script>");
    let got = client.ask("GET", "/v1/a", b"");
    assert_eq!(got.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(got.header("content-security-policy"), Some("sandbox"));
}

#[test]
fn responses_are_nosniff() {
    let server = Server::start(&["--max-value-bytes", "1KiB"]);
    let mut client = Connection::open(server.address());
    for (method, path) in [("PUT", "/v1/a"), ("GET", "/v1/b"), ("GET", "/v1"), ("GET", "/nowhere"), ("BREW", "/v1/a")] {
        let answer = client.ask(method, path, b"");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{method} {path}");
    }
    // The host rejects these too.
    let refused = client.ask("PUT", "/v1/a", &[0; 1_025]);
    assert_eq!((refused.status, refused.header("x-content-type-options")), (413, Some("nosniff")));
}

#[test]
fn head_has_length_and_no_body() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/a", b"eleven byte");
    let head = client.ask("HEAD", "/v1/a", b"");
    assert_eq!((head.status, head.header("content-length"), head.etag()), (200, Some("11"), Some(1)));
    // With a body, the next response would begin with it.
    let missing = client.ask("HEAD", "/v1/b", b"");
    assert_eq!((missing.status, missing.header("content-length")), (404, Some("12")));
    assert_eq!(client.ask("GET", "/v1/a", b"").body, b"eleven byte");
    // A length of zero is sent too, also with a cached response.
    client.ask("PUT", "/v1/empty", b"");
    for _ in 0..2 {
        let head = client.ask("HEAD", "/v1/empty", b"");
        assert_eq!((head.status, head.header("content-length"), head.etag()), (200, Some("0"), Some(2)));
    }
    let unchanged = client.ask_with("HEAD", "/v1/empty", &[("if-none-match", "\"2\"")], b"");
    assert_eq!((unchanged.status, unchanged.header("content-length")), (304, None));
    assert_eq!(client.ask("GET", "/v1/a", b"").body, b"eleven byte");
}

#[test]
fn connection_is_reused() {
    let server = Server::start(&["--max-connections", "1"]);
    let mut client = Connection::open(server.address());
    for n in 0..100 {
        let value = format!("value {n}");
        assert_eq!(client.ask("PUT", "/v1/a", value.as_bytes()).status, 201);
        assert_eq!(client.ask("GET", "/v1/a", b"").text(), value);
    }
}

#[test]
fn pipelined_requests_get_responses_in_order() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let put = |n: u64| format!("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 3\r\n\r\n{n:03}");
    let get = "GET /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n";
    client.send((1..=50).map(|n| put(n) + get).collect::<String>());
    for n in 1..=50 {
        let created = client.read();
        assert_eq!((created.status, created.etag()), (201, Some(n)));
        assert_eq!(client.read().text(), format!("{n:03}"));
    }
}

#[test]
fn expect_continue_gets_100() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    assert_eq!(client.read().status, 100);
    client.send("value");
    assert_eq!(client.read().status, 201);
    assert_eq!(client.ask("GET", "/v1/a", b"").body, b"value");
}

#[test]
fn chunked_body_is_joined() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ntransfer-encoding: chunked\r\n\r\n");
    client.send("6\r\nin two\r\n");
    client.send("7\r\n chunks\r\n0\r\n\r\n");
    assert_eq!(client.read().status, 201);
    assert_eq!(client.ask("GET", "/v1/a", b"").body, b"in two chunks");
}

#[test]
fn body_can_arrive_byte_by_byte() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 10\r\n\r\n");
    for byte in b"piecemeal." {
        client.send([*byte]);
    }
    assert_eq!(client.read().status, 201);
    assert_eq!(client.ask("GET", "/v1/a", b"").body, b"piecemeal.");
}

#[test]
fn connection_close_is_obeyed() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.send("GET /v1/a HTTP/1.1\r\nhost: kvs\r\nconnection: close\r\n\r\n");
    client.read().says(404, "no such key");
    assert_eq!(client.end(), "");
}

#[test]
fn every_response_has_date() {
    let server = Server::start(&[]);
    let response = Connection::open(server.address()).ask("GET", "/v1/a", b"");
    let date = response.header("date").expect("there is a date");
    assert!(date.len() == 29 && date.ends_with(" GMT"), "{date}");
}
