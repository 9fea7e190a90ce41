//! Log of a server under test: files in its data directory, or, where `KVS_TEST_LOG` is the URL of a PostgreSQL server, a
//! database there, and where it is that of NATS, a stream there.

use std::path::Path;
use std::process::Command;

use super::server::kvs;

/// Ends a test that applies to the log in files only, when it runs with another one.
macro_rules! of_files {
    () => {
        if std::env::var_os("KVS_TEST_LOG").is_some() {
            return;
        }
    };
}
pub(crate) use of_files;

/// Returns a `kvs` command with the log of a data directory.
pub fn kvs_at(data: &Path) -> Command {
    let mut command = kvs();
    command.env("KVS_DATA_DIR", data);
    if let Ok(url) = std::env::var("KVS_TEST_LOG") {
        let log = if url.starts_with("nats://") { stream(&url, data) } else { database(&url, data) };
        command.env("KVS_TXLOG", log);
    }
    if let Ok(monitors) = std::env::var("KVS_TXLOG_MONITOR") {
        command.env("KVS_TXLOG_MONITOR", monitors);
    }
    command
}

/// Returns whether the log can be compacted: one in NATS keeps every entry.
pub fn is_compactable() -> bool {
    !std::env::var("KVS_TEST_LOG").is_ok_and(|url| url.starts_with("nats://"))
}

/// Returns the URL of the log of this directory.
fn stream(url: &str, data: &Path) -> String {
    let name = data.to_str().expect("a temporary path is text").replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    let servers = url.rsplit_once('/').expect("the URL names a log").0;
    format!("{servers}/{name}")
}

/// Returns the URL of the database of this directory, and creates it when it is missing.
fn database(url: &str, data: &Path) -> String {
    let name = data.to_str().expect("a temporary path is text").trim_start_matches('/').replace('/', "-");
    let made = Command::new("psql").args(["-Xq", "-c", &format!("CREATE DATABASE \"{name}\""), url]).output();
    let made = made.expect("psql can be run");
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success() || said.contains("already exists"), "{said}");
    url.replace("/postgres?", &format!("/{name}?"))
}
