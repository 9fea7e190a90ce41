//! Logs that were changed from outside: each is rejected with a one-line error that has the file and the remedy, or opened
//! correctly, and never changed by commands that only read. Corruption within files is covered by the tests of the log.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tempfile::TempDir;

use crate::support::mount::Mount;
use crate::support::nobody::{by_nobody, program_in};
use crate::support::server::{Server, Stopped, kvs, refused, serve, through};
use crate::support::wire::Connection;

/// Small segments, so that a short test has several.
const SMALL: [&str; 4] = ["--segment-bytes", "128KiB", "--max-value-bytes", "16KiB"];

fn temporary() -> TempDir {
    TempDir::new().expect("a temporary directory can be made")
}

/// A log of several segments.
fn stored() -> Stopped {
    let server = Server::start(&SMALL);
    let mut client = Connection::open(server.address());
    for number in 0..40 {
        assert_eq!(client.ask("PUT", &format!("/v1/{number}"), &[b'x'; 10_000]).status, 201);
    }
    server.terminate()
}

fn segment(log: &Path, number: u32) -> PathBuf {
    log.join(format!("{number:010}.seg"))
}

fn change(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(file).expect("it is there");
    change(&mut bytes);
    fs::write(file, bytes).expect("it can be written");
}

/// Starts a server that must fail; its last line must contain all of these texts.
#[track_caller]
fn refuses(data: &Path, expected: &[&str]) {
    let mut command = serve(data);
    command.args(SMALL);
    let Err((status, stopped)) = Server::try_spawn(command, temporary()) else { panic!("it serves") };
    let last = stopped.stderr().last().expect("it says why");
    assert_eq!(status.code(), Some(1), "{last}");
    for text in expected {
        assert!(last.starts_with("kvs: ") && last.contains(text), "{text:?} is not in: {last}");
    }
}

#[test]
fn invalid_log_files_are_rejected_by_name() {
    type Spoil = fn(&Path);
    let spoils: [(&str, Spoil, &[&str]); 10] = [
        ("the first is missing", |log| fs::remove_file(segment(log, 1)).unwrap(), &["0000000001.seg", "is missing"]),
        ("one is missing", |log| fs::remove_file(segment(log, 2)).unwrap(), &["0000000002.seg", "is missing"]),
        (
            "all are missing",
            |log| {
                (1..).map(|number| segment(log, number)).take_while(|file| fs::remove_file(file).is_ok()).for_each(drop)
            },
            &["no segments", "watermark"],
        ),
        (
            "one has another's name",
            |log| fs::rename(segment(log, 2), log.join("0000000077.seg")).unwrap(),
            &["0000000077.seg was named 0000000002.seg"],
        ),
        (
            "two are exchanged",
            |log| {
                fs::rename(segment(log, 1), log.join("one")).unwrap();
                fs::rename(segment(log, 2), segment(log, 1)).unwrap();
                fs::rename(log.join("one"), segment(log, 2)).unwrap();
            },
            &["was named"],
        ),
        (
            "one is of another log",
            |log| {
                fs::copy(segment(&stored().data().join("log"), 2), segment(log, 2)).unwrap();
            },
            &["0000000002.seg", "another log"],
        ),
        (
            "one is empty",
            |log| fs::write(segment(log, 2), "").unwrap(),
            &["0000000002.seg", "at byte 0", "kvs txlog verify"],
        ),
        (
            "one is cut off",
            |log| change(&segment(log, 2), |bytes| bytes.truncate(70_000)),
            &["0000000002.seg", "at byte", "kvs txlog verify"],
        ),
        (
            "one comes from the future",
            |log| {
                change(&segment(log, 2), |bytes| {
                    bytes[8..12].copy_from_slice(&99_u32.to_le_bytes());
                    let checksum = crc32c::crc32c(&bytes[..508]);
                    bytes[508..512].copy_from_slice(&checksum.to_le_bytes());
                });
            },
            &["0000000002.seg", "format version 99", "newer kvs"],
        ),
        ("one only looks like one", |log| fs::write(log.join("2.seg"), "mine").unwrap(), &["2.seg", "move it away"]),
    ];
    for (what, spoil, expected) in spoils {
        println!("{what}");
        let stopped = stored();
        spoil(&stopped.data().join("log"));
        refuses(stopped.data(), expected);
        let mut verify = kvs();
        verify.args(["txlog", "verify", "--data-dir"]).arg(stopped.data());
        refused(verify).with(1, &["is corrupted in "]);
    }
}

