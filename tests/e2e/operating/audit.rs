//! The audit trail of changes to a server.

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::backup::{restore, take};
use crate::support::guests::{DEFAULT_GUEST, component, copy_of, guest};
use crate::support::server::{PATIENCE, Server, kvs};
use crate::support::swap::{status, swap};
use crate::support::tokens::Tokens;
use crate::support::wire::Connection;

const JSON: [&str; 2] = ["--log-format", "json"];

fn record(line: &str) -> Value {
    let record: Value = serde_json::from_str(line).expect("JSON");
    assert_eq!((&record["message"], &record["level"]), (&"audit".into(), &"INFO".into()));
    record
}

#[test]
fn swap_is_recorded_with_digest_principal_and_request_id() {
    let tokens = Tokens::new();
    let alice = tokens.add(&["alice", "--scope", "admin"]);
    // Not a loopback address, so that a token is required.
    let args = ["--tokens", &tokens.file(), "--admin", "0.0.0.0:0"];
    let server = Server::start(&[&JSON[..], &["--probation", "1ms"], &args].concat());
    let bearer = format!("Bearer {alice}");
    let headers = [("authorization", &*bearer), ("x-request-id", "change-7")];
    let put = |component: &[u8]| Connection::open(server.admin()).ask_with("PUT", "/guest", &headers, component).status;
    assert_eq!(put(&component(guest())), 200);
    let done = record(&server.says("\"target\":\"audit\""));
    for (field, value) in
        [("action", "swap"), ("outcome", "success"), ("principal", "alice"), ("request_id", "change-7")]
    {
        assert_eq!(done[field], value, "{done}");
    }
    assert_eq!(done["object"].as_str().map(str::len), Some(64), "{done}");
    assert_eq!(put(b"nonsense"), 422);
    let failed = record(&server.says("\"outcome\":\"it is not WebAssembly\""));
    assert_eq!((&failed["action"], &failed["principal"]), (&"swap".into(), &"alice".into()));
}

#[test]
fn read_only_and_edits_are_recorded_with_principal() {
    let tokens = Tokens::new();
    let alice = tokens.add(&["alice", "--scope", "admin"]);
    let args = ["--tokens", &tokens.file(), "--admin", "0.0.0.0:0"];
    let server = Server::start(&[&JSON[..], &args].concat());
    let bearer = format!("Bearer {alice}");
    for (method, path, status, action, object) in [
        ("PUT", "/v1/a", 201, "edit", "PUT /v1/a"),
        ("PUT", "/read-only", 200, "read-only", "on"),
        ("DELETE", "/v1/a", 503, "edit", "DELETE /v1/a"),
        ("DELETE", "/read-only", 200, "read-only", "off"),
    ] {
        let headers = [("authorization", &*bearer), ("x-request-id", "change-7")];
        assert_eq!(Connection::open(server.admin()).ask_with(method, path, &headers, b"").status, status, "{path}");
        let line = record(&server.says(&format!("\"object\":\"{object}\"")));
        let outcome = if action == "edit" { status.to_string() } else { "success".to_owned() };
        for (field, value) in
            [("action", action), ("outcome", &outcome), ("principal", "alice"), ("request_id", "change-7")]
        {
            assert_eq!(line[field], value, "{line}");
        }
    }
    // Reading the state is not recorded.
    let headers = [("authorization", &*bearer)];
    assert_eq!(Connection::open(server.admin()).ask_with("GET", "/read-only", &headers, b"").text(), "off\n");
    let lines = server.terminate().stderr().to_vec();
    assert_eq!(lines.iter().filter(|line| line.contains("\"audit\"")).count(), 4, "{lines:?}");
}

#[test]
fn reload_is_recorded_with_its_cause() {
    let data = TempDir::new().expect("a temporary directory can be made");
    let file = data.path().join("guest.wasm");
    fs::write(&file, component(DEFAULT_GUEST)).expect("it can be written");
    let server = Server::start(&["--probation", "1ms", file.to_str().expect("a temporary path is text")]);
    fs::write(&file, copy_of(DEFAULT_GUEST)).expect("it can be written");
    server.signal(Signal::HUP);
    let line = server.says("audit action=\"swap\"");
    let digest = status(&server)["sha256"].as_str().expect("a guest has a digest").to_owned();
    assert!(line.contains(&digest) && line.contains("principal=\"SIGHUP\""), "{line}");
    // Without tokens there is no principal.
    assert_eq!(swap(&server, &component(guest())).status, 200);
    let line = server.says_again("audit action=\"swap\"", 2);
    assert!(!line.contains("principal") && line.contains("request_id"), "{line}");
}

