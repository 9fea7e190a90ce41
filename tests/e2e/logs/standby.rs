//! Standbys on a log in files: two processes on one data directory.

mod faults;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit};
use tempfile::TempDir;

use crate::support::backup::{done, restored, take};
use crate::support::events::Events;
use crate::support::guests::{DEFAULT_GUEST, copy_of};
use crate::support::linear::clients::{Stage, read_on};
use crate::support::linear::plan::OPERATIONS;
use crate::support::linear::{AT_ONCE, judge};
use crate::support::load::{Clients, SMALL_SEGMENTS, SaysOver, under_load};
use crate::support::metrics::Metrics;
use crate::support::readiness::{STANDS_BY, UP_TO_DATE, WELL, becomes_ready, ready};
use crate::support::requests::{get, put, shows};
use crate::support::server::{PATIENCE, Server, kvs, serve};
use crate::support::swap::{status, swap};
use crate::support::wire::Connection;
use crate::support::zoo;

fn directory() -> TempDir {
    TempDir::new().expect("a temporary directory can be made")
}

/// Serves a directory that is shared with other processes, and kept after the end of this one.
fn serve_in(data: &Path, args: &[&str]) -> Server {
    let mut command = serve(data);
    command.args(args);
    Server::spawn(command, directory())
}

fn stand_by(data: &Path, args: &[&str]) -> Server {
    let server = serve_in(data, &[&["--standby", "--stale-reads"], args].concat());
    becomes_ready(&server, 200, STANDS_BY);
    server
}

