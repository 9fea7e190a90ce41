//! Online backups: taken while the server works, restored elsewhere, and rejected when a byte is corrupted.

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::support::backup::{backup, done, large, large_with, restore, restored, take, temporary, text};
use crate::support::guests::{DEFAULT_GUEST, copy_of};
use crate::support::load::SMALL_SEGMENTS;
use crate::support::memory::{forget_peak, memory, peak, peak_of};
use crate::support::metrics::{Metrics, until};
use crate::support::server::{Server, kvs, refused, serve, through};
use crate::support::swap::swaps;
use crate::support::wire::Connection;

/// An acknowledged write, and its sequence.
type Written = (u64, String, String);

const CLIENTS: usize = 4;
const KEYS: usize = 20;
/// Acknowledged writes between two backups.
const WRITES: usize = 1_000;

/// Writes to its own keys until `stop`.
fn write_on(address: SocketAddr, client: usize, stop: &AtomicBool, acknowledged: impl Fn()) -> Vec<Written> {
    let (mut connection, mut all) = (Connection::open(address), Vec::new());
    for count in 0.. {
        let (key, value) = (format!("{client}-{}", count % KEYS), format!("{count}{}", "v".repeat(count % 700)));
        let answer = connection.ask("PUT", &format!("/v1/{key}"), value.as_bytes());
        assert_eq!(answer.status, 201);
        all.push((answer.etag().expect("a write has a sequence"), key, value));
        acknowledged();
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    all
}

/// Checks that a server has all writes acknowledged up to a sequence, and none after it.
#[track_caller]
fn holds(server: &Server, written: &[Written], until: u64) {
    let mut expected = HashMap::new();
    for (sequence, key, value) in written.iter().filter(|written| written.0 <= until) {
        let newest = expected.entry(key.as_str()).or_insert((*sequence, value.as_str()));
        *newest = (*newest).max((*sequence, value.as_str()));
    }
    let mut client = Connection::open(server.address());
    for client_number in 0..CLIENTS {
        for key in 0..KEYS {
            let key = format!("{client_number}-{key}");
            let answer = client.ask("GET", &format!("/v1/{key}"), b"");
            let held = (answer.status == 200).then(|| (answer.etag().expect("it has a tag"), answer.text()));
            assert_eq!(held, expected.get(key.as_str()).copied(), "{key} up to {until}");
        }
    }
}

#[test]
fn backups_under_load_hold_what_was_acknowledged() {
    let server = Server::start(&SMALL_SEGMENTS);
    let (files, stop, counted) = (temporary(), AtomicBool::new(false), std::sync::mpsc::channel());
    let (acknowledged, counts) = counted;
    let file = |name: &str| files.path().join(name);
    let (mut ends, mut written) = (Vec::new(), Vec::new());
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (acknowledged, stop, address) = (acknowledged.clone(), &stop, server.address());
                // After a failed test, the counts do not matter.
                scope.spawn(move || write_on(address, client, stop, || acknowledged.send(()).unwrap_or_default()))
            })
            .collect();
        let _ended = End(&stop);
        let some = || (0..WRITES).for_each(|_| counts.recv().expect("the clients go on"));
        some();
        ends.push(take(&server, &file("0"), &[]));
        some();
        // The log is compacted continuously, and the guest swapped during a backup.
        thread::scope(|scope| {
            let swapping = scope.spawn(|| swaps(&server, &copy_of(DEFAULT_GUEST)));
            ends.push(take(&server, &file("1"), &["--since", &ends[0].to_string()]));
            swapping.join().expect("it swaps");
        });
        some();
        ends.push(take(&server, &file("2"), &["--since", &ends[1].to_string()]));
        ends.push(take(&server, &file("full"), &[]));
        stop.store(true, Ordering::Relaxed);
        written = clients.into_iter().flat_map(|client| client.join().expect("it continues")).collect();
    });
    assert!(Metrics::of(&server).get("kvs_txlog_compactions_total") > 0.0);
    let chain: Vec<_> = ["0", "1", "2"].map(file).into();
    for count in 1..=chain.len() {
        holds(&restored(&chain[..count], &[]), &written, ends[count - 1]);
    }
    holds(&restored(&[file("full")], &[]), &written, ends[3]);
    holds(&restored(&chain, &["--until", &ends[1].to_string()]), &written, ends[1]);
}

