//! Disk faults: strace makes selected system calls of the server fail. The server must log the failure, stop, and lose no
//! acknowledged write.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use tempfile::TempDir;

use crate::support::faults::{Fault, inject};
use crate::support::load::{Clients, SMALL_SEGMENTS, count};
use crate::support::server::{Server, refused, serve, through};
use crate::support::zoo;

/// Part of the path of every segment.
const SEGMENT: &str = "/log/00";

/// Returns whether the fault was injected.
fn was_met(data: &Path) -> bool {
    fs::read_to_string(data.join("trace")).expect("strace notes what it does").contains("(INJECTED)")
}

/// Serves under load, with a fault in the first, second, third ... of these calls, on one directory. Each time the server must
/// fail, log the reason and a path that contains `place`, and keep what it acknowledged.
fn fails_and_loses_nothing(call: &str, fault: Fault, expected: &[&str], place: &str) {
    let mut rng = zoo::dice();
    let mut clients = Clients::new(&mut rng);
    let mut data = TempDir::new().expect("a temporary directory can be made");
    let (mut served, unknown) = (0, AtomicU64::new(0));
    for at in 1..=count("KVS_TEST_FAULTS", 20) {
        let mut command = inject(serve(data.path()), call, fault, at, data.path());
        command.args(SMALL_SEGMENTS);
        let (status, stopped) = match Server::try_spawn(command, data) {
            Ok(server) => {
                served += 1;
                let answers = AtomicU64::new(0);
                let answered = |status| {
                    assert_ne!(status, 507, "the disk is not full");
                    unknown.fetch_add((status == 500).into(), Ordering::Relaxed);
                    // The server continues.
                    if answers.fetch_add(1, Ordering::Relaxed) == 100_000 {
                        server.signal(Signal::KILL);
                    }
                };
                clients.run(server.address(), answered, || ());
                server.ends()
            }
            Err(ended) => ended,
        };
        let said = stopped.stderr().join("\n");
        assert!(was_met(stopped.data()), "{call} {at}: it ended without the fault: {said}");
        assert_eq!(status.code(), Some(1), "{call} {at}: {status}, it said: {said}");
        let last = stopped.stderr().last().expect("it says why");
        for text in expected {
            assert!(last.contains(text), "{call} {at}: {text:?} is not in: {last}");
        }
        // A segment, the position after its sync, or at the start the file that identifies the directory.
        let places = [place, "/log/position", "/log/identity"];
        let named = last.split([' ', ':']).find(|word| places.iter().any(|place| word.contains(place)));
        assert!(
            named.is_some_and(|named| Path::new(named).exists()),
            "{call} {at}: it names nothing that is there: {last}"
        );

        let server = stopped.restart(&SMALL_SEGMENTS);
        clients.settle(server.address());
        data = server.terminate().into_data();
    }
    let unknown = unknown.into_inner();
    assert!(served > 10 && unknown > served, "it served {served} times, and the outcome was unknown {unknown} times");
}

#[test]
fn failed_sync_ends_server_and_loses_nothing() {
    fails_and_loses_nothing("fdatasync", Fault::Error("EIO"), &["fdatasync ", "Input/output error"], SEGMENT);
}

#[test]
fn failed_directory_sync_ends_server_and_loses_nothing() {
    fails_and_loses_nothing("fsync", Fault::Error("EIO"), &["sync ", "Input/output error"], "/");
}

/// A directory whose name is lost in a power cut loses the log.
#[test]
fn unsynced_new_directory_is_not_served() {
    let home = TempDir::new().expect("a temporary directory can be made");
    let data = home.path().join("data");
    let command = inject(serve(&data), "fsync", Fault::Error("EIO"), 1, home.path());
    refused(command).with(1, &[&format!("cannot use data directory {}", data.display()), "Input/output error"]);
    assert!(was_met(home.path()));
}

#[test]
fn failed_write_ends_server_and_loses_nothing() {
    fails_and_loses_nothing("pwrite64", Fault::Error("EIO"), &["write ", "Input/output error"], SEGMENT);
}

#[test]
fn empty_write_ends_server_and_loses_nothing() {
    fails_and_loses_nothing("pwrite64", Fault::Nothing, &["write "], SEGMENT);
}

/// The space was allocated, but some file systems need more.
#[test]
fn write_without_space_loses_nothing() {
    stays_or_fails_and_loses_nothing("pwrite64");
}

#[test]
fn allocation_without_space_loses_nothing() {
    stays_or_fails_and_loses_nothing("fallocate");
}

/// A full disk for one call only. The server may reject the start or writes for a while, or fail as above.
fn stays_or_fails_and_loses_nothing(call: &str) {
    let mut rng = zoo::dice();
    let mut clients = Clients::new(&mut rng);
    let mut data = TempDir::new().expect("a temporary directory can be made");
    for at in 1..=count("KVS_TEST_FAULTS", 20) {
        let mut command = inject(serve(data.path()), call, Fault::Error("ENOSPC"), at, data.path());
        command.args(SMALL_SEGMENTS);
        let stopped = match Server::try_spawn(command, data) {
            Ok(server) => {
                let answers = AtomicU64::new(0);
                let answered = |_| {
                    // For a while after the fault, unless the server failed.
                    if answers.fetch_add(1, Ordering::Relaxed) % 500 == 499 && was_met(server.data()) {
                        server.signal(Signal::KILL);
                    }
                };
                clients.run(server.address(), answered, || ());
                let (status, stopped) = server.ends();
                assert!(matches!(status.code(), None | Some(1)), "{call} {at}: {status}");
                stopped
            }
            Err((status, stopped)) => {
                let [.., last] = stopped.stderr() else { panic!("{call} {at}: it said nothing") };
                assert_eq!(status.code(), Some(1), "{call} {at}: {last}");
                assert!(last.contains("No space left on device"), "{call} {at}: {last}");
                stopped
            }
        };
        assert!(was_met(stopped.data()), "{call} {at}: it ended without the fault");
        let server = stopped.restart(&SMALL_SEGMENTS);
        clients.settle(server.address());
        data = server.terminate().into_data();
    }
}

/// A real short write: it crosses the largest allowed file size.
#[test]
fn short_write_ends_server_and_loses_nothing() {
    let mut rng = zoo::dice();
    let mut clients = Clients::new(&mut rng);
    let mut data = TempDir::new().expect("a temporary directory can be made");
    for _ in 0..count("KVS_TEST_FAULTS", 20) {
        // A process that ignores the signal gets an error.
        let serve = serve(data.path());
        let mut command = through("env", &serve);
        command.arg("--ignore-signal=XFSZ").arg(serve.get_program()).args(serve.get_args()).args(SMALL_SEGMENTS);
        let server = Server::spawn(command, data);
        let pid = Pid::from_raw(server.pid().cast_signed());
        // Somewhere within a segment, of 128 KiB.
        let limit = rng.u64(1_000..100_000);
        let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
        prlimit(pid, Resource::Fsize, limit).expect("a child can be limited");
        clients.run(server.address(), |_| (), || ());
        let (status, stopped) = server.ends();
        let last = stopped.stderr().last().expect("it says why");
        assert!(status.code() == Some(1) && last.contains("File too large"), "{status}, it said: {last}");
        let server = stopped.restart(&SMALL_SEGMENTS);
        clients.settle(server.address());
        data = server.terminate().into_data();
    }
}
