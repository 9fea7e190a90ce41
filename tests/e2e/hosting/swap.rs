//! Swaps of the guest: no request fails, no state is lost, and a faulty guest is rejected or rolled back.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::guests::{DEFAULT_GUEST, component, copy_of, exporting, guest, importing};
use crate::support::server::{Process, Refused, Server, kvs, refused};
use crate::support::swap::{in_phase, serving, status, swap, swaps, under_load};
use crate::support::wire::{Connection, get};

/// Long enough for a trap, and short enough to wait for.
const PROBATION: [&str; 2] = ["--probation", "300ms"];
/// Never over while a test runs.
const LONG_PROBATION: [&str; 2] = ["--probation", "1h"];

fn put(client: &mut Connection, path: &str, value: &str) {
    assert_eq!(client.ask("PUT", path, value.as_bytes()).status, 201);
}

#[test]
fn swapped_guest_has_data_of_previous_one() {
    let server = Server::start(&PROBATION);
    let mut client = Connection::open(server.address());
    for n in 0..100 {
        put(&mut client, &format!("/v1/key-{n}"), &format!("value {n}"));
    }
    assert_eq!(client.ask("DELETE", "/v1/key-7", b"").status, 200);

    swaps(&server, &component(guest()));
    assert_eq!(serving(&server), "unruly");
    assert_eq!(get(&mut client, "/store/key-42").text(), "value 42");
    assert_eq!(get(&mut client, "/store/key-7").status, 404);
    put(&mut client, "/store/key-7", "from the other");

    let answer = Connection::open(server.admin()).ask("DELETE", "/guest", b"");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(serving(&server), "kvs");
    assert_eq!(get(&mut client, "/v1/key-7").text(), "from the other");
    assert_eq!(get(&mut client, "/v1/key-42").etag(), Some(43));
    server.terminate();
}

#[test]
fn under_load_no_request_fails_and_no_read_is_stale() {
    let server = Server::start(&PROBATION);
    under_load(&server, |requests| {
        let guests = [copy_of(DEFAULT_GUEST), component(DEFAULT_GUEST)];
        for component in guests.iter().cycle().take(6) {
            let before = requests.load(Ordering::Relaxed);
            swaps(&server, component);
            assert!(requests.load(Ordering::Relaxed) > before, "requests were served meanwhile");
        }
    });
    server.terminate();
}

#[test]
fn dry_run_does_not_switch() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    put(&mut client, "/v1/a", "value");
    let answer = Connection::open(server.admin()).ask("PUT", "/guest?dry-run", &component(guest()));
    let report: serde_json::Value = serde_json::from_slice(&answer.body).expect("the report is JSON");
    assert_eq!((&report["name"], &report["entries"], &report["keys"]), (&"unruly".into(), &1.into(), &1.into()));
    assert!(report["pause_seconds"].is_null(), "{report}");
    assert_eq!(serving(&server), "kvs");
    assert_no_trace(&server);
    Connection::open(server.admin())
        .ask("PUT", "/guest?dry", b"")
        .says(400, "unknown query; there are ?dry-run, ?shadow=TIME with &sample=PERCENT and &max-differences=COUNT, and ?rollback for DELETE");
    server.terminate();
}

#[test]
fn concurrent_swap_is_rejected() {
    let server = Server::start(&LONG_PROBATION);
    thread::scope(|scope| {
        // The server may end before it responds.
        scope.spawn(|| Connection::open(server.admin()).try_ask("PUT", "/guest", &component(guest())));
        in_phase(&server, "probation");
        swap(&server, &component(DEFAULT_GUEST)).says(409, "another swap is in progress");
        server.signal(Signal::TERM);
    });
    server.ends_well();
}

#[test]
fn trap_on_probation_rolls_back_without_loss() {
    let server = Server::start(&LONG_PROBATION);
    let mut client = Connection::open(server.address());
    put(&mut client, "/v1/{own}a", "from the first");
    let answer = thread::scope(|scope| {
        let swapping = scope.spawn(|| swap(&server, &component(guest())));
        in_phase(&server, "probation");
        put(&mut client, "/store/{own}b", "from the second");
        assert_eq!(client.ask("PUT", "/store-and-trap/{own}c", b"from its last call").status, 500);
        // The next request is served by the first guest again, with the data of the second.
        assert_eq!(get(&mut client, "/v1/{own}a").text(), "from the first");
        assert_eq!(get(&mut client, "/v1/{own}b").text(), "from the second");
        assert_eq!(get(&mut client, "/v1/{own}c").text(), "from its last call");
        swapping.join().expect("the swap is answered")
    });
    assert_eq!(answer.status, 422);
    let why = answer.text();
    assert!(why.starts_with("unruly was rolled back on probation, the guest before serves again: "), "{why}");
    assert!(why.contains("unreachable") && why.contains("fall_over"), "{why}");
    server.says("unruly is rolled back on probation, kvs serves again");
    assert_eq!(serving(&server), "kvs");
    assert_no_trace(&server);
    server.terminate();
}

