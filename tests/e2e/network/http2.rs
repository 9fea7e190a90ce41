//! HTTP/2: over TLS by ALPN, on plain connections by prior knowledge; its limits, and attacks on it.
//!
//! Frames are made by hand where a library would not send them.

mod half_close;
mod messages;

use std::collections::BTreeSet;
use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::http_clients::curl;
use crate::support::http2::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, Frame, Frames, GET, GOAWAY, HEADERS, PING,
    PUT, RST_STREAM, SETTINGS, WINDOW_UPDATE, goes_on_with_headers, takes_back, takes_nothing,
};
use crate::support::memory::memory;
use crate::support::metrics::until;
use crate::support::server::{PATIENCE, Server};
use crate::support::wire::Connection;

fn is_served(server: &Server) {
    Connection::open(server.address()).ask("GET", "/v1/never", b"").says(404, "no such key");
}

#[test]
fn session_with_prior_knowledge_works() {
    let server = Server::start(&[]);
    let url = server.url("/v1/key-a");
    let ask = |args: &[&str]| curl(&[&["--http2-prior-knowledge"], args, &[&url]].concat());
    let (status, answer) = ask(&["-i", "-X", "PUT", "-d", "Hello, key-value store!"]);
    let answer = String::from_utf8_lossy(&answer);
    assert!(status == 201 && answer.starts_with("HTTP/2 201 "), "{answer}");
    assert_eq!(ask(&[]), (200, b"Hello, key-value store!".to_vec()));
    // From the guest, and from the cache.
    for _ in 0..2 {
        let (status, head) = ask(&["--head"]);
        assert!(status == 200 && String::from_utf8_lossy(&head).contains("content-length: 23\r\n"));
    }
    assert_eq!(ask(&["-X", "DELETE"]), (200, vec![]));
    assert_eq!(ask(&[]), (404, b"no such key\n".to_vec()));
}

#[test]
fn preface_can_arrive_byte_by_byte() {
    let server = Server::start(&[]);
    let mut one = Connection::open(server.address());
    for byte in b"PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 0\r\n\r\n" {
        one.send([*byte]);
    }
    assert_eq!(one.read().status, 201);
    let mut two = Frames { stream: TcpStream::connect(server.address()).expect("the server listens") };
    two.stream.set_nodelay(true).expect("a connection");
    for byte in b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" {
        two.stream.write_all(&[*byte]).expect("it is taken");
    }
    assert!(two.send(SETTINGS, 0, 0, b"") && two.send(HEADERS, END_STREAM | END_HEADERS, 1, GET));
    let answer = two.wait(&[HEADERS]).expect("an answer");
    // `:status: 200`, in HPACK.
    assert_eq!((answer.stream, answer.flags & END_HEADERS, answer.payload[0]), (1, END_HEADERS, 0x88));
}

#[test]
fn silent_client_is_disconnected() {
    let server = Server::start(&["--header-timeout", "300ms"]);
    // Nothing, half a preface, no request, half a request.
    assert_eq!(Connection::open(server.address()).end(), "");
    let mut half = Connection::open(server.address());
    half.send("PRI * HTTP");
    half.end();
    assert_eq!(Frames::open(server.address()).ended(), Some(0));
    let mut half = Frames::open(server.address());
    half.send(HEADERS, END_STREAM, 1, GET);
    half.ended();
    is_served(&server);
}

#[test]
fn request_in_flight_finishes_after_sigterm() {
    let server = Server::start(&[]);
    let mut client = Frames::open(server.address());
    client.send(HEADERS, END_HEADERS, 1, PUT);
    client.send(DATA, 0, 1, b"half");
    client.send(PING, 0, 0, b"received");
    client.wait(&[PING]).expect("it is there");
    server.signal(Signal::TERM);
    let away = client.wait(&[GOAWAY]).expect("it says that it goes");
    assert_eq!(away.error(), 0);
    client.send(DATA, END_STREAM, 1, b" whole");
    let answer = client.wait(&[HEADERS]).expect("an answer");
    // `:status: 201`, with the name from the table.
    assert!(answer.payload.starts_with(b"\x48") || answer.payload.windows(3).any(|text| text == b"201"), "{answer:?}");
    client.ended();
    let server = server.ends_well().restart(&[]);
    assert_eq!(Connection::open(server.address()).ask("GET", "/v1/a", b"").body, b"half whole");
}

