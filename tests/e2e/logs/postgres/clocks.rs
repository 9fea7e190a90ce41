//! Servers on one log whose clocks differ.

use std::time::Duration;

use tempfile::TempDir;

use crate::support::metrics::Metrics;
use crate::support::postgres::database::Database;
use crate::support::postgres::{stand_by, start};
use crate::support::readiness::{WELL, becomes_ready};
use crate::support::requests::{expires, shows};
use crate::support::sabotage::ahead;
use crate::support::server::{Server, serve};
use crate::support::txlog::done;
use crate::support::wire::Connection;

const HOUR: Duration = Duration::from_secs(3_600);
const BEHIND: &str = "[+]clock ok, but the system clock is 59m ";

/// A server whose clock is an hour ahead.
fn start_ahead(url: &str) -> Server {
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(["--txlog", url, "--txlog-timeout", "1s"]);
    let server = Server::spawn(ahead(HOUR, &command), data);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/before?ttl=1", b"value").status, 201);
    assert_eq!(client.ask("PUT", "/v1/stays?ttl=7200", b"value").status, 201);
    server
}

/// A server whose clock is an hour behind the log ends each TTL in its time, and reports the difference.
fn ends_ttls(server: &Server) {
    let mut client = Connection::open(server.address());
    expires(&mut client, "/v1/before");
    assert_eq!(client.ask("PUT", "/v1/after?ttl=1", b"value").status, 201);
    expires(&mut client, "/v1/after");
    assert_eq!(client.ask("GET", "/v1/stays", b"").status, 200);
    becomes_ready(server, 200, BEHIND);
    let behind = Metrics::of(server).get("kvs_clock_behind_seconds");
    assert!((HOUR.as_secs_f64() - 60.0..=HOUR.as_secs_f64()).contains(&behind), "{behind} s");
}

#[test]
fn ttl_ends_on_server_an_hour_behind_log() {
    let database = Database::start();
    start_ahead(&database.url()).terminate();
    // Again after a restart.
    for _ in 0..2 {
        let server = start(&database.url());
        ends_ttls(&server);
        server.terminate();
    }
}

#[test]
fn ttl_ends_after_failover_from_server_an_hour_ahead() {
    let database = Database::start();
    let primary = start_ahead(&database.url());
    let standby = stand_by(&database.url(), &[]);
    shows(&standby, "stays", 200, "value");
    primary.kill();
    becomes_ready(&standby, 200, BEHIND);
    becomes_ready(&standby, 200, WELL);
    ends_ttls(&standby);
}

#[test]
fn log_ahead_of_the_clock_is_compacted() {
    let database = Database::start();
    let server = start_ahead(&database.url());
    let mut client = Connection::open(server.address());
    expires(&mut client, "/v1/before");
    assert_eq!(client.ask("DELETE", "/v1/stays", b"").status, 200);
    server.terminate();
    done(&["compact", "--txlog", &database.url()]);
    assert_eq!(database.sql("SELECT count(*) FROM kvs.transactions"), ["0"]);
}
