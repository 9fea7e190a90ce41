//! Invalid components: each is rejected at the start, with exit code 1 and one line with the reason. `kvs inspect` reports
//! the same.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;
use wasm_encoder::{Component, Module};

use crate::support::guests::{DEFAULT_GUEST, exporting, guest, importing};
use crate::support::server::{self, Refused, Server, kvs, serve_refused};
use crate::support::wire::Connection;

/// Serves a file with these bytes, which must be rejected. Returns the error, which must name the file.
fn refused(bytes: impl AsRef<[u8]>) -> Refused {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let file = directory.path().join("guest.wasm");
    std::fs::write(&file, bytes).expect("the directory takes a file");
    refused_file(&file)
}

fn refused_file(file: &Path) -> Refused {
    let file = file.to_str().expect("a temporary path is text");
    let refused = serve_refused(&[file]);
    assert!(refused.line.contains(file), "it does not name the file: {refused}");
    refused
}

#[test]
fn missing_file_is_rejected() {
    let directory = TempDir::new().expect("a temporary directory can be made");
    refused_file(&directory.path().join("missing.wasm")).with(1, &["cannot be run as a guest", "No such file"]);
}

#[test]
fn directory_is_rejected() {
    let directory = TempDir::new().expect("a temporary directory can be made");
    refused_file(directory.path()).with(1, &["cannot be run as a guest", "directory"]);
}

#[test]
fn file_that_is_not_webassembly_is_rejected() {
    for bytes in [&b""[..], b"\0asm", b"#!/bin/sh\necho hello\n", b"(component)", &[0; 100_000]] {
        refused(bytes).with(1, &["cannot be run as a guest", "it is not WebAssembly"]);
    }
}

#[test]
fn too_large_file_is_rejected() {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let file = directory.path().join("large.wasm");
    // A sparse file.
    File::create(&file).and_then(|file| file.set_len(1 << 40)).expect("the directory takes a file with a hole");
    refused_file(&file).with(1, &["cannot be run as a guest", "larger than"]);
}

#[test]
fn core_module_is_rejected() {
    refused(Module::new().finish()).with(1, &["it is a core module, not a component", "wasm32-wasip2"]);
}

#[test]
fn truncated_component_is_rejected() {
    let whole = std::fs::read(DEFAULT_GUEST).expect("the default guest was built with the binary");
    for length in [9, 100, whole.len() / 2, whole.len() - 1] {
        refused(&whole[..length]).with(1, &["cannot be run as a guest"]);
    }
}

#[test]
fn corrupted_component_is_rejected() {
    let mut bytes = std::fs::read(DEFAULT_GUEST).expect("the default guest was built with the binary");
    // In the first section, after the header.
    bytes[10] ^= 0xff;
    refused(bytes).with(1, &["cannot be run as a guest"]);
}

#[test]
fn component_without_exports_is_rejected() {
    let expected = ["it does not export kvs:store/lifecycle@0.2.0, kvs:store/handler@0.2.0"];
    refused(Component::new().finish()).with(1, &expected);
}

#[test]
fn component_without_one_export_is_rejected() {
    let refused = refused(exporting(&["kvs:store/lifecycle@0.2.0", "kvs:store/sharding@0.2.0"]));
    refused.with(1, &["it does not export kvs:store/handler@0.2.0"]);
    assert!(!refused.line.contains("lifecycle"), "it names what is there: {refused}");
}

/// The error for a component of another version of the contract.
fn built_for(version: &str) -> String {
    format!(
        "it was built for kvs:store@{version}, and this host runs kvs:store@0.2.0: build it again with the WIT of this version"
    )
}

#[test]
fn component_of_another_contract_version_is_named() {
    let named = |version: &str| ["lifecycle", "handler", "sharding"].map(|name| format!("kvs:store/{name}@{version}"));
    for version in ["0.1.0", "0.2.1", "0.3.0"] {
        let names = named(version);
        let refused = refused(exporting(&names.each_ref().map(String::as_str)));
        refused.with(1, &[&built_for(version)]);
        assert!(!refused.line.contains("does not"), "the one reason is enough: {refused}");
    }
    // Only by an import.
    refused(importing("kvs:store/changes@0.1.0"))
        .with(1, &[&built_for("0.1.0"), "; it does not export kvs:store/lifecycle@0.2.0"]);
    refused(importing("kvs:store/changes@0.2.0"))
        .with(1, &["it imports kvs:store/changes@0.2.0, which this host does not offer"]);
    let mixed = ["kvs:store/lifecycle@0.2.0", "kvs:store/handler@0.1.0"];
    refused(exporting(&mixed)).with(1, &[&built_for("0.1.0")]);
}

#[test]
fn inspect_prints_contract_version() {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let file = directory.path().join("old.wasm");
    let old = ["kvs:store/lifecycle@0.1.0", "kvs:store/handler@0.1.0", "kvs:store/sharding@0.1.0"];
    std::fs::write(&file, exporting(&old)).expect("the directory takes a file");
    let output = inspect(&[file.to_str().expect("a temporary path is text")]).output().expect("it can be started");
    assert_eq!(output.status.code(), Some(1));
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(why.contains(&built_for("0.1.0")) && why.lines().count() == 1, "{why}");
}

#[test]
fn component_with_empty_exports_is_rejected() {
    let names = ["kvs:store/lifecycle@0.2.0", "kvs:store/handler@0.2.0", "kvs:store/sharding@0.2.0"];
    refused(exporting(&names)).with(1, &["cannot be run as a guest", "describe"]);
}