/// The data directory has no file of a guest that was not swapped in.
#[track_caller]
fn assert_no_trace(server: &Server) {
    cached(server.data());
    assert!(!server.data().join("guest.wasm").exists(), "it is remembered");
}

#[test]
fn trap_in_tick_on_probation_rolls_back() {
    let server = Server::start(&[&LONG_PROBATION[..], &["--guest-config", "fault=tick-traps"]].concat());
    let answer = swap(&server, &component(guest()));
    assert_eq!(answer.status, 422);
    assert!(answer.text().contains("in tick"), "{}", answer.text());
    assert_eq!(serving(&server), "kvs");
    server.terminate();
}

#[test]
fn guest_that_fails_on_replay_never_serves() {
    let server = Server::start(&["--guest-config", "fault=apply-traps"]);
    let mut client = Connection::open(server.address());
    put(&mut client, "/v1/a", "value");
    let answer = swap(&server, &component(guest()));
    assert_eq!(answer.status, 422);
    assert!(answer.text().contains("apply of entry 1 failed"), "{}", answer.text());
    assert_eq!(status(&server)["last_swap"]["reason"], answer.text().trim_end());
    assert_eq!(get(&mut client, "/v1/a").text(), "value");
    assert_no_trace(&server);
    server.terminate();
}

#[test]
fn guest_that_never_starts_is_rejected_under_load() {
    let server = Server::start(&["--guest-config", "fault=describe-loops-aloud", "--guest-cpu-limit", "2s"]);
    let mut client = Connection::open(server.address());
    put(&mut client, "/v1/a", "value");
    thread::scope(|scope| {
        let swapping = scope.spawn(|| swap(&server, &component(guest())));
        server.says("going round in circles");
        put(&mut client, "/v1/b", "meanwhile");
        assert_eq!(get(&mut client, "/v1/a").text(), "value");
        let answer = swapping.join().expect("the swap is answered");
        assert_eq!(answer.status, 422);
        assert!(answer.text().contains("longer than 2s"), "{}", answer.text());
    });
    assert_no_trace(&server);
    server.terminate();
}

/// The serving guest cannot be rebuilt: it traps on an entry that it appended itself.
#[test]
fn guest_that_cannot_be_rebuilt_is_replaced() {
    let server = Server::start(&[&PROBATION[..], &[guest(), "--guest-config", "fault=apply-traps"]].concat());
    let mut client = Connection::open(server.address());
    put(&mut client, "/store/{own}a", "value");
    assert_eq!(get(&mut client, "/trap").status, 500);
    server.says("the guest cannot be rebuilt");
    swaps(&server, &component(DEFAULT_GUEST));
    assert_eq!(get(&mut client, "/v1/{own}a").text(), "value");
    server.terminate();
}

#[test]
fn invalid_component_is_rejected_with_reason() {
    let server = Server::start(&[]);
    let truncated = &component(DEFAULT_GUEST)[..50_000];
    let another_version = exporting(&["kvs:store/lifecycle@0.1.0", "kvs:store/handler@0.1.0"]);
    let cases: [(&[u8], &str); 6] = [
        (b"", "it is not WebAssembly"),
        (b"#!/bin/sh", "it is not WebAssembly"),
        (b"\0asm\x01\0\0\0", "it is a core module, not a component; build it for wasm32-wasip2"),
        (truncated, "out of bounds"),
        (
            &importing("wasi:keyvalue/store@0.2.0"),
            "it imports wasi:keyvalue/store@0.2.0, which this host does not offer; it does not export \
             kvs:store/lifecycle@0.2.0, kvs:store/handler@0.2.0",
        ),
        (
            &another_version,
            "it was built for kvs:store@0.1.0, and this host runs kvs:store@0.2.0: build it again with the WIT of this version",
        ),
    ];
    for (component, reason) in cases {
        let answer = swap(&server, component);
        assert_eq!(answer.status, 422, "{reason}");
        assert!(answer.text().contains(reason), "{:?} does not contain {reason:?}", answer.text());
        assert_eq!(answer.text().lines().count(), 1);
    }
    assert_eq!(serving(&server), "kvs");
    assert_no_trace(&server);
    server.terminate();
}

