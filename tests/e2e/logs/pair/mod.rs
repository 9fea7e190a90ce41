//! The two roles, for clients and proxies: the address of the primary, stale reads of a standby, and the listener of the
//! primary only.

mod proxy;

use std::net::{SocketAddr, TcpListener};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use self::proxy::proxy_finds_primary;
use crate::support::postgres::database::Database;
use crate::support::postgres::proxy::{Proxy, Way};
use crate::support::postgres::{stand_by, start};
use crate::support::readiness::{AWAY, STANDS_BY, UP_TO_DATE, WELL, becomes_ready, ready};
use crate::support::requests::{get, put};
use crate::support::server::{PATIENCE, Process, Server, kvs, serve_refused};
use crate::support::wire::{Connection, Response, STALE};

/// Storage of the shared log.
enum Log {
    Files(TempDir),
    Postgres(Database),
}

/// Runs a test with each kind of log.
macro_rules! with_each_log {
    ($($test:ident),*) => {
        mod files {
            $(#[test] fn $test() { super::$test(&super::Log::files()) })*
        }
        mod postgres {
            $(#[test] fn $test() { super::$test(&super::Log::postgres()) })*
        }
    };
}

with_each_log!(
    standby_serves_stale_reads_only_on_request,
    client_reads_standby_with_stale_flag,
    import_to_standby_reports_wait,
    primary_path_and_advertised_url_follow_role,
    primary_listener_opens_after_takeover,
    proxy_finds_primary
);

impl Log {
    fn files() -> Self {
        Self::Files(TempDir::new().expect("a temporary directory can be made"))
    }

    fn postgres() -> Self {
        Self::Postgres(Database::start())
    }

    /// Starts a server.
    fn start(&self, args: &[&str]) -> Server {
        let log = match self {
            Self::Files(data) => vec!["--data-dir".to_owned(), data.path().to_str().expect("text").to_owned()],
            Self::Postgres(database) => ["--txlog", &database.url(), "--txlog-timeout", "1s"].map(str::to_owned).into(),
        };
        let log: Vec<_> = log.iter().map(String::as_str).collect();
        Server::start(&[&log, args].concat())
    }

    /// Starts a server while another is primary.
    fn stand_by(&self, args: &[&str]) -> Server {
        let server = self.start(&[&["--standby"], args].concat());
        becomes_ready(&server, 200, STANDS_BY);
        server
    }
}

const AGE: &str = "kvs-stale-age-ms";
const NO_READS: &str = "this server stands by; another one takes writes, and consistent reads; kvs-consistency: stale asks for a stale one";

fn read(address: SocketAddr, headers: &[(&str, &str)]) -> Response {
    Connection::open(address).ask_with("GET", "/v1/a", headers, b"")
}

fn age(response: &Response) -> u64 {
    response.header(AGE).expect("a stale read has its age").parse().expect("it is a number")
}

/// Status and body of `/primary`.
fn primary(server: &Server) -> (u16, String) {
    role(server, "/primary")
}

fn role(server: &Server, path: &str) -> (u16, String) {
    let answer = Connection::open(server.admin()).ask("GET", path, b"");
    (answer.status, answer.text().to_owned())
}

/// Waits until `ready` returns a value.
fn await_some<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = ready() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "{what} never happened");
        thread::sleep(Duration::from_millis(20));
    }
}

/// An address of this machine that no other test uses.
fn free(ip: &str) -> SocketAddr {
    TcpListener::bind((ip, 0)).and_then(|listener| listener.local_addr()).expect("a port is free")
}

