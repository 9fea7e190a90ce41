//! Stops of a server: graceful, immediate, and during the start.

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::guests::guest;
use crate::support::log::kvs_at;
use crate::support::server::{PATIENCE, Process, Server, serve};
use crate::support::wire::Connection;

/// A request in flight: its head was read, its body is incomplete.
fn in_flight(server: &Server) -> Connection {
    let mut client = Connection::open(server.address());
    client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\nexpect: 100-continue\r\ncontent-length: 10\r\n\r\n");
    assert_eq!(client.read().status, 100);
    client.send("half");
    client
}

fn a_request_in_flight_is_finished_after(signal: Signal) {
    let server = Server::start(&[]);
    let mut client = in_flight(&server);
    server.signal(signal);
    server.says("stopping: finishing requests in progress");
    assert!(client.is_silent_for(Duration::from_millis(200)), "the server did not wait for the rest of the body");

    client.send(" whole");
    assert_eq!(client.read().status, 201);
    assert_eq!(client.end(), "");
    let server = server.ends_well().restart(&[]);
    assert_eq!(Connection::open(server.address()).ask("GET", "/v1/a", b"").body, b"half whole");
}

#[test]
fn sigterm_finishes_requests_in_flight_and_exits_0() {
    a_request_in_flight_is_finished_after(Signal::TERM);
}

#[test]
fn sigint_finishes_requests_in_flight_and_exits_0() {
    a_request_in_flight_is_finished_after(Signal::INT);
}

/// A service manager that reads nothing, and whose socket holds no more.
#[test]
fn full_queue_of_service_manager_delays_neither_start_nor_stop() {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let (_manager, server) = busy_manager(&directory);
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", b"1").status, 201);
    server.terminate();
}

#[test]
fn report_is_repeated_until_service_manager_has_space() {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let (manager, server) = busy_manager(&directory);
    // The report is the last step of a start.
    server.says("serving on ");
    let reported = || {
        let mut bytes = [0; 512];
        let length = manager.recv(&mut bytes).expect("something is reported");
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    };
    let first = std::iter::repeat_with(reported).find(|report| !report.starts_with("STATUS=busy"));
    assert_eq!(first, Some(format!("READY=1\nMAINPID={}\n", server.pid())));
    server.terminate();
    assert_eq!(reported(), "STOPPING=1\n");
}

/// Starts a server whose service manager reads nothing, and has no space for another report.
fn busy_manager(directory: &TempDir) -> (UnixDatagram, Server) {
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).expect("it can be bound");
    manager.set_read_timeout(Some(PATIENCE)).expect("the time is not zero");
    let other = UnixDatagram::unbound().expect("there is a socket");
    other.connect(&path).expect("it is bound");
    other.set_nonblocking(true).expect("a socket can be");
    while other.send(b"STATUS=busy\n").is_ok() {}
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.env("NOTIFY_SOCKET", &path);
    (manager, Server::spawn(command, data))
}

#[test]
fn idle_connections_do_not_delay_stop() {
    let server = Server::start(&["--drain-timeout", "1h", "--idle-timeout", "1h"]);
    let mut idle = Connection::open(server.address());
    idle.ask("GET", "/v1/a", b"").says(404, "no such key");
    server.terminate();
    assert_eq!(idle.end(), "");
}

#[test]
fn unfinished_request_is_closed_at_drain_timeout() {
    let server = Server::start(&["--drain-timeout", "300ms", "--request-timeout", "1h"]);
    let mut client = in_flight(&server);
    let stopped = server.terminate();
    let said = stopped.stderr().join("\n");
    assert!(said.contains("1 connections were cut off after 300ms"), "{said}");
    assert_eq!(client.end(), "");
}

#[test]
fn incomplete_request_head_does_not_delay_stop() {
    let server = Server::start(&["--drain-timeout", "1h", "--idle-timeout", "1h", "--header-timeout", "1h"]);
    let mut first = Connection::open(server.address());
    first.send("GET /v1/a HTTP/1.1\r\nhost: ");
    let mut second = Connection::open(server.address());
    second.ask("GET", "/v1/a", b"").says(404, "no such key");
    second.send("GET /v1/a HTTP/1.1\r\nhost: ");
    let mut http2 = Connection::open(server.address());
    http2.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    let stopped = server.terminate();
    let lines = stopped.stderr().join("\n");
    assert!(!lines.contains("cut off"), "{lines}");
    for client in [&mut first, &mut second] {
        assert_eq!(client.end(), "");
    }
}

#[test]
fn finished_connections_do_not_count_as_closed_by_stop() {
    let args = ["--drain-timeout", "10s", "--request-timeout", "1h", "--min-body-rate", "1"];
    let server = Server::start(&args);
    // Half of each body, which keeps to the minimum rate for minutes.
    let begin = || {
        let mut client = Connection::open(server.address());
        client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\nexpect: 100-continue\r\ncontent-length: 1000\r\n\r\n");
        assert_eq!(client.read().status, 100);
        client.send([b'x'; 500]);
        client
    };
    let mut clients = [begin(), begin(), begin()];
    server.signal(Signal::TERM);
    server.says("stopping: finishing requests in progress");
    clients[0].send([b'x'; 500]);
    assert_eq!(clients[0].read().status, 201);
    let stopped = server.ends_well();
    let lines = stopped.stderr().join("\n");
    assert!(lines.contains("2 connections were cut off after 10s"), "{lines}");
}

