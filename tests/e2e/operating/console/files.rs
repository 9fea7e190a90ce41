//! What the console writes to files, and what it shows of times, errors and many shards.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use super::{console, get, lists, open, put};
use crate::support::backup::{backup, done, text};
use crate::support::server::{PATIENCE, Server, serve};
use crate::support::wire::{Connection, short};

/// Waits for the file with this end that a browser puts into a directory.
fn downloaded(directory: &Path, end: &str) -> PathBuf {
    let begun = Instant::now();
    loop {
        let entries = fs::read_dir(directory).expect("it can be listed");
        let mut entries = entries.map(|entry| entry.expect("it can be read").path());
        if let Some(file) = entries.find(|file| text(file).ends_with(end)) {
            return file;
        }
        assert!(begun.elapsed() < PATIENCE, "no file *{end} is there");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn value_and_backup_are_downloaded_without_token() {
    let server = Server::start(&[]);
    put(&server, "folder/a", b"value\r\n\xff");
    let page = console(&server);
    let files = TempDir::new().expect("a temporary directory can be made");
    page.call("Page.setDownloadBehavior", json!({ "behavior": "allow", "downloadPath": files.path() }));
    page.click("#take-backup");
    page.says("#backup-state", "The browser downloads it");
    let file = downloaded(files.path(), ".backup");
    assert!(done(backup(server.admin(), &["--verify", text(&file)])).contains("sound: 1 entries"));
    open(&page, "folder/a");
    page.click("#download");
    let file = downloaded(files.path(), "folder_a");
    assert_eq!(fs::read(file).expect("it is there"), b"value\r\n\xff");
    page.is_clean();
}

#[test]
fn ttl_is_that_of_the_clock_of_the_server() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", &format!("{}?ttl=1800", short("a")), b"1").status, 201);
    let page = console(&server);
    page.value("(now => { Date.now = () => now() + 3600e3; })(Date.now.bind(Date))");
    open(&page, "a");
    let ttl = page.value("Number(document.querySelector('#ttl').value)").as_u64();
    assert!(ttl.is_some_and(|ttl| (1_000..=1_800).contains(&ttl)), "{ttl:?}");
    page.fill("#value", "2");
    page.click("#save");
    page.says("#value-state", "Saved");
    assert_eq!(get(&server, "a").as_deref(), Some(&b"2"[..]));
    page.is_clean();
}

#[test]
fn standby_shows_stale_keys_and_its_lag() {
    let primary = Server::start(&[]);
    put(&primary, "a", "1");
    let mut command = serve(primary.data());
    command.arg("--standby");
    let standby = Server::spawn(command, TempDir::new().expect("a temporary directory can be made"));
    let page = console(&standby);
    page.says("#parts", "standby of process");
    lists(&page, &["a"]);
    page.says("#list-state", "stale by at most");
    page.says("#figures", "Replication lag, entries");
    open(&page, "a");
    assert_eq!(page.value("document.querySelector('#value').value"), "1");
    page.fill("#value", "2");
    page.click("#save");
    page.says("#value-state", "Not done: ");
    assert_eq!(get(&primary, "a").as_deref(), Some(&b"1"[..]));
    page.is_clean();
}

#[test]
fn charts_show_errors_and_all_shards() {
    let server = Server::start(&["--shards", "8"]);
    put(&server, "a", "1");
    let status = |method: &str, key: &str, header: (&str, &str)| {
        Connection::open(server.address()).ask_with(method, &short(key), &[header], b"").status
    };
    let statuses = [
        status("GET", "a", ("accept", "*/*")),
        status("GET", "a", ("if-none-match", "\"1\"")),
        status("PUT", "a", ("content-range", "bytes 0-0/1")),
        status("GET", "b", ("accept", "*/*")),
        status("PUT", "a", ("if-match", "\"9\"")),
    ];
    assert_eq!(statuses, [200, 304, 400, 404, 412]);
    assert_eq!(Connection::open(server.admin()).ask("PUT", "/read-only", b"").status, 200);
    assert_eq!(status("PUT", "a", ("accept", "*/*")), 503);
    let page = console(&server);
    page.says("#figures", "5xx: ");
    page.says("#figures", "Response cache");
    page.says("#figures", "3 others, at most: ");
    page.is_clean();
}
