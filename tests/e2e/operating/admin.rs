//! The admin listener: liveness and readiness, also while nothing else responds.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::guests::guest;
use crate::support::metrics::counts;
use crate::support::server::{PATIENCE, Process, Server, kvs, refused, serve, serve_refused};
use crate::support::tokens::Tokens;
use crate::support::wire::{Connection, Response};

fn get(admin: SocketAddr, path: &str) -> Response {
    Connection::open(admin).ask("GET", path, b"")
}

/// `kvs health`, with the variable of the server for the address.
fn health(admin: SocketAddr, args: &[&str]) -> Command {
    let mut command = kvs();
    command.arg("health").args(args).env("KVS_ADMIN", admin.to_string()).stdout(Stdio::piped());
    command
}

#[track_caller]
fn is_well(admin: SocketAddr, args: &[&str], expected: &str) {
    let output = health(admin, args).output().expect("the binary under test can be started");
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
}

#[test]
fn health_has_line_and_exit_code() {
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
fn serving_server_is_alive_and_ready() {
    let server = Server::start(&[]);
    get(server.admin(), "/livez").says(200, "ok");
    get(server.admin(), "/readyz")
        .says(200, "[+]log ok\n[+]guest ok\n[+]edge ok\n[+]workers ok\n[+]clock ok\n[+]tasks ok\n[+]diagnostics ok");
    let mut client = Connection::open(server.admin());
    client.send("HEAD /readyz HTTP/1.1\r\nhost: kvs\r\n\r\n");
    assert_eq!(client.try_read(true).expect("HEAD is answered").status, 200);
}

#[test]
fn replaying_server_is_alive_and_not_ready() {
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
        .says(503, "[+]log ok\n[-]guest replaying the log\n[-]edge not listening yet\n[+]workers ok\n[+]tasks ok\n[+]diagnostics ok");
    refused(health(admin, &[])).with(1, &["kvs: not ready: ", "[-]guest replaying the log", "(503)"]);
    is_well(admin, &["--live"], "alive\n");
}

#[test]
fn stopping_server_is_alive_and_not_ready() {
    let server = Server::start(&[]);
    let admin = server.admin();
    let mut client = Connection::open(server.address());
    client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\nexpect: 100-continue\r\ncontent-length: 10\r\n\r\n");
    assert_eq!(client.read().status, 100);
    server.signal(Signal::TERM);
    server.says("stopping: finishing requests in progress");
    get(admin, "/livez").says(200, "ok");
    get(admin, "/readyz").says(
        503,
        "[+]log ok\n[+]guest ok\n[-]edge stopping\n[+]workers ok\n[+]clock ok\n[+]tasks ok\n[+]diagnostics ok",
    );
    client.send("ten bytes.");
    assert_eq!(client.read().status, 201);
    server.ends_well();
}

#[test]
fn admin_responds_while_guest_uses_every_thread() {
    let data = tempfile::tempdir().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(["--guest-cpu-limit", "1h"]).arg(guest());
    // As on a machine with one core: the call below occupies the only thread that serves requests.
    command.env("TOKIO_WORKER_THREADS", "1");
    let server = Server::spawn(command, data);
    let mut client = Connection::open(server.address());
    client.send("GET /loop-aloud HTTP/1.1\r\nhost: kvs\r\n\r\n");
    server.says("going round in circles");
    get(server.admin(), "/livez").says(200, "ok");
    get(server.admin(), "/readyz")
        .says(200, "[+]log ok\n[+]guest ok\n[+]edge ok\n[+]workers ok\n[+]clock ok\n[+]tasks ok\n[+]diagnostics ok");
    assert!(client.is_silent_for(Duration::from_millis(1)), "the guest was not busy after all");
}

#[test]
fn unknown_path_and_method_are_404_and_405() {
    let server = Server::start(&[]);
    get(server.admin(), "/")
        .says(404, "unknown path; there are /livez, /readyz, /primary, /replica, /metrics, /guest, /backup, /history, /stats, /read-only, /v1 and /console");
    let refused = Connection::open(server.admin()).ask("PUT", "/livez", b"dead");
    refused.says(405, "this path has GET, HEAD");
    assert_eq!(refused.header("allow"), Some("GET, HEAD"));
}

#[test]
fn page_of_other_site_is_rejected() {
    let server = Server::start(&["--admin-host", "kvs,admin.example.org"]);
    let ask = |method: &str, path: &str, headers: &str| {
        let mut client = Connection::open(server.admin());
        client.send(format!("{method} {path} HTTP/1.1\r\n{headers}content-length: 0\r\n\r\n"));
        client.try_read(method == "HEAD").expect("an answer").status
    };
    let paths =
        ["/livez", "/readyz", "/primary", "/metrics", "/guest", "/v1", "/v1/a", "/console", "/console/app.js", "/x"];
    for path in paths {
        // The name of the page, rebound to this address.
        assert_eq!(ask("GET", path, "host: evil.example\r\n"), 403, "{path}");
        assert_eq!(ask("GET", path, "host: kvs\r\norigin: https://evil.example\r\n"), 403, "{path}");
        for method in ["PUT", "POST", "DELETE", "OPTIONS", "HEAD"] {
            assert_eq!(ask(method, path, "host: 127.0.0.1\r\norigin: null\r\n"), 403, "{method} {path}");
        }
    }
    for host in ["10.1.2.3:9090", "[::1]:9090", "localhost", "admin.example.org"] {
        assert_eq!(ask("GET", "/readyz", &format!("host: {host}\r\n")), 200, "{host}");
    }
    assert_eq!(ask("GET", "/readyz", ""), 400);
    assert_eq!(ask("GET", "/backup", "host: 127.0.0.1\r\nsec-fetch-site: cross-site\r\n"), 403);
    assert_eq!(ask("GET", "/guest", "host: kvs:9090\r\norigin: http://kvs:9090\r\n"), 200);
    assert_eq!(ask("GET", "/guest", "host: kvs\r\nhost: kvs\r\n"), 400);
    assert_eq!(ask("DELETE", "/guest", "host: evil.example\r\n"), 403);
    assert!(!server.stderr().iter().any(|line| line.contains("swapped")), "a swap was begun");
}

#[test]
fn request_to_v1_is_served_like_client_request() {
    let tokens = Tokens::new();
    let [reader, writer] =
        [["reader", "--scope", "read"], ["writer", "--scope", "write"]].map(|args| tokens.add(&args));
    let server = Server::start(&["--tokens", &tokens.file(), "--admin-open"]);
    let mut admin = Connection::open(server.admin());
    // The listener itself requires no token, but the HTTP interface does.
    assert_eq!(admin.ask("GET", "/guest", b"").status, 200);
    assert_eq!(admin.ask("GET", "/v1", b"").status, 401);
    let ask = |method, path, token: &str, body: &[u8]| {
        let mut admin = Connection::open(server.admin());
        admin.ask_with(method, path, &[("authorization", &format!("Bearer {token}"))], body)
    };
    assert_eq!(ask("PUT", "/v1/a", &reader, b"value").status, 403);
    assert_eq!(ask("PUT", "/v1/a", &writer, b"value").etag(), Some(1));
    assert_eq!(ask("GET", "/v1/key/a", &reader, b"").text(), "value");
    let mut client = Connection::open(server.address());
    let direct = client.ask_with("GET", "/v1/a", &[("authorization", &format!("Bearer {reader}"))], b"");
    assert_eq!((direct.text(), direct.etag()), ("value", Some(1)));
}

#[test]
fn watch_over_admin_ends_when_client_leaves() {
    let server = Server::start(&["--watch-keep-alive", "1h"]);
    let (mut watch, mut poll) = (Connection::open(server.admin()), Connection::open(server.admin()));
    assert_eq!(watch.ask_for_head("GET", "/v1?watch", &[]).status, 200);
    poll.send("GET /v1/a?wait=300s HTTP/1.1\r\nhost: localhost\r\n\r\n");
    counts(&server, "kvs_watches", 1.0);
    counts(&server, "kvs_http_requests_waiting_for_change", 1.0);
    get(server.admin(), "/livez").says(200, "ok");
    drop(poll);
    counts(&server, "kvs_http_requests_waiting_for_change", 0.0);
    drop(watch);
    counts(&server, "kvs_watches", 0.0);
    counts(&server, "kvs_http_requests_in_flight", 0.0);
}

/// Checks that a rejection has the headers of the HTTP interface.
#[track_caller]
fn can_be_retried(refused: &Response) {
    assert_eq!((refused.header("kvs-error"), refused.header("retry-after")), (Some("unavailable"), Some("1")));
}

#[test]
fn watches_over_admin_leave_room_for_probes() {
    let server = Server::start(&[]);
    let watch = || {
        let mut watch = Connection::open(server.admin());
        (watch.ask_for_head("GET", "/v1?watch", &[]).status, watch)
    };
    let watches: Vec<_> = (0..32).map(|_| watch()).collect();
    assert!(watches.iter().all(|(status, _)| *status == 200));
    let refused = Connection::open(server.admin()).ask("GET", "/v1/a", b"");
    assert_eq!(refused.status, 503, "{}", refused.text());
    can_be_retried(&refused);
    let accept = [("accept", "application/problem+json")];
    let problem = Connection::open(server.admin()).ask_with("GET", "/v1/a", &accept, b"");
    can_be_retried(&problem);
    assert!(problem.text().contains("\"code\":\"unavailable\""), "{}", problem.text());
    get(server.admin(), "/livez").says(200, "ok");
    assert_eq!(get(server.admin(), "/metrics").status, 200);
    drop(watches);
    counts(&server, "kvs_watches", 0.0);
    let begun = Instant::now();
    while Connection::open(server.admin()).ask("GET", "/v1/a", b"").status == 503 {
        assert!(begun.elapsed() < PATIENCE, "the places are never free again");
    }
}

#[test]
fn request_over_admin_is_finished_at_stop() {
    let server = Server::start(&[]);
    let mut admin = Connection::open(server.admin());
    admin.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    assert_eq!(admin.read().status, 100);
    let mut watch = Connection::open(server.admin());
    assert_eq!(watch.ask_for_head("GET", "/v1?watch", &[]).status, 200);
    server.signal(Signal::TERM);
    server.says("stopping: finishing requests in progress");
    let begun = Instant::now();
    let refused = loop {
        let answer = Connection::open(server.admin()).ask("GET", "/v1/a", b"");
        if answer.status == 503 {
            break answer;
        }
        assert!(begun.elapsed() < PATIENCE, "it still serves");
    };
    can_be_retried(&refused);
    admin.send("value");
    assert_eq!(admin.read().status, 201);
    server.ends_well();
}

#[test]
fn busy_guest_delays_v1_but_not_admin() {
    let data = tempfile::tempdir().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(["--guest-cpu-limit", "1h"]).arg(guest()).env("TOKIO_WORKER_THREADS", "1");
    let server = Server::spawn(command, data);
    let mut client = Connection::open(server.address());
    client.send("GET /loop-aloud HTTP/1.1\r\nhost: kvs\r\n\r\n");
    server.says("going round in circles");
    // The only thread that serves requests is busy, also for this one.
    let mut forwarded = Connection::open(server.admin());
    forwarded.send("GET /v1 HTTP/1.1\r\nhost: kvs\r\n\r\n");
    get(server.admin(), "/livez").says(200, "ok");
    assert_eq!(get(server.admin(), "/console").status, 200);
    assert!(forwarded.is_silent_for(Duration::from_millis(1)), "it was answered by nobody");
}

#[test]
fn taken_admin_port_is_reported() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let address = taken.local_addr().expect("a listener has an address").to_string();
    serve_refused(&["--admin", &address]).with(1, &[&address, "--admin", "in use"]);
}

