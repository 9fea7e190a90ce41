//! Upgrades of servers with their log in PostgreSQL and in NATS, which have an epoch in place of a lock.

use super::failures::{await_stopped, fail_at_each_step, no_read_of_old_is_stale, stopping_at, takeover};
use super::*;
use crate::support::nats::Nodes;
use crate::support::postgres::database::Database;
use crate::support::postgres::proxy::{Proxy, Way as Cable};
use crate::support::readiness::{AWAY, STANDS_BY, WELL, becomes_ready, ready};
use crate::support::requests::{answer, get, put, send};
use crate::support::server::Server;
use crate::support::wire::STALE;

/// A lease that does not expire while a process is stopped.
const LONG_LEASE: &str = "--read-lease=8s";

/// The log of a test.
enum Service {
    Postgres(Database),
    Nats(Nodes),
}

impl Service {
    fn postgres() -> Self {
        Self::Postgres(Database::start())
    }

    fn nats() -> Self {
        Self::Nats(Nodes::start(3))
    }

    /// Arguments of a server, with a lease that is short for this service.
    fn args(&self) -> Vec<String> {
        match self {
            Self::Postgres(database) => vec!["--txlog".to_owned(), database.url(), "--read-lease=1s".to_owned()],
            Self::Nats(nodes) => {
                let monitors = format!("--txlog-monitor={}", nodes.monitors());
                vec!["--txlog".to_owned(), nodes.url("x"), monitors, "--read-lease=3s".to_owned()]
            }
        }
    }

    fn start(&self) -> Upgraded {
        let args = self.args();
        Upgraded::start(&texts(&args))
    }

    /// The same, with a lease that is long.
    fn args_with_long_lease(&self) -> Vec<String> {
        self.args().into_iter().filter(|arg| !arg.starts_with("--read-lease")).chain([LONG_LEASE.to_owned()]).collect()
    }

    fn stand_by(&self) -> Server {
        self.stand_by_with(&self.args())
    }

    fn stand_by_with(&self, args: &[String]) -> Server {
        let server = Server::start(&[&texts(args)[..], &["--standby"]].concat());
        becomes_ready(&server, 200, STANDS_BY);
        if let Self::Postgres(database) = self {
            // Until the primary has noticed it, the standby waits for longer.
            await_some("a lease", || (database.sql("SELECT lease IS NULL FROM kvs.writer") == ["f"]).then_some(()));
        }
        server
    }
}

