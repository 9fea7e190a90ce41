//! Responses to invalid requests, which change nothing.

use crate::support::http_clients::{agent, curl};
use crate::support::server::Server;
use crate::support::wire::{Connection, short};

const UNKNOWN_PATH: &str = "unknown path; keys live at /v1/{key}, or at /v1/key/{key} when they hold a slash";
const RAW_SLASH: &str = "unknown path; a key that holds a slash lives at /v1/key/{key}, or is written with %2F";

#[test]
fn invalid_key_is_400_with_reason() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let longest = "k".repeat(1_024);
    assert_eq!(client.ask("PUT", &short(&longest), b"").status, 201);

    let too_long = format!("/v1/{longest}k");
    let too_long_escaped = format!("/v1/{}%C3%A4", "%6B".repeat(1_023));
    for (path, reason) in [
        ("/v1/", "key is empty"),
        ("/v1/key/", "key is empty"),
        (&too_long, "key is 1025 bytes long, at most 1024 are allowed"),
        (&too_long_escaped, "key is 1025 bytes long, at most 1024 are allowed"),
        ("/v1/%FF", "key is not valid UTF-8"),
        ("/v1/%ED%A0%80", "key is not valid UTF-8"),
        ("/v1/%C0%AF", "key is not valid UTF-8"),
        ("/v1/ab%zz", "bad percent escape at byte 3 of the key"),
        ("/v1/%4", "bad percent escape at byte 1 of the key"),
        ("/v1/100%", "bad percent escape at byte 4 of the key"),
        ("/v1/%00", "key holds the control character U+0000"),
        ("/v1/a%09b", "key holds the control character U+0009"),
        ("/v1/a%0Ab", "key holds the control character U+000A"),
        ("/v1/a%0D%0Ab", "key holds the control character U+000D"),
        ("/v1/%7F", "key holds the control character U+007F"),
        ("/v1/%C2%85", "key holds the control character U+0085"),
        ("/v1/..", "key has a `..` segment"),
        ("/v1/%2E%2E", "key has a `..` segment"),
        ("/v1/a%2F..%2Fb", "key has a `..` segment"),
        ("/v1/key/../../etc/passwd", "key has a `..` segment"),
        ("/v1/key/a/./b", "key has a `.` segment"),
    ] {
        for method in ["PUT", "GET", "DELETE"] {
            let response = client.ask(method, path, b"value");
            assert_eq!((response.status, response.text()), (400, format!("{reason}\n").as_str()), "{method} {path}");
        }
    }
    assert_eq!(client.ask("PUT", "/v1/next", b"").etag(), Some(2), "something of all that was stored");
}

#[test]
fn unknown_path_is_404_with_key_path() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for (path, reason) in [
        ("/", UNKNOWN_PATH),
        ("/v2/a", UNKNOWN_PATH),
        ("//v1/a", UNKNOWN_PATH),
        ("/favicon.ico", UNKNOWN_PATH),
        ("/v1/a/b", RAW_SLASH),
        ("/v1//a", RAW_SLASH),
    ] {
        for method in ["GET", "PUT", "POST"] {
            let response = client.ask(method, path, b"value");
            assert_eq!((response.status, response.text()), (404, format!("{reason}\n").as_str()), "{method} {path}");
        }
    }
}

#[test]
fn unknown_query_parameter_is_400() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/a?tll=5", b"value").says(400, "unknown query parameter `tll`");
    client.ask("GET", "/v1/a", b"").says(404, "no such key");
}

#[test]
fn unsupported_method_is_405_with_allow() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for method in ["POST", "PATCH", "OPTIONS", "TRACE", "BREW", "put", "get"] {
        let response = client.ask(method, "/v1/a", b"value");
        assert_eq!(response.status, 405, "{method}: {}", response.text());
        assert_eq!(response.header("allow"), Some("GET, HEAD, PUT, POST, DELETE"), "{method}");
    }
    client.ask("GET", "/v1/a", b"").says(404, "no such key");
}

#[test]
fn announced_large_body_is_rejected_before_it_is_sent() {
    let server = Server::start(&[]);
    for length in [(1 << 20) + 1, 1_u64 << 40] {
        let mut client = Connection::open(server.address());
        client.send(format!("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: {length}\r\n\r\n"));
        client.read().says(413, &format!("the body is {length} bytes, at most 1048576 are allowed"));
    }
    Connection::open(server.address()).ask("GET", "/v1/a", b"").says(404, "no such key");
}

#[test]
fn large_body_with_expect_continue_is_413() {
    let server = Server::start(&["--max-value-bytes", "10"]);
    let mut client = Connection::open(server.address());
    client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\nexpect: 100-continue\r\ncontent-length: 11\r\n\r\n");
    let refused = client.read();
    refused.says(413, "the body is 11 bytes, at most 10 are allowed");
    assert_eq!(refused.header("connection"), Some("close"));
    assert_eq!(client.end(), "");
}

#[test]
fn large_body_that_does_not_wait_for_continue_is_413() {
    let server = Server::start(&[]);
    let body = vec![b'x'; 8 << 20];
    let head =
        format!("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n", body.len());
    // As a proxy sends it. Several times, since a reset connection does not always lose the response.
    for _ in 0..10 {
        let mut client = Connection::open(server.address());
        client.send(&head);
        client.send(&body);
        client.read().says(413, "the body is 8388608 bytes, at most 1048576 are allowed");
    }
}