#[test]
fn settings_announce_max_concurrent_streams() {
    let server = Server::start(&["--http2-max-streams", "3"]);
    let mut client = Frames::open(server.address());
    let settings = client.wait(&[SETTINGS]).expect("its settings");
    let announced = settings.payload.chunks(6).find(|setting| setting[..2] == [0, 3]).expect("MAX_CONCURRENT_STREAMS");
    assert_eq!(announced[2..], [0, 0, 0, 3]);
    for stream in [1, 3, 5, 7] {
        client.send(HEADERS, END_HEADERS, stream, PUT);
    }
    // REFUSED_STREAM: it can be retried.
    let refused = client.wait(&[RST_STREAM, GOAWAY]).expect("one too many is refused");
    assert_eq!((refused.kind, refused.stream, refused.error()), (RST_STREAM, 7, 7));
    until(&server, "it is counted", |now| now.get("kvs_limit_exceeded_total{limit=\"http2-max-streams\"}") == 1.0);
    client.send(DATA, END_STREAM, 1, b"value");
    assert_eq!(client.wait(&[HEADERS]).expect("an answer").stream, 1);
}

#[test]
fn too_many_headers_are_431() {
    let server = Server::start(&["--max-header-bytes", "8KiB"]);
    let large = format!("x-large: {}", "x".repeat(9_000));
    let (status, _) = curl(&["--http2-prior-knowledge", "-H", &large, &server.url("/v1/a")]);
    assert_eq!(status, 431);
}

/// Twenty times at once: the connection of each is held for a second.
fn at_once(attack: impl Fn() + Sync) {
    thread::scope(|scope| (0..20).for_each(|_| drop(scope.spawn(&attack))));
}

#[test]
fn rapid_resets_close_connection() {
    let server = Server::start(&[]);
    is_served(&server);
    let before = memory(&server);
    at_once(|| {
        let reason = takes_back(&server, 10_000);
        assert!(reason.is_none_or(|reason| reason == ENHANCE_YOUR_CALM), "{reason:?}");
        is_served(&server);
    });
    let after = memory(&server);
    assert!(after < before + (32 << 10), "{before} KiB grew to {after} KiB");
}

#[test]
fn endless_headers_close_connection() {
    let server = Server::start(&[]);
    is_served(&server);
    let before = memory(&server);
    at_once(|| {
        let sent = goes_on_with_headers(&server, 1_000);
        assert!(sent < 1_000, "all was taken");
        is_served(&server);
    });
    let after = memory(&server);
    assert!(after < before + (32 << 10), "{before} KiB grew to {after} KiB");
}

#[test]
fn empty_data_frames_are_harmless() {
    let server = Server::start(&["--request-timeout", "1s"]);
    let mut client = Frames::open(server.address());
    client.send(HEADERS, END_HEADERS, 1, PUT);
    while client.send(DATA, 0, 1, b"") {
        client.stream.set_read_timeout(Some(Duration::from_millis(1))).expect("the time is not zero");
        // The server rejects it after a while; until then it gets empty frames.
        let mut byte = [0];
        if client.stream.peek(&mut byte).is_ok_and(|seen| seen > 0) {
            client.stream.set_read_timeout(Some(PATIENCE)).expect("the time is not zero");
            match client.wait(&[HEADERS, RST_STREAM, GOAWAY]) {
                Some(_) | None => break,
            }
        }
    }
    is_served(&server);
}

#[test]
fn client_that_reads_no_responses_is_disconnected() {
    let server = Server::start(&["--idle-timeout", "300ms"]);
    let value = vec![b'x'; 1 << 20];
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", &value).status, 201);
    takes_nothing(&server, 50).ended();
    is_served(&server);
}

/// Number of streams that a client opened, ten at a time, of those with a response, and the last accepted stream.
fn puts_until_the_end(server: &Server, client: usize, answered: &AtomicUsize) -> (Vec<u32>, BTreeSet<u32>, u32) {
    let mut frames = Frames::open(server.address());
    let (mut opened, mut done, mut last) = (Vec::new(), BTreeSet::new(), None);
    loop {
        while last.is_none() && opened.len() < done.len() + 10 {
            let stream = 2 * opened.len() as u32 + 1;
            let path = format!("/v1/{client}-{stream}");
            let head = [b"\x02\x03PUT\x86\x04", &[path.len() as u8][..], path.as_bytes(), b"\x41\x03kvs"].concat();
            frames.send(HEADERS, END_HEADERS, stream, &head);
            frames.send(DATA, END_STREAM, stream, b"x");
            opened.push(stream);
        }
        match frames.wait(&[HEADERS, PING, GOAWAY]) {
            Some(Frame { kind: HEADERS, stream, .. }) => {
                done.insert(stream);
                answered.fetch_add(1, Ordering::Relaxed);
            }
            Some(Frame { kind: PING, flags, payload, .. }) if flags & ACK == 0 => {
                frames.send(PING, ACK, 0, &payload);
            }
            Some(frame) if frame.kind == GOAWAY => {
                assert_eq!(frame.error(), 0, "it goes in peace");
                last = Some(u32::from_be_bytes(frame.payload[..4].try_into().expect("four bytes")));
            }
            Some(_) => {}
            None => return (opened, done, last.expect("it said that it goes")),
        }
    }
}