fn texts(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn lose_nothing(service: &Service) {
    let args = service.args();
    upgrades_under_load(&texts(&args), &Way::default(), true, count("KVS_TEST_UPGRADES", 10).div_ceil(2));
}

#[test]
fn upgrades_with_postgres_lose_nothing() {
    of_files!();
    lose_nothing(&Service::postgres());
}

#[test]
fn upgrades_with_nats_lose_nothing() {
    of_files!();
    lose_nothing(&Service::nats());
}

fn failures_leave_old_serving(service: &Service) {
    let programs = TempDir::new().expect("a temporary directory can be made");
    let server = service.start();
    under_load(&server, &Way::default(), true, || {
        fail_at_each_step(&server, &programs);
        server.upgrade(&["--binary", kvs_tests::binary()]);
    });
    server.terminate();
}

#[test]
fn failure_at_each_step_with_postgres_leaves_old_serving() {
    of_files!();
    failures_leave_old_serving(&Service::postgres());
}

#[test]
fn failure_at_each_step_with_nats_leaves_old_serving() {
    of_files!();
    failures_leave_old_serving(&Service::nats());
}

#[test]
fn history_over_upgrades_with_postgres_is_linearizable() {
    of_files!();
    let args = Service::postgres();
    histories_over_upgrades(&texts(&args.args()), count("KVS_TEST_HISTORIES", 40).div_ceil(4));
}

#[test]
fn history_over_upgrades_with_nats_is_linearizable() {
    of_files!();
    let service = Service::nats();
    histories_over_upgrades(&texts(&service.args()), count("KVS_TEST_HISTORIES", 40).div_ceil(4));
}

/// A standby that runs meanwhile gets the log neither in an upgrade nor in one that fails, and after the end of the server.
fn standby_waits(service: &Service) {
    let programs = TempDir::new().expect("a temporary directory can be made");
    let server = service.start();
    assert_eq!(Connection::open(server.address).ask("PUT", "/v1/a", b"1").status, 201);
    let standby = service.stand_by();
    for _ in 0..3 {
        server.upgrade(&[]);
    }
    let failing = format!("UPGRADE_FAILPOINT=kill:promoted exec {} \"$@\"", kvs_tests::binary());
    server.fails(&program(&programs, "failing", &failing));
    assert_eq!(Connection::open(server.address).ask("PUT", "/v1/a", b"2").status, 201);
    becomes_ready(&standby, 200, STANDS_BY);
    server.terminate();
    becomes_ready(&standby, 200, WELL);
    assert_eq!((get(&standby, "a"), put(&standby, "a", "3")), ((200, "2".into()), 201));
    standby.terminate();
}

#[test]
fn standby_waits_during_upgrade_with_postgres() {
    of_files!();
    standby_waits(&Service::postgres());
}

#[test]
fn standby_waits_during_upgrade_with_nats() {
    of_files!();
    standby_waits(&Service::nats());
}

/// A new process that has the log and does nothing yet: a standby does not take it before the lease has expired.
fn handed_over_log_is_not_free(service: &Service) {
    let programs = TempDir::new().expect("a temporary directory can be made");
    let args = service.args_with_long_lease();
    let server = Upgraded::start(&texts(&args));
    assert_eq!(Connection::open(server.address).ask("PUT", "/v1/a", b"1").status, 201);
    let standby = service.stand_by_with(&args);
    let (binary, pid_file) = stopping_at("log", &programs);
    thread::scope(|scope| {
        let upgrade = scope.spawn(|| server.upgrade(&["--binary", &binary]));
        let process = await_stopped(&pid_file);
        looks_again(&standby);
        let (status, text) = ready(&standby);
        assert!(status == 200 && text.contains(STANDS_BY), "{text}");
        signal(process, Signal::CONT);
        upgrade.join().expect("it succeeds");
    });
    assert_eq!(Connection::open(server.address).ask("PUT", "/v1/a", b"2").status, 201);
    becomes_ready(&standby, 200, STANDS_BY);
    server.terminate();
    standby.terminate();
}

/// Waits until a standby has looked at the log after this was called.
fn looks_again(standby: &Server) {
    let begun = Instant::now();
    await_some("a look at the log", || {
        let passed = begun.elapsed().as_millis();
        let answer = Connection::open(standby.address()).ask_with("GET", "/v1/a", &STALE, b"");
        // None of a primary, which it must not be.
        let age = answer.header("kvs-stale-age-ms").map_or(0, |age| age.parse().expect("a number"));
        (age < passed).then_some(())
    });
}

#[test]
fn handed_over_log_with_postgres_is_not_free() {
    of_files!();
    handed_over_log_is_not_free(&Service::postgres());
}

#[test]
fn handed_over_log_with_nats_is_not_free() {
    of_files!();
    handed_over_log_is_not_free(&Service::nats());
}

#[test]
fn no_read_of_old_is_stale_with_postgres() {
    of_files!();
    let service = Service::postgres();
    no_read_of_old_is_stale(&texts(&service.args_with_long_lease()));
}

#[test]
fn no_read_of_old_is_stale_with_nats() {
    of_files!();
    let service = Service::nats();
    no_read_of_old_is_stale(&texts(&service.args_with_long_lease()));
}

/// A new process that hangs for longer than the lease loses the log to a standby, and the old one does not take it back.
fn standby_that_took_over_is_left_alone(service: &Service) {
    let programs = TempDir::new().expect("a temporary directory can be made");
    let server = service.start();
    assert_eq!(Connection::open(server.address).ask("PUT", "/v1/a", b"1").status, 201);
    let standby = service.stand_by();
    let (binary, pid_file) = stopping_at("log", &programs);
    thread::scope(|scope| {
        let upgrade = scope.spawn(|| server.run(&["--binary", &binary]));
        let process = await_stopped(&pid_file);
        becomes_ready(&standby, 200, WELL);
        assert_eq!(put(&standby, "a", "2"), 201);
        // The old process lets it wait for the outcome.
        let mut read = send(server.first(), "GET /v1/a", "");
        let output = upgrade.join().expect("it ends");
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && printed.contains("the log cannot be taken back"), "{printed}");
        let refused = answer(&mut read);
        assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
        await_end(process);
        await_end(server.process.load(Ordering::Relaxed));
    });
    assert_eq!((get(&standby, "a"), put(&standby, "a", "3")), ((200, "2".into()), 201));
    standby.terminate();
}

