//! Which log a server under test has: files in its data directory or, where `KVS_TEST_LOG` is the URL of a PostgreSQL, a
//! database of the same name there.

use std::path::Path;
use std::process::Command;

use crate::server::kvs;

/// At the head of a test of what is in files, or of what only they can do: with another log there is nothing to test.
macro_rules! of_files {
    () => {
        if std::env::var_os("KVS_TEST_LOG").is_some() {
            return;
        }
    };
}
pub(crate) use of_files;

/// `kvs`, with the log that belongs to a data directory.
pub fn kvs_at(data: &Path) -> Command {
    let mut command = kvs();
    command.env("KVS_DATA_DIR", data);
    if let Ok(url) = std::env::var("KVS_TEST_LOG") {
        command.env("KVS_TXLOG", database(&url, data));
    }
    command
}

/// The URL of the database for this directory, which is made unless it is there.
fn database(url: &str, data: &Path) -> String {
    let name = data.to_str().expect("a temporary path is text").trim_start_matches('/').replace('/', "-");
    let made = Command::new("psql").args(["-Xq", "-c", &format!("CREATE DATABASE \"{name}\""), url]).output();
    let made = made.expect("psql can be run");
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success() || said.contains("already exists"), "{said}");
    url.replace("/postgres?", &format!("/{name}?"))
}
