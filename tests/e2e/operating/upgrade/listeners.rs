//! Listeners of a server that is upgraded: TCP, Unix sockets, and those of a service manager.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use rustls::{ClientConnection, StreamOwned};

use super::*;
use crate::support::tls::{self, shake_hands};

type Secure = StreamOwned<ClientConnection, UnixStream>;

fn open(path: &Path) -> Connection<UnixStream> {
    let stream = UnixStream::connect(path).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("it takes a timeout");
    Connection::over(stream)
}

#[test]
fn all_listeners_are_handed_over() {
    of_files!();
    let directory = TempDir::new().expect("a temporary directory can be made");
    let (kvs, path) = (kvs_tests::binary(), directory.path().join("kvs.sock"));
    let flag = format!("unix:{}", path.display());
    let authority = Authority::new();
    let pair = authority.issue("server", Kind::Server, 1);
    let listening = ["--listen", &flag, "--trusted-proxy", "unix", guest()];
    let secure = ["--tls-cert", &pair.certificate, "--tls-key", &pair.key, "--admin-tls"];
    let server = Upgraded::start(&[&listening[..], &secure].concat());
    let config = Client::of(&authority).config();
    let tcp = || Connection::over(tls::connect(&config, server.address).expect("it listens"));
    let admin = || Connection::over(tls::connect(&config, server.admin).expect("it listens"));
    let unix = || -> io::Result<Connection<Secure>> {
        let stream = UnixStream::connect(&path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        shake_hands(&config, stream).map(Connection::over)
    };
    let peer = |connection: &mut Connection<Secure>, client: &str| {
        let headers = [("x-forwarded-for", client)];
        let answer = connection.ask_with("GET", "/peer", if client.is_empty() { &[] } else { &headers }, b"");
        (answer.text().trim_end().to_owned(), answer.header("connection").map(str::to_owned))
    };

    // Sockets that differ from the flags of the new process.
    for (sockets, expected) in [
        ("\"$@\" --listen 127.0.0.1:0".to_owned(), "2 sockets were passed to this process for 3 addresses"),
        (
            format!("serve --data-dir {} --listen {flag} --listen 127.0.0.1:0", server.data.path().display()),
            "the socket that was passed to this process for it is 127.0.0.1:",
        ),
    ] {
        server.fails(&program(&directory, "other", &format!("exec {kvs} {sockets}")));
        server.first().says(expected);
        assert_eq!(unix().expect("it listens").ask("GET", "/store/none", b"").status, 404);
    }

    let (mut over_tcp, mut over_unix, mut idle_admin) = (tcp(), unix().expect("it listens"), admin());
    let (mut plain, mut proxy) = (unix().expect("it listens"), unix().expect("it listens"));
    assert_eq!(idle_admin.ask("GET", "/livez", b"").status, 200);
    for _ in 0..2 {
        assert_eq!(over_tcp.ask("PUT", "/store/a", b"1").status / 100, 2);
        assert_eq!(over_unix.ask("GET", "/store/a", b"").text(), "1");
        let former = server.process.load(Ordering::Relaxed);
        server.upgrade(&[]);
        assert_eq!(idle_admin.end(), "", "an idle connection of the admin listener is closed");
        // The old process forwards the addresses and principals of its clients.
        assert_eq!(peer(&mut plain, ""), ("None".to_owned(), Some("close".to_owned())));
        let given = "Some(\"203.0.113.7:0\")".to_owned();
        assert_eq!(peer(&mut proxy, "203.0.113.7"), (given.clone(), Some("close".to_owned())));
        (over_tcp, over_unix, idle_admin) = (tcp(), unix().expect("it is there still"), admin());
        await_end(former);
        (plain, proxy) = (unix().expect("its file is left by the old process"), unix().expect("it listens"));
        assert_eq!((peer(&mut plain, "").0, peer(&mut proxy, "203.0.113.7").0), ("None".to_owned(), given));
        assert_eq!(idle_admin.ask("GET", "/readyz", b"").status, 200);
    }
    server.terminate();
    assert!(!path.exists(), "the last process removes the socket");
}

#[test]
fn unix_socket_of_service_manager_is_left() {
    of_files!();
    let directory = TempDir::new().expect("a temporary directory can be made");
    let path = directory.path().join("kvs.sock");
    let unix = UnixListener::bind(&path).expect("it can be bound");
    let tcp = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = tcp.local_addr().expect("bound");
    let flag = format!("unix:{}", path.display());
    let server = Upgraded::start_with(&["--listen", &flag], |command| {
        let served = std::mem::replace(command, Command::new("/bin/sh"));
        *command = through("/bin/sh", &served);
        let sockets = "export LISTEN_PID=$$ LISTEN_FDS=2; exec \"$@\" 3<&0 4<&1 </dev/null >/dev/null";
        command.args(["-c", sockets, "sh"]).arg(served.get_program()).args(served.get_args());
        command.stdin(OwnedFd::from(tcp)).stdout(OwnedFd::from(unix));
    });
    assert_eq!(server.address, address);
    assert_eq!(open(&path).ask("PUT", "/v1/a", b"1").status, 201);
    server.upgrade(&[]);
    assert_eq!(open(&path).ask("GET", "/v1/a", b"").text(), "1");
    assert_eq!(Connection::open(address).ask("GET", "/v1/a", b"").text(), "1");
    server.terminate();
    assert!(path.exists(), "the service manager listens there still");
}
