//! Upgrades that fail, at every step, and those that cannot begin.

use super::*;
use crate::support::guests::{DEFAULT_GUEST, copy_of};
use crate::support::server::refused;

/// Upgrades to processes that end or hang at a step.
pub fn fail_at_each_step(server: &Upgraded, programs: &TempDir) {
    let kvs = kvs_tests::binary();
    for (step, expected) in [
        ("kill:start", "it ended before it reported \"ready\""),
        ("kill:ready", "it ended before it reported \"ready\""),
        ("kill:log", "it ended before it reported \"serving\""),
        ("kill:promoted", "it ended before it reported \"serving\""),
        ("stop:log", "it did not report \"serving\" within 10s"),
        ("stop:promoted", "it did not report \"serving\" within 10s"),
    ] {
        let binary = program(programs, "failing", &format!("UPGRADE_FAILPOINT={step} exec {kvs} \"$@\""));
        let failed = server.fails(&binary);
        assert!(failed.contains(expected), "{step}: {failed}");
    }
}

#[test]
fn failure_of_new_process_at_each_step_leaves_old_serving() {
    of_files!();
    let programs = TempDir::new().expect("a temporary directory can be made");
    let kvs = kvs_tests::binary();
    let server = Upgraded::start(&SMALL_SEGMENTS);
    under_load(&server, &Way::default(), true, || {
        fail_at_each_step(&server, &programs);
        let hanging = program(&programs, "hanging", &format!("UPGRADE_FAILPOINT=stop:start exec {kvs} \"$@\""));
        let failed = server.fails_with(&["--timeout", "1s", "--binary", hanging.to_str().expect("a path is text")]);
        assert!(failed.contains("it did not report \"ready\" within 1s"), "{failed}");
        let bad_flag = program(&programs, "flag", &format!("exec {kvs} \"$@\" --no-such-flag"));
        assert!(server.fails(&bad_flag).contains("exit status: 2"));
        let other = program(&programs, "other", "echo another program; exit 0");
        assert!(server.fails(&other).contains("it ended before it reported \"ready\""));
        let version = program(&programs, "version", "printf prepared >&0; exec sleep 600");
        assert!(server.fails(&version).contains("it reports \"prepared\" in place of \"ready\""));
        assert!(server.fails(&programs.path().join("missing")).contains("cannot start"));
        server.upgrade(&["--binary", kvs]);
    });
    server.terminate();
}

#[test]
fn trap_in_replay_leaves_old_process_serving() {
    of_files!();
    let programs = TempDir::new().expect("a temporary directory can be made");
    let kvs = kvs_tests::binary();
    let server = Upgraded::start(&[guest()]);
    let stores = || Connection::open(server.address).ask("PUT", "/store/a", b"value").status;
    assert_eq!(stores(), 201);
    let trapping = program(&programs, "trapping", &format!("exec {kvs} \"$@\" --guest-config fault=apply-traps"));
    let failed = server.fails(&trapping);
    assert!(failed.contains("it ended before it reported \"ready\""), "{failed}");
    let reason = server.first().says("apply of entry 1 failed");
    assert!(reason.contains("fall_over"), "{reason}");
    assert_eq!(stores(), 201);
    server.terminate();
}

/// The other side of an upgrade to another version.
#[test]
fn old_process_of_another_version_is_rejected() {
    let data = TempDir::new().expect("a temporary directory can be made");
    let (old, new) = UnixDatagram::pair().expect("a pair of sockets");
    old.send(b"kvs-handover 2 listen admin").expect("it is received later");
    let mut command = serve(data.path());
    command.env("KVS_HANDOVER", "1").stdin(OwnedFd::from(new));
    refused(command).with(1, &["is of another version: it begins with \"kvs-handover 2 ", "restart it instead"]);
}

/// A program that stops itself at this step, and the file with its number.
pub fn stopping_at(step: &str, programs: &TempDir) -> (String, PathBuf) {
    let (kvs, pid_file) = (kvs_tests::binary(), programs.path().join("pid"));
    let script = format!("echo $$ > {}; UPGRADE_FAILPOINT=stop:{step} exec {kvs} \"$@\"", pid_file.display());
    let binary = program(programs, "stopping", &script);
    (binary.to_str().expect("a path is text").to_owned(), pid_file)
}

/// Waits until that program has stopped itself.
pub fn await_stopped(pid_file: &Path) -> i32 {
    let process = await_some("the new process", || fs::read_to_string(pid_file).ok()?.trim().parse().ok());
    await_stop(process);
    process
}

/// The new process serves and has written, and the old one, which is stopped, does not know it yet.
pub fn no_read_of_old_is_stale(args: &[&str]) {
    const CLIENTS: usize = 50;
    let programs = TempDir::new().expect("a temporary directory can be made");
    let server = Upgraded::start(args);
    let write = |value: &str| Connection::open(server.address).ask("PUT", "/v1/a", value.as_bytes()).status;
    assert_eq!(write("1"), 201);
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| Connection::open(server.address)).collect();
    for client in &mut clients {
        // Most of these responses are from the cache.
        assert_eq!(client.ask("GET", "/v1/a", b"").text(), "1");
    }
    let (binary, pid_file) = stopping_at("promoted", &programs);
    let former = server.process.load(Ordering::Relaxed);
    thread::scope(|scope| {
        let upgrade = scope.spawn(|| server.upgrade(&["--binary", &binary]));
        let process = await_stopped(&pid_file);
        signal(former, Signal::STOP);
        await_stop(former);
        signal(process, Signal::CONT);
        assert_eq!(write("2"), 201);
        clients.iter_mut().for_each(|client| client.send("GET /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n"));
        signal(former, Signal::CONT);
        for client in &mut clients {
            let answer = client.read();
            assert_eq!((answer.status, answer.text()), (200, "2"));
        }
        upgrade.join().expect("it succeeds");
    });
    server.terminate();
}

