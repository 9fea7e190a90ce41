//! A PgBouncer in front of a database.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use super::database::{Database, PASSWORD, as_owner, give};
use crate::support::server::{PATIENCE, Process};

pub struct Pooler {
    port: u16,
    process: Process,
    home: TempDir,
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
        let process = run(&file, port);
        Self { port, process, home }
    }

    /// Ends it with its connections, and starts it with another mode.
    pub fn restart(&mut self, mode: &str) {
        let file = self.home.path().join("pgbouncer.ini");
        let before = fs::read_to_string(&file).expect("it is there");
        let (rest, _) = before.rsplit_once("pool_mode").expect("it is the last setting");
        fs::write(&file, format!("{rest}pool_mode = {mode}\n")).expect("a file can be written");
        self.process.signal(Signal::KILL);
        self.process.wait();
        self.process = run(&file, self.port);
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The URL of the database, by way of this.
    pub fn url(&self) -> String {
        format!("postgres://postgres@{}/postgres?sslmode=disable", self.address())
    }
}

/// Runs it until it listens.
fn run(file: &Path, port: u16) -> Process {
    let mut command = as_owner(Path::new("pgbouncer"));
    command.arg(file).stdout(Stdio::null());
    let process = Process::spawn(command);
    let deadline = Instant::now() + PATIENCE;
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "PgBouncer does not listen");
        thread::sleep(Duration::from_millis(20));
    }
    process
}
