//! Memory and work that clients can cause, mostly over HTTP/2: unread responses, large heads, and floods of control frames.

use std::thread;
use std::time::Instant;

use crate::support::http2::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Frames, GET, HEADERS, PING, PRIORITY, PUT, SETTINGS, WINDOW_UPDATE,
    field, takes_nothing,
};
use crate::support::memory::{memory, peak};
use crate::support::metrics::{Metrics, counts, until};
use crate::support::server::{PATIENCE, Server};
use crate::support::wire::Connection;

const EXCEEDED: &str = "kvs_limit_exceeded_total{limit=\"max-inflight-bytes\"}";
const FRAMES_EXCEEDED: &str = "kvs_limit_exceeded_total{limit=\"http2-max-control-frames\"}";

/// Repeats a request until it gets this status.
fn until_answered(server: &Server, path: &str, status: u16) {
    let begun = Instant::now();
    while Connection::open(server.address()).ask("GET", path, b"").status != status {
        assert!(begun.elapsed() < PATIENCE, "{path} was not answered with {status}");
    }
}

#[test]
fn unread_responses_stay_within_budget() {
    // In the end all of them are accepted and called.
    let patient = ["--max-requests", "10000", "--request-timeout", "100s"];
    let server = Server::start(&[&["--max-inflight-bytes", "64MiB"], &patient[..]].concat());
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", &vec![b'x'; 1 << 20]).status, 201);
    assert_eq!(client.ask("PUT", "/v1/small", &[b'x'; 10_000]).status, 201);
    let before = memory(&server);
    let holding: Vec<_> = (0..60).map(|_| takes_nothing(&server, 100)).collect();
    let now = until(&server, "the budget is used up", |now| now.get(EXCEEDED) > 0.0);
    let (held, limit) = (now.get("kvs_inflight_bytes"), now.get("kvs_inflight_bytes_limit"));
    assert!(held <= limit && limit == f64::from(64 << 20), "{held} of {limit}");
    // Small values are served, however much memory other clients hold.
    assert_eq!(client.ask("GET", "/v1/small", b"").status, 200);
    assert_eq!(client.ask("PUT", "/v1/small", &[b'y'; 10_000]).status, 201);
    // Large ones too, once slow clients are disconnected.
    until_answered(&server, "/v1/a", 200);
    let grown = memory(&server).saturating_sub(before);
    assert!(grown < 192 << 10, "memory grew by {grown} KiB");
    drop(holding);
    until(&server, "nothing is held by nobody", |now| now.get("kvs_inflight_bytes") == 0.0);
}

