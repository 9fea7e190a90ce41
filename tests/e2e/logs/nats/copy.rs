//! The local copy of a log in NATS JetStream: a restart reads it, a lost stream is made again from it, and it is never trusted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{args, printed, stand_by, start, texts};
use crate::support::metrics::{Metrics, counts};
use crate::support::mount::Mount;
use crate::support::nats::Nodes;
use crate::support::readiness::{UP_TO_DATE, WELL, becomes_ready};
use crate::support::requests::{get, put};
use crate::support::server::{PATIENCE, Server, kvs, refused, serve};

const USED: &str = "using the local copy of the log up to sequence ";

/// A command of the copy in a data directory.
fn txlog(command: &str, data: &Path) -> Command {
    let mut kvs = kvs();
    kvs.args(["txlog", command, "--data-dir"]).arg(data);
    kvs
}

/// The file of the copy.
fn file(data: &Path) -> PathBuf {
    let files = fs::read_dir(data.join("txlog-copy")).expect("there is a copy").flatten().map(|file| file.path());
    let mut copies = files.filter(|path| path.extension().is_none());
    let copy = copies.next().expect("there is a copy");
    assert_eq!(copies.next(), None, "the former one stays");
    copy
}

/// Waits until the copy has everything up to a sequence.
fn has(data: &Path, sequence: u64) {
    let begun = Instant::now();
    loop {
        let output = txlog("verify", data).stdout(std::process::Stdio::piped()).output().expect("it can be started");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() && text.ends_with(&format!(", newest sequence {sequence}\n")) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{text}{}", String::from_utf8_lossy(&output.stderr));
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn write(server: &Server, name: &str, count: usize) {
    for number in 0..count {
        assert_eq!(put(server, &format!("{name}-{number}"), &format!("{name} {number}")), 201);
    }
}

fn has_all(server: &Server, name: &str, count: usize) {
    for number in 0..count {
        assert_eq!(get(server, &format!("{name}-{number}")), (200, format!("{name} {number}")));
    }
}

fn has_all_of(server: &Server, names: [&str; 3]) {
    names.iter().for_each(|name| has_all(server, name, 20));
}

#[test]
fn lost_stream_is_made_again_from_copy_of_standby() {
    let mut nodes = Nodes::start(3);
    let primary = start(&nodes);
    let standby = stand_by(&nodes);
    write(&primary, "before", 20);
    printed(super::txlog(&nodes, &["compact"]));
    write(&primary, "after", 20);
    becomes_ready(&standby, 200, UP_TO_DATE);
    has(primary.data(), 40);
    has(standby.data(), 40);
    let [primary, standby] = [primary, standby].map(Server::kill);
    for node in 0..3 {
        nodes.kill(node);
        fs::remove_dir_all(nodes.store(node)).expect("the store can be removed");
    }
    (0..3).for_each(|node| nodes.restart(node));
    let args = args(&nodes);
    primary.refuses(&texts(&args)).with(1, &["the stream KVS-x-00 is gone, which this data directory was used with"]);

    let exported = standby.data().join("exported");
    fs::write(&exported, printed(txlog("export", standby.data()))).expect("a file can be written");
    let mut import = super::txlog(&nodes, &["import"]);
    import.arg(&exported);
    printed(import);
    let server = start(&nodes);
    has_all(&server, "before", 20);
    has_all(&server, "after", 20);
    // The old directory is of another log.
    primary.refuses(&texts(&args)).with(1, &["but this data directory was used with the log"]);
}

#[test]
fn restart_uses_copy_that_begins_again_after_compaction() {
    let nodes = Nodes::start(3);
    let server = start(&nodes);
    let args = args(&nodes);
    write(&server, "a", 20);
    has(server.data(), 20);
    let server = server.kill().restart(&texts(&args));
    server.says(&format!("{USED}20"));
    has_all(&server, "a", 20);
    write(&server, "b", 20);
    has(server.data(), 40);
    let killed = server.kill();
    // The log is compacted beyond the copy, so another one is made.
    let other = start(&nodes);
    write(&other, "c", 20);
    other.terminate();
    printed(super::txlog(&nodes, &["compact"]));
    let server = killed.restart(&texts(&args));
    server.says("making the local copy of the log again, since the log was compacted beyond it");
    has_all_of(&server, ["a", "b", "c"]);
    has(server.data(), 60);
    assert!(!file(server.data()).to_string_lossy().ends_with("-0"), "it begins with the snapshot");
    let server = server.kill().restart(&texts(&args));
    server.says(&format!("{USED}60"));
    has_all_of(&server, ["a", "b", "c"]);
}

#[test]
fn damaged_copy_is_used_up_to_its_damage_and_mended() {
    let nodes = Nodes::start(3);
    let mut server = start(&nodes);
    let args = args(&nodes);
    write(&server, "a", 20);
    type Spoil = fn(&mut Vec<u8>, usize);
    let flip: Spoil = |bytes, at| bytes[at] ^= 1;
    let cut: Spoil = |bytes, at| bytes.truncate(at);
    for (spoil, percent) in [(flip, 50), (flip, 1), (cut, 50), (flip, 99), (cut, 0)] {
        has(server.data(), 20);
        let killed = server.kill();
        let copy = file(killed.data());
        let mut bytes = fs::read(&copy).expect("it can be read");
        let at = bytes.len() * percent / 100;
        spoil(&mut bytes, at);
        let is_cut = bytes.len() == at;
        fs::write(&copy, bytes).expect("it can be written");
        if !is_cut {
            let verified = refused(txlog("verify", killed.data()));
            assert!(verified.code == 1 && verified.line.contains("damaged at "), "{verified}");
        }
        server = killed.restart(&texts(&args));
        if !is_cut && percent > 1 {
            server.says("the local copy of the log is used up to where it is damaged: ");
        }
        has_all(&server, "a", 20);
        becomes_ready(&server, 200, WELL);
    }
    has(server.data(), 20);
}

#[test]
fn copy_that_log_does_not_continue_is_set_aside() {
    let mut nodes = Nodes::start(1);
    let mut args = args(&nodes);
    args.push("--allow-unsafe-txlog".into());
    let server = Server::start(&texts(&args));
    write(&server, "both", 10);
    let killed = server.kill();
    nodes.stop(0);
    let (store, former) = (nodes.store(0), nodes.store(0).with_extension("copy"));
    let copied = Command::new("cp").arg("-r").args([&store, &former]).status().expect("cp can be started");
    assert!(copied.success());
    nodes.restart(0);
    let server = killed.restart(&texts(&args));
    write(&server, "lost", 10);
    has(server.data(), 20);
    let killed = server.kill();
    // A backup of the stream is restored by hand, and continued elsewhere.
    nodes.stop(0);
    fs::remove_dir_all(&store).and_then(|()| fs::rename(&former, &store)).expect("the store can be replaced");
    nodes.restart(0);
    let mut other = Server::start(&texts(&args));
    write(&other, "new", 30);
    for _ in 0..3 {
        other = other.terminate().restart(&texts(&args));
    }
    other.terminate();
    fs::remove_file(killed.data().join("txlog-nats")).expect("it is there");
    let server = killed.restart(&texts(&args));
    server.says("the log does not continue the local copy, which is now ");
    has_all(&server, "both", 10);
    has_all(&server, "new", 30);
    assert_eq!(get(&server, "lost-0").0, 404);
    has(server.data(), 40);
    let aside = file(server.data()).with_extension("old");
    assert!(aside.exists(), "{}", aside.display());
}

#[test]
fn copy_of_another_log_is_never_used() {
    let nodes = Nodes::start(3);
    let other = Server::start(&["--txlog", &nodes.url("y"), "--txlog-monitor", &nodes.monitors()]);
    write(&other, "other", 30);
    has(other.data(), 30);
    let server = start(&nodes);
    write(&server, "a", 10);
    has(server.data(), 10);
    let killed = server.kill();
    let own = file(killed.data());
    fs::copy(file(other.data()), &own).expect("it can be copied");
    let server = killed.restart(&texts(&args(&nodes)));
    has_all(&server, "a", 10);
    assert_eq!(get(&server, "other-0").0, 404);
    has(server.data(), 10);
    // One with its own name is no choice that a command makes.
    let name = file(other.data());
    fs::copy(&name, own.with_file_name(name.file_name().expect("it has one"))).expect("it can be copied");
    refused(txlog("verify", server.data())).with(1, &["there are copies of several logs"]);
    let server = server.kill().restart(&texts(&args(&nodes)));
    server.says(&format!("{USED}10"));
    has_all(&server, "a", 10);
}

#[test]
fn full_disk_stops_copy_and_no_server() {
    let nodes = Nodes::start(3);
    let disk = Mount::tmpfs();
    let mut command = serve(&disk.data());
    command.args(args(&nodes));
    let server = Server::spawn(command, TempDir::new().expect("a temporary directory can be made"));
    write(&server, "a", 10);
    has(&disk.data(), 10);
    let brim = disk.brim();
    let value = "x".repeat(100 << 10);
    for number in 0..10 {
        assert_eq!(put(&server, &format!("large-{number}"), &value), 201);
    }
    server.says("the local copy of the log fails, retrying every 60s: cannot write ");
    becomes_ready(&server, 200, "[+]log ok, but there is no local copy of it: cannot write ");
    assert!(Metrics::of(&server).get("kvs_txlog_copy_failures_total") >= 1.0);
    counts(&server, "kvs_txlog_copy_bytes", 0.0);
    has_all(&server, "a", 10);
    assert_eq!(put(&server, "b", &value), 201);
    fs::remove_file(brim).expect("it is there");
}
