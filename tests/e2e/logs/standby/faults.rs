//! Standbys in a faulty directory, and with a paused primary: `/readyz` reports the fault, and the standby changes nothing.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};

use super::{directory, serve_in, stand_by};
use crate::support::load::SMALL_SEGMENTS;
use crate::support::mount::Mount;
use crate::support::readiness::{STANDS_BY, UP_TO_DATE, WELL, becomes_ready, ready};
use crate::support::requests::{get, put, shows};
use crate::support::server::{PATIENCE, Process, Server, refused, serve};
use crate::support::wire::{Connection, STALE};

const CANNOT_FOLLOW: &str = "[-]log standby cannot follow the log: ";

/// The files of the log, with their bytes, without the watermark and incomplete files.
fn files(data: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(data.join("log")).expect("there is a log").map(|file| file.expect("it can be read"));
    let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
    let names = names.filter(|name| !name.starts_with("watermark") && !name.ends_with(".tmp"));
    names.map(|name| (name.clone(), fs::read(data.join("log").join(&name)).expect("it is there"))).collect()
}

/// The segment that entries are appended to in a short test.
fn segment(data: &Path) -> File {
    let first = data.join("log/0000000001.seg");
    File::options().read(true).write(true).open(first).expect("it is there")
}

/// Waits until the standby has polled the log again, and found that there is a primary.
fn looks(standby: &Server) {
    let begun = Instant::now();
    loop {
        let asked = begun.elapsed();
        let answer = Connection::open(standby.address()).ask_with("GET", "/v1/a", &STALE, b"");
        let age = answer.header("kvs-stale-age-ms").expect("a standby answers with an age");
        if Duration::from_millis(age.parse().expect("it is a number")) < asked {
            return;
        }
        assert!(asked < PATIENCE, "the standby looks no more");
        thread::sleep(Duration::from_millis(5));
    }
}

fn pause(server: &Server) {
    server.signal(Signal::STOP);
    let pid = i32::try_from(server.pid()).ok().and_then(Pid::from_raw).expect("a child has a number");
    waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED).expect("a child can be waited for");
}

#[test]
fn paused_primary_keeps_log_until_killed() {
    let data = directory();
    let (primary, standby) = (serve_in(data.path(), &[]), stand_by(data.path(), &[]));
    assert_eq!(put(&primary, "a", "1"), 201);
    shows(&standby, "a", 200, "1");
    pause(&primary);
    let before = files(data.path());
    for _ in 0..10 {
        looks(&standby);
    }
    let (status, report) = ready(&standby);
    assert!(status == 200 && report.contains(STANDS_BY), "{status} {report}");
    assert_eq!((put(&standby, "a", "2"), get(&standby, "a")), (503, (200, "1".into())));
    assert!(files(data.path()) == before, "the standby wrote to the log");

    primary.signal(Signal::CONT);
    assert_eq!(put(&primary, "a", "3"), 201);
    shows(&standby, "a", 200, "3");
    pause(&primary);
    primary.kill();
    becomes_ready(&standby, 200, WELL);
    assert_eq!((get(&standby, "a"), put(&standby, "a", "4")), ((200, "3".into()), 201));
}

#[test]
fn standby_reports_corruption_and_touches_nothing() {
    let data = directory();
    let primary = serve_in(data.path(), &[]);
    assert_eq!(put(&primary, "a", "1"), 201);
    let standby = stand_by(data.path(), &[]);
    let segment = segment(data.path());
    let mut magic = [0; 1];
    segment.read_exact_at(&mut magic, 0).expect("it can be read");
    segment.write_all_at(b"?", 0).expect("it can be written");
    assert_eq!(put(&primary, "a", "2"), 201);
    becomes_ready(&standby, 503, CANNOT_FOLLOW);
    pause(&primary);
    let before = files(data.path());
    assert_eq!(get(&standby, "a"), (200, "1".into()));
    let mut command = serve(data.path());
    command.arg("--standby");
    refused(command).with(1, &["cannot follow the log in ", "0000000001.seg is damaged at byte 0"]);
    assert!(files(data.path()) == before, "a standby wrote to the log");
    primary.signal(Signal::CONT);
    segment.write_all_at(&magic, 0).expect("it can be written");
    becomes_ready(&standby, 200, UP_TO_DATE);
    shows(&standby, "a", 200, "2");
    primary.kill();
    becomes_ready(&standby, 200, WELL);
    assert_eq!((put(&standby, "a", "3"), get(&standby, "a")), (201, (200, "3".into())));
}