#[test]
fn response_read_slowly_over_http1_is_cut_for_others() {
    let server = Server::start(&["--max-inflight-bytes", "32MiB", "--max-value-bytes", "16MiB"]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", &vec![b'x'; 10 << 20]).status, 201);
    let mut slow: Vec<_> = (0..2)
        .map(|_| {
            let mut slow = Connection::open(server.address());
            slow.send("GET /v1/a HTTP/1.1\r\nhost: kvs\r\nconnection: close\r\n\r\n");
            slow
        })
        .collect();
    until(&server, "both are held", |now| now.get("kvs_inflight_bytes") >= f64::from(20 << 20));
    let refused = client.ask("GET", "/v1/a", b"");
    refused.says(503, "too many bytes of requests and responses are in flight");
    assert_eq!(refused.header("retry-after"), Some("1"));
    until_answered(&server, "/v1/a", 200);
    let whole = slow.iter_mut().map(|slow| slow.end().len()).filter(|length| *length > 10 << 20).count();
    assert!(whole < 2, "none was cut");
}

#[test]
fn large_heads_on_many_streams_stay_within_budget() {
    let server = Server::start(&["--max-inflight-bytes", "16MiB"]);
    Connection::open(server.address()).ask("GET", "/v1/never", b"").says(404, "no such key");
    let before = memory(&server);
    // 15 fields of 3,968 bytes, in frames that are as long as they may be.
    let fields: Vec<u8> =
        (0..15).flat_map(|_| [b"\x00\x01x\x7f\x81\x1e".as_slice(), &[b'y'; 3_968]].concat()).collect();
    let head = [PUT, &fields].concat();
    let holding: Vec<_> = (0..20)
        .map(|_| {
            let mut client = Frames::open(server.address());
            for stream in (1..200).step_by(2) {
                let (first, rest) = head.split_at(16_000);
                client.send(HEADERS, 0, stream, first);
                let mut rest = rest.chunks(16_000).peekable();
                while let Some(more) = rest.next() {
                    client.send(CONTINUATION, if rest.peek().is_none() { END_HEADERS } else { 0 }, stream, more);
                }
            }
            client
        })
        .collect();
    until(&server, "the budget is used up", |now| now.get(EXCEEDED) > 0.0);
    assert!(Metrics::of(&server).get("kvs_inflight_bytes") <= f64::from(16 << 20));
    let grown = memory(&server).saturating_sub(before);
    assert!(grown < 64 << 10, "memory grew by {grown} KiB");
    Connection::open(server.address()).ask("GET", "/v1/never", b"").says(404, "no such key");
    drop(holding);
}

#[test]
fn unread_changes_of_slow_watches_stay_within_budget() {
    let server = Server::start(&["--max-inflight-bytes", "16MiB"]);
    let value = vec![b'x'; 512 << 10];
    let mut client = Connection::open(server.address());
    let mut put_all = || {
        for key in 0..40 {
            let begun = Instant::now();
            // Until slow clients are disconnected.
            while client.ask("PUT", &format!("/v1/{key}"), &value).status != 201 {
                client = Connection::open(server.address());
                assert!(begun.elapsed() < PATIENCE, "{key} was not stored");
            }
        }
    };
    for _ in 0..3 {
        put_all();
    }
    let before = peak(&server);
    let watching: Vec<_> = (0..10)
        .map(|connection| {
            let mut client = Frames::open(server.address());
            // INITIAL_WINDOW_SIZE: nothing may be sent to it.
            client.send(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
            for stream in 0..4 {
                let path = field(":path", &format!("/v1?watch&prefix={}", 4 * connection + stream));
                let head = [b"\x82\x86", &path[..], &field(":authority", "kvs")].concat();
                client.send(HEADERS, END_STREAM | END_HEADERS, 2 * stream + 1, &head);
                client.wait(&[HEADERS]).expect("it watches");
            }
            client
        })
        .collect();
    for _ in 0..4 {
        put_all();
    }
    let grown = peak(&server).saturating_sub(before);
    // Plus freed memory that was not returned to the system. Without a budget it is more than 130 MiB.
    assert!(grown < 80 << 10, "memory grew by {grown} KiB");
    drop(watching);
    until(&server, "nothing is held by nobody", |now| now.get("kvs_inflight_bytes") == 0.0);
}

#[test]
fn more_headers_than_allowed_are_431_over_http2_too() {
    let server = Server::start(&["--max-headers", "10"]);
    for (count, refused) in [(9, false), (11, true)] {
        let mut client = Frames::open(server.address());
        let head = [GET, &field("x", "y").repeat(count)].concat();
        client.send(HEADERS, END_STREAM | END_HEADERS, 1, &head);
        let answer = client.wait(&[HEADERS]).expect("an answer");
        // `:status: 431`, in HPACK.
        assert_eq!(answer.payload.starts_with(b"\x48\x83\x69\x90\xff"), refused, "{count}: {answer:?}");
    }
}

#[test]
fn floods_of_control_frames_close_connection() {
    let server = Server::start(&[]);
    let floods: [(&str, u8, u32, &[u8]); 8] = [
        ("PING", PING, 0, b"12345678"),
        ("SETTINGS", SETTINGS, 0, b""),
        ("SETTINGS with a window", SETTINGS, 0, &[0, 4, 0, 0, 255, 255]),
        ("PRIORITY", PRIORITY, 1, &[0, 0, 0, 3, 1]),
        ("WINDOW_UPDATE of the connection", WINDOW_UPDATE, 0, &[0, 0, 0, 1]),
        ("WINDOW_UPDATE of a stream", WINDOW_UPDATE, 1, &[0, 0, 0, 1]),
        ("empty DATA", DATA, 1, b""),
        ("a kind that nobody knows", 0xbe, 0, b""),
    ];
    thread::scope(|scope| {
        for (about, kind, stream, payload) in floods {
            let server = &server;
            scope.spawn(move || {
                let mut client = Frames::open(server.address());
                client.send(HEADERS, END_HEADERS, 1, PUT);
                client.send_many(kind, 0, stream, payload, 100_000);
                println!("{about} ended with {:?}", client.ended());
            });
        }
    });
    counts(&server, FRAMES_EXCEEDED, 8.0);
    Connection::open(server.address()).ask("GET", "/v1/never", b"").says(404, "no such key");
}

#[test]
fn control_frames_of_requests_close_nothing() {
    let server = Server::start(&["--http2-max-control-frames", "10"]);
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", &vec![b'x'; 1 << 20]).status, 201);
    let mut client = Frames::open(server.address());
    for stream in (1..60).step_by(2) {
        client.send(HEADERS, END_STREAM | END_HEADERS, stream, GET);
        client.send(PRIORITY, 0, stream, &[0, 0, 0, 0, 1]);
        let mut received = 0;
        while received < 1 << 20 {
            let frame = client.wait(&[DATA]).expect("it is not closed");
            received += frame.payload.len();
            let more = u32::try_from(frame.payload.len()).expect("a frame is short").to_be_bytes();
            if !frame.payload.is_empty() {
                client.send(WINDOW_UPDATE, 0, 0, &more);
                client.send(WINDOW_UPDATE, 0, stream, &more);
            }
        }
    }
}
