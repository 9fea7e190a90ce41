//! Guests in languages other than Rust (`guest/js`, `guest/python`), each built from source once per run.

use std::fs;
use std::path::Path;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use kvs_txlog::{AppendError, Event, Put, TransactionLog};
use tempfile::TempDir;

use crate::support::compiled;
use crate::support::file_log::open_log;
use crate::support::guests::just;
use crate::support::load::count;
use crate::support::log::of_files;
use crate::support::metrics::{Metrics, counts};
use crate::support::server::{PATIENCE, Server, serve};
use crate::support::swap::{comes_and_goes_under_load, serving};
use crate::support::wire::Connection;

/// Builds a component with a recipe from a source; without one, from the guest in the tree.
fn made(recipe: &str, source: Option<&str>, name: &str) -> String {
    // Recipes install tools, which must not happen concurrently.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let project = Path::new(kvs_tests::ROOT);
    let component = format!("target/guests/{name}.wasm");
    match source {
        None => just(project, &[recipe]),
        Some(source) => just(project, &[recipe, source, &component]),
    }
    project.join(component).to_str().expect("the path is text").to_owned()
}

/// A component compiled ahead of time, since compiling an interpreter at every start takes long.
fn compiled(component: &str) -> String {
    let file = Path::new(component).with_extension("cwasm");
    fs::write(&file, &*compiled::compiled(Path::new(component))).expect("the directory takes a file");
    file.to_str().expect("the path is text").to_owned()
}

fn js_component() -> &'static str {
    static COMPONENT: LazyLock<String> = LazyLock::new(|| made("guest-js", None, "js"));
    &COMPONENT
}

pub fn js() -> &'static str {
    static GUEST: LazyLock<String> = LazyLock::new(|| compiled(js_component()));
    &GUEST
}

pub fn python() -> &'static str {
    static GUEST: LazyLock<String> = LazyLock::new(|| compiled(&made("guest-python", None, "python")));
    &GUEST
}

/// Requests with the same responses from every guest with the REST interface.
const DIALOGUE: [(&str, &str, &[u8]); 25] = [
    ("GET", "/v1/old", b""),
    ("GET", "/v1/a", b""),
    ("PUT", "/v1/a", b"first"),
    ("GET", "/v1/a", b""),
    ("HEAD", "/v1/a", b""),
    ("PUT", "/v1/a", b"second"),
    ("GET", "/v1/key/a", b""),
    ("PUT", "/v1/key/b/c", b"\x00\xff binary"),
    ("GET", "/v1/b%2Fc", b""),
    ("PUT", "/v1/%C3%A4%20%F0%9F%A6%80", "ä".as_bytes()),
    ("GET", "/v1/%C3%A4%20%F0%9F%A6%80", b""),
    ("PUT", "/v1/empty", b""),
    ("GET", "/v1/empty", b""),
    ("DELETE", "/v1/a", b""),
    ("DELETE", "/v1/a", b""),
    ("GET", "/v1/a", b""),
    ("PUT", "/v1/%zz", b"x"),
    ("PUT", "/v1/%FF", b"x"),
    ("PUT", "/v1/%00", b"x"),
    ("PUT", "/v1/%2E%2E", b"x"),
    ("PUT", "/v1/", b"x"),
    ("PUT", "/v1/x/y", b"x"),
    ("GET", "/", b""),
    ("BREW", "/v1/b%2Fc", b""),
    ("PUT", "/v1/last", b"x"),
];

/// The responses: the status of each, and of a success the headers and the body.
fn dialogue(server: &Server) -> Vec<String> {
    let mut client = Connection::open(server.address());
    let mut ask = |(method, path, body): (&str, &str, &[u8])| {
        let got = client.ask(method, path, body);
        let headers = ["etag", "content-type", "content-length", "allow", "x-content-type-options"];
        let headers: Vec<_> = headers.iter().filter(|_| got.status < 300).map(|name| got.header(name)).collect();
        let body = if got.status < 300 { got.body.as_slice() } else { b"" };
        format!("{method} {path}: {} {headers:?} {:?}", got.status, String::from_utf8_lossy(body))
    };
    DIALOGUE.into_iter().map(&mut ask).collect()
}