#[test]
fn value_of_limit_size_is_accepted() {
    let server = Server::start(&["--max-value-bytes", "10"]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"ten bytes.").status, 201);
    client.ask("PUT", "/v1/b", b"eleven byte").says(413, "the body is 11 bytes, at most 10 are allowed");
    Connection::open(server.address()).ask("GET", "/v1/b", b"").says(404, "no such key");
}

#[test]
fn client_still_sending_large_body_gets_413() {
    let server = Server::start(&[]);
    let value = vec![b'x'; 8 << 20];
    // Several times, since a connection that is reset too early does not always lose the response.
    for _ in 0..10 {
        let mut response = agent().put(&server.url("/v1/a")).send(&value).expect("the answer is not lost");
        let text = response.body_mut().read_to_string().expect("the answer is whole");
        assert_eq!(response.status(), 413);
        assert_eq!(text, "the body is 8388608 bytes, at most 1048576 are allowed\n");
    }
    let file = server.data().join("upload");
    std::fs::write(&file, &value).expect("the directory takes a file");
    let file = file.to_str().expect("a temporary path is text");
    // Without `Expect`, so that it sends the body at once.
    let (status, text) = curl(&["-H", "Expect:", "-T", file, &server.url("/v1/a")]);
    assert_eq!((status, text.as_slice()), (413, &b"the body is 8388608 bytes, at most 1048576 are allowed\n"[..]));
}

#[test]
fn large_chunked_body_is_413() {
    let server = Server::start(&["--max-value-bytes", "10"]);
    let mut client = Connection::open(server.address());
    client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ntransfer-encoding: chunked\r\n\r\n8\r\n12345678\r\n");
    client.send("8\r\n12345678\r\n");
    client.read().says(413, "the body exceeds 10 bytes");
    Connection::open(server.address()).ask("GET", "/v1/a", b"").says(404, "no such key");
}

#[test]
fn large_head_is_431() {
    let server = Server::start(&[]);
    let large = format!("x-large: {}\r\n", "x".repeat(500_000));
    let many: String = (0..200).map(|n| format!("x-{n}: x\r\n")).collect();
    for headers in [large, many] {
        let mut client = Connection::open(server.address());
        // It may be rejected before it was sent completely.
        let _ = client.try_send(format!("GET /v1/a HTTP/1.1\r\nhost: kvs\r\n{headers}\r\n"));
        assert_eq!(client.read().status, 431, "{:.20}", headers);
        client.end();
    }
}

/// A request whose head has at least this many bytes.
fn head(bytes: usize) -> String {
    format!("GET /v1/a HTTP/1.1\r\nhost: kvs\r\nx-large: {}\r\n\r\n", "x".repeat(bytes))
}

#[test]
fn largest_head_is_set_by_its_flag() {
    let server = Server::start(&["--max-header-bytes", "8KiB"]);
    let mut client = Connection::open(server.address());
    client.send(head(7_000));
    client.read().says(404, "no such key");
    let _ = client.try_send(head(60_000));
    assert_eq!(client.read().status, 431);
}

#[test]
fn head_slightly_over_limit_is_431() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.send(head(60_000));
    client.read().says(404, "no such key");
    // A new connection: the size of a read depends on earlier requests.
    let mut client = Connection::open(server.address());
    let _ = client.try_send(head(70_000));
    assert_eq!(client.read().status, 431);
}

#[test]
fn garbage_is_400_and_closed() {
    let server = Server::start(&[]);
    let garbage: [&[u8]; 8] = [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", // A TLS client.
        b"\0\0\0\0\0\0\0\0\r\n\r\n",
        b"GET /v1/a b HTTP/1.1\r\nhost: kvs\r\n\r\n",
        b"GET /v1/a HTTP/9.9\r\nhost: kvs\r\n\r\n",
        b"GET /v1/a HTTP/1.1\r\nno colon\r\n\r\n",
        b"PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: many\r\n\r\n",
        b"PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 3\r\ncontent-length: 5\r\n\r\n12345",
    ];
    for bytes in garbage {
        let mut client = Connection::open(server.address());
        client.send(bytes);
        let answer = client.end();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{:?} got {answer:?}", String::from_utf8_lossy(bytes));
    }
    Connection::open(server.address()).ask("GET", "/v1/a", b"").says(404, "no such key");
}

#[test]
fn invalid_chunk_length_stores_nothing() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ntransfer-encoding: chunked\r\n\r\n4\r\nabcd\r\nzz\r\n");
    client.read().says(400, "the body is malformed or incomplete");
    client.end();
    Connection::open(server.address()).ask("GET", "/v1/a", b"").says(404, "no such key");
}

#[test]
fn disconnect_in_mid_body_stores_nothing() {
    for framing in ["content-length: 100\r\n\r\n", "transfer-encoding: chunked\r\n\r\n64\r\n"] {
        // The host logs disconnected clients only at this level.
        let server = Server::start(&["--log-filter", "info,kvs::edge=debug"]);
        let mut client = Connection::open(server.address());
        client.send(format!("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\n{framing}half of it"));
        drop(client);
        server.says("body: ");
        Connection::open(server.address()).ask("GET", "/v1/a", b"").says(404, "no such key");

        let server = server.kill().restart(&[]);
        let mut client = Connection::open(server.address());
        client.ask("GET", "/v1/a", b"").says(404, "no such key");
        assert_eq!(client.ask("PUT", "/v1/a", b"").etag(), Some(1), "something was appended");
    }
}

#[test]
fn incomplete_body_gets_400() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 100\r\n\r\nhalf of it");
    client.finish();
    client.read().says(400, "the body is malformed or incomplete");
    assert_eq!(client.end(), "");
    Connection::open(server.address()).ask("GET", "/v1/a", b"").says(404, "no such key");
}
