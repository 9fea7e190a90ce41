//! Messages over HTTP/2 that are malformed, or that a server and a proxy could read in two ways: what RFC 9113, section 8, asks for
//! is what they get, and nothing that was smuggled along is carried out.

use crate::support::http2::{DATA, END_HEADERS, END_STREAM, Frames, GOAWAY, HEADERS, RST_STREAM, field};
use crate::support::server::Server;
use crate::support::wire::Connection;

type Field = (&'static str, &'static str);

const METHOD: Field = (":method", "PUT");
const SCHEME: Field = (":scheme", "http");
const PATH: Field = (":path", "/v1/smuggled");
const AUTHORITY: Field = (":authority", "kvs");

/// A sound head, with these fields beside.
macro_rules! head {
    ($($field:expr),*) => {
        &[METHOD, SCHEME, PATH, AUTHORITY $(, $field)*]
    };
}

/// A sound head without an authority, with these fields beside.
macro_rules! local {
    ($($field:expr),*) => {
        &[METHOD, SCHEME, PATH $(, $field)*]
    };
}

/// What it is about, the head, what is in each frame of the body, and the trailers.
type Message = (&'static str, &'static [Field], &'static [&'static str], Option<&'static [Field]>);

/// Refused with this status, or by the library: the stream is reset, or the connection ended (RFC 9113, 8.1.1). The library answers
/// some with 400 itself.
const REFUSED: &[(u16, Message)] = &[
    // Names and values of fields (8.2, 8.2.1).
    (0, ("a name in capitals", head![("X", "y")], &["x"], None)),
    (0, ("a known name in capitals", local![("Host", "kvs")], &["x"], None)),
    (0, ("a name of nothing", head![("", "y")], &["x"], None)),
    (0, ("a space in a name", head![("x y", "z")], &["x"], None)),
    (0, ("a space after a name", head![("content-length ", "1")], &["x"], None)),
    (0, ("a colon in a name", head![("x:y", "z")], &["x"], None)),
    (0, ("a line end in a name", head![("x\r\ny", "z")], &["x"], None)),
    (0, ("a NUL in a name", head![("x\0", "y")], &["x"], None)),
    (0, ("a DEL in a name", head![("x\x7f", "y")], &["x"], None)),
    (0, ("bytes above ASCII in a name", head![("x\u{e4}", "y")], &["x"], None)),
    (0, ("a line end in a value", head![("x", "y\r\nz: a")], &["x"], None)),
    (0, ("a CR in a value", head![("x", "y\rz")], &["x"], None)),
    (0, ("an LF in a value", head![("x", "y\nz")], &["x"], None)),
    (0, ("a NUL in a value", head![("x", "y\0z")], &["x"], None)),
    (0, ("a control character in a value", head![("x", "y\x01z")], &["x"], None)),
    (400, ("a space before a value", head![("x", " y")], &["x"], None)),
    (400, ("a space after a value", head![("x", "y ")], &["x"], None)),
    (400, ("a tab after a value", head![("x", "y\t")], &["x"], None)),
    (400, ("a value of a space", head![("x", " ")], &["x"], None)),
    // Fields of the connection (8.2.2).
    (0, ("connection", head![("connection", "close")], &["x"], None)),
    (0, ("connection of nothing", head![("connection", "")], &["x"], None)),
    (0, ("proxy-connection", head![("proxy-connection", "close")], &["x"], None)),
    (0, ("keep-alive", head![("keep-alive", "timeout=5")], &["x"], None)),
    (0, ("a transfer coding", head![("transfer-encoding", "chunked")], &["1\r\nx\r\n0\r\n\r\n"], None)),
    (0, ("a transfer coding of none", head![("transfer-encoding", "identity")], &["x"], None)),
    (0, ("an upgrade", head![("upgrade", "h2c")], &["x"], None)),
    (0, ("a coding that is wanted", head![("te", "gzip")], &["x"], None)),
    (0, ("trailers and a coding that are wanted", head![("te", "trailers, gzip")], &["x"], None)),
    (0, ("trailers, and then a coding", head![("te", "trailers"), ("te", "gzip")], &["x"], None)),
    // Pseudo-headers (8.3).
    (0, ("a pseudo-header after a field", &[METHOD, SCHEME, AUTHORITY, ("x", "y"), PATH], &["x"], None)),
    (0, ("another path after a field", head![("x", "y"), (":path", "/v1/a")], &["x"], None)),
    (0, ("two paths", &[METHOD, SCHEME, PATH, PATH, AUTHORITY], &["x"], None)),
    (0, ("two paths that differ", &[METHOD, SCHEME, (":path", "/v1/a"), PATH, AUTHORITY], &["x"], None)),
    (0, ("two methods", &[METHOD, METHOD, SCHEME, PATH, AUTHORITY], &["x"], None)),
    (0, ("two schemes", &[METHOD, SCHEME, SCHEME, PATH, AUTHORITY], &["x"], None)),
    (0, ("two authorities", head![AUTHORITY], &["x"], None)),
    (0, ("a pseudo-header that nobody knows", head![(":other", "x")], &["x"], None)),
    (0, ("a pseudo-header of a response", head![(":status", "200")], &["x"], None)),
    (0, ("a pseudo-header in capitals", &[METHOD, SCHEME, (":Path", "/v1/smuggled"), AUTHORITY], &["x"], None)),
    (0, ("a protocol", head![(":protocol", "websocket")], &["x"], None)),
    // Of requests (8.3.1).
    (0, ("no method", &[SCHEME, PATH, AUTHORITY], &["x"], None)),
    (0, ("no scheme", &[METHOD, PATH, AUTHORITY], &["x"], None)),
    (0, ("no path", &[METHOD, SCHEME, AUTHORITY], &["x"], None)),
    (0, ("a method of nothing", &[(":method", ""), SCHEME, PATH, AUTHORITY], &["x"], None)),
    (0, ("a space in the method", &[(":method", "PUT "), SCHEME, PATH, AUTHORITY], &["x"], None)),
    (0, ("a line end in the method", &[(":method", "PUT /v1/a HTTP/1.1\r\n"), SCHEME, PATH, AUTHORITY], &["x"], None)),
    (0, ("a scheme of nothing", &[METHOD, (":scheme", ""), PATH, AUTHORITY], &["x"], None)),
    (400, ("another scheme", &[METHOD, (":scheme", "ftp"), PATH, AUTHORITY], &["x"], None)),
    (0, ("a path of nothing", &[METHOD, SCHEME, (":path", ""), AUTHORITY], &["x"], None)),
    (0, ("a space in the path", &[METHOD, SCHEME, (":path", "/v1/smug gled"), AUTHORITY], &["x"], None)),
    (0, ("a line end in the path", &[METHOD, SCHEME, (":path", "/v1/smuggled\r\nx: y"), AUTHORITY], &["x"], None)),
    (0, ("a NUL in the path", &[METHOD, SCHEME, (":path", "/v1/smuggled\0"), AUTHORITY], &["x"], None)),
    (400, ("an asterisk, which is for OPTIONS", &[METHOD, SCHEME, (":path", "*"), AUTHORITY], &["x"], None)),
    (0, ("a path without a slash", &[METHOD, SCHEME, (":path", "v1/smuggled"), AUTHORITY], &["x"], None)),
    (400, ("a path that is a query", &[METHOD, SCHEME, (":path", "?smuggled"), AUTHORITY], &["x"], None)),
    (
        0,
        (
            "a path in the absolute form",
            &[METHOD, SCHEME, (":path", "http://kvs/v1/smuggled"), AUTHORITY],
            &["x"],
            None,
        ),
    ),
    // Of the authority, and Host beside it (8.3.1).
    (400, ("no authority", local![], &["x"], None)),
    (400, ("a host of nothing", local![("host", "")], &["x"], None)),
    (0, ("an authority of nothing", local![(":authority", "")], &["x"], None)),
    (0, ("an authority of nothing, and a host", local![(":authority", ""), ("host", "kvs")], &["x"], None)),
    (400, ("an authority with a user", local![(":authority", "user@kvs")], &["x"], None)),
    (400, ("an authority with a user and a password", local![(":authority", "user:word@kvs")], &["x"], None)),
    (0, ("an authority with two ports", local![(":authority", "kvs:80:80")], &["x"], None)),
    (400, ("an authority with a port that is no number", local![(":authority", "kvs:b")], &["x"], None)),
    (400, ("an authority with a port that is none", local![(":authority", "kvs:65536")], &["x"], None)),
    (0, ("an authority that is half an address", local![(":authority", "[::1")], &["x"], None)),
    (0, ("an authority with a path", local![(":authority", "kvs/v1")], &["x"], None)),
    (0, ("an authority with a space", local![(":authority", "kvs other")], &["x"], None)),
    (400, ("a host with two ports", local![("host", "kvs:80:80")], &["x"], None)),
    (400, ("a host with a user", local![("host", "user@kvs")], &["x"], None)),
    (400, ("a host with a user beside the authority", head![("host", "user@kvs")], &["x"], None)),
    (400, ("another host", head![("host", "other")], &["x"], None)),
    (400, ("a host of nothing beside the authority", head![("host", "")], &["x"], None)),
    (400, ("another port", head![("host", "kvs:81")], &["x"], None)),
    (400, ("a port that the authority has not", head![("host", "kvs:80")], &["x"], None)),
    (400, ("two hosts", head![("host", "kvs"), ("host", "kvs")], &["x"], None)),
    (400, ("two hosts in its place", local![("host", "kvs"), ("host", "other")], &["x"], None)),
    // Tunnels (8.5).
    (501, ("a tunnel", &[(":method", "CONNECT"), (":authority", "kvs:80")], &["x"], None)),
    (0, ("a tunnel to a path", &[(":method", "CONNECT"), SCHEME, PATH, AUTHORITY], &["x"], None)),
    (
        0,
        (
            "a tunnel of another protocol",
            &[(":method", "CONNECT"), (":protocol", "websocket"), SCHEME, PATH, AUTHORITY],
            &["x"],
            None,
        ),
    ),
    // Lengths (8.1.1).
    (0, ("a length without a body", head![("content-length", "1")], &[], None)),
    (0, ("a length without a body, and trailers", head![("content-length", "1")], &[], Some(&[("x", "y")]))),
    (0, ("a length beyond the body", head![("content-length", "3")], &["x", "y"], None)),
    (0, ("a length beyond the body, and trailers", head![("content-length", "3")], &["xy"], Some(&[("x", "y")]))),
    (0, ("a body beyond the length", head![("content-length", "1")], &["xy"], None)),
    (0, ("a body beyond the length in another frame", head![("content-length", "1")], &["x", "y"], None)),
    (0, ("a body beyond a length of nothing", head![("content-length", "0")], &["x"], None)),
    (0, ("two lengths that differ", head![("content-length", "1"), ("content-length", "2")], &["x"], None)),
    (0, ("a list of lengths", head![("content-length", "1, 1")], &["x"], None)),
    (0, ("a length of nothing", head![("content-length", "")], &["x"], None)),
    (0, ("a negative length", head![("content-length", "-1")], &["x"], None)),
    (0, ("a length with a sign", head![("content-length", "+1")], &["x"], None)),
    (0, ("a length in hexadecimal", head![("content-length", "0x1")], &["x"], None)),
    (0, ("a length beyond 64 bits", head![("content-length", "18446744073709551617")], &["x"], None)),
    // Trailers (8.1).
    (0, ("a field of the connection in trailers", head![], &["x"], Some(&[("connection", "close")]))),
    (0, ("a transfer coding in trailers", head![], &["x"], Some(&[("transfer-encoding", "chunked")]))),
    (0, ("a name in capitals in trailers", head![], &["x"], Some(&[("X", "y")]))),
    (0, ("a line end in trailers", head![], &["x"], Some(&[("x", "y\r\nz: a")]))),
    // What changes the meaning of a body (RFC 9110, 8.4 and 14.5).
    (400, ("a part of a value", head![("content-range", "bytes 13-13/21")], &["x"], None)),
    (415, ("a compressed value", head![("content-encoding", "gzip")], &["x"], None)),
];

