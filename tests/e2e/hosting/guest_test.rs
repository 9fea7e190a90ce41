//! `kvs guest test`: it finds nothing in the guests of this project, and each mistake of one that makes it on demand
//! (`tests/guests/faulty`), with the request or the entry that shows it.

use std::fs;
use std::process::Stdio;
use std::sync::LazyLock;

use kvs_txlog::{Event, Put, TransactionLog};
use serde_json::Value;
use tempfile::TempDir;

use super::languages::{js, python};
use crate::support::file_log::open_log;
use crate::support::guests::{DEFAULT_GUEST, built};
use crate::support::server::kvs;

/// Tests a guest. Returns whether it passed, the report, and the last line of the diagnostics.
fn tested(args: &[&str]) -> (bool, Value, String) {
    let mut command = kvs();
    command.args(["guest", "test", "--output", "json", "--seed", "1"]).args(args);
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().expect("it can be started");
    let diagnostics = String::from_utf8_lossy(&output.stderr).into_owned();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {diagnostics}"));
    (output.status.success(), report, diagnostics.lines().last().unwrap_or_default().to_owned())
}

fn check<'r>(report: &'r Value, name: &str) -> &'r Value {
    let checks = report["checks"].as_array().expect("a list");
    checks.iter().find(|check| check["check"] == name).unwrap_or_else(|| panic!("no {name}: {report}"))
}

/// Tests a guest without mistakes, and returns the report.
#[track_caller]
fn passes(args: &[&str]) -> Value {
    let (passed, report, last) = tested(args);
    assert!(passed, "{last}\n{report:#}");
    for name in ["calls", "responses", "rebuild", "apply", "refused"] {
        assert_eq!(check(&report, name)["result"], "ok", "{report:#}");
    }
    report
}

#[test]
fn built_in_store_passes() {
    let report = passes(&[DEFAULT_GUEST]);
    assert_eq!((&report["requests"], &report["seed"]), (&3_000.into(), &1.into()));
    assert_eq!(check(&report, "reuse")["result"], "ok");
    // Those without a log, and without a file: the built-in guest.
    assert_eq!(check(&report, "log")["result"], "none");
    assert_eq!(passes(&[])["checks"], report["checks"]);
}

#[test]
fn guests_in_rust_pass() {
    for name in ["counters", "extension", "locks", "schema", "single", "template"] {
        passes(&[&built(name)]);
    }
}

#[test]
fn guests_in_other_languages_pass() {
    for guest in [js(), python()] {
        passes(&[guest, "--requests", "1000"]);
    }
}

/// A mistake, the check that finds it, and what the report has.
const MISTAKES: [(&str, &str, &[&str]); 17] = [
    (
        "forgets",
        "rebuild",
        &["/v1/", "before and after a rebuild", "the last to change it was request", "body \"text\""],
    ),
    ("clock", "rebuild", &["GET /v1/", "body", "before", "after"]),
    ("randomness", "apply", &["two replays differ from entry", "(put \"", "GET /v1/"]),
    ("batches", "apply", &["two replays differ from entry", "(put \"", "in batches of"]),
    ("counter", "rebuild", &["GET /v1", "body"]),
    ("number", "rebuild", &["event 1 of append 1"]),
    ("reuse", "reuse", &["GET /v1", "body", "as it was declared reusable"]),
    ("changes-anyway", "refused", &["whose append got", "changed the state", "after it"]),
    ("acknowledges-anyway", "refused", &["whose append got", "the response is 201"]),
    ("traps-when-refused", "refused", &["whose append got", "the log is always there"]),
    ("traps", "calls", &["PUT /v1/key-7", "a key that it does not expect"]),
    ("slow", "calls", &["PUT /v1/key-7", "the call took longer than", "--guest-cpu-limit"]),
    ("apply-traps", "apply", &["apply of entry", "an entry that it does not expect"]),
    ("invalid", "responses", &["GET /v1", "status 99"]),
    ("metrics", "metrics", &["request ", "PUT /v1/", "the metric puts is dropped: there are 5 (--guest-max-metrics)"]),
    ("metric-name", "metrics", &["request ", "PUT /v1/", "the metric \"puts-now\" is refused", "lower-case letters"]),
    ("", "", &[]),
];

