//! Backups taken with `kvs backup`, and servers on restored logs.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::server::{Server, kvs, serve};
use super::wire::Connection;

pub fn temporary() -> TempDir {
    TempDir::new().expect("a temporary directory can be made")
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is text")
}

/// `kvs backup`, of this server.
pub fn backup(admin: SocketAddr, args: &[&str]) -> Command {
    let mut command = kvs();
    command.arg("backup").args(args).env("KVS_ADMIN", admin.to_string());
    command
}

pub fn restore(files: &[PathBuf], args: &[&str]) -> Command {
    let mut command = kvs();
    command.arg("restore").args(files).args(args);
    command
}

/// Runs a command that must succeed, and returns its output.
#[track_caller]
pub fn done(mut command: Command) -> String {
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().expect("the binary can be started");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}, it said: {said}", output.status);
    String::from_utf8(output.stdout).expect("it is text")
}

/// Takes a backup, and returns its last sequence.
#[track_caller]
pub fn take(server: &Server, file: &Path, args: &[&str]) -> u64 {
    let printed = done(backup(server.admin(), &[&["-o", text(file)], args].concat()));
    printed.trim_end().parse().expect("it is a sequence")
}

/// Restores backups with these flags, and serves the result.
#[track_caller]
pub fn restored(files: &[PathBuf], args: &[&str]) -> Server {
    let data = temporary();
    done(restore(files, &[&["--data-dir", text(data.path())], args].concat()));
    Server::spawn(serve(data.path()), data)
}

/// Writes a log that is larger than the buffers of a connection, of a server that waits for a client for 200 ms.
pub fn large() -> Server {
    large_with(&["--backup-timeout", "200ms"])
}

/// Writes a log that is larger than the buffers of a connection.
pub fn large_with(args: &[&str]) -> Server {
    let server = Server::start(args);
    let mut client = Connection::open(server.address());
    let value = vec![b'v'; 1 << 20];
    for key in 0..24 {
        assert_eq!(client.ask("PUT", &format!("/v1/{key}"), &value).status, 201);
    }
    server
}