/// Processed. Each stores `value`.
const TAKEN: &[Message] = &[
    ("a sound message", head![], &["value"], None),
    ("a body in pieces, one of nothing", head![], &["va", "", "lue"], None),
    ("its length", head![("content-length", "5")], &["va", "lue"], None),
    ("its length with zeros before", head![("content-length", "005")], &["value"], None),
    ("its length twice", head![("content-length", "5"), ("content-length", "5")], &["value"], None),
    ("trailers that are wanted", head![("te", "trailers")], &["value"], None),
    ("trailers", head![], &["value"], Some(&[("x", "y"), ("content-length", "3"), ("host", "other")])),
    // Malformed (8.1), but the library drops it and gives no sign. Trailers are ignored, so it has no effect.
    ("a pseudo-header in trailers", head![], &["value"], Some(&[(":path", "/v1/a")])),
    ("its length, and trailers", head![("content-length", "5")], &["value"], Some(&[("x", "y")])),
    ("the same host", head![("host", "KVS")], &["value"], None),
    ("a host in place of the authority", local![("host", "kvs:80")], &["value"], None),
    ("a host that is an address", local![("host", "[::1]:80")], &["value"], None),
    ("an authority with a port", local![(":authority", "kvs:80"), ("host", "kvs:80")], &["value"], None),
    ("an authority that is an address", local![(":authority", "[::1]:80")], &["value"], None),
    ("pseudo-headers in another order", &[AUTHORITY, PATH, SCHEME, METHOD], &["value"], None),
    ("the scheme of TLS, as a proxy gives it", &[METHOD, (":scheme", "https"), PATH, AUTHORITY], &["value"], None),
    ("a scheme in capitals", &[METHOD, (":scheme", "HTTP"), PATH, AUTHORITY], &["value"], None),
    ("a value of nothing", head![("x", "")], &["value"], None),
    ("a tab in a value", head![("x", "y\tz")], &["value"], None),
    ("bytes above ASCII in a value", head![("x", "\u{e4}")], &["value"], None),
    ("a cookie in pieces", head![("cookie", "a=b"), ("cookie", "c=d")], &["value"], None),
    ("a priority", head![("priority", "u=0, i")], &["value"], None),
    ("settings for an upgrade", head![("http2-settings", "AAMAAABk")], &["value"], None),
];