/// The last entry of the log is corrupt, which without a primary would be a torn write.
#[test]
fn standby_does_not_truncate_corrupt_end() {
    let data = directory();
    let (primary, standby) = (serve_in(data.path(), &[]), stand_by(data.path(), &[]));
    assert_eq!(put(&primary, "a", "1"), 201);
    shows(&standby, "a", 200, "1");
    pause(&standby);
    let value = "x".repeat(10_000);
    assert_eq!(put(&primary, "b", &value), 201);
    let bytes = fs::read(data.path().join("log/0000000001.seg")).expect("it is there");
    let at = bytes.windows(100).position(|bytes| bytes == &value.as_bytes()[..100]).expect("it is in the log") as u64;
    segment(data.path()).write_all_at(b"?", at).expect("it can be written");
    standby.signal(Signal::CONT);
    becomes_ready(&standby, 503, CANNOT_FOLLOW);
    assert_eq!((get(&standby, "a"), get(&standby, "b").0), ((200, "1".into()), 404));
    pause(&primary);
    let before = files(data.path());
    primary.kill();
    standby.says("the log ends with sequence 1, but 2 had been durable");
    let (status, _) = standby.ends();
    assert_eq!(status.code(), Some(1));
    assert!(files(data.path()) == before, "the standby changed the log");
}

#[test]
fn standby_leaves_newer_format_unchanged() {
    let data = directory();
    let (primary, standby) = (serve_in(data.path(), &[]), stand_by(data.path(), &[]));
    assert_eq!(put(&primary, "a", "1"), 201);
    shows(&standby, "a", 200, "1");
    let segment = segment(data.path());
    let mut head = [0; 512];
    segment.read_exact_at(&mut head, 0).expect("it can be read");
    let now = head;
    head[8..12].copy_from_slice(&99_u32.to_le_bytes());
    let checksum = crc32c::crc32c(&head[..508]);
    head[508..].copy_from_slice(&checksum.to_le_bytes());
    segment.write_all_at(&head, 0).expect("it can be written");
    assert_eq!(put(&primary, "a", "2"), 201);
    becomes_ready(&standby, 503, CANNOT_FOLLOW);
    let newer = "it has format version 99 and this binary reads 1 to 2; use the newer kvs that wrote it";
    becomes_ready(&standby, 503, newer);
    assert_eq!(get(&standby, "a"), (200, "1".into()));
    pause(&primary);
    let before = files(data.path());
    let mut command = serve(data.path());
    command.arg("--standby");
    refused(command).with(1, &["cannot follow the log in ", newer]);
    assert!(files(data.path()) == before, "a standby wrote to the log");
    primary.signal(Signal::CONT);
    // The primary is upgraded back.
    segment.write_all_at(&now, 0).expect("it can be written");
    becomes_ready(&standby, 200, UP_TO_DATE);
    segment.write_all_at(&head, 0).expect("it can be written");
    pause(&primary);
    let before = files(data.path());
    primary.kill();
    standby.says(newer);
    assert_eq!(standby.ends().0.code(), Some(1));
    assert!(files(data.path()) == before, "the standby changed the log");
}

/// With or without a primary, a standby without write permission could never take over.
#[test]
fn standby_in_read_only_directory_ends_at_once() {
    let disk = Mount::tmpfs();
    let primary = disk.serve();
    assert_eq!(put(&primary, "a", "1"), 201);
    let read_only = disk.read_only();
    let standby = |expected: &str| {
        let mut command = serve(&read_only.data());
        command.arg("--standby").args(SMALL_SEGMENTS);
        refused(command).with(1, &[expected]);
    };
    standby("Read-only file system");
    primary.terminate();
    standby("is on a read-only file system; give another directory with --data-dir");
}

