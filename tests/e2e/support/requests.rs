//! Single requests, each on a connection of its own.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use super::server::{PATIENCE, Server};
use super::wire::{Connection, STALE};

pub fn put(server: &Server, key: &str, value: &str) -> u16 {
    Connection::open(server.address()).ask("PUT", &format!("/v1/{key}"), value.as_bytes()).status
}

pub fn get(server: &Server, key: &str) -> (u16, String) {
    let answer = Connection::open(server.address()).ask("GET", &format!("/v1/{key}"), b"");
    (answer.status, answer.text().to_owned())
}

pub fn get_stale(server: &Server, key: &str) -> (u16, String) {
    let answer = Connection::open(server.address()).ask_with("GET", &format!("/v1/{key}"), &STALE, b"");
    (answer.status, answer.text().to_owned())
}

/// Waits until a stale read returns this.
pub fn shows(server: &Server, key: &str, status: u16, value: &str) {
    let begun = Instant::now();
    loop {
        let (now, shown) = get_stale(server, key);
        if now == status && (status != 200 || shown == value) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{key} is not {status} {value:?}, but {now} {shown:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a request on a new connection, and does not wait for the response.
pub fn send(server: &Server, request: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.address()).expect("the system accepts connections");
    let length = body.len();
    let request =
        format!("{request} HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).expect("the system takes it");
    stream
}

/// The response, as far as it was received.
pub fn answer(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket has a timeout");
    let mut answer = Vec::new();
    // A connection that is reset has none.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// Reads the key until it does not exist. Each response must be the value or 404.
#[track_caller]
pub fn expires(client: &mut Connection, path: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let got = client.ask("GET", path, b"");
        if got.status == 404 {
            return got.says(404, "no such key");
        }
        assert_eq!((got.status, got.text()), (200, "value"));
        assert!(got.header("expires").is_some());
        assert!(Instant::now() < deadline, "{path} does not expire");
    }
}