struct End<'s>(&'s AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn tags_and_positions_of_lost_future_are_rejected() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"1").etag(), Some(1));
    let files = temporary();
    let full = files.path().join("full");
    assert_eq!(take(&server, &full, &[]), 1);
    assert_eq!(client.ask("PUT", "/v1/a", b"2").etag(), Some(2));
    let restored = restored(&[full], &[]);
    let mut client = Connection::open(restored.address());
    assert_eq!(client.ask_with("PUT", "/v1/a", &[("if-match", "\"2\"")], b"3").status, 412);
    for (tag, status) in [("\"2\"", 200), ("\"1\"", 206)] {
        let range = [("range", "bytes=0-0"), ("if-range", tag)];
        assert_eq!(client.ask_with("GET", "/v1/a", &range, b"").status, status, "{tag}");
    }
    assert_eq!(client.ask_for_head("GET", "/v1?watch&since=2", &[]).status, 410);
    let mut client = Connection::open(restored.address());
    assert_eq!(client.ask_with("PUT", "/v1/a", &[("if-match", "\"1\"")], b"3").status, 201);
    // So is an incremental backup since then.
    let answer = Connection::open(restored.admin()).ask("GET", "/backup?since=2", b"");
    answer.says(410, "sequence 2 is not in the history of this log; take a full backup");
    refused(backup(restored.admin(), &["-o", "-", "--since", "2"])).with(1, &["no backup", "(410)"]);
}

#[test]
fn backup_endpoint_rejects_invalid_queries() {
    let server = Server::start(&["--admin", "0.0.0.0:0", "--tokens", "/dev/null"]);
    let ask = |method: &str, target: &str| Connection::open(server.admin()).ask(method, target, b"").status;
    assert_eq!(ask("GET", "/backup"), 401);
    let server = Server::start(&[]);
    let ask = |method: &str, target: &str| Connection::open(server.admin()).ask(method, target, b"").status;
    for target in ["/backup?since=", "/backup?since=x", "/backup?since=-1", "/backup?until=1"] {
        assert_eq!(ask("GET", target), 400, "{target}");
    }
    assert_eq!((ask("POST", "/backup"), ask("GET", "/backup?since=1")), (405, 410));
    assert_eq!(Connection::open(server.admin()).ask_for_head("GET", "/backup", &[]).status, 200);
}