#[test]
fn too_large_component_is_rejected_unread() {
    let server = Server::start(&[]);
    let mut admin = Connection::open(server.admin());
    admin.send("PUT /guest HTTP/1.1\r\nhost: kvs\r\ncontent-length: 1073741824\r\n\r\n");
    admin.read().says(413, "a guest is at most 268435456 bytes");
    Connection::open(server.admin()).ask("POST", "/guest", b"").says(405, "this path has GET, HEAD, PUT, DELETE");
    server.terminate();
}

#[test]
fn swap_survives_restart_without_named_guest() {
    let server = Server::start(&PROBATION);
    put(&mut Connection::open(server.address()), "/v1/a", "value");
    swaps(&server, &component(guest()));

    let server = server.kill().restart(&PROBATION);
    assert_eq!(serving(&server), "unruly");
    assert_eq!(get(&mut Connection::open(server.address()), "/store/a").text(), "value");

    let server = server.terminate().restart(&[DEFAULT_GUEST]);
    assert_eq!(serving(&server), "kvs");

    let server = server.terminate().restart(&PROBATION);
    assert_eq!(serving(&server), "unruly");
    assert_eq!(Connection::open(server.admin()).ask("DELETE", "/guest", b"").status, 200);
    let server = server.terminate().restart(&[]);
    assert_eq!(status(&server)["source"], "built in");
    server.terminate();
}

#[test]
fn swap_is_persisted_only_after_probation() {
    let server = Server::start(&LONG_PROBATION);
    thread::scope(|scope| {
        scope.spawn(|| Connection::open(server.admin()).try_ask("PUT", "/guest", &component(guest())));
        in_phase(&server, "probation");
        server.signal(Signal::KILL);
    });
    let server = server.ends().1.restart(&[]);
    assert_eq!(serving(&server), "kvs");
    server.terminate();
}

#[test]
fn persisted_guest_that_fails_is_reported() {
    let server = Server::start(&[]);
    fs::write(server.data().join("guest.wasm"), "damaged").expect("the directory takes a file");
    let stopped = server.terminate();
    stopped.refuses(&[]).with(1, &["guest.wasm", "swapped in last", "it is not WebAssembly"]);
    stopped.restart(&[DEFAULT_GUEST]).terminate();
}

/// The only file in the cache.
fn cached(data: &Path) -> std::path::PathBuf {
    let files = fs::read_dir(data.join("cache")).expect("there is a cache");
    let files: Vec<_> = files.map(|file| file.expect("it can be listed").path()).collect();
    let [file] = files.as_slice() else { panic!("one guest was compiled, and there are {files:?}") };
    file.clone()
}

#[test]
fn corrupted_compiled_guest_is_recompiled() {
    let mut stopped = Server::start(&[]).terminate();
    let file = cached(stopped.data());
    let good = fs::read(&file).expect("it can be read");
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    for damaged in [&flipped[..], &good[..good.len() / 2], &good[..10], b""] {
        fs::write(&file, damaged).expect("it can be written");
        let server = stopped.restart(&[]);
        server.says("is not used, and compiled again");
        put(&mut Connection::open(server.address()), "/v1/a", "value");
        stopped = server.terminate();
        assert!(fs::read(&file).expect("it can be read") == good, "it was not compiled again");
    }
    // An intact one is used.
    let server = stopped.restart(&[]);
    assert!(!server.stderr().iter().any(|line| line.contains("compiled again")));
    server.terminate();
}

#[test]
fn cache_of_compiled_guests_is_limited() {
    let server = Server::start(&["--probation", "1ms"]);
    for n in 0..10 {
        let mut component = component(DEFAULT_GUEST);
        component.extend([0, 3, 1, b'n', n]);
        swaps(&server, &component);
    }
    let kept = fs::read_dir(server.data().join("cache")).expect("there is a cache").count();
    assert_eq!(kept, 8);
    server.terminate();
}

/// A server with the built-in guest from a file.
fn from_file(args: &[&str]) -> (Server, TempDir, String) {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let file = directory.path().join("guest.wasm");
    fs::copy(DEFAULT_GUEST, &file).expect("the guest can be copied");
    let file = file.to_str().expect("a temporary path is text").to_owned();
    let server = Server::start(&[&[file.as_str()], args].concat());
    (server, directory, file)
}

