//! The guests of the project other than the built-in one (`guest/`), each built from source once per run: their functions,
//! and that they share data with the built-in guest.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use kvs_tests::target_dir;
use tempfile::TempDir;

use crate::support::guests::{built, just};
use crate::support::pages::run_in;
use crate::support::server::{Process, Server, serve};
use crate::support::swap::comes_and_goes_under_load;
use crate::support::wire::Connection;

fn counters() -> &'static str {
    static GUEST: LazyLock<String> = LazyLock::new(|| built("counters"));
    &GUEST
}

fn schema() -> &'static str {
    static GUEST: LazyLock<String> = LazyLock::new(|| built("schema"));
    &GUEST
}

#[test]
fn counters_share_values_with_built_in_guest() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/visits", b"41").status, 201);
    assert_eq!(client.ask("PUT", "/v1/name", b"kvs").status, 201);
    client.ask("PATCH", "/v1/visits", b"+1").says(405, "a key has GET, HEAD, PUT, POST and DELETE");

    let server = server.terminate().restart(&[counters()]);
    let mut client = Connection::open(server.address());
    let counted = client.ask("PATCH", "/v1/visits", b"+1");
    assert_eq!((counted.status, counted.text(), counted.etag()), (200, "42", Some(3)));
    assert_eq!(client.ask("PATCH", "/v1/key/a/new/one", b"-7\n").text(), "-7");
    client.ask("PATCH", "/v1/name", b"+1").says(409, "the value is not a 64-bit signed integer in decimal text");
    client.ask("PATCH", "/v1/visits", b"lots").says(422, "the body is no number with a sign: +1, -5");
    client.ask("PATCH", "/v1/a/b", b"+1");
    assert_eq!(client.ask("POST", "/v1/visits", b"").header("allow"), Some("GET, HEAD, PUT, POST, DELETE, PATCH"));
    assert_eq!(client.ask("GET", "/v1/name", b"").text(), "kvs");

    let server = server.kill().restart(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("GET", "/v1/visits", b"").text(), "42");
    assert_eq!(client.ask("GET", "/v1/a%2Fnew%2Fone", b"").text(), "-7");
}

const USERS: &str = r#"schema.users/={"type":"object","properties":{"age":{"type":"integer"}},"required":["name"]}"#;