#[test]
fn stalled_backup_client_is_disconnected() {
    let server = large();
    let mut stalled = Connection::open(server.admin());
    stalled.send("GET /backup HTTP/1.1\r\nhost: kvs\r\n\r\n");
    let mut busy = 0;
    let file = temporary().path().join("missing/backup");
    server.says("the client took nothing for 200ms (--backup-timeout)");
    // Truncated in the middle, not at a possible end.
    assert_eq!(stalled.try_read(true).expect("it had begun").status, 200);
    let cut_off = loop {
        match stalled.try_chunk() {
            Ok(Some(_)) => busy += 1,
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    assert!(cut_off && busy > 0, "{busy} pieces");
    let failed = until(&server, "it failed", |now| now.get("kvs_backup_failures_total") == 1.0);
    assert_eq!(failed.get("kvs_backup_last_success_timestamp_seconds"), 0.0);
    refused(backup(server.admin(), &["-o", text(&file)])).with(1, &["cannot write ", "missing/backup"]);
    let files = temporary();
    assert_eq!(take(&server, &files.path().join("full"), &[]), 24);
    let taken = until(&server, "it is counted", |now| now.get("kvs_backup_last_success_timestamp_seconds") > 0.0);
    let size = fs::metadata(files.path().join("full")).expect("it is there").len();
    assert_eq!(taken.get("kvs_backup_last_bytes"), size as f64);
}

/// Begins a backup, of which most is not sent before it is read.
fn begun(server: &Server) -> Connection {
    let mut client = Connection::open(server.admin());
    client.send("GET /backup HTTP/1.1\r\nhost: kvs\r\n\r\n");
    assert_eq!(client.try_read(true).expect("it begins").status, 200);
    client
}

/// Reads the rest of a backup, and returns its file.
fn completed(mut client: Connection, files: &Path) -> PathBuf {
    let mut bytes = Vec::new();
    while let Some(chunk) = client.chunk() {
        bytes.extend(chunk);
    }
    let file = files.join("full");
    fs::write(&file, bytes).expect("it can be written");
    file
}

#[test]
fn backup_over_a_whole_swap_is_sound() {
    let server = large_with(&["--probation", "1ms"]);
    let client = begun(&server);
    swaps(&server, &copy_of(DEFAULT_GUEST));
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/later", b"1").status, 201);
    assert_eq!(Metrics::of(&server).get("kvs_backup_last_success_timestamp_seconds"), 0.0);
    let files = temporary();
    let file = completed(client, files.path());
    let restored = restored(&[file], &[]);
    let has = |key: &str| Connection::open(restored.address()).ask_for_head("HEAD", &format!("/v1/{key}"), &[]).status;
    assert_eq!(((0..24).filter(|key| has(&key.to_string()) == 200).count(), has("later")), (24, 404));
}

#[test]
fn backup_over_a_compaction_is_sound() {
    let server = large_with(&["--backup-timeout", "10m"]);
    let client = begun(&server);
    let compactions = || Metrics::of(&server).get("kvs_txlog_compactions_total");
    let before = compactions();
    let mut written: Vec<(u64, u64)> = (1..=24).map(|sequence| (sequence, sequence - 1)).collect();
    let mut writer = Connection::open(server.address());
    while compactions() == before {
        let key = written.len() as u64 % 24;
        let answer = writer.ask("PUT", &format!("/v1/{key}"), &vec![b'w'; 1 << 20]);
        written.push((answer.etag().expect("it is written"), key));
        assert!(written.len() < 1_000, "the log is not compacted");
    }
    assert_eq!(Metrics::of(&server).get("kvs_backup_last_success_timestamp_seconds"), 0.0);
    let files = temporary();
    let file = completed(client, files.path());
    let contents = done(backup(server.admin(), &["--verify", text(&file), "--output", "json"]));
    let contents: serde_json::Value = serde_json::from_str(&contents).expect("it is JSON");
    let end: u64 = contents["sequence"].as_str().and_then(|end| end.parse().ok()).expect("it is a sequence");
    let restored = restored(&[file], &[]);
    for key in 0..24 {
        let newest = written.iter().rfind(|(sequence, of)| *of == key && *sequence <= end).map(|newest| newest.0);
        let head = Connection::open(restored.address()).ask_for_head("HEAD", &format!("/v1/{key}"), &[]);
        assert_eq!((head.status, head.etag()), (200, newest), "{key} up to {end}");
    }
}

#[test]
fn backup_shows_its_progress() {
    let server = large_with(&[]);
    for (target, entries) in [("/backup", "24"), ("/backup?since=20", "4")] {
        let mut client = Connection::open(server.admin());
        let head = client.ask_for_head("GET", target, &[]);
        assert_eq!((head.status, head.header("kvs-backup-entries")), (200, Some(entries)), "{target}");
        // Until its end, since one is taken at a time.
        while client.chunk().is_some() {}
    }
    let files = temporary();
    // `script` runs the command in a terminal.
    let mut script = through("script", &backup(server.admin(), &[]));
    let command = format!("{} backup -o {}", kvs_tests::binary(), text(&files.path().join("full")));
    script.args(["--quiet", "--return", "--command", &command, "/dev/null"]);
    let seen = done(script);
    assert!(seen.contains("of 24 entries"), "{seen}");
}

#[test]
fn memory_of_backup_and_restore_is_bounded() {
    // A log of 192 MiB, of which the store has a few.
    let server = Server::start(&["--retain", "1h", "--durability", "os"]);
    let mut client = Connection::open(server.address());
    for n in 0..192 {
        assert_eq!(client.ask("PUT", &format!("/v1/{}", n % 4), &vec![n; 1 << 20]).status / 100, 2);
    }
    let files = temporary();
    let file = files.path().join("full");
    let before = memory(&server);
    forget_peak(&server);
    assert_eq!(take(&server, &file, &[]), 192);
    let grown = peak(&server).saturating_sub(before);
    assert!(grown < 16 << 10, "memory grew by {grown} KiB");
    let data = temporary();
    let restored = peak_of(&restore(&[file], &["--data-dir", text(data.path())]));
    assert!(restored < 64 << 10, "the restore took {restored} KiB");
}

#[test]
fn single_backup_runs_and_ends_with_its_client() {
    let server = large();
    let mut first = Connection::open(server.admin());
    first.send("GET /backup HTTP/1.1\r\nhost: kvs\r\n\r\n");
    assert_eq!(first.try_read(true).expect("it begins").status, 200);
    let second = Connection::open(server.admin()).ask("GET", "/backup", b"");
    second.says(409, "another backup is in progress; try again when it is complete");
    drop(first);
    server.says("the backup failed: the client ");
    assert_eq!(take(&server, &temporary().path().join("full"), &[]), 24);
}

#[test]
fn failed_backup_keeps_previous_file() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    let files = temporary();
    let file = files.path().join("full");
    client.ask("PUT", "/v1/a", b"1");
    take(&server, &file, &[]);
    let before = fs::read(&file).expect("it is there");
    client.ask("PUT", "/v1/b", &[b'v'; 100_000]);
    // Limits files to 4 KiB, and ignores the signal for larger ones.
    let command = backup(server.admin(), &["-o", text(&file)]);
    let mut limited = through("sh", &command);
    let script = "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\"";
    limited.args(["-c", script]).arg(command.get_program()).args(command.get_args());
    refused(limited).with(1, &["File too large"]);
    assert_eq!(fs::read(&file).expect("it is there"), before);
    assert_eq!(fs::read_dir(files.path()).expect("it can be listed").count(), 1);
    let mut full = backup(server.admin(), &["-o", "-"]);
    full.stdout(fs::File::options().write(true).open("/dev/full").expect("it is there"));
    let said = full.output().expect("the binary can be started");
    assert!(!said.status.success());
    // A reader that has left does not have all of it.
    let mut unread = backup(server.admin(), &["-o", "-"]).stdout(Stdio::piped()).spawn().expect("it can be started");
    drop(unread.stdout.take());
    assert_eq!(unread.wait().expect("it ends").code(), Some(1));
}

#[test]
fn backup_from_standard_output_is_verified_and_restored() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/a", b"1");
    client.ask("PUT", "/v1/b?ttl=1000", b"2");
    let files = temporary();
    let file = files.path().join("full");
    let mut command = backup(server.admin(), &["-o", "-"]);
    command.stdout(fs::File::create(&file).expect("a file can be made"));
    assert!(command.status().expect("the binary can be started").success());
    let printed = done(backup(server.admin(), &["--verify", text(&file)]));
    assert!(printed.ends_with("the backup is sound: 2 entries after sequence 0 up to 2\n"), "{printed}");

    let data = temporary();
    let target = ["--data-dir", text(data.path())];
    let sound = fs::read(&file).expect("it is there");
    for (spoil, expected) in [
        (sound[..sound.len() - 1].to_vec(), "is cut off at byte "),
        ([&sound[..70], b"x", &sound[71..]].concat(), "is corrupted at byte 64"),
        (b"text\n".to_vec(), "is cut off at byte 5"),
        ([b"x".to_vec(), sound.clone()].concat(), "it is not a backup of kvs"),
    ] {
        fs::write(&file, spoil).expect("it can be written");
        refused(backup(server.admin(), &["--verify", text(&file)])).with(1, &[expected, text(&file)]);
        refused(restore(std::slice::from_ref(&file), &target)).with(1, &[expected, text(&file)]);
        assert!(!data.path().join("log").exists());
    }
    fs::write(&file, &sound).expect("it can be written");
    refused(restore(&[file.clone(), files.path().join("none")], &target)).with(1, &["cannot open", "none"]);
    refused(restore(std::slice::from_ref(&file), &["--until", "soon"])).with(2, &["--until", "must be a sequence"]);
    done(restore(std::slice::from_ref(&file), &target));
    refused(restore(&[file], &target)).with(1, &["there is a log in", "already", "--data-dir"]);
    let server = Server::spawn(serve(data.path()), data);
    assert_eq!(Connection::open(server.address()).ask("GET", "/v1/b", b"").text(), "2");
}

