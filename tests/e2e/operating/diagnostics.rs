//! Blocked, closed and full standard error: the server continues.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::support::guests::guest;
use crate::support::log::{kvs_at, of_files};
use crate::support::server::{PATIENCE, Server, kvs};
use crate::support::tokens::Tokens;
use crate::support::wire::{Connection, Response};

/// Two free addresses, for a server that cannot report its own.
fn free() -> [SocketAddr; 2] {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.3:0").expect("there is a free port"));
    listeners.map(|listener| listener.local_addr().expect("a listener has an address"))
}

#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "it never was so that {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn does_not_block(pipe: &PipeWriter, set: bool) {
    let flags = fcntl_getfl(pipe).expect("a pipe has flags");
    fcntl_setfl(pipe, if set { flags | OFlags::NONBLOCK } else { flags - OFlags::NONBLOCK }).expect("they can be set");
}

/// A pipe that is full.
fn full() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = pipe().expect("there are pipes");
    does_not_block(&writer, true);
    while writer.write(&[b'\n'; 4096]).is_ok() {}
    (reader, writer)
}

/// Killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server whose log lines are lost; it must serve and stop as usual.
fn does_all_it_does(stderr: impl Into<Stdio>) {
    let tokens = Tokens::new();
    let (kept, revoked) = (tokens.add(&["kept", "--scope", "admin"]), tokens.add(&["revoked"]));
    let [listen, admin] = free();
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = kvs_at(data.path());
    command.args(["serve", "--listen", &listen.to_string(), "--admin", &admin.to_string(), "--tokens", &tokens.file()]);
    command.args(["--admin-open", "--segment-bytes", "2MiB", "--access-log-rate", "1000000", "--probation", "300ms"]);
    let mut server = Running(command.stderr(stderr).spawn().expect("the binary under test can be started"));
    let admin_says = |path: &str| -> Option<Response> {
        std::net::TcpStream::connect(admin).ok()?;
        Some(Connection::open(admin).ask("GET", path, b""))
    };
    wait_until("it is ready", || admin_says("/readyz").is_some_and(|report| report.status == 200));

    // With a request each, access log included.
    let ask = |method: &str, token: &str, body: &[u8]| {
        let mut client = Connection::open(listen);
        let length = body.len();
        client.send(format!(
            "{method} /v1/a HTTP/1.1\r\nhost: kvs\r\nauthorization: Bearer {token}\r\ncontent-length: {length}\r\n\r\n"
        ));
        client.send(body);
        client.read().status
    };
    let metric = |name: &str| -> f64 {
        let metrics = admin_says("/metrics").expect("it listens");
        let line =
            metrics.text().lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
        line.unwrap_or_else(|| panic!("{name} is missing")).parse().expect("a number")
    };
    for _ in 0..60 {
        assert!(matches!(ask("PUT", &kept, &[b'x'; 200_000]), 200 | 201 | 204), "a write is not answered as ever");
    }
    wait_until("the log is compacted", || metric("kvs_txlog_compactions_total") > 0.0);

    assert_eq!(ask("GET", &revoked, b""), 200);
    let file = std::fs::read_to_string(tokens.file()).expect("it is there");
    let left: Vec<_> = file.lines().filter(|line| !line.contains("revoked")).collect();
    std::fs::write(tokens.file(), left.join("\n") + "\n").expect("it can be written");
    wait_until("the tokens are reloaded", || ask("GET", &revoked, b"") == 401);

    let mut swap = kvs();
    swap.args(["swap", guest(), "--admin", &admin.to_string()]);
    let swapped = swap.stderr(Stdio::piped()).output().expect("the binary under test can be started");
    assert!(swapped.status.success(), "{}", String::from_utf8_lossy(&swapped.stderr));
    assert_eq!(admin_says("/readyz").expect("it listens").status, 200);

    kill_process(Pid::from_child(&server.0), Signal::TERM).expect("a child can be signalled");
    let mut ended = None;
    wait_until("it ends", || {
        ended = server.0.try_wait().expect("a child can be waited for");
        ended.is_some()
    });
    assert_eq!(ended.expect("it has ended").code(), Some(0));
}