/// The files of the log.
fn names(data: &Path) -> Vec<String> {
    let names = fs::read_dir(data.join("log")).expect("there is a log");
    let mut names: Vec<_> =
        names.map(|entry| entry.expect("it can be read").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn standby_follows_primary_and_writes_nothing() {
    let data = directory();
    let primary = serve_in(data.path(), &[]);
    assert_eq!((put(&primary, "a", "1"), put(&primary, "b", "1")), (201, 201));
    let standby = stand_by(data.path(), &["--shards", "3"]);
    assert_eq!(get(&standby, "a"), (200, "1".into()));
    let mut watch = Events::open(&standby, "/v1?watch&prefix=a", &[]);
    assert_eq!(put(&primary, "a", "2"), 201);
    let event = watch.next().expect("the watch continues");
    assert_eq!((event.id, &event.data["value"]), (3, &"2".into()));
    shows(&standby, "a", 200, "2");
    becomes_ready(&standby, 200, UP_TO_DATE);
    let refused = Connection::open(standby.address()).ask("PUT", "/v1/a", b"");
    refused.says(503, &format!("this server stands by; another one takes writes; the primary is {}", primary.url("")));
    let metrics = Connection::open(standby.admin()).ask("GET", "/metrics", b"");
    for line in ["\nkvs_txlog_role 1\n", "\nkvs_txlog_replication_lag_entries 0\n", "\nkvs_txlog_sequence 3\n"] {
        assert!(metrics.text().contains(line), "{line:?} is not in {}", metrics.text());
    }
    let before = names(data.path());
    standby.kill();
    assert_eq!(names(data.path()), before);
    primary.terminate();
}

#[test]
fn standby_reports_memory_of_its_guest() {
    let data = directory();
    let primary = serve_in(data.path(), &[]);
    let standby = stand_by(data.path(), &[]);
    let mut watch = Events::open(&standby, "/v1?watch&prefix=large-31", &[]);
    let before = Metrics::of(&standby).get("kvs_guest_memory_bytes");
    let value = "x".repeat(1 << 20);
    for n in 0..32 {
        assert_eq!(put(&primary, &format!("large-{n}"), &value), 201);
    }
    // A read would bring the metric up to date; a change is reported when it is applied.
    watch.next().expect("the watch continues");
    let after = Metrics::of(&standby).get("kvs_guest_memory_bytes");
    assert!(after >= before + f64::from(24 << 20), "{before} to {after}");
}

/// A swap is persisted in the data directory, so the standby serves the guest of its primary, also after a takeover.
#[test]
fn standby_serves_guest_of_its_primary() {
    let data = directory();
    let primary = serve_in(data.path(), &SHORT);
    let standby = stand_by(data.path(), &SHORT);
    let (first, other) = (digest(&primary), copy_of(DEFAULT_GUEST));
    let reason = "this server stands by and serves the guest of its primary; swap the guest there";
    swap(&standby, &other).says(409, reason);
    assert_eq!(Connection::open(standby.admin()).ask("PUT", "/guest?dry-run", &other).status, 200);
    assert_eq!((swap(&primary, &other).status, put(&primary, "a", "1")), (200, 201));
    let follows = |before: &str| {
        let begun = Instant::now();
        // Also until its probation is over.
        while digest(&standby) == before || !status(&standby)["swap"].is_null() {
            assert!(begun.elapsed() < PATIENCE, "the standby keeps its guest");
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(digest(&standby), digest(&primary));
    };
    follows(&first);
    let second = digest(&primary);
    assert_eq!(Connection::open(primary.admin()).ask("DELETE", "/guest", b"").status, 200);
    follows(&second);
    assert_eq!(swap(&primary, &other).status, 200);
    follows(&first);
    primary.kill();
    becomes_ready(&standby, 200, WELL);
    assert_eq!((digest(&standby), get(&standby, "a")), (second, (200, "1".into())));
    assert_eq!(Connection::open(standby.admin()).ask("DELETE", "/guest", b"").status, 200);
    assert_eq!(digest(&standby), first);
}

const SHORT: [&str; 2] = ["--probation", "100ms"];

fn digest(server: &Server) -> String {
    status(server)["sha256"].as_str().expect("a digest is text").to_owned()
}

/// A guest that the primary was given on its command line: a standby serves it if it was given the same, or is not ready.
#[test]
fn standby_reports_that_its_primary_has_another_guest() {
    let data = directory();
    let file = data.path().join("named.wasm");
    fs::write(&file, copy_of(DEFAULT_GUEST)).expect("the directory takes a file");
    let file = file.to_str().expect("a temporary path is text");
    let primary = serve_in(data.path(), &[file, SHORT[0], SHORT[1]]);
    assert_eq!(put(&primary, "a", "1"), 201);
    let named = digest(&primary);
    let standby = stand_by(data.path(), &[file, SHORT[0], SHORT[1]]);
    let other = serve_in(data.path(), &["--standby", SHORT[0], SHORT[1]]);
    let differs = format!(
        "[-]guest of the primary this server serves the built-in guest, and its primary the guest with SHA-256 {named}; "
    );
    becomes_ready(&other, 503, &differs);
    other.says("the primary serves the guest with SHA-256 ");
    // A swap there is followed by both.
    assert_eq!(Connection::open(primary.admin()).ask("DELETE", "/guest", b"").status, 200);
    becomes_ready(&other, 200, STANDS_BY);
    let begun = Instant::now();
    while digest(&standby) == named {
        assert!(begun.elapsed() < PATIENCE, "a standby that was given a guest follows no swap");
        thread::sleep(Duration::from_millis(20));
    }
    standby.terminate();
    primary.terminate();
    becomes_ready(&other, 200, WELL);
    other.terminate();

    let primary = serve_in(data.path(), &[file, SHORT[0], SHORT[1]]);
    assert_eq!(digest(&primary), named);
    let other = serve_in(data.path(), &["--standby", SHORT[0], SHORT[1]]);
    becomes_ready(&other, 503, &differs);
    primary.kill();
    other.says("took over with another guest than the primary had: that was the guest with SHA-256 ");
    becomes_ready(&other, 503, &differs);
    // As an operator corrects it.
    assert_eq!(swap(&other, &copy_of(DEFAULT_GUEST)).status, 200);
    becomes_ready(&other, 200, WELL);
    assert_eq!((digest(&other), get(&other, "a")), (named, (200, "1".into())));
}

/// As with too many connections. The files of the primary do not change again.
#[test]
fn guest_of_primary_is_followed_after_a_shortage() {
    let data = directory();
    let (primary, standby) = (serve_in(data.path(), &SHORT), stand_by(data.path(), &SHORT));
    let pid = Pid::from_raw(standby.pid().cast_signed());
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let limit = Rlimit { current: Some(3), maximum };
    let before = prlimit(pid, Resource::Nofile, limit).expect("a child can be limited");
    assert_eq!(swap(&primary, &copy_of(DEFAULT_GUEST)).status, 200);
    standby.says("the guest cannot be read again from ");
    prlimit(pid, Resource::Nofile, before).expect("a child can be limited");
    let begun = Instant::now();
    while digest(&standby) != digest(&primary) {
        assert!(begun.elapsed() < PATIENCE, "the standby keeps its guest");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn takeover_keeps_a_guest_record_that_cannot_be_read() {
    let data = directory();
    let (primary, standby) = (serve_in(data.path(), &[]), stand_by(data.path(), &[]));
    // As of an input/output error: it can be opened, and not read.
    let record = data.path().join("guest.serving");
    fs::remove_file(&record).and_then(|()| fs::create_dir(&record)).expect("the directory is the test's");
    primary.kill();
    standby.says("took over without knowing the guest that the primary had: cannot read ");
    becomes_ready(&standby, 200, "[+]guest of the primary ok, but it is unknown: cannot read ");
    let stopped = standby.terminate();
    assert!(!stopped.stderr().iter().any(|line| line.contains("cannot record for standbys")));
}

#[test]
fn standby_on_files_stays_read_only_after_takeover() {
    let data = directory();
    let (primary, standby) = (serve_in(data.path(), &[]), stand_by(data.path(), &[]));
    assert_eq!(put(&primary, "a", "1"), 201);
    // The state is that of the primary.
    for method in ["PUT", "DELETE"] {
        let refused = Connection::open(standby.admin()).ask(method, "/read-only", b"");
        refused.says(
            409,
            "this server stands by and shares the data directory of its primary; send this to the admin listener of the primary",
        );
    }
    assert!(!data.path().join("read-only").exists());
    assert_eq!(Connection::open(primary.admin()).ask("PUT", "/read-only", b"").text(), "on\n");
    assert_eq!(Connection::open(standby.admin()).ask("DELETE", "/read-only", b"").status, 409);
    primary.kill();
    becomes_ready(&standby, 200, "read-only");
    assert_eq!((put(&standby, "a", "2"), get(&standby, "a")), (503, (200, "1".into())));
    assert_eq!(Connection::open(standby.admin()).ask("DELETE", "/read-only", b"").text(), "off\n");
    assert_eq!(put(&standby, "a", "2"), 201);
}

#[test]
fn standby_on_files_has_history_and_states_of_the_past() {
    let data = directory();
    let primary = serve_in(data.path(), &["--retain", "1h"]);
    assert_eq!((put(&primary, "a", "1"), put(&primary, "a", "2")), (201, 201));
    let standby = stand_by(data.path(), &[]);
    let mut history = kvs();
    history.args(["history", "a", "--at", "1"]).env("KVS_ADMIN", standby.admin().to_string());
    let printed = done(history);
    assert!(printed.contains("\"value\":\"1\""), "{printed}");
    let files = directory();
    let file = files.path().join("full");
    assert_eq!(take(&standby, &file, &[]), 2);
    assert_eq!(get(&restored(&[file], &["--until", "1"]), "a"), (200, "1".into()));
}

#[test]
fn standby_takes_over_from_killed_primary_without_gap() {
    let data = directory();
    let primary = serve_in(data.path(), &[]);
    let standby = stand_by(data.path(), &["--shards", "3"]);
    let mut clients = Clients::new(&mut zoo::dice());
    let mut watch = Events::open(&standby, "/v1?watch&since=0", &[]);
    thread::scope(|scope| {
        // All writes, in order, each once.
        let watching = scope.spawn(move || {
            for number in 1.. {
                let event = watch.next().expect("the watch continues over a takeover");
                assert_eq!(event.id, number);
                if event.data["key"] == "the end" {
                    return;
                }
            }
        });
        under_load(&primary, &mut clients, 1_000, || primary.signal(Signal::KILL));
        primary.ends();
        becomes_ready(&standby, 200, WELL);
        clients.settle(standby.address());
        under_load(&standby, &mut clients, 1_000, || {});
        clients.settle(standby.address());
        assert_eq!(put(&standby, "the%20end", ""), 201);
        watching.join().expect("it saw everything");
    });
    standby.terminate();
    clients.settle(serve_in(data.path(), &[]).address());
}

#[test]
fn standbys_take_over_in_turn_under_compaction() {
    let data = directory();
    let mut clients = Clients::new(&mut zoo::dice());
    let mut primary = serve_in(data.path(), &SMALL_SEGMENTS);
    for way in [Signal::KILL, Signal::TERM, Signal::KILL] {
        let standby = stand_by(data.path(), &SMALL_SEGMENTS);
        under_load(&primary, &mut clients, 1_000, || primary.signal(way));
        primary.ends();
        becomes_ready(&standby, 200, WELL);
        clients.settle(standby.address());
        primary = standby;
    }
    primary.terminate();
    clients.settle(serve_in(data.path(), &SMALL_SEGMENTS).address());
}

#[test]
fn histories_over_file_log_takeovers_are_linearizable() {
    let mut rng = zoo::dice();
    let data = directory();
    let (primary, standby) = (serve_in(data.path(), &[]), stand_by(data.path(), &[]));
    let names: Vec<_> = (0..AT_ONCE).map(|n| n.to_string()).collect();
    let stage = Stage::default();
    stage.set(Some(primary.address()));
    let mut shown = 0;
    let (judged, servers) = judge(&stage, &names, &mut rng, |rng| {
        let mut servers = vec![primary, standby];
        for (number, way) in [Signal::KILL, Signal::TERM].into_iter().enumerate() {
            let part = AT_ONCE * OPERATIONS / 10 * if number == 0 { 1 } else { 5 };
            stage.wait_for(part + rng.u64(..part / 2));
            let [.., primary, standby] = &servers[..] else { panic!("there are two at least") };
            let is_over = AtomicBool::new(false);
            let next = thread::scope(|scope| {
                let reading =
                    scope.spawn(|| read_on(standby.address(), &names[0], || !is_over.load(Ordering::Relaxed)));
                let says_over = SaysOver(&is_over);
                if way == Signal::KILL {
                    stage.set(None);
                }
                primary.signal(way);
                becomes_ready(standby, 200, WELL);
                stage.set(Some(standby.address()));
                let next = stand_by(data.path(), &[]);
                drop(says_over);
                shown += reading.join().expect("what it shows does not go back");
                next
            });
            servers.push(next);
        }
        servers
    });
    println!("{} operations, {} of unknown outcome, {shown} reads of standbys", judged.operations, judged.unknown);
    assert_eq!(judged.operations as u64, AT_ONCE * OPERATIONS);
    drop(servers);
}

#[test]
fn standby_without_primary_becomes_primary_and_others_wait() {
    let data = directory();
    let first = serve_in(data.path(), &["--standby"]);
    first.says("this one is the primary");
    assert_eq!(put(&first, "a", "1"), 201);
    let (second, third) = (stand_by(data.path(), &[]), stand_by(data.path(), &[]));
    first.terminate();
    // One of them, at once.
    let deadline = std::time::Instant::now() + PATIENCE;
    let (primary, waits) = loop {
        match [&second, &third].map(|server| ready(server).1.contains(WELL)) {
            [true, false] => break (second, third),
            [false, true] => break (third, second),
            [true, true] => panic!("both have taken over"),
            [false, false] => assert!(std::time::Instant::now() < deadline, "none takes over"),
        }
    };
    assert_eq!(put(&primary, "a", "2"), 201);
    shows(&waits, "a", 200, "2");
    becomes_ready(&waits, 200, STANDS_BY);
    primary.terminate();
    becomes_ready(&waits, 200, WELL);
    assert_eq!((put(&waits, "a", "3"), get(&waits, "a")), (201, (200, "3".into())));
}
