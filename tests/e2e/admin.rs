//! The admin listener: alive and ready are told apart, and both are told when nothing else is.

use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::server::{Process, Server, kvs, refused, serve, serve_refused};
use crate::unruly::guest;
use crate::wire::{Connection, Response};

fn get(admin: SocketAddr, path: &str) -> Response {
    Connection::open(admin).ask("GET", path, b"")
}

/// `kvs health`, told where to ask by the variable that told the server.
fn health(admin: SocketAddr, args: &[&str]) -> Command {
    let mut command = kvs();
    command.arg("health").args(args).env("KVS_ADMIN", admin.to_string()).stdout(Stdio::piped());
    command
}

#[track_caller]
fn is_well(admin: SocketAddr, args: &[&str], told: &str) {
    let output = health(admin, args).output().expect("the binary under test can be started");
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), told);
}

#[test]
fn health_has_a_line_and_an_exit_code() {
    let server = Server::start(&["--admin", "0.0.0.0:0", "--tokens", "/dev/null"]);
    let admin = server.admin();
    // No token is asked for, and the address that was listened on will do.
    is_well(admin, &[], "ready\n");
    is_well(admin, &["--live"], "alive\n");
    drop(server);
    refused(health(admin, &[])).with(1, &["no response", &admin.to_string(), "--admin"]);
    refused(health(admin, &["--live"])).with(1, &["no response"]);
}

#[test]
fn a_server_that_serves_is_alive_and_ready() {
    let server = Server::start(&[]);
    get(server.admin(), "/livez").says(200, "ok");
    get(server.admin(), "/readyz")
        .says(200, "[+]log ok\n[+]guest ok\n[+]edge ok\n[+]clock ok\n[+]tasks ok\n[+]diagnostics ok");
    let mut client = Connection::open(server.admin());
    client.send("HEAD /readyz HTTP/1.1\r\nhost: kvs\r\n\r\n");
    assert_eq!(client.try_read(true).expect("HEAD is answered").status, 200);
}

#[test]
fn a_server_that_replays_is_alive_and_not_ready() {
    let server = Server::start(&[guest()]);
    assert_eq!(Connection::open(server.address()).ask("PUT", "/store/a", b"value").status, 201);
    let stopped = server.kill();

    let mut command = serve(stopped.data());
    command.args(["--guest-config", "fault=apply-loops-aloud", "--guest-replay-cpu-limit", "1h"]).arg(guest());
    let process = Process::spawn(command);
    let admin = process.admin();
    let going = process.stderr.find(|line| line.contains("going round in circles").then_some(()));
    going.unwrap_or_else(|said| panic!("it ended before it replayed:\n{said}"));
    get(admin, "/livez").says(200, "ok");
    get(admin, "/readyz")
        .says(503, "[+]log ok\n[-]guest replaying the log\n[-]edge not listening yet\n[+]tasks ok\n[+]diagnostics ok");
    refused(health(admin, &[])).with(1, &["kvs: not ready: ", "[-]guest replaying the log", "(503)"]);
    is_well(admin, &["--live"], "alive\n");
}

#[test]
fn a_server_that_stops_is_alive_and_not_ready() {
    let server = Server::start(&[]);
    let admin = server.admin();
    let mut client = Connection::open(server.address());
    client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\nexpect: 100-continue\r\ncontent-length: 10\r\n\r\n");
    assert_eq!(client.read().status, 100);
    server.signal(Signal::TERM);
    server.says("stopping: finishing what is under way");
    get(admin, "/livez").says(200, "ok");
    get(admin, "/readyz")
        .says(503, "[+]log ok\n[+]guest ok\n[-]edge stopping\n[+]clock ok\n[+]tasks ok\n[+]diagnostics ok");
    client.send("ten bytes.");
    assert_eq!(client.read().status, 201);
    server.ends_well();
}

#[test]
fn it_answers_while_the_guest_has_every_thread() {
    let data = tempfile::tempdir().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(["--guest-cpu-limit", "1h"]).arg(guest());
    // As on a machine with one core: the call below keeps the only thread that serves requests.
    command.env("TOKIO_WORKER_THREADS", "1");
    let server = Server::spawn(command, data);
    let mut client = Connection::open(server.address());
    client.send("GET /loop-aloud HTTP/1.1\r\nhost: kvs\r\n\r\n");
    server.says("going round in circles");
    get(server.admin(), "/livez").says(200, "ok");
    get(server.admin(), "/readyz")
        .says(200, "[+]log ok\n[+]guest ok\n[+]edge ok\n[+]clock ok\n[+]tasks ok\n[+]diagnostics ok");
    assert!(client.is_silent_for(Duration::from_millis(1)), "the guest was not busy after all");
}

/// What the admin listener says of a path that it does not have.
const UNKNOWN: &str =
    "unknown path; there are /livez, /readyz, /primary, /metrics, /guest, /backup, /history and /read-only";

#[test]
fn what_it_does_not_have_is_404_and_405() {
    let server = Server::start(&[]);
    get(server.admin(), "/").says(404, UNKNOWN);
    get(server.admin(), "/v1/a").says(404, UNKNOWN);
    let refused = Connection::open(server.admin()).ask("PUT", "/livez", b"dead");
    refused.says(405, "this path has GET, HEAD");
    assert_eq!(refused.header("allow"), Some("GET, HEAD"));
}

#[test]
fn an_admin_port_that_is_taken() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let address = taken.local_addr().expect("a listener has an address").to_string();
    serve_refused(&["--admin", &address]).with(1, &[&address, "--admin", "in use"]);
}
