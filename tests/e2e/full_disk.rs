//! Disks that are full: small file systems, mounted for a test.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::load::{Clients, SMALL_SEGMENTS};
use crate::support::server::{Server, kvs, refused, serve};
use crate::support::wire::Connection;
use crate::support::zoo;

/// Temporary file system.
pub struct Mount {
    directory: TempDir,
}

impl Mount {
    const SIZE: u64 = 24 << 20;

    /// tmpfs.
    pub fn tmpfs() -> Self {
        Self::of(&["-t", "tmpfs", "-o", &format!("size={}", Self::SIZE), "none"])
    }

    /// ext4 in a file.
    fn ext4() -> Self {
        let image = tempfile::NamedTempFile::new().expect("a temporary file can be made");
        image.as_file().set_len(Self::SIZE).expect("a file can be made longer");
        let path = image.path().to_str().expect("a temporary path is text");
        // No blocks reserved for root, which runs this.
        run("mkfs.ext4", &["-q", "-m", "0", path]);
        Self::of(&["-o", "loop", path])
    }

    fn of(what: &[&str]) -> Self {
        let directory = TempDir::new().expect("a temporary directory can be made");
        let path = directory.path().to_str().expect("a temporary path is text").to_owned();
        run("mount", &[what, &[&path]].concat());
        Self { directory }
    }

    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub fn remount(&self, option: &str) {
        let path = self.directory.path().to_str().expect("a temporary path is text");
        run("mount", &["-o", &format!("remount,{option}"), path]);
    }

    /// Allocates this amount of space, until the file is removed.
    pub fn filler(&self, bytes: u64) -> PathBuf {
        let path = self.directory.path().join("filler");
        let zeros = vec![0; usize::try_from(bytes).expect("it is not much")];
        fs::write(&path, zeros).expect("there is room so far");
        File::open(&path).and_then(|file| file.sync_all()).expect("there is room so far");
        path
    }

    /// Allocates all remaining space, until the file is removed.
    pub fn brim(&self) -> PathBuf {
        let path = self.directory.path().join("brim");
        let mut file = File::create(&path).expect("a file can be empty");
        for size in [1 << 20, 4096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
        path
    }

    pub fn serve(&self) -> Server {
        let mut command = serve(&self.data());
        command.args(SMALL_SEGMENTS);
        // The directory that is removed with the server is another.
        Server::spawn(command, TempDir::new().expect("a temporary directory can be made"))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let path = self.directory.path();
        let unmounted = Command::new("umount").arg(path).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", path.display());
        }
    }
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("this test needs {program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "this test mounts a file system, for which it must be root: {program}: {said}");
}

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

    // Under load, and killed there.
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
    // The segment has space.
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
fn full_disk_aborts_an_import() {
    let disk = Mount::tmpfs();
    let text = disk.directory.path().join("text");
    fs::write(&text, "1\t2\ta\tb\n").expect("there is room for this");
    let _filler = disk.filler(8 << 20);
    let mut command = kvs();
    command.args(["txlog", "import", "--data-dir"]).arg(disk.data()).arg(&text);
    refused(command).with(1, &["No space left on device", disk.data().to_str().expect("a temporary path is text")]);
}