#[test]
fn guest_file_is_reloaded_on_sighup() {
    let (server, _directory, file) = from_file(&PROBATION);
    server.signal(Signal::HUP);
    server.says("serves already");
    fs::copy(guest(), &file).expect("the guest can be copied");
    server.signal(Signal::HUP);
    server.says("the guest was swapped");
    assert_eq!(serving(&server), "unruly");
    fs::write(&file, "nonsense").expect("it can be written");
    server.signal(Signal::HUP);
    server.says("the guest was not swapped: it is not WebAssembly");
    fs::remove_file(&file).expect("it can be removed");
    server.signal(Signal::HUP);
    server.says("the guest cannot be read again");
    assert_eq!(serving(&server), "unruly");
    let stopped = server.terminate();
    let last = stopped.stderr().last().expect("it says that it stopped");
    assert!(last.contains("guest=\"unruly\""), "{last}");
}

#[test]
fn guest_file_changed_during_swap_is_loaded_after_it() {
    let (server, _directory, file) = from_file(&["--probation", "3s"]);
    thread::scope(|scope| {
        scope.spawn(|| swaps(&server, &copy_of(DEFAULT_GUEST)));
        in_phase(&server, "probation");
        fs::copy(guest(), &file).expect("the guest can be copied");
        server.signal(Signal::HUP);
        server.says("another swap is in progress; the guest in");
        assert_eq!(serving(&server), "kvs");
        server.says("the guest was swapped guest=\"unruly\"");
    });
    server.terminate();
}

#[test]
fn watched_guest_file_is_reloaded_on_change() {
    let (server, _directory, file) = from_file(&[PROBATION[0], PROBATION[1], "--watch-guest"]);
    // Overwritten, as compilers do, and replaced, as editors do.
    fs::write(&file, component(guest())).expect("it can be written");
    server.says("the guest was swapped guest=\"unruly\"");
    let beside = format!("{file}.new");
    fs::copy(DEFAULT_GUEST, &beside).expect("the guest can be copied");
    fs::rename(&beside, &file).expect("it can be renamed");
    server.says("the guest was swapped guest=\"kvs\"");
    server.terminate();
}

fn kvs_swap(admin: impl ToString, args: &[&str]) -> std::process::Command {
    let mut command = kvs();
    command.args(["swap", "--admin", &admin.to_string()]).args(args);
    command
}

fn kvs_swap_refused(admin: impl ToString, args: &[&str]) -> Refused {
    refused(kvs_swap(admin, args))
}

#[test]
fn kvs_swap_prints_outcome() {
    let server = Server::start(&PROBATION);
    put(&mut Connection::open(server.address()), "/v1/a", "value");
    let says = |args: &[&str]| {
        let output = kvs_swap(server.admin(), args).stdout(std::process::Stdio::piped()).output();
        let output = output.expect("the binary under test can be started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("it says text")
    };
    let said = says(&[guest(), "--dry-run"]);
    assert!(said.contains("could serve: 1 entries replayed"), "{said}");
    assert_eq!(serving(&server), "kvs");
    let said = says(&[guest()]);
    assert!(said.starts_with("unruly ") && said.contains("serves: 1 entries replayed"), "{said}");
    assert_eq!(serving(&server), "unruly");
    let said = says(&[]);
    assert!(said.starts_with("kvs "), "{said}");
    assert_eq!(serving(&server), "kvs");
    server.terminate();
}

#[test]
fn kvs_swap_error_is_one_line() {
    let server = Server::start(&[]);
    let admin = server.admin();
    kvs_swap_refused(admin, &["Cargo.toml"]).with(1, &["not swapped", "422", "it is not WebAssembly"]);
    kvs_swap_refused(admin, &["missing.wasm"]).with(1, &["cannot read missing.wasm", "No such file"]);
    let elsewhere = format!("http://{}", server.address());
    kvs_swap_refused(elsewhere, &[guest()]).with(1, &["not swapped", "404"]);
    server.terminate();
    kvs_swap_refused(admin, &[guest()]).with(1, &["no response from", "check that the server is running"]);
}

/// A replay in progress does not prevent a stop.
#[test]
fn server_stops_during_replay() {
    let server = Server::start(&["--guest-config", "fault=apply-loops-aloud", "--guest-replay-cpu-limit", "1h"]);
    put(&mut Connection::open(server.address()), "/v1/a", "value");
    let mut swapping = Process::spawn(kvs_swap(server.admin(), &[guest()]));
    server.says("going round in circles");
    assert_eq!(status(&server)["swap"]["phase"], "replaying");
    server.terminate();
    assert!(!swapping.wait().success());
}