fn faulty() -> &'static str {
    static GUEST: LazyLock<String> = LazyLock::new(|| built("faulty"));
    &GUEST
}

#[test]
fn each_mistake_is_found_with_what_shows_it() {
    for (mistake, name, parts) in MISTAKES {
        let setting = format!("mistake={mistake}");
        let limit = if mistake == "slow" { "300ms" } else { "5s" };
        let limits = ["--guest-cpu-limit", limit, "--guest-max-metrics", "5"];
        let (passed, report, last) = tested(&[&[faulty(), "--guest-config", &setting], &limits[..]].concat());
        if name.is_empty() {
            assert!(passed, "without a mistake: {report:#}");
            continue;
        }
        let found = &check(&report, name)["found"];
        let text = found.as_str().unwrap_or_else(|| panic!("{mistake} is not found: {report:#}"));
        assert!(parts.iter().all(|part| text.contains(part)), "{mistake}: {text}");
        assert!(!passed && last.contains("repeat with --seed 1 --requests 3000"), "{mistake}: {last}");
    }
}

#[test]
fn same_seed_finds_the_same() {
    let find = || {
        let (_, report, _) = tested(&[faulty(), "--guest-config", "mistake=forgets"]);
        check(&report, "rebuild")["found"].as_str().expect("it is found").to_owned()
    };
    assert_eq!(find(), find());
}

#[test]
fn given_requests_reach_paths_of_a_guest() {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let file = directory.path().join("requests");
    fs::write(
        &file,
        "# locks\nPOST /locks/a?owner=ann&ttl=10s\nPOST /locks/a?owner=bob\n\nDELETE /locks/a?owner=ann\n",
    )
    .expect("the directory takes a file");
    let file = file.to_str().expect("a temporary path is text");
    let without = passes(&[&built("locks")]);
    let with = passes(&[&built("locks"), "--requests-from", file]);
    assert_ne!(with["entries"], without["entries"]);

    fs::write(directory.path().join("requests"), "GET /v1\nGET\n").expect("the directory takes a file");
    let mut command = kvs();
    command.args(["guest", "test", "--requests-from", file]).stderr(Stdio::piped());
    let output = command.output().expect("it can be started");
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && line.contains("line 2: the target is missing"), "{line}");
}

#[test]
fn given_log_is_replayed_and_not_changed() {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let log = open_log(directory.path());
    for n in 0..3_000 {
        let key = if n == 1_234 { "odd\u{1}".to_owned() } else { format!("k{}", n % 500) };
        let put = Put { key, value: n.to_string().into(), metadata: Vec::new(), expires: None };
        log.append(n, &[Event::Put(put)]).expect("the log takes it");
    }
    log.close().expect("the log can be closed");
    drop(log);
    let data = directory.path().to_str().expect("a temporary path is text");
    let flags = ["--requests", "100", "--data-dir", data];
    let report = passes(&[&[DEFAULT_GUEST], &flags[..]].concat());
    assert_eq!((&check(&report, "log")["result"], &check(&report, "log")["count"]), (&"ok".into(), &5.into()));

    // The entries of the log do not reach the requests; what is found is in the log, and the entry is named.
    let (_, report, _) = tested(&[&[faulty(), "--guest-config", "mistake=batches"], &flags[..]].concat());
    let found = check(&report, "log")["found"].as_str().unwrap_or_else(|| panic!("{report:#}"));
    assert!(found.contains("two replays differ from entry"), "{found}");
    let output =
        kvs().args(["txlog", "cat", "--data-dir", data]).stdout(Stdio::piped()).output().expect("it can be started");
    assert_eq!(output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count(), 3_000);
}