#[test]
fn clients_that_do_not_read_leave_their_places_to_probes() {
    let server = Server::start(&["--backup-timeout", "1s"]);
    // As many as there can be, each with more responses than its socket holds.
    let asked = "GET /console/app.js HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(1_000);
    let idle: Vec<_> = (0..64)
        .map(|_| {
            let mut client = TcpStream::connect(server.admin()).expect("the listener accepts");
            client.set_nonblocking(true).expect("a socket can be");
            // As much as the socket takes.
            while matches!(client.write(asked.as_bytes()), Ok(1..)) {}
            client
        })
        .collect();
    assert_eq!(get(server.admin(), "/livez").status, 200);
    drop(idle);
}

#[test]
fn idle_connections_leave_their_places_to_probes() {
    let kinds = [
        ("that send nothing", ""),
        ("that send half a head", "GET /livez HTTP/1.1\r\nhost"),
        ("that have sent a request", "GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"),
    ];
    for (kind, sent) in kinds {
        let server = Server::start(&[]);
        let mut idle: Vec<_> = (0..200)
            .map(|_| {
                let mut client = TcpStream::connect(server.admin()).expect("the listener accepts");
                client.write_all(sent.as_bytes()).expect("the socket takes it");
                client
            })
            .collect();
        assert_eq!(get(server.admin(), "/livez").status, 200, "beside connections {kind}");
        // It did not take until their timeout.
        let last = idle.last_mut().expect("there are some");
        last.set_nonblocking(true).expect("a socket can be");
        let read = last.read_to_end(&mut Vec::new()).expect_err("it is open").kind();
        assert_eq!(read, ErrorKind::WouldBlock, "connections {kind}");
    }
}
