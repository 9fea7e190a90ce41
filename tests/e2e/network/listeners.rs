//! Several listeners, and Unix sockets: permissions, stale sockets, and rejected addresses.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::support::events::Events;
use crate::support::guests::guest;
use crate::support::http_clients::curl;
use crate::support::log::{kvs_at, of_files};
use crate::support::server::{PATIENCE, Server, refused, serve_refused};
use crate::support::wire::Connection;

/// A directory of sockets, and a path in it.
fn socket() -> (TempDir, PathBuf, String) {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let path = directory.path().join("kvs.sock");
    let flag = format!("unix:{}", path.display());
    (directory, path, flag)
}

fn connect(path: &Path) -> Connection<UnixStream> {
    let stream = UnixStream::connect(path).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("it takes a timeout");
    Connection::over(stream)
}

#[test]
fn all_listeners_serve_one_store() {
    let (_directory, path, flag) = socket();
    let second = TcpListener::bind("127.0.0.13:0").and_then(|listener| listener.local_addr()).expect("a port is free");
    let server = Server::start(&["--listen", &second.to_string(), "--listen", &flag]);
    let line = server.says("serving on http://");
    assert!(line.contains(&format!(" and http://{second} and {flag}")), "{line}");
    let tag = Connection::open(server.address()).ask("PUT", "/v1/a", b"value").etag();
    let mut unix = connect(&path);
    for response in [Connection::open(second).ask("GET", "/v1/a", b""), unix.ask("GET", "/v1/a", b"")] {
        assert_eq!((response.status, response.text(), response.etag()), (200, "value", tag));
    }
    // A watch ends when its client disconnects, and a large value is complete.
    let mut watch = Events::over(connect(&path), "/v1?watch", &[]).expect("it is answered").expect("there are events");
    let large = vec![b'x'; 1 << 20];
    assert_eq!(unix.ask("PUT", "/v1/large", &large).status, 201);
    assert_eq!(watch.next().expect("it comes").data["key"], "large");
    assert_eq!(unix.ask("GET", "/v1/large", b"").body, large);
    for http2 in ["--http1.1", "--http2-prior-knowledge"] {
        let socket = path.to_str().expect("it is text");
        assert_eq!(curl(&[http2, "--unix-socket", socket, "http://kvs/v1/a"]), (200, b"value".to_vec()));
    }
    server.terminate();
    assert!(!path.exists(), "the socket was left");
}

#[test]
fn unix_socket_client_has_no_address() {
    let (_directory, path, flag) = socket();
    let flags = ["--access-log-rate", "9", "--max-connections-per-address", "1"];
    let server = Server::start(&[&[guest(), "--listen", &flag], &flags[..]].concat());
    let peer =
        |headers: &[(&str, &str)]| connect(&path).ask_with("GET", "/peer", headers, b"").text().trim_end().to_owned();
    // The limit per address does not apply to them.
    let _open = connect(&path);
    assert_eq!(peer(&[("x-forwarded-for", "203.0.113.7")]), "None");
    server.says("peer=unix");
    let trusting = server.terminate().restart(&[guest(), "--listen", &flag, "--trusted-proxy", "unix"]);
    assert_eq!(peer(&[("x-forwarded-for", "203.0.113.7")]), "Some(\"203.0.113.7:0\")");
    assert_eq!(peer(&[]), "None");
    drop(trusting);
}

#[test]
fn stale_socket_is_replaced() {
    of_files!();
    let (_directory, path, flag) = socket();
    let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    let server = Server::start(&["--listen", &flag]);
    assert_eq!(mode(&path), 0o600);
    // In use: an error, and the socket stays.
    serve_refused(&["--listen", &flag]).with(1, &[&flag, "another process listens there"]);
    assert_eq!(connect(&path).ask("GET", "/v1/a", b"").status, 404);
    let killed = server.kill();
    assert!(path.exists());
    let server = killed.restart(&["--listen", &flag, "--listen-mode", "660"]);
    assert_eq!((mode(&path), connect(&path).ask("GET", "/v1/a", b"").status), (0o660, 404));
    // By then it is the socket of another process.
    fs::remove_file(&path).expect("it can be removed");
    let other = UnixListener::bind(&path).expect("it can be bound");
    server.terminate();
    assert!(path.exists());
    drop(other);
}

#[test]
fn addresses_are_checked() {
    let (directory, path, flag) = socket();
    let check = |args: &[&str]| {
        let mut command = kvs_at(&directory.path().join("data"));
        command.args(["serve", "--check"]).args(args);
        command
    };
    fs::write(&path, "file").expect("it can be written");
    let missing = format!("unix:{}/missing/kvs.sock", directory.path().display());
    for (args, parts) in [
        (
            &["--listen", "127.0.0.1:8080", "--listen", "127.0.0.1:8080"][..],
            &["--listen 127.0.0.1:8080 are the same address"][..],
        ),
        (&["--listen", "127.0.0.1:9090", "--admin", "127.0.0.1:9090"], &["--listen and --admin 127.0.0.1:9090"]),
        (&["--listen-when-primary", "127.0.0.1:8080"], &["--listen and --listen-when-primary 127.0.0.1:8080"]),
        (&["--insecure", "--listen", "0.0.0.0:9090", "--admin", "127.0.0.1:9090"], &["--listen and --admin"]),
        (&["--insecure", "--listen", "[::]:9090", "--admin", "127.0.0.1:9090"], &["--listen and --admin"]),
        (
            &["--insecure", "--listen", "[::]:8080", "--listen", "0.0.0.0:8080"],
            &["--listen and --listen 0.0.0.0:8080 are the same address"],
        ),
        (&["--listen", "[::ffff:127.0.0.1]:9090", "--admin", "127.0.0.1:9090"], &["--listen and --admin"]),
        (&["--listen", "unix:/a", "--listen", "unix:/a"], &["unix:/a is given twice"]),
        (&["--listen", &flag], &[&flag, "is not a socket"]),
        (&["--listen", &missing], &["is not a directory"]),
        (&["--listen", "127.0.0.1:0", "--listen", "0.0.0.0:8080"], &["--listen 0.0.0.0:8080", "--insecure"]),
        (&["--data-dir", "/dev/null"], &["--data-dir /dev/null is not a directory"]),
    ] {
        refused(check(args)).with(1, parts);
    }
    for (args, part) in [
        (&["--listen", "unix:"][..], "unix:"),
        (&["--listen", &format!("unix:/{}", "x".repeat(107))], "at most 107 bytes, and this one 108"),
        (&["--listen-mode", "066"], "from 600"),
        (&["--listen-mode", "rw"], "from 600"),
    ] {
        refused(check(args)).with(2, &[part]);
    }
    serve_refused(&["--listen", &flag]).with(1, &[&flag, "is not a socket"]);
    // An IPv6 address without IPv4, and a path of maximum length.
    let longest = format!("unix:/tmp/{}", "x".repeat(102));
    let both = ["--listen", "[::1]:9090", "--admin", "127.0.0.1:9090", "--listen", &longest];
    let output = check(&both).output().expect("the binary under test can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // A running server does not matter.
    fs::remove_file(&path).expect("it can be removed");
    let _other = UnixListener::bind(&path).expect("it can be bound");
    let output = check(&["--listen", &flag]).output().expect("the binary under test can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
