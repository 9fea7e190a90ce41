//! The pair in `deploy/pair`: two servers behind the proxy that is configured there, which finds the primary.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::Log;
use crate::support::events::Events;
use crate::support::readiness::{WELL, becomes_ready};
use crate::support::server::{PATIENCE, Process};
use crate::support::wire::{Connection, Response};

/// Repeats an idempotent request on new connections until it succeeds.
fn until_done(address: SocketAddr, method: &str, body: &[u8]) -> Response {
    let begun = Instant::now();
    loop {
        let answer = Connection::try_open(address).and_then(|mut proxy| proxy.try_ask(method, "/v1/a", body));
        match answer {
            Ok(done) if done.status < 300 => return done,
            last => assert!(begun.elapsed() < PATIENCE, "{method} is never done, but {last:?}"),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Opens a watch, with retries: a proxy that was just started treats all servers as primary until its first check.
fn watch_through(address: SocketAddr, target: &str) -> Events {
    let begun = Instant::now();
    loop {
        match Connection::try_open(address).and_then(|proxy| Events::over(proxy, target, &[])) {
            Ok(Ok(events)) => return events,
            Ok(Err(refused)) => assert!(begun.elapsed() < PATIENCE, "{refused:?}"),
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
        }
        thread::sleep(Duration::from_millis(10));
    }
}

pub fn proxy_finds_primary(log: &Log) {
    let servers = [log.start(&["--standby"]), log.stand_by(&[])];
    // An address that no other test uses.
    let free = TcpListener::bind("127.0.0.7:0").and_then(|listener| listener.local_addr()).expect("a port is free");
    let mut proxy = Command::new("haproxy");
    proxy.arg("-f").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/pair/haproxy.cfg"));
    proxy.env("PROXY", free.to_string());
    for (number, server) in servers.iter().enumerate() {
        let name = format!("SERVER_{}", number + 1);
        proxy.env(format!("{name}_ADMIN"), server.admin().port().to_string()).env(name, server.address().to_string());
    }
    let _proxy = Process::spawn(proxy);
    let begun = Instant::now();
    while Connection::try_open(free).is_err() {
        assert!(begun.elapsed() < PATIENCE, "the proxy does not listen");
        thread::sleep(Duration::from_millis(20));
    }

    assert_eq!(until_done(free, "PUT", b"1").etag(), Some(1));
    let mut watch = watch_through(free, "/v1?watch");
    let [primary, standby] = servers;
    primary.signal(Signal::KILL);
    primary.ends();
    let written = until_done(free, "PUT", b"2");
    assert_eq!((written.status, written.etag()), (201, Some(2)));
    assert_eq!(until_done(free, "GET", b"").text(), "2");
    becomes_ready(&standby, 200, WELL);
    // The watch was from the killed server; the client resumes at its position.
    assert!(!matches!(watch.try_next(), Ok(Some(_))), "that server is gone");
    let mut watch = watch_through(free, &format!("/v1?watch&since={}", watch.begin));
    assert_eq!(watch.next().expect("it continues").id, 2);
}