#[test]
fn foreign_files_are_kept_and_logged() {
    let stopped = stored();
    let log = stopped.data().join("log");
    let others = ["notes.txt", "0000000001.seg.bak", "core.123", "of others.tmp"];
    for name in others {
        fs::write(log.join(name), "mine").expect("the directory takes a file");
        fs::write(stopped.data().join(name), "mine").expect("the directory takes a file");
    }
    fs::create_dir(log.join("folder")).expect("the directory takes another");
    let server = stopped.restart(&SMALL);
    server.says("holds files that are not the log's");
    assert_eq!(Connection::open(server.address()).ask("GET", "/v1/39", b"").body, [b'x'; 10_000]);
    let stopped = server.terminate();
    for name in others {
        assert_eq!(fs::read(stopped.data().join("log").join(name)).expect("it is still there"), b"mine");
    }
}

#[test]
fn directory_below_unreadable_one_is_served() {
    let (home, program) = (temporary(), temporary());
    let data = home.path().join("data");
    fs::create_dir(&data).expect("the directory takes another");
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).expect("it is ours");
    mode(&data, 0o777);
    mode(program.path(), 0o755);
    mode(home.path(), 0o311);
    let serve = serve(&data);
    let mut command = through(program_in(program.path()).to_str().expect("a temporary path is text"), &serve);
    command.args(serve.get_args());
    let stopped = Server::spawn(by_nobody(command), temporary()).terminate();
    assert!(stopped.stderr().iter().all(|line| line.contains(" INFO ")), "{:?}", stopped.stderr());
    mode(home.path(), 0o755);
    assert!(segment(&data.join("log"), 1).exists());
}

#[test]
fn inaccessible_files_are_rejected() {
    let stopped = stored();
    let (data, log) = (stopped.data(), stopped.data().join("log"));
    let program = program_in(data);
    // All of it is accessible to all users at first.
    let files = fs::read_dir(&log).expect("it is there").map(|file| file.expect("it is there").path());
    for path in files.chain([data.to_owned(), log.clone(), data.join("LOCK")]) {
        fs::set_permissions(&path, Permissions::from_mode(0o777)).expect("it is ours");
    }
    let command = |args: &[&str]| {
        let mut command = through(program.to_str().expect("a temporary path is text"), &kvs());
        command.args(args).arg("--data-dir").arg(data).env("KVS_LISTEN", "127.0.0.1:0").stdout(Stdio::null());
        by_nobody(command)
    };
    let all: [&[&str]; 4] = [&["serve"], &["txlog", "verify"], &["txlog", "cat"], &["txlog", "compact"]];
    let closed = Permissions::from_mode(0o000);
    for (closed_now, expected) in
        [(segment(&log, 2), "0000000002.seg"), (log.clone(), "/log"), (data.join("LOCK"), "data")]
    {
        let before = fs::metadata(&closed_now).expect("it is there").permissions();
        fs::set_permissions(&closed_now, closed.clone()).expect("it is ours");
        for args in all {
            println!("{args:?} without {}", closed_now.display());
            let data = data.to_str().expect("a temporary path is text");
            refused(command(args)).with(1, &[data, expected, "ermission denied", "change its owner or mode"]);
        }
        fs::set_permissions(&closed_now, before).expect("it is ours");
    }
}

#[test]
fn read_only_file_system_is_rejected() {
    let disk = Mount::tmpfs();
    disk.serve().terminate();
    disk.remount("ro");
    let data = disk.data();
    refuses(&data, &[data.to_str().expect("a temporary path is text"), "read-only file system"]);
    for command in ["verify", "cat", "export", "compact"] {
        let mut log = kvs();
        log.args(["txlog", command, "--data-dir"]).arg(&data);
        refused(log).with(1, &[data.to_str().expect("a temporary path is text"), "read-only file system"]);
    }
    disk.remount("rw");
    disk.serve().terminate();
}
