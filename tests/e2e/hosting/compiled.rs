//! Guests compiled ahead of time: served from disk if they are intact and made for this binary, otherwise rejected with a
//! one-line error, and never accepted over the network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::guests::{DEFAULT_GUEST, exporting, guest};
use crate::support::server::{Server, kvs, refused, serve_refused};
use crate::support::wire::Connection;

fn directory() -> TempDir {
    TempDir::new().expect("a temporary directory can be made")
}

fn compile(guest: &str, output: &Path, flags: &[&str]) -> Command {
    let mut command = kvs();
    command.args(["compile", guest, "--output"]).arg(output).args(flags);
    command
}

fn compiled(directory: &TempDir, guest: &str, flags: &[&str]) -> PathBuf {
    let file = directory.path().join("guest.cwasm");
    let status = compile(guest, &file, flags).status().expect("the binary under test can be started");
    assert!(status.success(), "{status}");
    file
}

fn text(file: &Path) -> &str {
    file.to_str().expect("a temporary path is text")
}

#[test]
fn compiled_guest_serves_like_its_component() {
    let directory = directory();
    for flags in [&[][..], &["--native"]] {
        let file = compiled(&directory, DEFAULT_GUEST, flags);
        let server = Server::start(&[text(&file)]);
        let mut client = Connection::open(server.address());
        assert_eq!(client.ask("PUT", "/v1/a", b"value").status, 201);
        assert!(!server.data().join("cache").exists(), "it was kept compiled once more");
        // Any guest can use the log.
        let server = server.terminate().restart(&[]);
        assert_eq!(Connection::open(server.address()).ask("GET", "/v1/a", b"").text(), "value");
    }
}

#[test]
fn compile_without_file_compiles_built_in_guest() {
    let directory = directory();
    let file = directory.path().join("default.cwasm");
    let status = kvs().args(["compile", "-o"]).arg(&file).status().expect("the binary under test can be started");
    assert!(status.success(), "{status}");
    assert!(fs::read(&file).ok() == fs::read(compiled(&directory, DEFAULT_GUEST, &[])).ok(), "it is another");
    let inspected = kvs().arg("inspect").arg(&file).stdout(Stdio::piped()).output().expect("the binary can be started");
    let inspected = String::from_utf8_lossy(&inspected.stdout).into_owned();
    assert!(inspected.contains("fits     yes") && inspected.contains("name     kvs"), "{inspected}");
}

#[test]
fn corrupted_or_other_version_is_rejected() {
    let directory = directory();
    let file = compiled(&directory, DEFAULT_GUEST, &[]);
    let good = fs::read(&file).expect("it can be read");
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    for (bytes, expected) in [
        (&flipped[..], "its checksum is wrong"),
        (&good[..good.len() / 2], "its checksum is wrong"),
        (&good[..39], "it is cut off"),
        (&good[..8], "it is cut off"),
        (&good[..7], "it is not WebAssembly"),
        // Without the header: as wasmtime writes it.
        (&good[40..], "it is not WebAssembly"),
    ] {
        fs::write(&file, bytes).expect("it can be written");
        serve_refused(&[text(&file)]).with(1, &[text(&file), "cannot be run as a guest", expected]);
    }
    // For another system, and for a CPU with a feature that this one does not have.
    let mut others = vec![(&[][..], &b"-linux-gnu"[..], &b"-haiku-gnu"[..])];
    if cfg!(target_arch = "x86_64") {
        others.push((&["--native"], b"has_popcnt", b"has_pigeon"));
    }
    for (flags, found, other) in others {
        let mut code = fs::read(compiled(&directory, DEFAULT_GUEST, flags)).expect("it can be read").split_off(40);
        let at = code.windows(found.len()).position(|bytes| bytes == found).expect("it says what it was made for");
        code[at..at + found.len()].copy_from_slice(other);
        fs::write(&file, sealed(&code)).expect("it can be written");
        serve_refused(&[text(&file)]).with(1, &["another version of kvs or for another CPU", "kvs compile"]);
    }
}

/// As `kvs compile` writes it.
fn sealed(code: &[u8]) -> Vec<u8> {
    use sha2::{Digest, Sha256};
    [b"kvscwasm", Sha256::digest(code).as_slice(), code].concat()
}

#[test]
fn unfit_component_is_not_compiled() {
    let directory = directory();
    let (input, output) = (directory.path().join("input"), directory.path().join("output"));
    let once = fs::read(compiled(&directory, DEFAULT_GUEST, &[])).expect("it can be read");
    for (bytes, expected) in [
        (b"#!/bin/sh".to_vec(), "it is not WebAssembly"),
        (exporting(&[]), "it does not export kvs:store/lifecycle@0.2.0"),
        (once, "it is compiled already"),
    ] {
        fs::write(&input, bytes).expect("the directory takes a file");
        refused(compile(text(&input), &output, &[])).with(1, &["cannot compile", text(&input), expected]);
        assert!(!output.exists(), "something was written");
    }
    refused(compile("no-such-file", &output, &[])).with(1, &["cannot compile no-such-file", "No such file"]);
    refused(compile(DEFAULT_GUEST, Path::new("/proc/kvs.cwasm"), &[])).with(1, &["cannot write /proc/kvs.cwasm"]);
}

#[test]
fn compiled_guest_is_rejected_over_network() {
    let directory = directory();
    let file = compiled(&directory, guest(), &[]);
    let code = fs::read(&file).expect("it can be read");
    let server = Server::start(&[text(&file), "--probation", "1ms"]);
    let mut admin = Connection::open(server.admin());
    let sent = admin.ask("PUT", "/guest", &code);
    sent.says(422, "it is compiled, and taken only from disk: send the component");
    assert_eq!(admin.ask("PUT", "/guest?dry-run", &code).status, 422);

    fs::write(&file, fs::read(compiled(&TempDir::new().expect("a directory"), DEFAULT_GUEST, &[])).expect("read"))
        .expect("it can be written");
    server.signal(Signal::HUP);
    server.says("the guest was swapped");
    assert!(admin.ask("GET", "/guest", b"").text().contains("\"name\": \"kvs\""));
}
