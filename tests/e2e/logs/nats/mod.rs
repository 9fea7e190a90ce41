//! The log in NATS JetStream: each test starts its own cluster of three nodes, kills nodes and corrupts their data.

mod backup;
mod compaction;
mod conditions;
mod copy;
mod disasters;
mod quorum;
mod supervision;

use std::collections::HashMap;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::load::count;
use crate::support::nats::{Nodes, SAFE};
use crate::support::readiness::{STANDS_BY, UP_TO_DATE, WELL, becomes_ready};
use crate::support::requests::{answer, get, put, send};
use crate::support::server::{PATIENCE, Refused, Server, kvs, refused, serve};
use crate::support::wire::{Connection, STALE};

/// Short, so that takeovers are fast.
const LEASE: [&str; 2] = ["--read-lease", "3s"];

fn args(nodes: &Nodes) -> Vec<String> {
    let own = ["--txlog", &nodes.url("x"), "--txlog-monitor", &nodes.monitors()].map(str::to_owned);
    own.into_iter().chain(LEASE.map(str::to_owned)).collect()
}

fn texts(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn start(nodes: &Nodes) -> Server {
    Server::start(&texts(&args(nodes)))
}

fn stand_by(nodes: &Nodes) -> Server {
    let args = args(nodes);
    let server = Server::start(&[&texts(&args)[..], &["--standby"]].concat());
    becomes_ready(&server, 200, STANDS_BY);
    server
}

fn txlog(nodes: &Nodes, args: &[&str]) -> Command {
    let mut kvs = kvs();
    kvs.arg("txlog").args(args).args(["--txlog", &nodes.url("x")]);
    kvs
}

fn printed(mut command: Command) -> String {
    let output = command.stdout(std::process::Stdio::piped()).output().expect("the binary can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("it is text")
}

#[test]
fn writes_survive_restart_and_kill() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    becomes_ready(&server, 200, WELL);
    assert_eq!((put(&server, "a", "1"), put(&server, "a", "2"), put(&server, "b", "3")), (201, 201, 201));
    assert_eq!(Connection::open(server.address()).ask("DELETE", "/v1/b", b"").status, 200);
    let args = args(&nodes);
    let server = server.terminate().restart(&texts(&args));
    assert_eq!((get(&server, "a"), get(&server, "b").0), ((200, "2".into()), 404));
    assert_eq!(put(&server, "c", "4"), 201);
    let server = server.kill().restart(&texts(&args));
    assert_eq!((get(&server, "a"), get(&server, "c")), ((200, "2".into()), (200, "4".into())));
    assert_eq!(put(&server, "c", "5"), 201);
}

#[test]
fn second_server_is_rejected_while_first_runs() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(args(&nodes));
    refused(command).with(1, &["stream KVS-x-00 at 127.0.0.1:", "it is in use by process ", "serve with --standby"]);
    assert_eq!(put(&server, "a", "1"), 201);
}

#[test]
fn standby_takes_over_from_killed_and_from_stopped_primary() {
    let nodes = Nodes::start(3);
    let first = start(&nodes);
    assert_eq!(put(&first, "a", "1"), 201);
    let second = stand_by(&nodes);
    becomes_ready(&second, 200, UP_TO_DATE);
    let stale = |server: &Server| Connection::open(server.address()).ask_with("GET", "/v1/a", &STALE, b"").status;
    assert_eq!((stale(&second), get(&second, "a").0, put(&second, "a", "2")), (200, 503, 503));
    let first = first.kill();
    becomes_ready(&second, 200, WELL);
    assert_eq!((get(&second, "a"), put(&second, "a", "2")), ((200, "1".into()), 201));
    // The killed one restarts as a standby, and takes over at once from one that stops.
    let args = args(&nodes);
    let third = first.restart(&[&texts(&args)[..], &["--standby"]].concat());
    becomes_ready(&third, 200, UP_TO_DATE);
    second.terminate();
    becomes_ready(&third, 200, WELL);
    assert_eq!((get(&third, "a"), put(&third, "a", "3")), ((200, "2".into()), 201));
}