/// Sends it, and gives the status of the answer, or nothing when it was malformed for the library.
fn answer_to(server: &Server, (about, head, body, trailers): &Message) -> Option<u16> {
    let mut client = Frames::open(server.address());
    let block = |fields: &[Field]| fields.iter().flat_map(|(name, value)| field(name, value)).collect::<Vec<_>>();
    let end = |is_last| if is_last { END_STREAM } else { 0 };
    client.send(HEADERS, END_HEADERS | end(body.is_empty() && trailers.is_none()), 1, &block(head));
    // The stream can be closed before all was sent.
    for (at, data) in body.iter().enumerate() {
        client.send(DATA, end(at + 1 == body.len() && trailers.is_none()), 1, data.as_bytes());
    }
    if let Some(trailers) = trailers {
        client.send(HEADERS, END_HEADERS | END_STREAM, 1, &block(trailers));
    }
    let answer = client.wait(&[HEADERS, RST_STREAM, GOAWAY]);
    let answer = answer.unwrap_or_else(|| panic!("{about}: the connection ended without a word"));
    match answer.kind {
        HEADERS => Some(answer.status()),
        _ => {
            assert_ne!(answer.error(), 0, "{about}: {answer:?}");
            None
        }
    }
}

#[test]
fn malformed_messages_are_rejected() {
    let server = Server::start(&[]);
    let mut wrong = Vec::new();
    for (status, message) in REFUSED {
        let got = answer_to(&server, message).unwrap_or(0);
        if got != *status && (*status, got) != (0, 400) {
            wrong.push(format!("{}: {got}, and not {status}", message.0));
        }
        let stored = Connection::open(server.address()).ask("GET", "/v1/smuggled", b"");
        if stored.status != 404 {
            wrong.push(format!("{}: it was carried out", message.0));
            Connection::open(server.address()).ask("DELETE", "/v1/smuggled", b"");
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), REFUSED.len(), wrong.join("\n"));
}

#[test]
fn unusual_valid_messages_are_processed() {
    let server = Server::start(&[]);
    for message in TAKEN {
        assert_eq!(answer_to(&server, message), Some(201), "{}", message.0);
        let mut client = Connection::open(server.address());
        assert_eq!(client.ask("GET", "/v1/smuggled", b"").text(), "value", "{}", message.0);
        assert_eq!(client.ask("DELETE", "/v1/smuggled", b"").status, 200);
    }
}