#[test]
fn closed_stderr_does_not_stop_server() {
    of_files!();
    let (reader, writer) = pipe().expect("there are pipes");
    drop(reader);
    does_all_it_does(writer);
}

#[test]
fn full_disk_of_log_lines_does_not_stop_server() {
    of_files!();
    does_all_it_does(File::options().write(true).open("/dev/full").expect("Linux has it"));
}

#[test]
fn full_nonblocking_pipe_does_not_stop_server() {
    of_files!();
    let (_reader, writer) = full();
    does_all_it_does(writer);
}

#[test]
fn unread_pipe_does_not_stop_server() {
    of_files!();
    let (_reader, writer) = full();
    does_not_block(&writer, false);
    does_all_it_does(writer);
}

/// Lines are lost, counted and reported while they are not read, and are written again when they are.
#[test]
fn lost_lines_are_counted_and_reported() {
    let [listen, admin] = free();
    let data = TempDir::new().expect("a temporary directory can be made");
    let (mut reader, writer) = full();
    does_not_block(&writer, false);
    let mut command = kvs_at(data.path());
    command.args(["serve", "--listen", &listen.to_string(), "--admin", &admin.to_string(), "--log-filter", "trace"]);
    command.args(["--access-log-rate", "1000000"]);
    let _server = Running(command.stderr(writer).spawn().expect("the binary under test can be started"));
    drop(command);
    let report = || {
        std::net::TcpStream::connect(admin).ok()?;
        Some(Connection::open(admin).ask("GET", "/readyz", b""))
    };
    wait_until("it is ready", || report().is_some_and(|report| report.status == 200));
    let mut client = Connection::open(listen);
    let target = format!("/v1/{}", "a".repeat(250));
    let is_lost = || report().expect("it listens").text().contains("[+]diagnostics ok, but log lines are lost: ");
    wait_until("lines are lost", || {
        (0..100).for_each(|_| drop(client.ask("GET", &target, b"")));
        is_lost()
    });
    let metrics = Connection::open(admin).ask("GET", "/metrics", b"");
    let lost = metrics.text().lines().find_map(|line| line.strip_prefix("kvs_log_lines_lost_total "));
    assert!(lost.is_some_and(|lost| lost != "0"), "{}", metrics.text());

    let mut said = Vec::new();
    let mut some = [0; 65_536];
    wait_until("the loss is reported", || {
        let count = reader.read(&mut some).expect("a pipe can be read");
        said.extend_from_slice(&some[..count]);
        String::from_utf8_lossy(&said).contains("log lines were lost")
    });
    assert!(!is_lost(), "it still loses lines");
}

/// A command in a pipe that ends early does not fail.
#[test]
fn command_with_closed_stderr_succeeds() {
    of_files!();
    let data = TempDir::new().expect("a temporary directory can be made");
    let file = data.path().join("lines");
    std::fs::write(&file, "").expect("it can be written");
    let (reader, writer) = pipe().expect("there are pipes");
    drop(reader);
    let mut command = kvs();
    command.args(["txlog", "import", "--data-dir"]).arg(data.path().join("data")).arg(&file);
    let ended = command.stderr(writer).status().expect("the binary under test can be started");
    assert_eq!(ended.code(), Some(0));
}

/// No command panics when its output is closed, however short that is.
#[test]
fn command_with_closed_stdout_succeeds() {
    of_files!();
    let tokens = Tokens::new();
    tokens.add(&["alice"]);
    let server = Server::start(&[]);
    let (admin, file) = (server.admin().to_string(), tokens.file());
    for args in [
        &["inspect", guest()][..],
        &["health", "--output", "json", "--admin", &admin],
        &["read-only", "off", "--output", "json", "--admin", &admin],
        &["stats", "--admin", &admin],
        &["token", "list", "--tokens", &file],
        &["swap", guest(), "--dry-run", "--admin", &admin],
    ] {
        let (reader, writer) = pipe().expect("there are pipes");
        drop(reader);
        let mut command = kvs();
        command.args(args).stdout(writer).stderr(Stdio::piped());
        let output = command.output().expect("the binary under test can be started");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(0) && !said.contains("panicked"), "{args:?}: {:?}, {said}", output.status);
    }
}