#[test]
fn history_of_key_has_all_entries() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for value in ["1", "2"] {
        assert_eq!(client.ask("PUT", "/v1/a%20%C3%A9", value.as_bytes()).status, 201);
        assert_eq!(client.ask("PUT", "/v1/b", value.as_bytes()).status, 201);
    }
    assert_eq!(client.ask("DELETE", "/v1/a%20%C3%A9", b"").status, 200);
    let history = |args: &[&str]| {
        let mut command = kvs();
        command.arg("history").args(args).env("KVS_ADMIN", server.admin().to_string());
        command
    };
    let lines = |args: &[&str]| -> Vec<(String, String, serde_json::Value)> {
        let printed = done(history(args));
        let parsed = printed.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("it is JSON"));
        let fields = parsed.map(|line| {
            let text = |name: &str| line[name].as_str().expect("it is text").to_owned();
            (text("sequence"), text("type"), line["value"].clone())
        });
        fields.collect()
    };
    let line = |sequence: &str, kind: &str, value| (sequence.to_owned(), kind.to_owned(), value);
    let (first, second) = (line("1", "put", "1".into()), line("3", "put", "2".into()));
    let deleted = line("5", "delete", serde_json::Value::Null);
    assert_eq!(lines(&["a é"]), [first.clone(), second.clone(), deleted.clone()]);
    assert_eq!((lines(&["a é", "--at", "2"]), lines(&["a é", "--at", "3"])), (vec![first], vec![second]));
    assert_eq!((lines(&["a é", "--at", "5"]), lines(&["nothing"])), (vec![deleted], vec![]));
    refused(history(&["a é", "--at", "0"])).with(1, &["no history", "(404)"]);
    refused(history(&["a é", "--at", "6"])).with(1, &["sequence 6 is not in the history", "(410)"]);
    let ask = |method: &str, target: &str| Connection::open(server.admin()).ask(method, target, b"").status;
    assert_eq!((ask("GET", "/history"), ask("GET", "/history?at=1"), ask("PUT", "/history?key=a")), (400, 400, 405));
}

