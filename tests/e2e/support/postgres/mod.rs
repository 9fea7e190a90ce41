//! PostgreSQL servers for tests, and proxies in front of them.

pub mod database;
pub mod pooler;
pub mod proxy;

use self::database::Database;
use super::readiness::{STANDS_BY, becomes_ready};
use super::server::Server;

/// Checks that the log has all entries once, in order, without a gap: nothing was compacted.
pub const WHOLE: &str = "SELECT count(*) = max(sequence) AND min(sequence) = 1 AND max(sequence) = (SELECT last FROM kvs.writer) \
     FROM kvs.transactions";

pub fn start(url: &str) -> Server {
    Server::start(&["--txlog", url, "--txlog-timeout", "1s", "--request-timeout", "3s"])
}

pub const DEPOSED: &str = "lost the epoch of the log: another process is primary";

/// Waits for the end of a server from which another has taken over.
pub fn is_deposed(server: Server) {
    let (status, stopped) = server.ends();
    let last = stopped.stderr().last().expect("it says why");
    assert!(status.code() == Some(1) && last.contains(DEPOSED), "{status}: {last}");
}

pub fn stand_by(url: &str, args: &[&str]) -> Server {
    let server = Server::start(&[&["--txlog", url, "--txlog-timeout", "1s", "--standby"], args].concat());
    becomes_ready(&server, 200, STANDS_BY);
    server
}

/// Waits until the one that writes keeps to a lease.
pub fn has_lease(database: &Database) {
    database.becomes("SELECT lease IS NOT NULL FROM kvs.writer", "t");
}