#[test]
fn no_read_of_old_process_is_stale() {
    of_files!();
    no_read_of_old_is_stale(&[]);
}

/// Begins an upgrade in which the new process takes over after the old one has ended. `meanwhile` is called while the new one is
/// stopped, just before it reports that it is ready. Returns what `kvs upgrade` printed to stderr.
pub fn takeover(server: &Upgraded, programs: &TempDir, meanwhile: impl FnOnce()) -> String {
    let (binary, pid_file) = stopping_at("ready", programs);
    assert_eq!(Connection::open(server.address).ask("PUT", "/v1/a", b"1").status, 201);
    thread::scope(|scope| {
        let upgrade = scope.spawn(|| server.run(&["--binary", &binary]));
        let process = await_stopped(&pid_file);
        let former = server.process.swap(process, Ordering::Relaxed);
        meanwhile();
        signal(process, Signal::CONT);
        await_end(former);
        assert_eq!(Connection::open(server.address).ask("GET", "/v1/a", b"").text(), "1");
        let output = upgrade.join().expect("it ends");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    })
}

#[test]
fn failure_to_close_log_is_takeover() {
    of_files!();
    let programs = TempDir::new().expect("a temporary directory can be made");
    let server = Upgraded::start(&[]);
    // The old process names it to the new one.
    let position = server.data.path().join("log/position");
    let printed = takeover(&server, &programs, || fs::remove_file(position).expect("it is there"));
    assert!(printed.contains("not upgraded: the log cannot be closed for an upgrade"), "{printed}");
    assert_eq!(Connection::open(server.address).ask("PUT", "/v1/a", b"2").status, 201);
    server.terminate();
}

#[test]
fn death_of_old_process_during_upgrade_is_takeover() {
    of_files!();
    let programs = TempDir::new().expect("a temporary directory can be made");
    let kvs = kvs_tests::binary();
    let server = Upgraded::start(&[]);
    takeover(&server, &programs, || server.first().signal(Signal::KILL));
    // The failpoint is in the environment of the process that serves now.
    let binary = program(&programs, "next", &format!("unset UPGRADE_FAILPOINT; exec {kvs} \"$@\""));
    server.upgrade(&["--binary", binary.to_str().expect("a path is text")]);
    assert_eq!(Connection::open(server.address).ask("GET", "/v1/a", b"").text(), "1");
    server.terminate();
}

/// The new process reads the state before it serves.
#[test]
fn read_only_switch_during_upgrade_is_rejected() {
    of_files!();
    let programs = TempDir::new().expect("a temporary directory can be made");
    let kvs = kvs_tests::binary();
    let server = Upgraded::start(&[]);
    let switch = |method: &str| Connection::open(server.admin).ask(method, "/read-only", b"");
    let (binary, pid_file) = stopping_at("promoted", &programs);
    let former = server.process.load(Ordering::Relaxed);
    thread::scope(|scope| {
        let upgrade = scope.spawn(|| server.upgrade(&["--binary", &binary]));
        let process = await_stopped(&pid_file);
        for method in ["PUT", "DELETE"] {
            let answer = switch(method);
            assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")), "{}", answer.text());
        }
        assert_eq!(switch("GET").text(), "off\n");
        signal(process, Signal::CONT);
        upgrade.join().expect("it succeeds");
    });
    // Until then it can accept a connection of the admin listener.
    await_end(former);
    assert_eq!(switch("PUT").text(), "on\n");
    assert_eq!(Connection::open(server.address).ask("PUT", "/v1/a", b"1").status, 503);
    let failing = format!("export UPGRADE_FAILPOINT=kill:promoted; exec {kvs} \"$@\"");
    server.fails(&program(&programs, "failing", &failing));
    assert_eq!(switch("GET").text(), "on\n");
    assert_eq!(switch("DELETE").text(), "off\n");
    assert_eq!(Connection::open(server.address).ask("PUT", "/v1/a", b"1").status, 201);
    server.terminate();
}

#[test]
fn impossible_upgrade_is_refused() {
    of_files!();
    let empty = TempDir::new().expect("a temporary directory can be made");
    let output = kvs_at(empty.path()).arg("upgrade").output().expect("it can be run");
    assert!(String::from_utf8_lossy(&output.stderr).contains("no server can be reached in"));
    let server = Upgraded::start(&["--probation", "60s"]);
    let swapped = Connection::open(server.admin);
    thread::scope(|scope| {
        let mut swapped = swapped;
        scope.spawn(move || swapped.ask("PUT", "/guest", &copy_of(DEFAULT_GUEST)));
        server.first().says("another guest serves, on probation");
        assert!(server.fails(Path::new(kvs_tests::binary())).contains("a swap is in progress"));
        assert_eq!(Connection::open(server.admin).ask("DELETE", "/guest?rollback", b"").status / 100, 2);
    });
    server.terminate();
}
