//! Clients that close their side of the connection after their requests: each complete request is answered, and then the connection
//! ends.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Arc;

use crate::support::certificates::{Authority, Kind};
use crate::support::http2::{
    DATA, END_HEADERS, END_STREAM, Frames, GET, GOAWAY, HEADERS, PUT, RST_STREAM, SETTINGS, WINDOW_UPDATE, field,
};
use crate::support::metrics::counts;
use crate::support::server::Server;
use crate::support::tls::{Client, connect};
use crate::support::wire::Connection;

/// Sends one request and closes the side of the client.
fn ask(server: &Server, head: &[u8], body: Option<&[u8]>) -> Frames {
    let mut client = Frames::open(server.address());
    let end = if body.is_none() { END_STREAM } else { 0 };
    client.send(HEADERS, END_HEADERS | end, 1, head);
    if let Some(body) = body {
        client.send(DATA, END_STREAM, 1, body);
    }
    client.stream.shutdown(Shutdown::Write).expect("it is connected");
    client
}

/// The head of a GET.
fn get(path: &str) -> Vec<u8> {
    [field(":method", "GET"), field(":scheme", "http"), field(":authority", "kvs"), field(":path", path)].concat()
}

/// Reads up to the end of the connection. Returns the status of the first response, and the bodies of the responses that ended.
fn responses<S: Read + Write>(mut client: Frames<S>) -> (u16, Vec<Vec<u8>>) {
    let (mut status, mut bodies, mut whole) = (None, BTreeMap::<_, Vec<u8>>::new(), Vec::new());
    while let Some(frame) = client.next() {
        match frame.kind {
            HEADERS => {
                status.get_or_insert_with(|| frame.status());
            }
            DATA => bodies.entry(frame.stream).or_default().extend(&frame.payload),
            RST_STREAM | GOAWAY => assert_eq!(frame.error(), 0, "{frame:?}"),
            _ => {}
        }
        if matches!(frame.kind, HEADERS | DATA) && frame.flags & END_STREAM != 0 {
            whole.push(bodies.remove(&frame.stream).unwrap_or_default());
        }
    }
    (status.expect("a response"), whole)
}

#[test]
fn complete_request_before_half_close_is_answered() {
    let server = Server::start(&[]);
    for _ in 0..30 {
        let (status, bodies) = responses(ask(&server, PUT, Some(b"value")));
        assert!((status == 201 || status == 200) && bodies.len() == 1, "{status} {bodies:?}");
        assert_eq!(responses(ask(&server, GET, None)), (200, vec![b"value".to_vec()]));
    }
    // What would not end is ended: a watch after its position, and a long poll.
    let (status, bodies) = responses(ask(&server, &get("/v1?watch"), None));
    assert!(status == 200 && bodies.len() == 1 && bodies[0].starts_with(b"id: "), "{status} {bodies:?}");
    assert_eq!(responses(ask(&server, &get("/v1/b?wait=300s"), None)), (404, vec![b"no such key\n".to_vec()]));
}

/// Asks often for a large value, more than sockets hold, and begins to read after its side is closed.
fn reads_late<S: Read + Write>(mut client: Frames<S>, close: impl FnOnce(&mut S)) {
    const TIMES: u32 = 16;
    // INITIAL_WINDOW_SIZE, and the window of the connection.
    client.send(SETTINGS, 0, 0, &[0, 4, 0, 64, 0, 0]);
    client.send(WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes());
    for stream in (1..2 * TIMES).step_by(2) {
        client.send(HEADERS, END_STREAM | END_HEADERS, stream, GET);
    }
    close(&mut client.stream);
    let (status, bodies) = responses(client);
    assert_eq!((status, bodies.len()), (200, TIMES as usize));
    assert!(bodies.iter().all(|body| body.len() == 1 << 20 && body.iter().all(|byte| *byte == b'x')));
}

#[test]
fn responses_that_wait_for_half_closed_client_are_whole() {
    let authority = Authority::new();
    let pair = authority.issue("server", Kind::Server, 1);
    let large = vec![b'x'; 1 << 20];
    let budget = ["--max-inflight-bytes", "256MiB"];

    let server = Server::start(&budget);
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", &large).status, 201);
    reads_late(Frames::open(server.address()), |stream| stream.shutdown(Shutdown::Write).expect("it is connected"));

    let server = Server::start(&[&budget[..], &["--tls-cert", &pair.certificate, "--tls-key", &pair.key]].concat());
    let client = Client::of(&authority);
    let mut one = client.open(server.address()).expect("a connection");
    assert_eq!(one.ask("PUT", "/v1/a", &large).status, 201);
    let mut config = client.config();
    Arc::make_mut(&mut config).alpn_protocols = vec![b"h2".to_vec()];
    let stream = connect(&config, server.address()).expect("a connection");
    reads_late(Frames::over(stream), |stream| {
        stream.conn.send_close_notify();
        stream.flush().expect("it is connected");
    });
}

#[test]
fn half_closed_client_is_disconnected() {
    let server = Server::start(&["--request-timeout", "300ms"]);
    // Nothing can be added to half a request.
    let mut half = Frames::open(server.address());
    half.send(HEADERS, END_HEADERS, 1, PUT);
    half.send(DATA, 0, 1, b"half");
    half.stream.shutdown(Shutdown::Write).expect("it is connected");
    assert_eq!(half.wait(&[HEADERS]).expect("a response").status(), 408);
    half.ended();
    // A watch without a window: its begin cannot be sent.
    let mut watch = Frames::open(server.address());
    watch.send(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
    watch.send(HEADERS, END_STREAM | END_HEADERS, 1, &get("/v1?watch"));
    watch.wait(&[HEADERS]).expect("a response");
    watch.stream.shutdown(Shutdown::Write).expect("it is connected");
    watch.ended();
    counts(&server, "kvs_watches", 0.0);
    counts(&server, "kvs_txlog_sequence", 0.0);
}