#[test]
fn rollback_is_recorded_with_principal() {
    let tokens = Tokens::new();
    let [alice, bob] = ["alice", "bob"].map(|name| tokens.add(&[name, "--scope", "admin"]));
    let args = ["--tokens", &tokens.file(), "--admin", "0.0.0.0:0", "--probation", "1h"];
    let server = Server::start(&[&JSON[..], &args].concat());
    let ask = |token: &str, method: &str, path: &str, body: &[u8]| {
        let headers = [("authorization", &*format!("Bearer {token}")), ("x-request-id", "change-8")];
        Connection::open(server.admin()).ask_with(method, path, &headers, body).status
    };
    assert_eq!(ask(&bob, "DELETE", "/guest?rollback", b""), 409);
    thread::scope(|scope| {
        // The response comes at the end of the probation.
        let swapped = scope.spawn(|| ask(&alice, "PUT", "/guest", &component(guest())));
        let begun = Instant::now();
        while ask(&bob, "DELETE", "/guest?rollback", b"") != 202 {
            assert!(begun.elapsed() < PATIENCE, "there is no probation");
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(swapped.join().expect("it is answered"), 422);
    });
    for (object, outcome) in [("none", "nothing to roll back"), ("probation", "success")] {
        let line = record(&server.says(&format!("\"object\":\"{object}\"")));
        for (field, value) in
            [("action", "rollback"), ("outcome", outcome), ("principal", "bob"), ("request_id", "change-8")]
        {
            assert_eq!(line[field], value, "{line}");
        }
    }
}

/// Runs a command, and returns the action and object that it recorded for this user.
fn recorded(mut command: Command) -> (String, String) {
    let output = command.args(JSON).stdout(Stdio::piped()).output().expect("the binary under test can be started");
    let lines = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{lines}");
    let record = record(lines.lines().find(|line| line.contains("\"audit\"")).unwrap_or_else(|| panic!("{lines}")));
    assert!(record["principal"].as_str().is_some_and(|user| user.starts_with("uid=")), "{record}");
    let text = |field: &str| record[field].as_str().expect("it is text").to_owned();
    (text("action"), text("object"))
}

#[test]
fn restore_is_recorded_with_user() {
    let data = TempDir::new().expect("a temporary directory can be made");
    let (file, to) = (data.path().join("backup"), data.path().join("restored"));
    let server = Server::start(&[]);
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", b"value").status, 201);
    take(&server, &file, &[]);
    let to = to.to_str().expect("a temporary path is text");
    assert_eq!(recorded(restore(&[file], &["--data-dir", to])), ("restore".to_owned(), to.to_owned()));
}

#[test]
fn new_and_revoked_tokens_are_recorded_with_user() {
    let data = TempDir::new().expect("a temporary directory can be made");
    let token = |action: &str| {
        let mut command = kvs();
        command.args(["token", action, "bob", "--tokens"]).arg(data.path().join("tokens"));
        recorded(command)
    };
    assert_eq!(token("create"), ("token-create".to_owned(), "bob".to_owned()));
    let (action, object) = token("revoke");
    // With the id, since several tokens can have one name.
    assert!(action == "token-revoke" && object.starts_with("bob "), "{action} of {object}");
}

#[test]
fn reloaded_tokens_are_recorded_by_name_and_id() {
    let tokens = Tokens::new();
    let alice = tokens.add(&["alice", "--scope", "admin"]);
    let server = Server::start(&[&JSON[..], &["--tokens", &tokens.file()]].concat());
    let bob = tokens.add(&["bob"]);
    server.signal(Signal::HUP);
    let line = record(&server.says("\"token-reload\""));
    let object = line["object"].as_str().expect("text");
    assert!(object.starts_with("new: bob ") && !object.contains("alice"), "{line}");
    assert_eq!((&line["outcome"], &line["principal"]), (&"success".into(), &"file".into()));
    // Another scope for alice, and none for bob.
    let text = fs::read_to_string(tokens.file()).expect("it can be read");
    let text: String = text.lines().filter(|line| line.starts_with("alice")).collect();
    fs::write(tokens.file(), text.replace(" admin ", " read ") + "\n").expect("it can be written");
    server.signal(Signal::HUP);
    let line = record(&server.says_again("\"token-reload\"", 2));
    let object = line["object"].as_str().expect("text");
    assert!(object.contains("revoked: bob ") && object.contains("changed: alice "), "{line}");
    let lines = server.terminate().stderr().join("\n");
    assert!(!lines.contains(&alice) && !lines.contains(&bob), "{lines}");
}

#[test]
fn rejected_requests_are_recorded_up_to_rate() {
    let tokens = Tokens::new();
    let bob = tokens.add(&["bob", "--scope", "read"]);
    let server = Server::start(&[&JSON[..], &["--tokens", &tokens.file(), "--admin", "0.0.0.0:0"]].concat());
    let mut client = Connection::open(server.admin());
    let bearer = format!("Bearer {bob}");
    let headers = [("authorization", &*bearer), ("x-request-id", "try-1")];
    assert_eq!(client.ask_with("PUT", "/read-only", &headers, b"").status, 403);
    let line = record(&server.says("\"access\""));
    for (field, value) in [
        ("object", "PUT /read-only"),
        ("outcome", "rejected: 403 Forbidden"),
        ("principal", "bob"),
        ("request_id", "try-1"),
        ("peer", &format!("127.0.0.1:{}", client.port())),
    ] {
        assert_eq!(line[field], value, "{line}");
    }
    let begun = Instant::now();
    for _ in 0..2_000 {
        assert_eq!(client.ask("GET", "/metrics", b"").status, 401);
    }
    let seconds = usize::try_from(begun.elapsed().as_secs()).expect("a short time");
    server.says("audit log rate exceeded");
    // Pages of other sites have no token.
    client.send("GET /guest HTTP/1.1\r\nhost: elsewhere.example\r\n\r\n");
    assert_eq!(client.read().status, 403);
    let lines = server.terminate().stderr().to_vec();
    let logged = lines.iter().filter(|line| line.contains("rejected: 401")).count();
    assert!((1..=10 * (seconds + 2)).contains(&logged), "{logged} lines in {seconds} s");
}

#[test]
fn failures_are_recorded() {
    let server = Server::start(&JSON);
    let mut client = Connection::open(server.admin());
    for (path, id) in [("/guest?dry-rum", "try-1"), ("/guest?shadow=1y", "try-2")] {
        assert_eq!(client.ask_with("PUT", path, &[("x-request-id", id)], b"").status, 400);
        let line = record(&server.says(&format!("\"request_id\":\"{id}\"")));
        let expected = ("swap", "none", "rejected: 400 Bad Request");
        let field = |name: &str| line[name].as_str().unwrap_or_default();
        assert_eq!((field("action"), field("object"), field("outcome")), expected, "{line}");
    }
    let data = TempDir::new().expect("a temporary directory can be made");
    let path = |name: &str| data.path().join(name);
    let mut revoke = kvs();
    revoke.args(["token", "revoke", "bob", "--tokens"]).arg(path("none"));
    let mut create = kvs();
    create.args(["token", "create", "b=b", "--tokens"]).arg(path("tokens"));
    let to = path("restored");
    let restore = restore(&[path("none")], &["--data-dir", to.to_str().expect("a temporary path is text")]);
    for (mut command, action, outcome) in [
        (revoke, "token-revoke", "cannot read"),
        (create, "token-create", "the name must be"),
        (restore, "restore", "cannot open"),
    ] {
        let output = command.args(JSON).output().expect("the binary under test can be started");
        assert!(!output.status.success(), "{action}");
        let lines = String::from_utf8_lossy(&output.stderr).into_owned();
        let line = record(lines.lines().find(|line| line.contains("\"audit\"")).unwrap_or_else(|| panic!("{lines}")));
        assert_eq!(line["action"], action, "{line}");
        assert!(line["outcome"].as_str().is_some_and(|text| text.contains(outcome)), "{line}");
    }
}

#[test]
fn edit_in_console_is_recorded() {
    let server = Server::start(&JSON);
    let mut client = Connection::open(server.admin());
    assert_eq!(client.ask_with("PUT", "/v1/a", &[("x-request-id", "edit-1")], b"value").status, 201);
    assert_eq!(client.ask("GET", "/v1/a", b"").status, 200);
    assert_eq!(client.ask("DELETE", "/v1/a?unknown=1", b"").status, 400);
    let done = record(&server.says("\"object\":\"PUT /v1/a\""));
    for (field, value) in [("action", "edit"), ("outcome", "201"), ("request_id", "edit-1")] {
        assert_eq!(done[field], value, "{done}");
    }
    server.says("\"object\":\"DELETE /v1/a?unknown=1\",\"outcome\":\"400\"");
    // Also one whose client disconnects.
    let mut leaves = Connection::open(server.admin());
    leaves.send("PUT /v1/b HTTP/1.1\r\nhost: kvs\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\n");
    assert_eq!(leaves.read().status, 100);
    drop(leaves);
    server.says("\"object\":\"PUT /v1/b\"");
    // Requests of other clients are in the access log, and reads are not recorded.
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/c", b"").status, 201);
    let lines = server.terminate().stderr().to_vec();
    assert_eq!(lines.iter().filter(|line| line.contains("\"audit\"")).count(), 3, "{lines:?}");
}