#[test]
fn read_only_server_rejects_writes_after_restart() {
    let server = Server::start(&[]);
    let ask = |server: &Server, method: &str, path: &str| Connection::open(server.address()).ask(method, path, b"1");
    assert_eq!(ask(&server, "PUT", "/v1/a").status, 201);
    let read_only = |server: &Server, state: &str| {
        let mut command = kvs();
        command.args(["read-only", state]).env("KVS_ADMIN", server.admin().to_string());
        assert_eq!(done(command), format!("{state}\n"));
    };
    let gauge = |server: &Server| Metrics::of(server).get("kvs_read_only");
    assert_eq!(gauge(&server), 0.0);
    read_only(&server, "on");
    let is_read_only = |server: &Server| {
        for (method, path) in [("PUT", "/v1/a"), ("DELETE", "/v1/a"), ("POST", "/v1")] {
            let answer = ask(server, method, path);
            answer.says(503, "the server is read-only, for maintenance; try again later");
            assert_eq!(answer.header("retry-after"), Some("1"));
        }
        assert_eq!((ask(server, "GET", "/v1/a").text(), gauge(server)), ("1", 1.0));
        let ready = Connection::open(server.admin()).ask("GET", "/readyz", b"");
        assert_eq!(ready.status, 200);
        assert!(ready.text().contains("[+]log ok, but read-only: writes are rejected"), "{}", ready.text());
    };
    is_read_only(&server);
    let server = server.terminate().restart(&[]);
    server.says("read-only since before the start");
    is_read_only(&server);
    Connection::open(server.admin()).ask("GET", "/read-only", b"").says(200, "on");
    read_only(&server, "off");
    assert_eq!((ask(&server, "PUT", "/v1/a").status, gauge(&server)), (201, 0.0));
    let server = server.terminate().restart(&[]);
    assert_eq!(ask(&server, "DELETE", "/v1/a").status, 200);
    assert_eq!(Connection::open(server.admin()).ask("POST", "/read-only", b"").status, 405);
}