fn standby_serves_stale_reads_only_on_request(log: &Log) {
    let server = log.start(&[]);
    assert_eq!(put(&server, "a", "1"), 201);
    let standby = log.stand_by(&[]);
    let url = server.url("");

    // The guest is not called, whatever the path: its response would be stale.
    for path in ["/v1/a", "/v1", "/v1?watch", "/v1/nothing"] {
        let refused = Connection::open(standby.address()).ask("GET", path, b"");
        refused.says(503, &format!("{NO_READS}; the primary is {url}"));
        assert_eq!(refused.header("kvs-primary"), Some(&*url));
        assert_eq!(refused.header("retry-after"), Some("1"));
    }
    let problem = read(standby.address(), &[("accept", "application/problem+json")]);
    assert_eq!((problem.status, problem.header("content-type")), (503, Some("application/problem+json")));
    assert!(problem.text().contains(&url), "{}", problem.text());
    assert_eq!(read(standby.address(), &[("kvs-consistency", "strong")]).status, 503);
    assert_eq!(Connection::open(standby.address()).ask("HEAD", "/v1/a", b"").status, 503);

    let stale = read(standby.address(), &STALE);
    assert_eq!((stale.status, stale.text()), (200, "1"));
    age(&stale);
    let stale = Connection::open(standby.address()).ask_with("HEAD", "/v1/a", &STALE, b"");
    assert_eq!(stale.status, 200);
    age(&stale);
    let nothing = Connection::open(standby.address()).ask_with("GET", "/v1/nothing", &STALE, b"");
    nothing.says(404, "no such key");
    age(&nothing);
    // The header applies to reads only: writes are rejected.
    let refused = Connection::open(standby.address()).ask_with("PUT", "/v1/a", &STALE, b"2");
    refused.says(503, &format!("this server stands by; another one takes writes; the primary is {url}"));

    // On a primary the header changes nothing, and is checked all the same.
    for headers in [&STALE[..], &[("kvs-consistency", "strong")]] {
        let current = read(server.address(), headers);
        assert_eq!((current.status, current.text(), current.header(AGE)), (200, "1", None));
    }
    for server in [&server, &standby] {
        read(server.address(), &[("kvs-consistency", "eventual")])
            .says(400, "kvs-consistency is stale or strong, once");
    }
}

