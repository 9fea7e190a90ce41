//! Malformed and ambiguous requests, byte for byte: the responses are those of RFC 9110 and 9112, and smuggled requests are
//! never executed.
//!
//! Each is followed by a request that ends the connection, and all responses are read.

use crate::support::metrics::Metrics;
use crate::support::server::Server;
use crate::support::wire::Connection;

/// A head with these lines after the request line.
macro_rules! get {
    ($lines:expr) => {
        concat!("GET /v1/a HTTP/1.1\r\n", $lines, "\r\n").as_bytes()
    };
}

macro_rules! put {
    ($lines:expr, $body:expr) => {
        concat!("PUT /v1/smuggled HTTP/1.1\r\nhost: kvs\r\n", $lines, "\r\n", $body).as_bytes()
    };
}

macro_rules! chunked {
    ($body:expr) => {
        put!("transfer-encoding: chunked\r\n", $body)
    };
}

/// A request that follows a body, which another parser could take for a part of the body.
macro_rules! and_one_more {
    ($first:expr) => {
        concat!(
            "POST /v1/a HTTP/1.1\r\nhost: kvs\r\n",
            $first,
            "PUT /v1/smuggled HTTP/1.1\r\nhost: kvs\r\ncontent-length: 1\r\n\r\nx"
        )
        .as_bytes()
    };
}

/// Expected statuses, in order, or one of several alternatives.
type Answers = &'static [&'static [u16]];

const REFUSED: Answers = &[&[400]];
const NOT_THERE: Answers = &[&[404]];

