//! Disks that are full: small file systems, mounted for a test.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::Signal;

use crate::support::load::Clients;
use crate::support::mount::Mount;
use crate::support::server::{kvs, refused};
use crate::support::wire::Connection;
use crate::support::zoo;

/// Puts values until the disk is full, and returns their number.
fn fill(client: &mut Connection, first: u64) -> u64 {
    for number in first.. {
        let response = client.ask("PUT", &path(number), &value(number));
        if response.status == 507 {
            response.says(507, "no room is left, on disk or in memory; nothing was stored");
            assert_eq!(client.ask("GET", &path(number), b"").status, 404, "nothing was stored");
            return number;
        }
        assert_eq!(response.status, 201, "{}", response.text());
    }
    unreachable!("a disk has an end")
}

fn path(number: u64) -> String {
    format!("/v1/fill-{number}")
}

fn value(number: u64) -> Vec<u8> {
    format!("value {number} ").into_bytes().into_iter().cycle().take(16_000).collect()
}

fn is_full_of(client: &mut Connection, count: u64) {
    for number in 0..count {
        assert!(client.ask("GET", &path(number), b"").body == value(number), "value {number} of {count}");
    }
}

fn a_full_disk_refuses_writes_until_there_is_room(disk: &Mount) {
    let filler = disk.filler(8 << 20);
    let server = disk.serve();
    let mut client = Connection::open(server.address());
    let count = fill(&mut client, 0);
    server.says("disk full: cannot allocate the next segment of the log");
    assert!(count > 500, "{count} values filled it");
    is_full_of(&mut client, count);

    // Full under load, and then killed.
    let mut clients = Clients::new(&mut zoo::dice());
    let (answers, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    let answered = |status| {
        refused.fetch_add((status == 507).into(), Ordering::Relaxed);
        if answers.fetch_add(1, Ordering::Relaxed) == 2_000 {
            server.signal(Signal::KILL);
        }
    };
    clients.run(server.address(), answered, || ());
    assert!(refused.into_inner() > 100, "the disk was not full");
    server.ends();

    // The server starts without any space, and serves reads.
    let server = disk.serve();
    clients.settle(server.address());
    let mut client = Connection::open(server.address());
    is_full_of(&mut client, count);
    let count = fill(&mut client, count);

    fs::remove_file(filler).expect("it is there");
    server.says("disk space is available for the log again");
    let more = fill(&mut client, count);
    assert!(more > count + 100, "only {} more values after room was made", more - count);
    is_full_of(&mut client, more);
    server.terminate();
    let server = disk.serve();
    clients.settle(server.address());
    is_full_of(&mut Connection::open(server.address()), more);
}

#[test]
fn full_tmpfs_rejects_writes_until_there_is_space() {
    a_full_disk_refuses_writes_until_there_is_room(&Mount::tmpfs());
}

#[test]
fn full_ext4_rejects_writes_until_there_is_space() {
    a_full_disk_refuses_writes_until_there_is_room(&Mount::ext4());
}

/// No space even for small files: the holder of the lock, and the durable watermark.
#[test]
fn completely_full_disk_is_served() {
    let disk = Mount::tmpfs();
    let server = disk.serve();
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", b"1").status, 201);
    server.terminate();
    fs::remove_file(disk.data().join("LOCK")).expect("it is there");
    let brim = disk.brim();
    let server = disk.serve();
    let mut client = Connection::open(server.address());
    // The segment still has space.
    assert_eq!(client.ask("PUT", "/v1/b", b"2").status, 201);
    server.says("the watermark file was not written");
    assert_eq!(client.ask("PUT", "/v1/c", b"3").status, 201);
    fs::remove_file(brim).expect("it is there");
    server.terminate();
    let server = disk.serve();
    let mut client = Connection::open(server.address());
    for (path, value) in [("/v1/a", "1"), ("/v1/b", "2"), ("/v1/c", "3")] {
        assert_eq!(client.ask("GET", path, b"").text(), value);
    }
}

#[test]
fn full_disk_aborts_import() {
    let disk = Mount::tmpfs();
    let text = disk.directory.path().join("text");
    fs::write(&text, "1\t2\ta\tb\n").expect("there is room for this");
    let _filler = disk.filler(8 << 20);
    let mut command = kvs();
    command.args(["txlog", "import", "--data-dir"]).arg(disk.data()).arg(&text);
    refused(command).with(1, &["No space left on device", disk.data().to_str().expect("a temporary path is text")]);
}