fn client_reads_standby_with_stale_flag(log: &Log) {
    let server = log.start(&[]);
    assert_eq!(put(&server, "a", "1"), 201);
    let standby = log.stand_by(&[]);
    let run = |command: &[&str]| {
        let mut kvs = kvs();
        kvs.args(command).args(["--url", &standby.url("")]).stdout(Stdio::piped());
        let output = kvs.output().expect("the binary can be started");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    for command in [&["get", "a"][..], &["list"], &["export"], &["watch"]] {
        let (code, _, said) = run(command);
        assert!(code == Some(1) && said.contains(&server.url("")), "{command:?}: {said}");
    }
    assert_eq!(run(&["get", "a", "--stale"]).1, "1");
    assert_eq!(run(&["list", "--stale"]).1, "a\n");
    assert!(run(&["export", "--stale"]).1.contains("\"key\":\"a\""));
}

fn import_to_standby_reports_wait(log: &Log) {
    let server = log.start(&[]);
    let standby = log.stand_by(&[]);
    let lines = tempfile::NamedTempFile::new().expect("a temporary file can be made");
    std::fs::write(lines.path(), "{\"key\": \"a\", \"value\": \"1\"}\n").expect("it can be written");
    let mut import = kvs();
    import.arg("import").arg(lines.path()).args(["--url", &standby.url("")]);
    let mut import = Process::spawn(import);
    let waits = import.stderr.find(|line| line.contains("waiting for the server").then(|| line.to_owned()));
    let waits = waits.expect("it says so");
    assert!(waits.contains("this server stands by") && waits.contains(&server.url("")), "{waits}");
    // It continues when the standby is primary.
    server.signal(Signal::KILL);
    server.ends();
    assert!(import.wait().success());
    assert_eq!(get(&standby, "a"), (200, "1".into()));
}

fn primary_path_and_advertised_url_follow_role(log: &Log) {
    let server = log.start(&["--advertise", "https://kvs.example:8443"]);
    let standby = log.stand_by(&[]);
    let third = log.stand_by(&[]);
    assert_eq!(primary(&server), (200, "primary\n".into()));
    assert_eq!(primary(&standby), (503, "this server stands by; another one takes writes\n".into()));
    assert_eq!(role(&server, "/replica"), (503, "primary\n".into()));
    assert_eq!(role(&standby, "/replica"), (200, "replica\n".into()));
    assert_eq!(read(standby.address(), &[]).header("kvs-primary"), Some("https://kvs.example:8443"));
    let others = Connection::open(server.admin()).ask("POST", "/primary", b"");
    assert_eq!((others.status, others.header("allow")), (405, Some("GET, HEAD")));
    assert!(!ready(&standby).1.contains("https://"), "the URL is no part of the holder's name");

    server.signal(Signal::KILL);
    server.ends();
    let standbys = [standby, third];
    let next = await_some("a takeover", || standbys.iter().position(|standby| primary(standby).0 == 200));
    let [next, other] = [&standbys[next], &standbys[1 - next]];
    assert_eq!((role(next, "/replica").0, role(other, "/replica").0), (503, 200));
    assert_eq!((put(next, "a", "1"), get(next, "a")), (201, (200, "1".into())));
    // After its next poll.
    let named = next.url("");
    await_some("the name of the next", || {
        (read(other.address(), &[]).header("kvs-primary") == Some(&named)).then_some(())
    });
    assert_eq!(primary(other).0, 503);
}

fn primary_listener_opens_after_takeover(log: &Log) {
    let shared = free(if matches!(log, Log::Files(_)) { "127.0.0.5" } else { "127.0.0.8" });
    let at = shared.to_string();
    let server = log.start(&["--listen-when-primary", &at]);
    server.says("listening on");
    let standby = log.stand_by(&["--listen-when-primary", &at]);
    let mut client = Connection::open(shared);
    assert_eq!(client.ask("PUT", "/v1/a", b"1").status, 201);
    assert_eq!(get(&server, "a"), (200, "1".into()));
    // The advertised URL of the primary.
    assert_eq!(read(standby.address(), &[]).header("kvs-primary"), Some(&*format!("http://{shared}")));

    server.signal(Signal::KILL);
    server.ends();
    let mut client = await_some("an open port", || Connection::try_open(shared).ok());
    assert_eq!(client.ask("PUT", "/v1/a", b"2").status, 201);
    assert_eq!(get(&standby, "a"), (200, "2".into()));
    standby.says(&format!("primary, listening on {at}"));
    // Both listeners are drained.
    standby.terminate();
    assert!(Connection::try_open(shared).is_err());
}

#[test]
fn taken_primary_port_is_reported_and_awaited() {
    let taken = TcpListener::bind("127.0.0.6:0").expect("a port is free");
    let at = taken.local_addr().expect("it is bound");
    let server = Server::start(&["--listen-when-primary", &at.to_string(), "--max-connections", "1"]);
    server.says(&format!("--listen-when-primary {at} cannot be opened"));
    becomes_ready(&server, 200, &format!("[+]primary listener ok, but --listen-when-primary {at} cannot be opened"));
    assert_eq!(put(&server, "a", "1"), 201, "the other listener serves");
    drop(taken);
    becomes_ready(&server, 200, "[+]primary listener ok\n");
    assert_eq!(read(at, &[]).text(), "1");
    becomes_ready(&server, 200, WELL);
}

#[test]
fn malformed_role_flags_are_rejected() {
    serve_refused(&["--listen-when-primary", "127.0.0.1:0"]).with(2, &["a port other than 0"]);
    serve_refused(&["--listen-when-primary", "0.0.0.0:8080"]).with(1, &["--listen-when-primary", "--insecure"]);
    serve_refused(&["--advertise", "kvs.example:8443"]).with(2, &["a URL of at most 256 bytes"]);
}

#[test]
fn stale_age_grows_while_database_is_unavailable() {
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    let server = start(&database.url());
    assert_eq!(put(&server, "a", "1"), 201);
    let standby = stand_by(&database.url_at(proxy.port), &["--stale-reads"]);
    becomes_ready(&standby, 200, UP_TO_DATE);
    // No header is needed here, and a client that requires a consistent read gets 503.
    assert_eq!(read(standby.address(), &[]).text(), "1");
    read(standby.address(), &[("kvs-consistency", "strong")])
        .says(503, &format!("{NO_READS}; the primary is {}", server.url("")));
    proxy.set(Way::Reset);
    becomes_ready(&standby, 200, AWAY.trim_start_matches("[+]log ok, but "));
    assert_eq!(put(&server, "a", "2"), 201);
    let written = Instant::now();
    let stale = await_some("an age of two seconds", || {
        let read = read(standby.address(), &[]);
        (age(&read) >= 2_000).then_some(read)
    });
    assert_eq!(stale.text(), "1", "it cannot know of another");
    let waited = u64::try_from(written.elapsed().as_millis()).expect("it is not that long");
    let later = read(standby.address(), &[]);
    assert!(age(&later) >= waited, "{} after {waited} ms", age(&later));
    proxy.set(Way::Open);
    await_some("the newer value", || (read(standby.address(), &[]).text() == "2").then_some(()));
    await_some("an age below two seconds", || (age(&read(standby.address(), &[])) < 2_000).then_some(()));
}