#[test]
fn component_with_unknown_import_is_rejected() {
    for import in ["wasi:keyvalue/store@0.2.0", "wasi:nn/graph@0.2.0", "wasi:filesystems/types@0.2.12"] {
        refused(importing(import)).with(1, &[&format!("it imports {import}, which this host does not offer")]);
    }
}

#[test]
fn guest_that_traps_at_start_is_rejected() {
    let refused = serve_refused(&[guest(), "--guest-config", "fault=describe-traps"]);
    refused.with(1, &["describe failed", "fall_over"]);
}

#[test]
fn guest_that_exits_at_start_is_rejected() {
    serve_refused(&[guest(), "--guest-config", "fault=describe-exits"]).with(1, &["describe failed", "called exit"]);
}

#[test]
fn guest_with_invalid_name_is_rejected() {
    serve_refused(&[guest(), "--guest-config", "fault=name"]).with(1, &["its name is not a word"]);
}

#[test]
fn guest_with_too_many_headers_is_rejected() {
    serve_refused(&[guest(), "--guest-config", "fault=headers"]).with(1, &["it names 65 request headers, at most 64"]);
}

#[test]
fn guest_with_endless_start_is_rejected() {
    let refused = serve_refused(&[guest(), "--guest-config", "fault=describe-loops", "--guest-cpu-limit", "100ms"]);
    refused.with(1, &["describe failed", "longer than 100ms", "circle"]);
}

#[test]
fn guest_over_memory_limit_is_rejected() {
    serve_refused(&["--guest-max-memory-bytes", "1MiB"]).with(1, &["does not start", "memory"]);
}

#[test]
fn guest_that_traps_in_replay_is_rejected() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/{x}a", b"value").status, 201);
    assert_eq!(client.ask("PUT", "/v1/{x}b", b"value").status, 201);
    let stopped = server.terminate();
    stopped
        .refuses(&[guest(), "--guest-config", "fault=apply-traps"])
        .with(1, &["apply of entry 1 failed", "fall_over"]);
    // The log is unchanged.
    let server = stopped.restart(&[]);
    assert_eq!(Connection::open(server.address()).ask("GET", "/v1/{x}b", b"").body, b"value");
}

fn inspect(args: &[&str]) -> Command {
    let mut command = kvs();
    command.arg("inspect").args(args).stdout(Stdio::piped());
    command
}

#[test]
fn inspect_describes_guest() {
    for (args, name) in [(&[][..], "kvs"), (&[DEFAULT_GUEST], "kvs"), (&[guest()], "unruly")] {
        let output = inspect(args).output().expect("the binary under test can be started");
        let said = String::from_utf8(output.stdout).expect("it says text");
        assert!(output.status.success(), "{said}");
        for expected in [
            &format!("name     {name} 0.1.0"),
            "contract kvs:store@0.2.0\n",
            "uses     transaction-log\n",
            "kvs:store/handler@0.2.0",
            "sha256   ",
            " bytes",
            "shards   any number",
            "fits     yes",
        ] {
            assert!(said.contains(expected), "{expected:?} is not in:\n{said}");
        }
        let uses = said.split("uses     ").nth(1).and_then(|rest| rest.split("imports").next()).expect("it says that");
        for interface in ["request-context", "logging", "timer", "metrics"] {
            let is_used = name == "unruly" || interface == "timer";
            assert_eq!(uses.contains(interface), is_used, "{interface}:\n{said}");
        }
    }
}

#[test]
fn unknown_capabilities_are_shown_and_ignored() {
    let args = ["--guest-config", "capabilities=key-prefix later", guest()];
    let output = inspect(&args).output().expect("the binary under test can be started");
    let said = String::from_utf8(output.stdout).expect("it says text");
    assert!(said.contains("can      key-prefix\n         later\n") && said.contains("fits     yes"), "{said}");
    let server = Server::start(&args);
    assert_eq!(Connection::open(server.address()).ask("GET", "/handled", b"").status, 200);
    let many = format!("capabilities={}", "word ".repeat(65));
    serve_refused(&["--guest-config", &many, guest()]).with(1, &["it declares 65 capabilities, at most 64"]);
    serve_refused(&["--guest-config", "capabilities=größe", guest()]).with(1, &["a capability is not a word"]);
}

#[test]
fn inspect_reports_why_component_is_rejected() {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let file = directory.path().join("other.wasm");
    let file = file.to_str().expect("a temporary path is text");
    std::fs::write(file, importing("wasi:keyvalue/store@0.2.0")).expect("the directory takes a file");
    let output = inspect(&[file]).output().expect("the binary under test can be started");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("imports  wasi:keyvalue/store@0.2.0"));
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(
        why.starts_with(&format!("kvs: {file} cannot be run as a guest: it imports wasi:keyvalue/store@0.2.0")),
        "{why}"
    );
    assert!(why.contains("; it does not export kvs:store/lifecycle@0.2.0") && why.lines().count() == 1, "{why}");

    std::fs::write(file, "text").expect("the directory takes a file");
    server::refused(inspect(&[file])).with(1, &["it is not WebAssembly"]);
    let traps = ["--guest-config", "fault=describe-traps", guest()];
    let why = String::from_utf8(inspect(&traps).output().expect("it can be started").stderr).expect("text");
    assert!(why.contains("describe failed") && why.lines().count() == 1, "{why}");
}
