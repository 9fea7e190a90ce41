//! Upgrades: the process of a server is replaced while clients of every kind use it, and new processes fail at every step.

mod clients;
mod failures;
mod listeners;
mod services;

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use self::clients::{END, Tally, http1, http2, watch};
use crate::support::certificates::{Authority, Kind};
use crate::support::events::Events;
use crate::support::guests::{brittle, copy_of, guest};
use crate::support::linear::clients::Stage;
use crate::support::linear::plan::OPERATIONS;
use crate::support::linear::{AT_ONCE, judge};
use crate::support::load::{SMALL_SEGMENTS, SaysOver, count};
use crate::support::log::{kvs_at, of_files};
use crate::support::server::{PATIENCE, Server, serve, through};
use crate::support::tls::{self, Client};
use crate::support::wire::{Connection, Way};
use crate::support::zoo;

/// No connection is cut off on a slow machine, and requests wait for a new process that hangs.
const ARGS: [&str; 4] = ["--drain-timeout", "30s", "--request-timeout", "60s"];

/// A server whose process is replaced. The last one is killed when this is dropped.
struct Upgraded {
    first: Option<Server>,
    data: TempDir,
    address: SocketAddr,
    admin: SocketAddr,
    process: AtomicI32,
}

impl Upgraded {
    fn start(args: &[&str]) -> Self {
        Self::start_with(args, |_| {})
    }

    fn start_with(args: &[&str], prepare: impl FnOnce(&mut Command)) -> Self {
        let data = TempDir::new().expect("a temporary directory can be made");
        let mut command = serve(data.path());
        command.args(ARGS).args(args);
        prepare(&mut command);
        let first = Server::spawn(command, TempDir::new().expect("a temporary directory can be made"));
        let (address, admin, process) = (first.address(), first.admin(), AtomicI32::new(pid(&first)));
        Self { first: Some(first), data, address, admin, process }
    }

    fn first(&self) -> &Server {
        self.first.as_ref().expect("it is there until the end")
    }

    /// Runs `kvs upgrade`.
    fn run(&self, args: &[&str]) -> Output {
        let mut command = kvs_at(self.data.path());
        command.arg("upgrade").args(args).stdout(Stdio::piped()).output().expect("it can be run")
    }

