//! Commands and servers that are killed: an import resumes where it was, and a watch continues.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{client, objects, refuses, run};
use crate::support::log::kvs_at;
use crate::support::server::{Server, Stopped};
use crate::support::wire::Connection;

/// Progress of an import, from its file.
fn mark(file: &Path) -> usize {
    let text = fs::read(file.with_added_extension("kvs-import")).expect("a load keeps how far it came");
    let mark: Value = serde_json::from_slice(&text).expect("it is JSON");
    mark["line"].as_u64().expect("a number") as usize
}

/// A server at the address of one that was killed.
fn again(stopped: Stopped, address: SocketAddr, args: &[&str]) -> Server {
    let data = stopped.into_data();
    let mut command = kvs_at(data.path());
    command.args(["serve", "--listen", &address.to_string()]).args(args);
    Server::spawn(command, data)
}

/// Waits until this many puts have happened from now on.
struct Puts(Connection);

impl Puts {
    fn of(server: &Server) -> Self {
        let mut connection = Connection::open(server.address());
        assert_eq!(connection.ask_for_head("GET", "/v1?watch", &[]).status, 200);
        connection.chunk().expect("it begins");
        Self(connection)
    }

    fn wait(&mut self, count: usize) {
        let (mut seen, mut text) = (0, Vec::new());
        while seen < count {
            text.extend(self.0.chunk().expect("the stream continues"));
            let end = text.windows(2).rposition(|window| window == b"\n\n").map_or(0, |at| at + 2);
            let events = text.drain(..end).collect::<Vec<_>>();
            seen += events.windows(10).filter(|window| window == b"event: put").count();
        }
    }
}

#[test]
fn interrupted_import_resumes_at_any_point() {
    const LINES: usize = 6_000;
    // So that an import takes longer than a second, the interval at which it records its progress.
    const SLOW: [&str; 4] = ["--rate-limit", "1000/s", "--rate-burst", "100"];
    let mut server = Server::start(&SLOW);
    let directory = TempDir::new().expect("a temporary directory can be made");
    let file = directory.path().join("lines.jsonl");
    let name = file.to_str().expect("a temporary path is text");
    // Each key several times: the last line counts, even if lines are put twice.
    let key = |line: usize| format!("key-{}", line % 700);
    let text: Vec<_> =
        (0..LINES).map(|line| json!({"key": key(line), "value": line.to_string()}).to_string()).collect();
    let write = |lines: &[String]| fs::write(&file, lines.join("\n")).expect("the directory takes a file");
    write(&text);
    let stored = |server: &Server| -> BTreeMap<String, usize> {
        let objects = objects(client(server, &["export"])).into_iter();
        let pair = |object: Value| (object["key"].as_str()?.to_owned(), object["value"].as_str()?.parse().ok()?).into();
        objects.filter_map(pair).collect()
    };

    let mut marks = vec![0];
    for round in 0..3 {
        let mut puts = Puts::of(&server);
        let mut load = client(&server, &["import", "--resume", name]);
        let mut load = load.stderr(Stdio::piped()).spawn().expect("the binary can be started");
        puts.wait(1_500);
        if round < 2 {
            load.kill().expect("a child can be killed");
            load.wait().expect("a child can be waited for");
        } else {
            let address = server.address();
            let stopped = server.kill();
            let output = load.wait_with_output().expect("a child can be waited for");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.starts_with("kvs: line ") && said.lines().count() == 1, "{said}");
            assert!(said.contains("no response from") && said.contains("resume with kvs import --resume"), "{said}");
            server = again(stopped, address, &SLOW);
        }
        let mark = mark(&file);
        assert!(mark > *marks.last().expect("there is one"), "in round {round} it came from {marks:?} to {mark}");
        marks.push(mark);
        // All lines up to the recorded progress are stored, unless a later or repeated line has the same key.
        let (stored, again) = (stored(&server), marks[round]);
        for line in again..mark {
            let there = stored.get(&key(line)).copied();
            assert!(there.is_some_and(|there| there >= line), "line {line} of {mark} is not stored, but {there:?}");
        }
    }

    let mut changed = text.clone();
    changed[5] = changed[5].replace("5", "6");
    write(&changed);
    refuses(&server, &["import", "--resume", name]).with(1, &["the imported part of ", "has changed"]);
    write(&text);
    let elsewhere = Server::start(&[]);
    refuses(&elsewhere, &["import", "--resume", name])
        .with(1, &["kvs-import belongs to an import into", "import without --resume"]);

    let output = run(client(&server, &["import", "--resume", name]), b"");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(said, format!("imported {} lines\n", LINES - marks[3]));
    let last = (LINES - 700..LINES).map(|line| (key(line), line)).collect::<BTreeMap<_, _>>();
    assert_eq!(stored(&server), last);
    let left: Vec<_> =
        directory.path().read_dir().expect("it is there").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["lines.jsonl"]);
}

#[test]
fn watch_resumes_after_server_restart() {
    let mut server = Server::start(&[]);
    let address = server.address();
    let mut wire = Connection::open(address);
    wire.ask("PUT", "/v1/a0", b"before");
    let watch = |args: &[&str]| {
        let mut command = client(&server, args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("it can be started");
        let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        (Killed(child), lines)
    };
    let (_plain, mut plain) = watch(&["watch", "--since", "0"]);
    let (_json, mut json) = watch(&["watch", "a", "--since", "0", "--output", "json"]);
    let mut plain = || plain.next().expect("it continues").expect("it is text");
    let mut json = || -> Value {
        serde_json::from_str(&json.next().expect("it continues").expect("it is text")).expect("a line is JSON")
    };
    assert_eq!(plain(), "1 put \"a0\" = \"before\"");
    assert_eq!(json()["sequence"], "1");
    for round in 1..=3 {
        wire.ask("PUT", "/v1/a1", b"two\nlines");
        wire.ask("DELETE", "/v1/b", b"");
        wire.ask("PUT", "/v1/b", b"\xff");
        server = again(server.kill(), address, &[]);
        wire = Connection::open(address);
        wire.ask("DELETE", "/v1/b", b"");
        let first = 3 * round - 1;
        assert_eq!(plain(), format!("{first} put \"a1\" = \"two\\nlines\""));
        assert_eq!(plain(), format!("{} put \"b\" = b\"\\xff\"", first + 1));
        assert_eq!(plain(), format!("{} delete \"b\"", first + 2));
        assert_eq!(json(), json!({"key": "a1", "value": "two\nlines", "type": "put", "sequence": first.to_string()}));
    }
}

/// A child that ends with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Fails only when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