#[test]
fn value_that_violates_its_schema_is_not_appended() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/key/users/old", b"no JSON").status, 201);

    let flags = r#"schema.flags/={"type":"boolean"}"#;
    let server = server.terminate().restart(&[schema(), "--guest-config", USERS, "--guest-config", flags]);
    let mut client = Connection::open(server.address());
    for (path, value, status) in [
        ("/v1/key/users/ann", r#"{"name":"Ann","age":40}"#, 201),
        ("/v1/key/users/bob", r#"{"name":"Bob","age":"old"}"#, 422),
        ("/v1/key/users/bob", r#"{"age":1}"#, 422),
        ("/v1/key/users/bob", "Bob", 422),
        ("/v1/key/users/bob", "", 422),
        ("/v1/users%2Fbob", "[]", 422),
        ("/v1/key/flags/on", "true", 201),
        ("/v1/key/flags/on", "1", 422),
        ("/v1/users", "anything", 201),
        ("/v1/other", "{", 201),
    ] {
        let got = client.ask("PUT", path, value.as_bytes());
        assert_eq!(got.status, status, "{path} {value}: {}", got.text());
    }
    let why = client.ask("PUT", "/v1/key/users/bob", br#"{"name":"Bob","age":"old"}"#);
    why.says(422, "a value under users/ must match its schema: \"old\" is not of type \"integer\", at \"/age\"");
    client.ask("GET", "/v1/key/users/bob", b"").says(404, "no such key");
    assert_eq!(client.ask("PUT", "/v1/next", b"").etag(), Some(6), "something of all that was refused was appended");

    // Values stored before are not checked.
    assert_eq!(client.ask("GET", "/v1/key/users/old", b"").text(), "no JSON");
    assert_eq!(client.ask("DELETE", "/v1/key/users/old", b"").status, 200);
    client.ask("GET", "/v1/key/users/old", b"").says(404, "no such key");
}

#[test]
fn invalid_schema_is_reported_at_start() {
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args([schema(), "--guest-config", r#"schema.a/={"type":"number of things"}"#]);
    let mut process = Process::spawn(command);
    let reason = |line: &str| line.contains("the setting schema.a/ is no JSON schema").then_some(());
    process.stderr.find(reason).unwrap_or_else(|said| panic!("the reason is not in:\n{said}"));
    assert_eq!(process.wait().code(), Some(1));
}

#[test]
fn counters_are_swapped_in_and_out_under_load() {
    let server = comes_and_goes_under_load(counters(), &[], |_, client| {
        for n in 1..=20 {
            assert_eq!(client.ask("PATCH", "/v1/visits", b"+1").text(), n.to_string());
        }
    });
    assert_eq!(Connection::open(server.address()).ask("GET", "/v1/visits", b"").text(), "20");
    server.terminate();
}

#[test]
fn schemas_are_swapped_in_and_out_under_load() {
    let server = comes_and_goes_under_load(schema(), &["--guest-config", USERS], |_, client| {
        assert_eq!(client.ask("PUT", "/v1/key/users/bob", b"Bob").status, 422);
        assert_eq!(client.ask("PUT", "/v1/key/users/bob", br#"{"name":"Bob"}"#).status, 201);
    });
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("GET", "/v1/key/users/bob", b"").text(), r#"{"name":"Bob"}"#);
    assert_eq!(client.ask("PUT", "/v1/key/users/bob", b"Bob").status, 201);
    server.terminate();
}

/// Copies the files of the project, without build results and dependencies.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("the directory can be made");
    for entry in fs::read_dir(from).expect("the project can be read") {
        let entry = entry.expect("the project can be read");
        let name = entry.file_name();
        if entry.path().is_dir() {
            if !["target", "node_modules", ".git", "data"].iter().any(|left| name == *left) {
                copy(&entry.path(), &to.join(name));
            }
        } else {
            fs::copy(entry.path(), to.join(name)).expect("the file can be copied");
        }
    }
}

/// A copy of the project, in which one test at a time creates guests. One for all tests, so that its crates are built once.
fn project() -> MutexGuard<'static, PathBuf> {
    static PROJECT: LazyLock<Mutex<PathBuf>> = LazyLock::new(|| {
        let project = Path::new(env!("CARGO_TARGET_TMPDIR")).join("project");
        let _ = fs::remove_dir_all(&project);
        copy(Path::new(kvs_tests::ROOT), &project);
        symlink(target_dir(), project.join("target")).expect("the directory takes a link");
        Mutex::new(project)
    });
    PROJECT.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn tutorial() {
    run_in("docs/guest-tutorial.md", &project());
}

#[test]
fn lock_service_page() {
    run_in("docs/locks.md", &project());
}

#[test]
fn guest_based_on_built_in_builds_and_serves() {
    let project = project();
    just(&project, &["new-guest", "long-book", "--on", "default"]);
    just(&project, &["guest", "long-book"]);
    let server = Server::start(&[project.join("target/guests/long-book.wasm").to_str().expect("the path is text")]);
    assert!(server.says("serving on").contains("long-book"));
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/key/a/b", b"value").status, 201);
    assert_eq!(client.ask("GET", "/length/a%2Fb", b"").text(), "5");
    client.ask("GET", "/length/b", b"").says(404, "no such key");
    assert_eq!(client.ask("GET", "/v1?count=true", b"").text(), r#"{"count":1}"#);
}

#[test]
fn new_guest_builds_passes_its_test_and_serves() {
    let project = project();
    just(&project, &["new-guest", "note-book"]);
    just(&project, &["guest", "note-book"]);
    let server = Server::start(&[project.join("target/guests/note-book.wasm").to_str().expect("the path is text")]);
    assert!(server.says("serving on").contains("note-book"));
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"value").status, 201);
    assert_eq!(client.ask("GET", "/v1/a", b"").body, b"value");
    let server = server.terminate().restart(&[]);
    assert_eq!(Connection::open(server.address()).ask("GET", "/v1/a", b"").body, b"value");

    for (arguments, why) in [
        (&["note-book"][..], "exists already"),
        (&["Note_Book"], "lower-case letters"),
        (&["../x"], "lower-case letters"),
        (&["x", "--on", "kvs"], "is unknown"),
    ] {
        let again = Command::new("just").current_dir(&*project).arg("new-guest").args(arguments).output();
        let again = again.expect("just starts");
        let said = String::from_utf8_lossy(&again.stderr);
        assert!(!again.status.success() && said.contains(why), "{arguments:?}: {said}");
    }
}