/// Compares a guest with the built-in one: its responses, also on the log of the built-in guest, and the responses of the
/// built-in guest on its log.
#[track_caller]
fn responds_like_the_built_in_guest(guest: &str) {
    let [default, other] = [&[][..], &[guest]].map(|guest| {
        let server = Server::start(&[]);
        let put = Connection::open(server.address()).ask("PUT", "/v1/old", b"of the default guest");
        assert_eq!(put.status, 201);
        server.terminate().restart(guest)
    });
    assert_eq!(dialogue(&other), dialogue(&default));

    let read = |server: &Server| {
        let mut client = Connection::open(server.address());
        let mut get = |path: &str| client.ask("GET", path, b"").body;
        ["/v1/a", "/v1/old", "/v1/b%2Fc", "/v1/%C3%A4%20%F0%9F%A6%80", "/v1/empty", "/v1/last"].map(&mut get)
    };
    let expected = read(&default);
    assert_eq!(read(&other), expected);
    let other = other.kill().restart(&[guest]);
    assert_eq!(read(&other), expected, "what it finds of its own");
    assert_eq!(read(&other.terminate().restart(&[])), expected, "what the default guest finds of it");
}

#[test]
fn javascript_responds_like_built_in_guest() {
    responds_like_the_built_in_guest(js());
}

#[test]
fn python_responds_like_built_in_guest() {
    responds_like_the_built_in_guest(python());
}

/// A guest without a TTL parameter still applies the expiries in the log.
#[track_caller]
fn honours_expiry(guest: &str) {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/gone?ttl=1", b"value").status, 201);
    assert_eq!(client.ask("PUT", "/v1/stays?ttl=3600", b"value").status, 201);
    let server = server.kill().restart(&[guest]);
    let mut client = Connection::open(server.address());
    let deadline = Instant::now() + PATIENCE;
    while client.ask("GET", "/v1/gone", b"").status == 200 {
        assert!(Instant::now() < deadline, "the key does not expire");
    }
    client.ask("GET", "/v1/gone", b"").says(404, "no such key");
    assert_eq!(client.ask("GET", "/v1/stays", b"").text(), "value");
}

#[test]
fn javascript_honours_expiry() {
    honours_expiry(js());
}

#[test]
fn python_honours_expiry() {
    honours_expiry(python());
}

#[test]
fn javascript_is_swapped_in_and_out_under_load() {
    let server = comes_and_goes_under_load(js_component(), &[], |server, client| {
        assert_eq!(serving(server), "js");
        assert_eq!(client.ask("PUT", "/v1/from", b"JavaScript").status, 201);
    });
    assert_eq!(Connection::open(server.address()).ask("GET", "/v1/from", b"").text(), "JavaScript");
    server.terminate();
}

/// The value of a key by its number: 1 KiB for each tenth.
fn value_of(number: u64) -> Vec<u8> {
    number.to_string().into_bytes().repeat(if number.is_multiple_of(10) { 1024 / number.to_string().len() } else { 1 })
}

