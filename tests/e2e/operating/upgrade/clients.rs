//! Clients that honour `Connection: close` and GOAWAY. None of their requests may fail.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{self, SendRequest};
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::runtime::Builder;

use crate::support::wire::{Connection, Response, Stream, Way};

/// Counters of all clients.
#[derive(Default)]
pub struct Tally {
    pub requests: AtomicUsize,
    pub closed: AtomicUsize,
    pub watches: AtomicUsize,
}

/// Writes and reads its own key over HTTP/1.1 until it is over. Returns the sequences of its writes.
pub fn http1(way: &Way, address: SocketAddr, number: usize, over: &AtomicBool, tally: &Tally) -> Vec<u64> {
    let open = || way.try_open(address).unwrap_or_else(|error| panic!("a connection is refused: {error}"));
    let (mut connection, path) = (open(), format!("/v1/http1-{number}"));
    let mut written = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let value = written.len().to_string();
        let put = connection.ask("PUT", &path, value.as_bytes());
        assert_eq!(put.status, 201, "{}", put.text());
        written.push(put.etag().expect("a PUT is answered with its sequence"));
        keep(&mut connection, &put, open, tally);
        let got = connection.ask("GET", &path, b"");
        assert_eq!((got.status, got.text()), (200, &*value));
        keep(&mut connection, &got, open, tally);
    }
    written
}

fn keep<S>(connection: &mut S, response: &Response, open: impl Fn() -> S, tally: &Tally) {
    tally.requests.fetch_add(1, Ordering::Relaxed);
    if response.header("connection") == Some("close") {
        tally.closed.fetch_add(1, Ordering::Relaxed);
        *connection = open();
    }
}

/// As `http1`, over HTTP/2.
pub fn http2(address: SocketAddr, over: &AtomicBool, tally: &Tally) -> Vec<u64> {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (mut sender, mut written) = (connect(address).await, Vec::new());
        while !over.load(Ordering::Relaxed) {
            let value = written.len().to_string();
            let put = ask(&mut sender, address, "PUT", &value, tally).await;
            assert_eq!(put.0, StatusCode::CREATED, "{:?}", put.1);
            written.push(put.2.expect("a PUT is answered with its sequence"));
            let got = ask(&mut sender, address, "GET", "", tally).await;
            assert_eq!((got.0, &*got.1), (StatusCode::OK, value.as_bytes()));
        }
        written
    })
}

async fn connect(address: SocketAddr) -> SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(address).await.expect("no connection is refused");
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (sender, connection) = handshake.expect("HTTP/2 is spoken");
    tokio::spawn(connection);
    sender
}

/// Sends the request on this connection, or on a new one if the server sent GOAWAY before it accepted the request.
async fn ask(
    sender: &mut SendRequest<Full<Bytes>>,
    address: SocketAddr,
    method: &str,
    value: &str,
    tally: &Tally,
) -> (StatusCode, Bytes, Option<u64>) {
    loop {
        let request = Request::builder().method(method).uri(format!("http://{address}/v1/http2"));
        let request = request.body(Full::from(value.to_owned())).expect("a request");
        if sender.ready().await.is_ok() {
            match sender.send_request(request).await {
                Ok(response) => {
                    tally.requests.fetch_add(1, Ordering::Relaxed);
                    let etag = response
                        .headers()
                        .get("etag")
                        .and_then(|etag| etag.to_str().ok()?.trim_matches('"').parse().ok());
                    let status = response.status();
                    let body = response.into_body().collect().await.expect("the body is whole").to_bytes();
                    return (status, body, etag);
                }
                Err(error) => assert!(is_unprocessed(&error), "{method} failed: {error:?}"),
            }
        }
        tally.closed.fetch_add(1, Ordering::Relaxed);
        *sender = connect(address).await;
    }
}

/// Whether the request was not accepted, after a GOAWAY without an error.
fn is_unprocessed(error: &hyper::Error) -> bool {
    let h2 = error.source().and_then(|source| source.downcast_ref::<h2::Error>());
    error.is_canceled() || h2.is_some_and(|h2| h2.is_go_away() && h2.reason() == Some(h2::Reason::NO_ERROR))
}

/// Key whose write ends the watch.
pub const END: &str = "end";

/// Watches all keys until the write that ends it, and resumes by position. Returns the sequences.
pub fn watch(way: &Way, address: SocketAddr, over: &AtomicBool, tally: &Tally) -> Vec<u64> {
    let (mut seen, mut after) = (Vec::new(), 0);
    loop {
        tally.watches.fetch_add(1, Ordering::Relaxed);
        let mut connection = way.try_open(address).unwrap_or_else(|error| panic!("a connection is refused: {error}"));
        let head = connection.try_ask_for_head("GET", &format!("/v1?watch&since={after}"), &[]);
        let head = head.expect("a watch begins");
        assert_eq!(head.status, 200);
        let mut length = head.header("content-length").map(|length| length.parse().expect("a number"));
        let mut rest = String::new();
        while let Some(chunk) = chunk(&mut connection, &mut length) {
            rest += &chunk;
            while let Some((block, later)) = rest.split_once("\n\n") {
                if block == ":" && over.load(Ordering::Relaxed) {
                    // Something else failed.
                    return seen;
                }
                let is_event = block.contains("event: ");
                let is_end = is_event && block.contains(&format!("\"key\":\"{END}\""));
                if is_end {
                    return seen;
                }
                if let Some(id) = block.lines().find_map(|line| line.strip_prefix("id: ")) {
                    let id = id.parse().expect("a sequence");
                    assert!(id >= after + u64::from(is_event), "{id} comes after {after}");
                    after = id;
                    seen.extend(is_event.then_some(id));
                }
                rest = later.to_owned();
            }
        }
        assert_eq!(rest, "", "a watch ends within an event");
    }
}

/// The next chunk of a watch. One that the old process has forwarded is a single chunk of known length.
fn chunk(connection: &mut Connection<Box<dyn Stream>>, length: &mut Option<usize>) -> Option<String> {
    let bytes = match length {
        None => connection.try_chunk().expect("a watch ends in good order")?,
        Some(0) => return None,
        Some(left) => connection.try_read_exact(std::mem::take(left)).expect("the body is whole"),
    };
    Some(String::from_utf8(bytes).expect("text"))
}