/// Description, bytes, and expected responses. None of these requests stores anything.
const CASES: &[(&str, &[u8], Answers)] = &[
    // The request line (RFC 9112, 3).
    ("a sound request", get!("host: kvs\r\n"), NOT_THERE),
    ("an empty line before it is ignored", b"\r\nGET /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", NOT_THERE),
    ("no version", b"GET /v1/a\r\nhost: kvs\r\n\r\n", REFUSED),
    ("no target", b"GET HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("no method", b" /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("two spaces before the target", b"GET  /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("two spaces before the version", b"GET /v1/a  HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a tab before the target", b"GET\t/v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a space in the target", b"GET /v1/a b HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a space after the version", b"GET /v1/a HTTP/1.1 \r\nhost: kvs\r\n\r\n", REFUSED),
    ("a space before the method", b" GET /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a bare CR in the request line", b"GET /v1/a\rHTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a NUL in the target", b"GET /v1/a\0 HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a DEL in the target", b"GET /v1/a\x7f HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a control character in the target", b"GET /v1/a\x01 HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a NUL in the method", b"G\0T /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a separator in the method", b"GE(T /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a colon in the method", b"GET: /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a method of bytes above ASCII", b"G\xc3\x8bT /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a method nobody knows", b"BREW /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", &[&[405]]),
    ("a method in lower case is another", b"get /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", &[&[405]]),
    ("TLS on a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", REFUSED),
    ("another protocol", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", REFUSED),
    ("nothing but lines", b"\r\n\r\n\r\n\r\n", &[]),
    ("garbage", b"\xff\xfe\xfd\xfc\r\n\r\n", REFUSED),
    // Versions (RFC 9112, 2.3).
    ("HTTP/1.0", b"GET /v1/a HTTP/1.0\r\nhost: kvs\r\n\r\n", NOT_THERE),
    ("HTTP/1.0 needs no host", b"GET /v1/a HTTP/1.0\r\n\r\n", NOT_THERE),
    ("HTTP/0.9", b"GET /v1/a HTTP/0.9\r\nhost: kvs\r\n\r\n", &[&[400, 505]]),
    ("HTTP/1.2", b"GET /v1/a HTTP/1.2\r\nhost: kvs\r\n\r\n", &[&[400, 404, 505]]),
    ("HTTP/2.0 in a request line", b"GET /v1/a HTTP/2.0\r\nhost: kvs\r\n\r\n", &[&[400, 505]]),
    ("HTTP/3.0", b"GET /v1/a HTTP/3.0\r\nhost: kvs\r\n\r\n", &[&[400, 505]]),
    ("HTTP/11", b"GET /v1/a HTTP/11\r\nhost: kvs\r\n\r\n", REFUSED),
    ("HTTP/1", b"GET /v1/a HTTP/1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("HTTP/1.10", b"GET /v1/a HTTP/1.10\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a version with a sign", b"GET /v1/a HTTP/+1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a version in lower case", b"GET /v1/a http/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a version of nothing", b"GET /v1/a HTTP/.\r\nhost: kvs\r\n\r\n", REFUSED),
    // Targets (RFC 9112, 3.2).
    ("the absolute form", b"GET http://kvs/v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", NOT_THERE),
    ("the absolute form goes before the host", b"GET http://kvs/v1/a HTTP/1.1\r\nhost: other\r\n\r\n", NOT_THERE),
    ("the absolute form needs a host", b"GET http://kvs/v1/a HTTP/1.1\r\n\r\n", REFUSED),
    ("the asterisk is for OPTIONS", b"GET * HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a target without a slash", b"GET v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a target that is a query", b"GET ?a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a fragment is not sent", b"GET /v1/a#b HTTP/1.1\r\nhost: kvs\r\n\r\n", &[&[400, 404]]),
    ("an authority as the target", b"GET kvs:80 HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a tunnel", b"CONNECT kvs:80 HTTP/1.1\r\nhost: kvs:80\r\n\r\n", &[&[501]]),
    ("a tunnel to a path", b"CONNECT /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", &[&[400, 501]]),
    ("a scheme without a host", b"GET http:///v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    // Hosts (RFC 9112, 3.2).
    ("no host", get!(""), REFUSED),
    ("two hosts", get!("host: kvs\r\nhost: kvs\r\n"), REFUSED),
    ("two hosts that differ", get!("host: kvs\r\nhost: other\r\n"), REFUSED),
    ("a host with a path", get!("host: kvs/v1\r\n"), REFUSED),
    ("a host with a user", get!("host: user@kvs\r\n"), REFUSED),
    ("a host with a space", get!("host: kvs other\r\n"), REFUSED),
    ("a host with two ports", get!("host: kvs:80:80\r\n"), REFUSED),
    ("a host with a port that is no number", get!("host: kvs:b\r\n"), REFUSED),
    ("a host with a port that is none", get!("host: kvs:65536\r\n"), REFUSED),
    ("a host that is half an address", get!("host: [::1\r\n"), REFUSED),
    ("a host that is an address without brackets", get!("host: ::1\r\n"), REFUSED),
    ("a host with a name in brackets", get!("host: [kvs]\r\n"), REFUSED),
    ("a host with a broken escape", get!("host: k%vs\r\n"), REFUSED),
    ("two hosts in HTTP/1.0", b"GET /v1/a HTTP/1.0\r\nhost: kvs\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a host with a path in HTTP/1.0", b"GET /v1/a HTTP/1.0\r\nhost: kvs/v1\r\n\r\n", REFUSED),
    ("the absolute form with a user", b"GET http://user@kvs/v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("the absolute form with two ports", b"GET http://kvs:80:80/v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("the absolute form of another scheme", b"GET ftp://kvs/v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n", REFUSED),
    ("a host with a port", get!("host: kvs:8080\r\n"), NOT_THERE),
    ("a host that is an address", get!("host: [::1]:8080\r\n"), NOT_THERE),
    ("an empty host is one", get!("host:\r\n"), NOT_THERE),
    // Header lines (RFC 9112, 5).
    ("a header line without a colon", get!("host: kvs\r\nnocolon\r\n"), REFUSED),
    ("a header line that is only a colon", get!("host: kvs\r\n: x\r\n"), REFUSED),
    ("a space before the colon", get!("host : kvs\r\n"), REFUSED),
    ("a tab before the colon", get!("host\t: kvs\r\n"), REFUSED),
    ("a space before the first header", b"GET /v1/a HTTP/1.1\r\n host: kvs\r\n\r\n", REFUSED),
    ("a folded header", get!("host: kvs\r\nx: a\r\n b\r\n"), REFUSED),
    ("a header folded with a tab", get!("host: kvs\r\nx: a\r\n\tb\r\n"), REFUSED),
    ("a folded length", put!("content-length:\r\n 1\r\n", "x"), REFUSED),
    ("a NUL in a value", get!("host: kvs\r\nx: a\0b\r\n"), REFUSED),
    ("a bare CR in a value", get!("host: kvs\r\nx: a\rb\r\n"), REFUSED),
    ("a bare CR that would end a line", get!("host: kvs\r\nx: a\rcontent-length: 5\r\n"), REFUSED),
    ("a control character in a value", get!("host: kvs\r\nx: a\x01b\r\n"), REFUSED),
    ("a DEL in a value", get!("host: kvs\r\nx: a\x7fb\r\n"), REFUSED),
    ("a tab in a value", get!("host: kvs\r\nx: a\tb\r\n"), NOT_THERE),
    ("bytes above ASCII in a value", b"GET /v1/a HTTP/1.1\r\nhost: kvs\r\nx: \xff\xfe\r\n\r\n", NOT_THERE),
    ("a NUL in a name", get!("host: kvs\r\nx\0y: a\r\n"), REFUSED),
    ("a space in a name", get!("host: kvs\r\nx y: a\r\n"), REFUSED),
    ("a bracket in a name", get!("host: kvs\r\nx[y]: a\r\n"), REFUSED),
    ("bytes above ASCII in a name", b"GET /v1/a HTTP/1.1\r\nhost: kvs\r\nx\xff: a\r\n\r\n", REFUSED),
    ("an empty value", get!("host: kvs\r\nx:\r\n"), NOT_THERE),
    // Line ends (RFC 9112, 2.2: a bare LF may be accepted as a line end, and is, as by nginx, Go and hyper; a bare CR is not).
    ("lines that end with LF", b"GET /v1/a HTTP/1.1\nhost: kvs\n\n", NOT_THERE),
    ("a host behind a bare LF", get!("host: kvs\r\nx: a\nhost: kvs\r\n"), REFUSED),
    ("a coding behind a bare LF", put!("content-length: 1\r\nx: a\ntransfer-encoding: chunked\r\n", "x"), REFUSED),
    ("lines that end with CR", b"GET /v1/a HTTP/1.1\rhost: kvs\r\r", REFUSED),
    ("an end of CR CR LF", b"GET /v1/a HTTP/1.1\r\nhost: kvs\r\r\n\r\n", REFUSED),
    // Lengths (RFC 9112, 6.2).
    ("a length that is not a number", put!("content-length: many\r\n", "x"), REFUSED),
    ("an empty length", put!("content-length:\r\n", "x"), REFUSED),
    ("a negative length", put!("content-length: -1\r\n", "x"), REFUSED),
    ("a length with a sign", put!("content-length: +1\r\n", "x"), REFUSED),
    ("a length with a point", put!("content-length: 1.0\r\n", "x"), REFUSED),
    ("a length in hexadecimal", put!("content-length: 0x1\r\n", "x"), REFUSED),
    ("a length with a space inside", put!("content-length: 1 0\r\n", "x"), REFUSED),
    ("a length with an underscore", put!("content-length: 1_0\r\n", "x"), REFUSED),
    (
        "a length in other digits",
        "PUT /v1/smuggled HTTP/1.1\r\nhost: kvs\r\ncontent-length: １\r\n\r\nx".as_bytes(),
        REFUSED,
    ),
    ("a length beyond 64 bits", put!("content-length: 18446744073709551617\r\n", "x"), REFUSED),
    ("a length beyond the limit", put!("content-length: 9223372036854775807\r\n", "x"), &[&[413]]),
    ("two lengths that differ", put!("content-length: 1\r\ncontent-length: 2\r\n", "xx"), REFUSED),
    ("a list of lengths that differ", put!("content-length: 1, 2\r\n", "xx"), REFUSED),
    ("a length and a half", put!("content-length: 1;2\r\n", "xx"), REFUSED),
    // Codings (RFC 9112, 6.1).
    // Both may be rejected, or the coding alone may count; the connection ends in any case.
    (
        "both, the coding last",
        and_one_more!("content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
        &[&[400, 405]],
    ),
    (
        "both, the coding first",
        and_one_more!("transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n"),
        &[&[400, 405]],
    ),
    (
        "both, and a length of nothing",
        and_one_more!("transfer-encoding: chunked\r\ncontent-length: 0\r\n\r\n1\r\nx\r\n0\r\n\r\n"),
        &[&[400, 405]],
    ),
    (
        "both, and two lengths",
        and_one_more!("content-length: 0\r\ntransfer-encoding: chunked\r\ncontent-length: 9\r\n\r\n0\r\n\r\n"),
        &[&[400, 405]],
    ),
    ("a coding nobody knows", put!("transfer-encoding: brotli\r\n", "x"), &[&[400, 501]]),
    ("chunked is not last", put!("transfer-encoding: chunked, gzip\r\n", "0\r\n\r\n"), &[&[400, 501]]),
    ("chunked after another", put!("transfer-encoding: gzip, chunked\r\n", "1\r\nx\r\n0\r\n\r\n"), &[&[501]]),
    ("chunked after identity", put!("transfer-encoding: identity, chunked\r\n", "1\r\nx\r\n0\r\n\r\n"), &[&[501]]),
    ("chunked twice", put!("transfer-encoding: chunked, chunked\r\n", "1\r\nx\r\n0\r\n\r\n"), &[&[400, 501]]),
    ("chunked after nothing", put!("transfer-encoding: , chunked\r\n", "1\r\nx\r\n0\r\n\r\n"), &[&[400, 501]]),
    (
        "chunked in two lines",
        put!("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", "1\r\nx\r\n0\r\n\r\n"),
        &[&[400, 501]],
    ),
    (
        "another line, and then chunked",
        put!("transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n", "1\r\nx\r\n0\r\n\r\n"),
        &[&[400, 501]],
    ),
    ("chunked with a parameter", put!("transfer-encoding: chunked;q=1\r\n", "1\r\nx\r\n0\r\n\r\n"), &[&[400, 501]]),
    ("identity", put!("transfer-encoding: identity\r\n", "x"), &[&[400, 501]]),
    ("almost chunked", put!("transfer-encoding: xchunked\r\n", "0\r\n\r\n"), &[&[400, 501]]),
    ("chunked in quotes", put!("transfer-encoding: \"chunked\"\r\n", "0\r\n\r\n"), &[&[400, 501]]),
    ("chunked with a control character", put!("transfer-encoding: \x0bchunked\r\n", "0\r\n\r\n"), REFUSED),
    ("chunked with a space before the colon", put!("transfer-encoding : chunked\r\n", "0\r\n\r\n"), REFUSED),
    ("an empty coding", put!("transfer-encoding:\r\n", "0\r\n\r\n"), &[&[400, 501]]),
    (
        "chunked, and then another line",
        put!("transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n", "0\r\n\r\n"),
        &[&[400, 501]],
    ),
    (
        "chunked in HTTP/1.0",
        b"PUT /v1/smuggled HTTP/1.0\r\nhost: kvs\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        &[&[400, 501]],
    ),
    // Chunks (RFC 9112, 7.1).
    ("a size that is no number", chunked!("zz\r\nx\r\n0\r\n\r\n"), REFUSED),
    ("an empty size", chunked!("\r\nx\r\n0\r\n\r\n"), REFUSED),
    ("a negative size", chunked!("-1\r\nx\r\n0\r\n\r\n"), REFUSED),
    ("a size with a sign", chunked!("+1\r\nx\r\n0\r\n\r\n"), REFUSED),
    ("a size with 0x", chunked!("0x1\r\nx\r\n0\r\n\r\n"), REFUSED),
    ("a size beyond 64 bits", chunked!("10000000000000001\r\nx\r\n0\r\n\r\n"), REFUSED),
    ("a huge size", chunked!("ffffffffffffffff\r\nx\r\n0\r\n\r\n"), &[&[400, 408, 413]]),
    ("data longer than its size", chunked!("1\r\nxy\r\n0\r\n\r\n"), REFUSED),
    ("data shorter than its size", chunked!("5\r\nx\r\n0\r\n\r\n"), REFUSED),
    ("no line end after the data", chunked!("1\r\nx0\r\n\r\n"), REFUSED),
    ("a size that ends with LF", chunked!("1\nx\r\n0\r\n\r\n"), REFUSED),
    ("a size that ends with CR", chunked!("1\rx\r\n0\r\n\r\n"), REFUSED),
    ("data that ends with LF", chunked!("1\r\nx\n0\r\n\r\n"), REFUSED),
    ("an extension with a bare LF", chunked!("1;a\nb\r\nx\r\n0\r\n\r\n"), REFUSED),
    ("an extension with a bare CR", chunked!("1;a\rb\r\nx\r\n0\r\n\r\n"), REFUSED),
    ("a space before the size", chunked!(" 1\r\nx\r\n0\r\n\r\n"), REFUSED),
    // Headers that change the meaning of a body (RFC 9110, 8.4 and 14.5).
    ("a part of a value", put!("content-range: bytes 13-13/21\r\ncontent-length: 1\r\n", "x"), REFUSED),
    ("a compressed value", put!("content-encoding: gzip\r\ncontent-length: 1\r\n", "x"), &[&[415]]),
    ("a value for one language", put!("content-language: de\r\ncontent-length: 1\r\n", "x"), &[&[415]]),
    ("a value to save", put!("content-disposition: attachment\r\ncontent-length: 1\r\n", "x"), &[&[415]]),
    ("a value to cache", put!("cache-control: max-age=60\r\ncontent-length: 1\r\n", "x"), &[&[415]]),
    // Bytes after a request.
    (
        "two requests in one go",
        b"GET /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\nGET /v1/b HTTP/1.1\r\nhost: kvs\r\n\r\n",
        &[&[404], &[404]],
    ),
    ("a bad one after a good one", b"GET /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\nGARBAGE\r\n\r\n", &[&[404], &[400]]),
    (
        "a good one after a bad one",
        b"GARBAGE\r\n\r\nPUT /v1/smuggled HTTP/1.1\r\nhost: kvs\r\ncontent-length: 1\r\n\r\nx",
        REFUSED,
    ),
    (
        "one after the last of its client",
        b"GET /v1/a HTTP/1.1\r\nhost: kvs\r\nconnection: close\r\n\r\nGET /v1/b HTTP/1.1\r\nhost: kvs\r\n\r\n",
        NOT_THERE,
    ),
    (
        "another protocol after the upgrade",
        b"GET /v1/a HTTP/1.1\r\nhost: kvs\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        NOT_THERE,
    ),
    ("an expectation nobody knows", get!("host: kvs\r\nexpect: miracles\r\n"), &[&[404, 417]]),
];

#[test]
fn malformed_requests_get_standard_responses() {
    assert!(CASES.len() >= 100, "{}", CASES.len());
    let server = Server::start(&["--max-target-bytes", "256"]);
    let end = format!("GET /{} HTTP/1.1\r\nhost: kvs\r\n\r\n", "x".repeat(300));
    let mut wrong = Vec::new();
    for (about, bytes, answers) in CASES {
        let mut client = Connection::open(server.address());
        // It may be closed before all of it was sent.
        let _ = client.try_send([bytes, end.as_bytes()].concat());
        let mut got = statuses(&client.end());
        // No other request gets this response.
        got.pop_if(|status| *status == 414);
        if got.len() != answers.len() || got.iter().zip(*answers).any(|(got, right)| !right.contains(got)) {
            wrong.push(format!("{about}: {got:?}, and not {answers:?}"));
        }
        let stored = Connection::open(server.address()).ask("GET", "/v1/smuggled", b"");
        assert_eq!(stored.status, 404, "{about}: it was carried out");
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), CASES.len(), wrong.join("\n"));
}

/// The statuses of all responses.
fn statuses(text: &str) -> Vec<u16> {
    let status = |line: &str| line.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
    text.split("\r\n").filter_map(|line| status(line.split('\n').next_back()?)).collect()
}

#[test]
fn admin_listener_rejects_what_two_servers_could_read_differently() {
    let server = Server::start(&[]);
    for (about, lines, status) in [
        ("a sound request", "host: kvs\r\ntransfer-encoding: chunked\r\nconnection: close\r\n", 200),
        ("no host", "transfer-encoding: chunked\r\n", 400),
        ("two hosts", "host: kvs\r\nhost: kvs\r\ntransfer-encoding: chunked\r\n", 400),
        ("a host with two ports", "host: kvs:80:80\r\ntransfer-encoding: chunked\r\n", 400),
        ("a host with a port that is no number", "host: kvs:b\r\ntransfer-encoding: chunked\r\n", 400),
        ("a host with a port that is none", "host: kvs:65536\r\ntransfer-encoding: chunked\r\n", 400),
        ("a host with a broken escape", "host: k%vs\r\ntransfer-encoding: chunked\r\n", 400),
        ("chunked after another", "host: kvs\r\ntransfer-encoding: gzip, chunked\r\n", 501),
        ("chunked after identity", "host: kvs\r\ntransfer-encoding: identity, chunked\r\n", 501),
        ("chunked twice", "host: kvs\r\ntransfer-encoding: chunked, chunked\r\n", 501),
        ("chunked in two lines", "host: kvs\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", 400),
    ] {
        let mut client = Connection::open(server.admin());
        client.send(format!("DELETE /guest?dry-run HTTP/1.1\r\n{lines}\r\n0\r\n\r\n"));
        assert_eq!(statuses(&client.end()), [status], "{about}");
    }
}

#[test]
fn truncated_requests_have_no_effect() {
    let server = Server::start(&[]);
    for (about, bytes) in [
        ("a head", get!("host: kvs")),
        ("a head with a length", b"PUT /v1/smuggled HTTP/1.1\r\nhost: kvs\r\ncontent-length: 0\r\n"),
        ("a body", put!("content-length: 10\r\n", "x")),
        ("a body of nothing at all", put!("content-length: 10\r\n", "")),
        ("a size", chunked!("1")),
        ("a chunk", chunked!("5\r\nx")),
        ("chunks without the last", chunked!("1\r\nx\r\n")),
        ("chunks without the end", chunked!("1\r\nx\r\n0\r\n")),
        ("trailers", chunked!("1\r\nx\r\n0\r\na: b\r\n")),
    ] {
        let mut client = Connection::open(server.address());
        client.send(bytes);
        client.finish();
        let got = statuses(&client.end());
        assert!(matches!(got[..], [] | [400]), "{about}: {got:?}");
        Connection::open(server.address()).ask("GET", "/v1/smuggled", b"").says(404, "no such key");
    }
}

#[test]
fn unusual_valid_requests_are_processed() {
    let server = Server::start(&[]);
    for (about, bytes) in [
        ("a chunked body", chunked!("4\r\nvalu\r\n1\r\ne\r\n0\r\n\r\n")),
        ("sizes in capitals, with zeros before", chunked!("0005\r\nvalue\r\n000\r\n\r\n")),
        ("chunks with extensions", chunked!("5;a=b;c=\"d\"\r\nvalue\r\n0;e\r\n\r\n")),
        ("a chunked body with trailers", chunked!("5\r\nvalue\r\n0\r\nx: y\r\ncontent-length: 3\r\n\r\n")),
        ("chunked in capitals", put!("Transfer-Encoding: CHUNKED\r\n", "5\r\nvalue\r\n0\r\n\r\n")),
        ("the same length twice", put!("content-length: 5\r\ncontent-length: 5\r\n", "value")),
        ("lines that end with LF", b"PUT /v1/smuggled HTTP/1.1\nhost: kvs\ncontent-length: 5\n\nvalue"),
        ("a length with zeros before", put!("content-length: 005\r\n", "value")),
        ("white space around a length", put!("content-length: \t 5 \t\r\n", "value")),
        // Values have no modification date (RFC 9110, 13.1.4).
        (
            "a condition on a date",
            put!("if-unmodified-since: Thu, 01 Jan 1970 00:00:00 GMT\r\ncontent-length: 5\r\n", "value"),
        ),
        ("what browsers send to pass caches", put!("cache-control: no-cache\r\ncontent-length: 5\r\n", "value")),
        ("a range, which is for GET", put!("range: bytes=0-0\r\ncontent-length: 5\r\n", "value")),
        ("the absolute form", b"PUT http://kvs/v1/smuggled HTTP/1.1\r\nhost: kvs\r\ncontent-length: 5\r\n\r\nvalue"),
    ] {
        let mut client = Connection::open(server.address());
        client.send(bytes);
        assert_eq!(client.read().status, 201, "{about}");
        // All of it was consumed.
        assert_eq!(client.ask("GET", "/v1/smuggled", b"").text(), "value", "{about}");
        assert_eq!(client.ask("DELETE", "/v1/smuggled", b"").status, 200);
    }
}

#[test]
fn floods_of_small_chunks_are_rejected() {
    let server = Server::start(&[]);
    // Ten thousand parts of less than 16 bytes, and any number of others.
    for (small, large, status) in [(10_000, 1_000, 201), (10_001, 0, 400)] {
        let chunks = ["1\r\nx\r\n".repeat(small), "10\r\n0123456789abcdef\r\n".repeat(large)].concat();
        let mut client = Connection::open(server.address());
        let head = "PUT /v1/a HTTP/1.1\r\nhost: kvs\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
        client.send([head, &chunks, "0\r\n\r\n"].concat());
        assert_eq!(statuses(&client.end()), [status], "{small} and {large}");
    }
    // The rest of the body of a request that is rejected for another reason is not read for long either.
    let before = Metrics::of(&server).get("kvs_network_receive_bytes_total");
    let mut client = Connection::open(server.address());
    let head = "PUT /v1/a HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n";
    // It may be closed before all of it was sent.
    let _ = client.try_send([head, &"1\r\nx\r\n".repeat(1_000_000)].concat());
    client.end();
    let received = Metrics::of(&server).get("kvs_network_receive_bytes_total") - before;
    assert!(received < 1e6, "{received} bytes were read");
}

#[test]
fn complete_request_before_half_close_is_answered() {
    let server = Server::start(&[]);
    let large = vec![b'x'; 1 << 20];
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/large", &large).status, 201);
    for (about, bytes, status) in [
        ("a body", put!("content-length: 5\r\n", "value"), 201),
        ("a chunked body", chunked!("5\r\nvalue\r\n0\r\n\r\n"), 201),
        ("a read", get!("host: kvs\r\n"), 404),
        ("a list", b"GET /v1 HTTP/1.1\r\nhost: kvs\r\n\r\n", 200),
        ("a long poll, which ends", b"GET /v1/a?wait=300s HTTP/1.1\r\nhost: kvs\r\n\r\n", 404),
    ] {
        for _ in 0..30 {
            let mut client = Connection::open(server.address());
            client.send(bytes);
            client.finish();
            assert_eq!(client.read().status, status, "{about}");
            assert_eq!(client.end(), "", "{about}");
        }
    }
    let mut client = Connection::open(server.address());
    client.send(b"GET /v1/large HTTP/1.1\r\nhost: kvs\r\n\r\n");
    client.finish();
    assert_eq!(client.read().body, large, "a response that does not fit into one write");
    // Requests in the same packet are answered too, in order.
    let mut client = Connection::open(server.address());
    client.send([put!("content-length: 1\r\n", "x"), get!("host: kvs\r\n")].concat());
    client.finish();
    assert_eq!((client.read().status, client.read().status, client.end()), (201, 404, String::new()));
    // A watch sends its head and position, and ends: a half-closed client looks like a disconnected one.
    let mut client = Connection::open(server.address());
    client.send(b"GET /v1?watch HTTP/1.1\r\nhost: kvs\r\n\r\n");
    client.finish();
    let got = client.end();
    assert!(got.starts_with("HTTP/1.1 200 ") && got.contains("id: ") && got.ends_with("0\r\n\r\n"), "{got:?}");
}