/// More keys than the JavaScript engine has room for as objects.
#[test]
fn javascript_holds_many_keys() {
    of_files!();
    let keys = count("KVS_TEST_JS_KEYS", 120_000);
    let data = TempDir::new().expect("a temporary directory can be made");
    let log = open_log(data.path());
    for first in (0..keys).step_by(1_000) {
        let put =
            |number: u64| Put { key: number.to_string(), value: value_of(number), metadata: Vec::new(), expires: None };
        let events: Vec<_> = (first..keys.min(first + 1_000)).map(|number| Event::Put(put(number))).collect();
        loop {
            match log.append(1, &events) {
                Ok(_) => break,
                // The queue of the log is full.
                Err(AppendError::Unavailable) => thread::yield_now(),
                Err(error) => panic!("it takes no entries: {error:?}"),
            }
        }
    }
    log.close().expect("it can be closed");

    let mut command = serve(data.path());
    command.arg(js());
    let server = Server::spawn(command, data);
    let mut client = Connection::open(server.address());
    for number in (0..keys).step_by(keys as usize / 1_000) {
        assert_eq!(client.ask("GET", &format!("/v1/{number}"), b"").body, value_of(number), "{number}");
        assert_eq!(client.ask("PUT", &format!("/v1/{number}"), b"another").status, 201);
        assert_eq!(client.ask("PUT", &format!("/v1/new-{number}"), b"value").status, 201);
        assert_eq!(client.ask("DELETE", &format!("/v1/{}", number + 1), b"").status, 200);
        client.ask("GET", &format!("/v1/{}", number + 1), b"").says(404, "no such key");
    }
    for number in (0..keys).step_by(keys as usize / 1_000) {
        assert_eq!(client.ask("GET", &format!("/v1/{number}"), b"").text(), "another");
        assert_eq!(client.ask("GET", &format!("/v1/{}", number + 2), b"").body, value_of(number + 2));
    }
    counts(&server, "kvs_store_keys", keys as f64);
}

/// Starts a guest that prints, logs, counts, fails, and probes for WASI. Its output and the reports of failures have the request id.
#[track_caller]
fn prints_and_fails(guest: &str, probes: &[(&str, &str)], report: &[&str]) {
    let server = Server::start(&[guest]);
    let mut client = Connection::open(server.address());
    for (key, expected) in probes {
        let got = client.ask_with("GET", &format!("/v1/{key}"), &[("x-request-id", &format!("id-{key}"))], b"");
        assert!(got.status == 200 && got.text().contains(expected), "{key}: {} {}", got.status, got.text());
        let line = server.says(&format!("asked for {key}"));
        assert!(line.contains(&format!("request_id=\"id-{key}\"")), "{line}");
        let line = server.says(&format!("warned of {key}"));
        assert!(line.contains("WARN") && line.contains(&format!("request_id=\"id-{key}\"")), "{line}");
        let metrics = Metrics::of(&server);
        assert_eq!(metrics.get(&format!("kvs_guest_custom_probes_total{{key=\"{key}\"}}")), 2.0);
        assert_eq!(metrics.get("kvs_guest_custom_last"), 0.5);
    }
    assert_eq!(client.ask_with("GET", "/v1/fail", &[("x-request-id", "id-fail")], b"").status, 500);
    for expected in report {
        let line = server.says(expected);
        assert!(line.contains("request_id=\"id-fail\""), "{line}");
    }
    // The next instance continues to serve.
    let (key, expected) = probes[0];
    assert!(client.ask("GET", &format!("/v1/{key}"), b"").text().contains(expected));
}

#[test]
fn javascript_output_and_failure_have_request_id() {
    let probe = compiled(&made("guest-js", Some("tests/e2e/probes/probe.ts"), "probe-js"));
    prints_and_fails(
        &probe,
        &[("headers", "b"), ("request-id", "id-request-id")],
        &["nothing is found", "Stack:", "handle@"],
    );
}

#[test]
fn python_output_and_failure_have_request_id() {
    let probe = compiled(&made("guest-python", Some("tests/e2e/probes/probe.py"), "probe-python"));
    let refused = [
        ("open", "refused: FileNotFoundError"),
        ("list", "refused: FileNotFoundError"),
        ("socket", "refused: PermissionError"),
        ("resolve", "refused: "),
        ("environment", "refused: KeyError"),
        ("request-id", "'id-request-id'"),
    ];
    prints_and_fails(&probe, &refused, &["Traceback (most recent call last)", "LookupError: nothing is found"]);
}
