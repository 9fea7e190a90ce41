//! A real Prometheus, with the rules of `deploy/alerts.yaml`.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::server::{PATIENCE, Process};
use super::wire::Connection;

pub const ALERTS: &str = include_str!("../../../deploy/alerts.yaml");
/// The pause between two questions to Prometheus.
const PAUSE: Duration = Duration::from_millis(200);

/// The names of all alerts.
pub fn alerts() -> Vec<&'static str> {
    ALERTS.lines().filter_map(|line| line.trim_start().strip_prefix("- alert: ")).collect()
}

/// A Prometheus that scrapes admin listeners each second, and waits for no alert to last.
pub struct Prometheus {
    _process: Process,
    _directory: TempDir,
    address: SocketAddr,
}

impl Prometheus {
    /// Returns when each of the targets has been scraped.
    pub fn of(targets: &[SocketAddr]) -> Self {
        Self::with(ALERTS, targets)
    }

    /// One for which a backup is too old after 2 s, not 2 days.
    pub fn of_backups(targets: &[SocketAddr]) -> Self {
        Self::with(&ALERTS.replace("2 * 86400", "2").replace("2d", "2s"), targets)
    }

    fn with(rules: &str, targets: &[SocketAddr]) -> Self {
        let directory = TempDir::new().expect("a temporary directory can be made");
        let rules: Vec<_> = rules.lines().filter(|line| !line.trim_start().starts_with("for: ")).collect();
        let mut config = String::from(
            "global: { scrape_interval: 1s, evaluation_interval: 1s }\nrule_files: [alerts.yaml]\n\
             scrape_configs: [{ job_name: kvs, static_configs: [{ targets: [",
        );
        for target in targets {
            let _ = write!(config, "'{target}',");
        }
        config.push_str("] }] }]\n");
        for (name, text) in [("alerts.yaml", rules.join("\n")), ("prometheus.yaml", config)] {
            fs::write(directory.path().join(name), text).expect("the directory takes a file");
        }
        let mut command = Command::new("prometheus");
        command.current_dir(directory.path()).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.args(["--config.file=prometheus.yaml", "--storage.tsdb.path=data", "--web.listen-address=127.0.0.1:0"]);
        let process = Process::spawn(command);
        let address = |line: &str| line.split_once("msg=\"Listening on\" address=")?.1.parse().ok();
        let address =
            process.stderr.find(address).unwrap_or_else(|said| panic!("`just test` installs prometheus: {said}"));
        let prometheus = Self { _process: process, _directory: directory, address };
        for target in targets {
            prometheus.until(&format!("up%7Binstance=%22{target}%22%7D==1"), |found| found.contains("\"metric\""));
        }
        prometheus
    }

    fn get(&self, path: &str) -> String {
        let mut client = Connection::open(self.address);
        client.send(format!("GET {path} HTTP/1.1\r\nhost: prometheus\r\nconnection: close\r\n\r\n"));
        client.end()
    }

    #[track_caller]
    pub fn until(&self, query: &str, is_so: impl Fn(&str) -> bool) {
        let begun = Instant::now();
        loop {
            let found = self.get(&format!("/api/v1/query?query={query}"));
            if is_so(&found) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{query}: {found}");
            thread::sleep(PAUSE);
        }
    }

    /// Waits until this alert fires for a server.
    #[track_caller]
    pub fn fires(&self, alert: &str, server: SocketAddr) {
        assert!(alerts().contains(&alert), "{alert}");
        self.fires_with(alert, &format!("instance=%22{server}%22"));
    }

    /// Waits until this alert fires for the servers together.
    #[track_caller]
    pub fn fires_for_all(&self, alert: &str) {
        self.fires_with(alert, "job=%22kvs%22");
    }

    #[track_caller]
    fn fires_with(&self, alert: &str, label: &str) {
        let query = format!("ALERTS%7Balertname=%22{alert}%22,alertstate=%22firing%22,{label}%7D");
        self.until(&query, |found| found.contains("\"metric\""));
    }

    /// Checks that none fires for a server.
    #[track_caller]
    pub fn is_quiet(&self, server: SocketAddr) {
        // One evaluation at least.
        self.until("count(ALERTS)%20or%20vector(0)", |found| found.contains("\"value\""));
        let found = self.get(&format!("/api/v1/query?query=ALERTS%7Binstance=%22{server}%22%7D"));
        assert!(found.contains("\"result\":[]"), "{found}");
    }
}