/// The directory is replaced by that of another server, for instance by a wrong mount.
#[test]
fn standby_leaves_other_log_unchanged() {
    let root = directory();
    let [data, other]: [PathBuf; 2] = ["data", "other"].map(|name| root.path().join(name));
    let exchange = || renameat_with(CWD, &data, CWD, &other, RenameFlags::EXCHANGE).expect("they can be exchanged");
    let (primary, others) = (serve_in(&data, &[]), serve_in(&other, &[]));
    let standby = stand_by(&data, &[]);
    assert_eq!((put(&primary, "a", "1"), put(&others, "a", "other"), put(&others, "b", "other")), (201, 201, 201));
    shows(&standby, "a", 200, "1");
    exchange();
    becomes_ready(&standby, 503, CANNOT_FOLLOW);
    let another = "holds another log than the one that was followed; bring back the right one";
    becomes_ready(&standby, 503, another);
    assert_eq!((get(&standby, "a"), get(&standby, "b").0), ((200, "1".into()), 404));
    exchange();
    becomes_ready(&standby, 200, UP_TO_DATE);
    assert_eq!(put(&primary, "a", "2"), 201);
    shows(&standby, "a", 200, "2");
    exchange();
    becomes_ready(&standby, 503, another);
    pause(&others);
    let before = files(&data);
    others.kill();
    standby.says(another);
    assert_eq!(standby.ends().0.code(), Some(1));
    assert!(files(&data) == before, "the standby changed another log");
    exchange();
    assert_eq!((put(&primary, "a", "3"), get(&primary, "a")), (201, (200, "3".into())));
}

/// A primary that finds no space for the position file serves, and no standby can follow it.
#[test]
fn standby_reports_that_full_disk_has_no_position() {
    let disk = Mount::tmpfs();
    let primary = disk.serve();
    assert_eq!(put(&primary, "a", "1"), 201);
    primary.terminate();
    fs::remove_file(disk.data().join("log/position")).expect("it is there");
    let brim = disk.brim();
    let primary = disk.serve();
    primary.says("disk full: no position file, no standby can follow");
    let before = files(&disk.data());
    let mut command = serve(&disk.data());
    command.arg("--standby").args(SMALL_SEGMENTS);
    let mut standby = Process::spawn(command);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let report = Connection::open(standby.admin()).ask("GET", "/readyz", b"");
        assert_eq!(report.status, 503, "{}", report.text());
        let reason = "[-]log not open yet: cannot follow the log: the primary has published no position in ";
        if report.text().starts_with(reason) {
            break;
        }
        assert!(Instant::now() < deadline, "/readyz has no reason, but {}", report.text());
    }
    assert_eq!((put(&primary, "a", "2"), get(&primary, "a")), (201, (200, "2".into())));
    assert_eq!(files(&disk.data()).len(), before.len(), "the standby made or removed files of the log");
    fs::remove_file(brim).expect("it is there");
    primary.terminate();
    let promoted = standby.stderr.find(|line| line.contains("no other process uses ").then_some(()));
    promoted.unwrap_or_else(|said| panic!("it did not become primary, but printed:\n{said}"));
    standby.stderr.find(|line| line.contains("serving on http://").then_some(())).expect("it serves");
    let answer = Connection::open(standby.admin()).ask("GET", "/v1/a", b"");
    assert_eq!((answer.status, answer.text()), (200, "2"));
    standby.signal(Signal::TERM);
    assert!(standby.wait().success());
}

#[test]
fn standby_takes_over_on_full_disk() {
    let disk = Mount::tmpfs();
    let primary = disk.serve();
    let standby = stand_by(&disk.data(), &SMALL_SEGMENTS);
    let brim = disk.brim();
    let mut client = Connection::open(primary.address());
    let mut stored = 0;
    while client.ask("PUT", &format!("/v1/key-{stored}"), &[b'x'; 10_000]).status == 201 {
        stored += 1;
    }
    assert!(stored > 0, "there was room for some");
    becomes_ready(&primary, 200, "[+]log ok, but cannot allocate the next segment of the log, ");
    becomes_ready(&standby, 200, UP_TO_DATE);
    shows(&standby, &format!("key-{}", stored - 1), 200, &"x".repeat(10_000));
    primary.kill();
    standby.says("promoted to primary");
    assert_eq!(get(&standby, &format!("key-{}", stored - 1)).0, 200);
    fs::remove_file(brim).expect("it is there");
    becomes_ready(&standby, 200, WELL);
    let deadline = Instant::now() + PATIENCE;
    while put(&standby, "again", "x") != 201 {
        assert!(Instant::now() < deadline, "there is room again, and nothing is stored");
    }
}