#[test]
fn graceful_stop_answers_every_accepted_stream() {
    const CLIENTS: usize = 8;
    let server = Server::start(&[]);
    let answered = AtomicUsize::new(0);
    let clients: Vec<_> = thread::scope(|scope| {
        let (server, answered) = (&server, &answered);
        let threads: Vec<_> =
            (0..CLIENTS).map(|client| scope.spawn(move || puts_until_the_end(server, client, answered))).collect();
        while answered.load(Ordering::Relaxed) < 50 * CLIENTS {
            thread::yield_now();
        }
        server.signal(Signal::TERM);
        threads.into_iter().map(|thread| thread.join().expect("a client sees what it is to see")).collect()
    });
    let server = server.ends_well().restart(&[]);
    let mut connection = Connection::open(server.address());
    for (client, (opened, done, last)) in clients.iter().enumerate() {
        let unanswered: Vec<_> = opened.iter().filter(|stream| *stream <= last && !done.contains(stream)).collect();
        assert!(unanswered.is_empty(), "{unanswered:?} were taken, up to {last}, and not answered");
        for stream in done {
            let path = format!("/v1/{client}-{stream}");
            assert_eq!(connection.ask("GET", &path, b"").body, b"x", "{path} was acknowledged and is gone");
        }
    }
}

#[test]
fn connection_with_many_streams_gets_fair_share() {
    let server = Server::start(&["--access-log-rate", "1000"]);
    let mut client = Connection::open(server.address());
    let put = |n| format!(r#"{{"op": "put", "key": "{{all}}{n}", "value": "{:01000}"}}"#, 0);
    let puts: Vec<_> = (0..900).map(put).collect();
    assert_eq!(client.ask("POST", "/v1", format!("[{}]", puts.join(",")).as_bytes()).status, 200);
    let mut many = Frames::open(server.address());
    // `:method: HEAD`: the work of a list, without its body.
    for stream in (1..200).step_by(2) {
        let head = b"\x02\x04HEAD\x86\x04\x0f/v1?values=true\x41\x03kvs";
        assert!(many.send(HEADERS, END_STREAM | END_HEADERS, stream, head));
    }
    // By now the other responses are there too.
    assert!(many.wait(&[HEADERS]).is_some());
    (0..5).for_each(|_| assert_eq!(client.ask("GET", "/v1/never", b"").status, 404));
    for _ in 0..99 {
        assert!(many.wait(&[HEADERS]).is_some());
    }
    drop(many);
    let lines = server.terminate().stderr().to_vec();
    let answered: Vec<_> = lines.iter().filter(|line| line.contains("request") && line.contains("/v1")).collect();
    let place = answered.iter().rposition(|line| line.contains("/v1/never")).expect("it was answered");
    assert!(answered.len() > 100 && place < 50, "the fifth request was number {place} of {}", answered.len());
}

#[test]
fn invalid_frames_close_connection() {
    let server = Server::start(&[]);
    let cases: [(&str, u8, u8, u32, &[u8]); 8] = [
        ("DATA of no stream", DATA, 0, 0, b"x"),
        ("DATA of a stream that is not open", DATA, 0, 1, b"x"),
        ("HEADERS of a stream of the server", HEADERS, END_STREAM | END_HEADERS, 2, GET),
        ("HEADERS that are no HPACK", HEADERS, END_STREAM | END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff\xff"),
        ("SETTINGS of a broken length", SETTINGS, 0, 0, b"12345"),
        ("WINDOW_UPDATE of nothing", WINDOW_UPDATE, 0, 0, &[0, 0, 0, 0]),
        ("PING of a broken length", PING, 0, 0, b"short"),
        ("CONTINUATION of nothing", CONTINUATION, END_HEADERS, 1, GET),
    ];
    for (about, kind, flags, stream, payload) in cases {
        let mut client = Frames::open(server.address());
        client.send(kind, flags, stream, payload);
        let reason = client.ended();
        assert!(reason.is_some_and(|reason| reason != 0), "{about}: {reason:?}");
    }
    is_served(&server);
}
