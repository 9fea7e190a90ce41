//! Readiness of a server, and the line of the log in `/readyz`.

use std::thread;
use std::time::{Duration, Instant};

use super::server::{PATIENCE, Server};
use super::wire::Connection;

pub fn ready(server: &Server) -> (u16, String) {
    let answer = Connection::open(server.admin()).ask("GET", "/readyz", b"");
    (answer.status, answer.text().to_owned())
}

/// Waits until `/readyz` responds this.
pub fn becomes_ready(server: &Server, status: u16, expected: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (now, text) = ready(server);
        if now == status && text.contains(expected) {
            return;
        }
        assert!(Instant::now() < deadline, "/readyz is not {status} {expected:?}, but {now}: {text}");
        thread::sleep(Duration::from_millis(20));
    }
}

pub const WELL: &str = "[+]log ok\n";
pub const AWAY: &str = "[+]log ok, but database unavailable";
pub const STANDS_BY: &str = "[+]log ok, but standby of process ";
pub const UP_TO_DATE: &str = ", replication lag 0 entries\n";