#[test]
fn paused_primary_never_answers_stale() {
    let nodes = Nodes::start(3);
    let paused = start(&nodes);
    assert_eq!(put(&paused, "a", "1"), 201);
    let standby = stand_by(&nodes);
    becomes_ready(&standby, 200, UP_TO_DATE);
    paused.signal(Signal::STOP);
    // The system buffers these, and the server reads them when it resumes.
    let mut waiting: Vec<_> = (0..20).map(|_| send(&paused, "GET /v1/a", "")).collect();
    becomes_ready(&standby, 200, WELL);
    assert_eq!(put(&standby, "a", "2"), 201);
    let mut lost = send(&paused, "PUT /v1/lost", "x");
    paused.signal(Signal::CONT);
    for stream in &mut waiting {
        let answer = answer(stream);
        assert!(!answer.starts_with("HTTP/1.1 200"), "stale: {answer}");
    }
    let answer = answer(&mut lost);
    assert!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
    let (status, stopped) = paused.ends();
    let last = stopped.stderr().last().expect("it says why");
    assert!(status.code() == Some(1) && last.contains("lost the epoch of the log"), "{status}: {last}");
    assert_eq!((get(&standby, "a"), get(&standby, "lost").0), ((200, "2".into()), 404));
}

/// Clients of one server, and their responses.
#[derive(Default)]
struct Clients {
    ended: AtomicBool,
    acknowledged: Mutex<Vec<String>>,
    reads: AtomicUsize,
    failed_reads: Mutex<Vec<u16>>,
}

/// Ends the clients, also when the test fails.
struct End<'c>(&'c Clients);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
    }
}

impl Clients {
    fn acknowledged(&self) -> usize {
        self.acknowledged.lock().expect("nobody panics").len()
    }

    /// Writes keys of its own, each once.
    fn write(&self, server: &Server, writer: usize) {
        let mut connection = Connection::open(server.address());
        for number in 0.. {
            if self.ended.load(Ordering::Acquire) {
                return;
            }
            let key = format!("w{writer}-{number}");
            match connection.ask("PUT", &format!("/v1/{key}"), key.as_bytes()).status {
                201 => self.acknowledged.lock().expect("nobody panics").push(key),
                // Not accepted, or the outcome is unknown.
                503 | 504 => thread::sleep(Duration::from_millis(20)),
                status => panic!("{key}: {status}"),
            }
        }
    }