#[test]
fn second_signal_stops_at_once() {
    let server = Server::start(&["--drain-timeout", "1h", "--request-timeout", "1h"]);
    let _client = in_flight(&server);
    server.signal(Signal::TERM);
    server.says("stopping: finishing requests in progress");
    server.signal(Signal::TERM);
    let (status, stopped) = server.ends();
    assert_eq!(status.code(), Some(1), "{}", stopped.stderr().join("\n"));
}

#[test]
fn start_and_stop_are_logged_in_one_line_each() {
    let server = Server::start(&[]);
    let (address, data) = (server.address(), server.data().display().to_string());
    Connection::open(address).ask("PUT", "/v1/a", b"");
    let stopped = server.terminate().restart(&[]).terminate();
    let lines = stopped.stderr();
    // A log in NATS has a line of its own before.
    let (start, stop) = (lines.iter().find(|line| line.contains(" serving on ")), lines.last());
    let (Some(start), Some(stop)) = (start, stop) else { panic!("{}", lines.join("\n")) };
    let has = |line: &str, expected: &[&str]| expected.iter().all(|text| line.contains(text));
    assert!(
        has(start, &["serving on http://127.0.0.1:", &data, "kvs", "version=\"0.1.0\"", "entries=1", "took="]),
        "{start}"
    );
    assert!(has(stop, &["stopped serving on http://127.0.0.1:", &data, "kvs", "sequence=1"]), "{stop}");
}

#[test]
fn sigterm_during_start_exits_0() {
    // A start that does not finish, and reports when it is in progress.
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(["--guest-config", "fault=describe-loops-aloud", "--guest-cpu-limit", "1h"]).arg(guest());
    let mut process = Process::spawn(command);
    let going = process.stderr.find(|line| line.contains("going round in circles").then_some(()));
    going.unwrap_or_else(|said| panic!("it ended before the signal:\n{said}"));

    process.signal(Signal::TERM);
    let status = process.wait();
    assert_eq!(status.code(), Some(0), "{status}");
}

#[test]
fn sigterm_during_replay_exits_0_and_loses_nothing() {
    let server = Server::start(&[guest()]);
    assert_eq!(Connection::open(server.address()).ask("PUT", "/store/a", b"value").status, 201);
    let stopped = server.kill();

    let mut command = serve(stopped.data());
    command.args(["--guest-config", "fault=apply-loops-aloud", "--guest-replay-cpu-limit", "1h"]).arg(guest());
    let mut process = Process::spawn(command);
    let going = process.stderr.find(|line| line.contains("going round in circles").then_some(()));
    going.unwrap_or_else(|said| panic!("it ended before the signal:\n{said}"));
    process.signal(Signal::TERM);
    assert_eq!(process.wait().code(), Some(0));

    let server = stopped.restart(&[guest()]);
    assert_eq!(Connection::open(server.address()).ask("GET", "/store/a", b"").body, b"value");
}

#[test]
fn server_restarts_at_same_address() {
    // An address that no other test uses, so that nobody takes the port meanwhile.
    let on = |address: &str, data: TempDir| {
        let mut command = kvs_at(data.path());
        command.args(["serve", "--listen", address]);
        Server::spawn(command, data)
    };
    let server = on("127.0.0.2:0", TempDir::new().expect("a temporary directory can be made"));
    let address = server.address().to_string();
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"value").status, 201);
    // The server closes first, so its end of the connection stays in TIME_WAIT.
    let stopped = server.terminate();
    assert_eq!(client.end(), "");

    let server = on(&address, stopped.into_data());
    assert_eq!(Connection::open(server.address()).ask("GET", "/v1/a", b"").body, b"value");
}

#[test]
fn no_acknowledged_request_is_closed_by_stop_under_load() {
    const CLIENTS: usize = 16;
    let server = Server::start(&[]);
    let acknowledged = AtomicUsize::new(0);
    let load = &|client: usize| {
        let mut keys = Vec::new();
        let mut connection = Connection::open(server.address());
        loop {
            let path = format!("/v1/{client}-{}", keys.len());
            match connection.try_ask("PUT", &path, b"value") {
                Ok(response) => assert_eq!(response.status, 201, "{}", response.text()),
                Err(error) => return (keys, error.to_string()),
            }
            keys.push(path);
            acknowledged.fetch_add(1, Ordering::Relaxed);
        }
    };
    let clients: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..CLIENTS).map(|client| scope.spawn(move || load(client))).collect();
        while acknowledged.load(Ordering::Relaxed) < 20 * CLIENTS {
            thread::yield_now();
        }
        server.signal(Signal::TERM);
        threads.into_iter().map(|thread| thread.join().expect("a client sees what it is to see")).collect()
    });
    for (_, error) in &clients {
        // Between two requests: no byte of a response was received.
        let between = ["ended after \"\"", "reset by peer", "Broken pipe"];
        assert!(between.iter().any(|end| error.contains(end)), "cut off in mid-answer: {error}");
    }
    let server = server.ends_well().restart(&[]);
    let mut connection = Connection::open(server.address());
    for path in clients.iter().flat_map(|(keys, _)| keys) {
        assert_eq!(connection.ask("GET", path, b"").body, b"value", "{path} was acknowledged and is gone");
    }
}