    /// Upgrades, and returns the time without a call.
    fn upgrade(&self, args: &[&str]) -> Duration {
        let output = self.run(&[args, &["--output", "json"]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let upgraded: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let process = upgraded["process"].as_i64().and_then(|process| process.try_into().ok()).expect("a number");
        assert_ne!(self.process.swap(process, Ordering::Relaxed), process);
        Duration::from_secs_f64(upgraded["pause_seconds"].as_f64().expect("a number"))
    }

    /// Upgrades to a program that must fail, and returns what is expected.
    fn fails(&self, binary: &Path) -> String {
        self.fails_with(&["--binary", binary.to_str().expect("a path is text")])
    }

    fn fails_with(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let expected = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{expected}");
        assert!(expected.contains("not upgraded, the server continues to serve"), "{expected}");
        expected
    }

    /// The processes that took the locks of the data directory, as the kernel names them: descriptors that are passed on keep
    /// their locks.
    fn lock_takers(&self) -> Vec<i32> {
        let inodes = ["log", "LOCK"].map(|file| fs::metadata(self.data.path().join(file)).expect("it is there").ino());
        let locks = fs::read_to_string("/proc/locks").expect("the kernel lists all locks");
        let taker = |line: &str| {
            let fields: Vec<_> = line.split_whitespace().collect();
            // A process that waits for a lock has an arrow before.
            let [_, "FLOCK", _, _, taker, file, ..] = fields[..] else { return None };
            let inode = file.rsplit(':').next()?.parse().ok()?;
            inodes.contains(&inode).then(|| taker.parse().expect("a number"))
        };
        locks.lines().filter_map(taker).collect()
    }

    /// Ends the serving process by a graceful shutdown.
    fn terminate(mut self) -> TempDir {
        signal(self.process.load(Ordering::Relaxed), Signal::TERM);
        let first = self.first.take().expect("it is there until the end");
        // The last line is that of the last process.
        first.ends();
        await_end(self.process.load(Ordering::Relaxed));
        std::mem::replace(&mut self.data, TempDir::new().expect("a temporary directory can be made"))
    }
}

impl Drop for Upgraded {
    fn drop(&mut self) {
        if let Some(process) = Pid::from_raw(self.process.load(Ordering::Relaxed)) {
            let _ = kill_process(process, Signal::KILL);
        }
    }
}

fn pid(server: &Server) -> i32 {
    i32::try_from(server.pid()).expect("a number of a process")
}

fn await_end(process: i32) {
    await_some("the end of a process", || {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        (stat.is_empty() || stat.contains(") Z ")).then_some(())
    });
}

/// Waits until a process has stopped itself at a failpoint.
fn await_stop(process: i32) {
    await_some("the stop of a process", || {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        stat.contains(") T ").then_some(())
    });
}

fn signal(process: i32, signal: Signal) {
    kill_process(Pid::from_raw(process).expect("not 0"), signal).expect("it runs");
}

fn await_some<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} did not come");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A program in place of the next binary.
fn program(directory: &TempDir, name: &str, text: &str) -> PathBuf {
    let path = directory.path().join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("the directory takes a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
    path
}

/// Runs clients of all kinds, in this way where it is given, while `meanwhile` upgrades the server.
fn under_load(server: &Upgraded, way: &Way, with_http2: bool, meanwhile: impl FnOnce()) -> Tally {
    let over = AtomicBool::new(false);
    let tally = Tally::default();
    thread::scope(|scope| {
        let (over, tally, address) = (&over, &tally, server.address);
        let watching = scope.spawn(move || watch(way, address, over, tally));
        let mut writing: Vec<_> = (0..4).map(|n| scope.spawn(move || http1(way, address, n, over, tally))).collect();
        if with_http2 {
            writing.push(scope.spawn(move || http2(address, over, tally)));
        }
        {
            let _over = SaysOver(over);
            await_some("the load", || (tally.requests.load(Ordering::Relaxed) > 100).then_some(()));
            meanwhile();
        }
        let written: Vec<_> = writing.into_iter().map(|client| client.join()).collect();
        let end = way.try_open(address).expect("a connection").ask("PUT", &format!("/v1/{END}"), b"");
        assert_eq!(end.status, 201);
        let seen = watching.join().expect("no event is lost");
        let mut written: Vec<u64> = written.into_iter().flat_map(|client| client.expect("no request fails")).collect();
        written.sort_unstable();
        assert_eq!(seen.len(), written.len(), "events and writes");
        assert!(seen == written, "a watch gets every write once, in order");
    });
    tally
}

fn upgrades_under_load(args: &[&str], way: &Way, with_http2: bool, upgrades: u64) {
    let server = Upgraded::start(args);
    let mut pauses = Vec::new();
    let tally = under_load(&server, way, with_http2, || {
        for _ in 0..upgrades {
            pauses.push(server.upgrade(&[]));
        }
    });
    pauses.sort_unstable();
    let Tally { requests, closed, watches } = &tally;
    println!(
        "{upgrades} upgrades, {requests:?} requests, {closed:?} closed connections, {watches:?} watches, {pauses:?}"
    );
    assert!(watches.load(Ordering::Relaxed) as u64 > upgrades, "a watch ends with each process");
    assert_eq!(Connection::open(server.admin).ask("GET", "/livez", b"").status, 200);
    server.terminate();
}

#[test]
fn upgrades_under_load_lose_nothing() {
    of_files!();
    upgrades_under_load(&SMALL_SEGMENTS, &Way::default(), true, count("KVS_TEST_UPGRADES", 10));
}

#[test]
fn upgrades_with_shards_and_spares_lose_nothing() {
    of_files!();
    let args = ["--spare", "--shards", "4"];
    upgrades_under_load(&args, &Way::default(), true, count("KVS_TEST_UPGRADES", 10).div_ceil(3));
}

#[test]
fn upgrades_over_tls_lose_nothing() {
    of_files!();
    let authority = Authority::new();
    let pair = authority.issue("server", Kind::Server, 1);
    let args = ["--tls-cert", &pair.certificate, "--tls-key", &pair.key];
    let config = Client::of(&authority).config();
    let way = Way::new(move |address| Ok(Box::new(tls::connect(&config, address)?)), "");
    upgrades_under_load(&args, &way, false, count("KVS_TEST_UPGRADES", 10).div_ceil(3));
}

/// A lock that was free for a moment has been taken by another process than the first.
#[test]
fn lock_is_never_free_during_upgrades() {
    of_files!();
    let programs = TempDir::new().expect("a temporary directory can be made");
    let server = Upgraded::start(&[]);
    let first = server.process.load(Ordering::Relaxed);
    assert_eq!(server.lock_takers(), [first; 2]);
    // In a namespace of processes the kernel leaves out one that has ended.
    let is_kept = || server.lock_takers().iter().all(|taker| *taker == first);
    for _ in 0..3 {
        server.upgrade(&[]);
        assert!(is_kept(), "{first} took it first, then {:?}", server.lock_takers());
    }
    let failing = format!("UPGRADE_FAILPOINT=kill:log exec {} \"$@\"", kvs_tests::binary());
    server.fails(&program(&programs, "failing", &failing));
    assert!(is_kept(), "{first} took it first, then {:?}", server.lock_takers());
    server.terminate();
}

#[test]
fn signal_upgrades_like_command() {
    of_files!();
    let server = Upgraded::start(&[]);
    assert_eq!(Connection::open(server.address).ask("PUT", "/v1/a", b"1").status, 201);
    server.first().signal(Signal::USR2);
    let line = server.first().says("serves in place of this one");
    let (_, rest) = line.split_once("process ").expect("it is named");
    server.process.store(rest.split(' ').next().expect("a number").parse().expect("a number"), Ordering::Relaxed);
    assert!(server.first().says("audit").contains("SIGUSR2"));
    assert_eq!(Connection::open(server.address).ask("GET", "/v1/a", b"").text(), "1");
    server.upgrade(&[]);
    assert_eq!(Connection::open(server.address).ask("GET", "/v1/a", b"").text(), "1");
    server.terminate();
}

#[test]
fn open_connections_are_served_until_their_next_response() {
    of_files!();
    let server = Upgraded::start(&[]);
    let mut idle = Connection::open(server.address);
    assert_eq!(idle.ask("PUT", "/v1/a", b"1").status, 201);
    let mut head = Connection::open(server.address);
    assert_eq!(head.ask("GET", "/v1/a", b"").status, 200);
    let mut admin = Connection::open(server.admin);
    assert_eq!(admin.ask("GET", "/livez", b"").status, 200);
    let fresh = Connection::open(server.address);
    let mut events =
        Events::over(Connection::open(server.address), "/v1?watch", &[]).expect("answered").expect("events");
    let mut poll = Connection::open(server.address);
    let etag = [("if-none-match", "\"1\""), ("prefer", "wait=60")];
    thread::scope(|scope| {
        let polling = scope.spawn(move || poll.ask_with("GET", "/v1/a", &etag, b"").status);
        server.upgrade(&[]);
        assert_eq!(polling.join().expect("it is answered"), 304, "a long poll ends as at a stop");
    });
    assert_eq!(events.next(), None, "a watch ends after a whole event");
    // The old process would wait for it.
    drop(events);
    let mut watch = Connection::open(server.address);
    assert_eq!(watch.ask("PUT", "/v1/b", b"2").status, 201);
    // Read from the new process, by the old one.
    let answer = idle.ask("GET", "/v1/b", b"");
    assert_eq!((answer.status, answer.text(), answer.header("connection")), (200, "2", Some("close")));
    assert_eq!(idle.end(), "");
    let answer = head.ask("HEAD", "/v1/b", b"");
    assert_eq!((answer.status, answer.header("content-length")), (200, Some("1")));
    let mut fresh = fresh;
    assert_eq!(fresh.ask("GET", "/v1/none", b"").status, 404);
    assert_eq!(admin.end(), "", "an idle connection of the admin listener is closed");
    server.terminate();
}

#[test]
fn stop_of_old_process_closes_its_idle_connections() {
    of_files!();
    let server = Upgraded::start(&[]);
    let mut idle = Connection::open(server.address);
    assert_eq!(idle.ask("PUT", "/v1/a", b"1").status, 201);
    let former = server.process.load(Ordering::Relaxed);
    server.upgrade(&[]);
    let begun = Instant::now();
    signal(former, Signal::TERM);
    await_end(former);
    assert!(begun.elapsed() < Duration::from_secs(20), "it waits for the drain timeout");
    assert_eq!(idle.end(), "");
    assert_eq!(Connection::open(server.address).ask("GET", "/v1/a", b"").text(), "1");
    server.terminate();
}

#[test]
fn history_over_upgrades_is_linearizable() {
    of_files!();
    histories_over_upgrades(&SMALL_SEGMENTS, count("KVS_TEST_HISTORIES", 40).div_ceil(2));
}

/// Clients record histories over upgrades of the process.
fn histories_over_upgrades(args: &[&str], histories: u64) {
    let mut rng = zoo::dice();
    let server = Upgraded::start(args);
    let (mut upgrades, mut operations) = (0, 0);
    for round in 0..histories.div_ceil(AT_ONCE) {
        let names: Vec<_> = (0..AT_ONCE.min(histories - round * AT_ONCE)).map(|n| format!("{round}-{n}")).collect();
        let stage = Stage::default();
        stage.set(Some(server.address));
        let all = names.len() as u64 * OPERATIONS;
        let (judged, ()) = judge(&stage, &names, &mut rng, |_| {
            for moment in 1..4 {
                stage.wait_for(all * moment / 5);
                server.upgrade(&[]);
                upgrades += 1;
            }
        });
        assert_eq!(judged.unknown, 0, "no outcome is unknown");
        operations += judged.operations as u64;
    }
    println!("{histories} histories of {operations} operations over {upgrades} upgrades");
    assert_eq!(operations, histories * OPERATIONS);
    server.terminate();
}

/// An upgrade changes the host, not the guest: neither to the file that was named, when another guest was swapped in, nor to what
/// the file has become.
#[test]
fn guest_stays_the_one_that_serves() {
    of_files!();
    let directory = TempDir::new().expect("a temporary directory can be made");
    let named = directory.path().join("named.wasm");
    fs::copy(guest(), &named).expect("it can be copied");
    let server = Upgraded::start(&[named.to_str().expect("a path is text"), "--probation", "1ms"]);
    let digest = || {
        let status = Connection::open(server.admin).ask("GET", "/guest", b"");
        serde_json::from_slice::<Value>(&status.body).expect("the status is JSON")["sha256"].clone()
    };
    let first = digest();
    // What it was started with is on disk still.
    server.upgrade(&[]);
    assert_eq!(digest(), first);
    fs::write(&named, copy_of(guest())).expect("it can be written");
    server.fails_with(&[]);
    server.first().says("serves a guest that is not on disk any more");
    assert_eq!(digest(), first);
    let swapped =
        Connection::open(server.admin).ask("PUT", "/guest", &fs::read(brittle()).expect("the guest is built"));
    assert_eq!(swapped.status, 200, "{}", swapped.text());
    let second = digest();
    assert_ne!(second, first);
    server.upgrade(&[]);
    assert_eq!(digest(), second);
    server.terminate();
}

#[test]
fn service_manager_gets_state_and_main_process() {
    of_files!();
    let directory = TempDir::new().expect("a temporary directory can be made");
    let manager = UnixDatagram::bind(directory.path().join("notify")).expect("it can be bound");
    manager.set_read_timeout(Some(PATIENCE)).expect("the time is not zero");
    let expected = || {
        let mut bytes = [0; 512];
        let length = manager.recv(&mut bytes).expect("something is reported");
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    };
    let notify = directory.path().join("notify");
    let server = Upgraded::start_with(&[], |command| {
        command.env("NOTIFY_SOCKET", &notify);
    });
    let ready = |process: i32| format!("READY=1\nMAINPID={process}\n");
    assert_eq!(expected(), ready(server.process.load(Ordering::Relaxed)));
    let other = program(&directory, "other", "exit 1");
    server.fails(&other);
    assert!(expected().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert_eq!(expected(), ready(server.process.load(Ordering::Relaxed)));
    server.upgrade(&[]);
    assert!(expected().starts_with("RELOADING=1\n"));
    assert_eq!(expected(), ready(server.process.load(Ordering::Relaxed)));
    // The old process reports it: it could end before the new one does.
    let kvs = kvs_tests::binary();
    let stopped = program(&directory, "stopped", &format!("UPGRADE_FAILPOINT=stop:serving exec {kvs} \"$@\""));
    server.upgrade(&["--binary", stopped.to_str().expect("a path is text")]);
    let process = server.process.load(Ordering::Relaxed);
    assert!(expected().starts_with("RELOADING=1\n"));
    assert_eq!(expected(), ready(process));
    await_stop(process);
    signal(process, Signal::CONT);
    server.terminate();
    assert_eq!(expected(), "STOPPING=1\n");
}

#[test]
fn socket_activation_gives_both_listeners() {
    of_files!();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let admin = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let (address, admin_address) = (listener.local_addr().expect("bound"), admin.local_addr().expect("bound"));
    // Clients connect before the server runs.
    let mut client = Connection::open(address);
    let data = TempDir::new().expect("a temporary directory can be made");
    let served = serve(data.path());
    let mut command = through("/bin/sh", &served);
    command.args(["-c", "export LISTEN_PID=$$ LISTEN_FDS=2; exec \"$@\" 3<&0 4<&1 </dev/null >/dev/null", "sh"]);
    command.arg(served.get_program()).args(served.get_args());
    command.stdin(OwnedFd::from(listener)).stdout(OwnedFd::from(admin));
    let server = Server::spawn(command, data);
    assert_eq!((server.address(), server.admin()), (address, admin_address));
    assert_eq!(client.ask("PUT", "/v1/a", b"1").status, 201);
    assert_eq!(Connection::open(admin_address).ask("GET", "/readyz", b"").status, 200);
    server.terminate();
    assert!(Connection::try_open(address).is_err(), "the listener is closed");
}