#[test]
fn standby_that_took_over_with_postgres_is_left_alone() {
    of_files!();
    standby_that_took_over_is_left_alone(&Service::postgres());
}

#[test]
fn standby_that_took_over_with_nats_is_left_alone() {
    of_files!();
    standby_that_took_over_is_left_alone(&Service::nats());
}

#[test]
fn database_that_is_away_leaves_old_serving() {
    of_files!();
    let programs = TempDir::new().expect("a temporary directory can be made");
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    let server = Upgraded::start(&["--txlog", &database.url_at(proxy.port)]);
    let (binary, pid_file) = stopping_at("ready", &programs);
    thread::scope(|scope| {
        let upgrade = scope.spawn(|| server.run(&["--binary", &binary]));
        let process = await_stopped(&pid_file);
        proxy.set(Cable::Reset);
        becomes_ready(server.first(), 200, AWAY);
        signal(process, Signal::CONT);
        let output = upgrade.join().expect("it ends");
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(printed.contains("not upgraded, the server continues to serve"), "{printed}");
        assert!(printed.contains("the log cannot be closed for an upgrade: the database is unavailable"), "{printed}");
    });
    proxy.set(Cable::Open);
    becomes_ready(server.first(), 200, WELL);
    assert_eq!(Connection::open(server.address).ask("PUT", "/v1/a", b"1").status, 201);
    server.upgrade(&["--binary", kvs_tests::binary()]);
    assert_eq!(Connection::open(server.address).ask("GET", "/v1/a", b"").text(), "1");
    server.terminate();
}

/// The database has committed the handover, and the old process cannot know it: it ends, and the new one takes over.
#[test]
fn lost_answer_to_handover_is_takeover() {
    of_files!();
    let programs = TempDir::new().expect("a temporary directory can be made");
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    let server = Upgraded::start(&["--txlog", &database.url_at(proxy.port), "--read-lease=1s"]);
    let printed = takeover(&server, &programs, || proxy.set(Cable::EndsAtCommit));
    assert!(printed.contains("not upgraded: the log cannot be closed for an upgrade"), "{printed}");
    assert!(printed.contains("has taken it over"), "{printed}");
    assert_eq!(Connection::open(server.address).ask("PUT", "/v1/a", b"2").status, 201);
    server.terminate();
}

/// Servers of two logs, which need no lock on it, in one directory.
#[test]
fn control_socket_of_another_server_is_left_alone() {
    of_files!();
    let database = Database::start();
    let server = Upgraded::start(&[]);
    let mut command = serve(server.data.path());
    command.args(["--txlog", &database.url()]);
    let other = Server::spawn(command, TempDir::new().expect("a temporary directory can be made"));
    other.says("another server uses this data directory");
    server.upgrade(&[]);
    assert_eq!(put(&other, "a", "1"), 201);
    other.terminate();
    server.upgrade(&[]);
    server.terminate();
}