    /// Reads a key that no client writes.
    fn read(&self, server: &Server) {
        let mut connection = Connection::open(server.address());
        while !self.ended.load(Ordering::Acquire) {
            let status = connection.ask("GET", "/v1/before", b"").status;
            self.reads.fetch_add(1, Ordering::Relaxed);
            if status != 200 {
                self.failed_reads.lock().expect("nobody panics").push(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until this many more writes are acknowledged, and returns how long the first took.
    fn grow(&self, by: usize) -> Duration {
        let (before, begun) = (self.acknowledged(), Instant::now());
        let mut first = None;
        while self.acknowledged() < before + by {
            assert!(begun.elapsed() < PATIENCE, "writes do not come back");
            if first.is_none() && self.acknowledged() > before {
                first = Some(begun.elapsed());
            }
            thread::sleep(Duration::from_millis(10));
        }
        first.unwrap_or_else(|| begun.elapsed())
    }
}

#[test]
fn killed_leaders_of_engine_lose_and_double_nothing() {
    let kills = count("KVS_TEST_LEADER_KILLS", 2);
    let mut nodes = Nodes::start(3);
    let server = Server::start(&["--txlog", &nodes.url("x"), "--txlog-monitor", &nodes.monitors()]);
    assert_eq!(put(&server, "before", "1"), 201);
    let clients = Clients::default();
    let mut pauses = Vec::new();
    thread::scope(|scope| {
        let _end = End(&clients);
        for client in 0..4 {
            let (server, clients) = (&server, &clients);
            scope.spawn(move || clients.write(server, client));
            scope.spawn(move || clients.read(server));
        }
        for _ in 0..kills {
            clients.grow(100);
            let leader = nodes.leader("x");
            nodes.kill(leader);
            // Responses in flight have arrived by now.
            thread::sleep(Duration::from_millis(500));
            pauses.push(clients.grow(100) + Duration::from_millis(500));
            nodes.restart(leader);
        }
    });
    let Clients { acknowledged, reads, failed_reads, .. } = clients;
    let (acknowledged, failed) = (acknowledged.into_inner().unwrap(), failed_reads.into_inner().unwrap());
    for key in &acknowledged {
        assert_eq!(get(&server, key), (200, key.clone()));
    }
    becomes_ready(&server, 200, WELL);
    server.terminate();
    let mut times: HashMap<String, usize> = HashMap::new();
    for line in printed(txlog(&nodes, &["cat", "--output", "json"])).lines() {
        let entry: Value = serde_json::from_str(line).expect("it is JSON");
        *times.entry(entry["key"].as_str().expect("it has a key").to_owned()).or_default() += 1;
    }
    let lost = acknowledged.iter().filter(|key| !times.contains_key(*key)).count();
    let doubled = times.values().filter(|times| **times > 1).count();
    println!(
        "{kills} kills of the leader: {} writes acknowledged, {lost} lost, {doubled} doubled, writes back after {pauses:.1?}, \
         {} reads, of which {} failed",
        acknowledged.len(),
        reads.into_inner(),
        failed.len()
    );
    assert!(lost == 0 && doubled == 0);
    // Reads are answered for 0.8 L + 4 s after the last renewal of the lease. An election can take longer on a slow machine.
    let is_long = pauses.iter().any(|pause| *pause > Duration::from_secs(11));
    assert!(failed.is_empty() || is_long, "{failed:?}");
}

#[test]
fn standby_started_under_load_finds_primary() {
    let nodes = Nodes::start(3);
    let first = start(&nodes);
    let clients = Clients::default();
    let standby = thread::scope(|scope| {
        let _end = End(&clients);
        scope.spawn(|| clients.write(&first, 0));
        // Beyond its claim, so that only a frame under load can name it.
        clients.grow(100);
        stand_by(&nodes)
    });
    first.kill();
    becomes_ready(&standby, 200, WELL);
    for key in clients.acknowledged.into_inner().unwrap() {
        assert_eq!(get(&standby, &key), (200, key.clone()));
    }
}

fn refuses(nodes: &Nodes, args: &[&str]) -> Refused {
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(["--txlog", &nodes.url("x")]).args(args);
    refused(command)
}

#[test]
fn unsafe_settings_are_rejected_unless_allowed() {
    let nodes = Nodes::start_with(1, "max_payload: 8MB\njetstream { store_dir: STORE }\n");
    let monitors = nodes.monitors();
    refuses(&nodes, &["--allow-unsafe-txlog", "--max-value-bytes", "16MiB"])
        .with(1, &["max_payload of the server is 8388608 bytes", "lower --max-value-bytes"]);
    // The stream is there now, with one replica.
    refuses(&nodes, &["--txlog-monitor", &monitors])
        .with(1, &["num_replicas of KVS-x-00 is 1", "sync_interval of the node", "--allow-unsafe-txlog"]);
    refuses(&nodes, &[]).with(1, &["sync_interval of the nodes is unknown", "--txlog-monitor"]);
    let url = nodes.url("x");
    let server = Server::start(&["--txlog", &url, "--allow-unsafe-txlog"]);
    becomes_ready(&server, 200, "num_replicas of KVS-x-00 is 1");
    assert_eq!(put(&server, "a", "1"), 201);
}

#[test]
fn passwords_are_checked_and_never_shown() {
    let users = format!("{SAFE}authorization {{ user: kvs, password: s3cret }}\n");
    let nodes = Nodes::start_with(1, &users);
    let with = |user: &str| nodes.url("x").replace("nats://", &format!("nats://{user}@"));
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(["--txlog", &with("kvs:wr0ng"), "--allow-unsafe-txlog"]);
    let refused = refused(command);
    refused.with(1, &["cannot open the log in the stream KVS-x-00"]);
    assert!(!refused.line.contains("wr0ng"), "{refused}");
    let server = Server::start(&["--txlog", &with("kvs:s3cret"), "--allow-unsafe-txlog"]);
    assert_eq!(put(&server, "a", "1"), 201);
    assert!(server.stderr().iter().all(|line| !line.contains("s3cret")), "{:?}", server.stderr());
}

#[test]
fn deleted_stream_is_never_empty_store() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    assert_eq!(put(&server, "a", "1"), 201);
    assert!(nodes.api("STREAM.DELETE.KVS-x-00", "").contains("\"success\":true"));
    let (status, stopped) = server.ends();
    let last = stopped.stderr().last().expect("it says why");
    assert!(status.code() == Some(1) && last.contains("the stream KVS-x-00 is gone"), "{status}: {last}");
    stopped
        .refuses(&texts(&args(&nodes)))
        .with(1, &["the stream KVS-x-00 is gone, which this data directory was used with"]);
}

#[test]
fn purged_stream_is_never_empty_store() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    assert_eq!(put(&server, "a", "1"), 201);
    assert!(nodes.api("STREAM.PURGE.KVS-x-00", "").contains("\"success\":true"));
    let (status, stopped) = server.ends();
    let last = stopped.stderr().last().expect("it says why");
    assert!(status.code() == Some(1) && last.contains("frames of the log in the stream KVS-x-00"), "{status}: {last}");
    stopped.refuses(&texts(&args(&nodes))).with(1, &["it was purged by hand"]);
}

/// Writes until the response has this status, and returns the keys of acknowledged writes.
fn put_until(server: &Server, status: u16, name: &str, value: &str) -> Vec<String> {
    let begun = Instant::now();
    let mut acknowledged = Vec::new();
    for number in 0.. {
        let key = format!("{name}{number}");
        let now = put(server, &key, value);
        if now == 201 {
            acknowledged.push(key);
        }
        if now == status {
            return acknowledged;
        }
        assert!([201, 503, 504, 507].contains(&now) && begun.elapsed() < PATIENCE, "{now} instead of {status}");
        thread::sleep(Duration::from_millis(20));
    }
    unreachable!("the numbers do not end")
}

#[test]
fn lost_end_of_stream_is_never_continued() {
    let mut nodes = Nodes::start(1);
    let mut args = args(&nodes);
    args.push("--allow-unsafe-txlog".into());
    let server = Server::start(&texts(&args));
    assert_eq!(put(&server, "a", "1"), 201);
    nodes.kill(0);
    let (store, copy) = (nodes.store(0), nodes.store(0).with_extension("copy"));
    let copied = Command::new("cp").arg("-r").args([&store, &copy]).status().expect("cp can be started");
    assert!(copied.success());
    nodes.restart(0);
    put_until(&server, 201, "lost", "1");
    // As after a power cut of a node that does not sync.
    nodes.kill(0);
    std::fs::remove_dir_all(&store).and_then(|()| std::fs::rename(&copy, &store)).expect("the store can be replaced");
    nodes.restart(0);
    let (status, stopped) = server.ends();
    let last = stopped.stderr().last().expect("it says why");
    assert!(status.code() == Some(1) && last.contains("the engine has lost the end of the log"), "{status}: {last}");
    let mut again = serve(stopped.data());
    again.args(&args);
    let again = again.output().expect("it can be run");
    let reason = String::from_utf8_lossy(&again.stderr);
    let last = reason.lines().last().expect("it says why");
    assert_eq!(again.status.code(), Some(1), "{reason}");
    assert!(
        last.contains("the engine has lost the end of the log") && last.contains("with another --data-dir"),
        "{reason}"
    );
}

#[test]
fn server_restarts_while_node_is_down() {
    let mut nodes = Nodes::start(3);
    let server = start(&nodes);
    assert_eq!(put(&server, "a", "1"), 201);
    // With that of the stream, a leader must be elected first.
    nodes.kill(nodes.leader("x"));
    let args = args(&nodes);
    let server = server.kill().restart(&texts(&args));
    server.says("sync_interval of a node is unknown");
    assert_eq!(get(&server, "a"), (200, "1".into()));
    put_until(&server, 201, "b", "2");
}

#[test]
fn log_that_ends_with_large_frames_is_opened() {
    let nodes = Nodes::start(3);
    let args = ["--txlog", &nodes.url("x"), "--txlog-monitor", &nodes.monitors(), "--max-value-bytes", "2MiB"]
        .map(str::to_owned);
    let server = Server::start(&texts(&args));
    // One read returns at most 4 MiB, and a start needs the last four frames. The heartbeats are a second apart.
    let value = "x".repeat(3 << 19);
    for key in ["a", "b", "c", "d"] {
        assert_eq!(put(&server, key, &value), 201);
    }
    let server = server.kill().restart(&texts(&args));
    for key in ["a", "b", "c", "d"] {
        assert_eq!(get(&server, key), (200, value.clone()));
    }
    assert_eq!(put(&server, "e", "1"), 201);
}

#[test]
fn full_stream_rejects_writes_until_it_has_space() {
    let nodes = Nodes::start(3);
    let args = args(&nodes);
    let server = Server::start(&[&texts(&args)[..], &["--request-timeout", "2s"]].concat());
    assert_eq!(put(&server, "a", "1"), 201);
    nodes.limit("x", Some(100 << 10));
    let value = "x".repeat(10 << 10);
    let mut acknowledged = put_until(&server, 507, "full", &value);
    nodes.limit("x", None);
    acknowledged.extend(put_until(&server, 201, "again", &value));
    assert!(acknowledged.len() > 2, "{acknowledged:?}");
    becomes_ready(&server, 200, WELL);
    let server = server.terminate().restart(&texts(&args));
    for key in acknowledged {
        assert_eq!(get(&server, &key), (200, value.clone()));
    }
}

#[test]
fn large_write_uses_node_that_accepts_it() {
    let mut nodes = Nodes::start(3);
    let args = args(&nodes);
    let server = Server::start(&[&texts(&args)[..], &["--max-value-bytes", "2MiB"]].concat());
    for node in 0..2 {
        nodes.set(node, "max_payload: 8MB", "max_payload: 1MB");
        nodes.kill(node);
        nodes.restart(node);
        put_until(&server, 201, "between", "1");
    }
    // Now the client is connected to one of these.
    nodes.kill(2);
    put_until(&server, 201, "without", "1");
    nodes.restart(2);
    put_until(&server, 201, "large", &"x".repeat(3 << 19));
    becomes_ready(&server, 200, WELL);
}

#[test]
fn log_is_verified_exported_and_imported() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    assert_eq!((put(&server, "a", "1"), put(&server, "b", "2")), (201, 201));
    // While it is served from.
    assert!(printed(txlog(&nodes, &["verify"])).ends_with("the log is sound: 2 entries, newest sequence 2\n"));
    let exported = printed(txlog(&nodes, &["export"]));
    server.terminate();
    let file = TempDir::new().expect("a temporary directory can be made");
    let file = file.path().join("exported");
    std::fs::write(&file, &exported).expect("a file can be written");
    let mut import = kvs();
    import.args(["txlog", "import", "--txlog", &nodes.url("y")]).arg(&file);
    printed(import);
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(["--txlog", &nodes.url("y"), "--txlog-monitor", &nodes.monitors()]);
    let server = Server::spawn(command, data);
    assert_eq!((get(&server, "a"), get(&server, "b")), ((200, "1".into()), (200, "2".into())));
}
