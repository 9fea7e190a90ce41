//! A PgBouncer in front of a database.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::database::{Database, PASSWORD, as_owner, give};
use crate::support::server::{PATIENCE, Process};

pub struct Pooler {
    port: u16,
    _process: Process,
    _home: TempDir,
}

impl Pooler {
    /// `mode` is the pool mode: when a session of the database is given to another client.
    pub fn start(database: &Database, mode: &str) -> Self {
        let home = TempDir::new().expect("a temporary directory can be made");
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let port = free.expect("a port is free").port();
        let file = home.path().join("pgbouncer.ini");
        let configuration = format!(
            "[databases]\npostgres = host=127.0.0.1 port={} user=postgres password='{PASSWORD}'\n[pgbouncer]\n\
             listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = {mode}\n",
            database.port()
        );
        fs::write(&file, configuration).expect("a file can be written");
        give(home.path());
        give(&file);
        let mut command = as_owner(Path::new("pgbouncer"));
        command.arg(&file).stdout(Stdio::null());
        let process = Process::spawn(command);
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "PgBouncer does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        Self { port, _process: process, _home: home }
    }

    /// The URL of the database, by way of this.
    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres?sslmode=disable", self.port)
    }
}
