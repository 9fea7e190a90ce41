//! Timeouts and limits: slow clients, idle clients, many clients.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::guests::{DEFAULT_GUEST, copy_of, guest};
use crate::support::metrics::{counts, until};
use crate::support::nobody::{by_nobody, program_in};
use crate::support::server::{PATIENCE, Server, refused, serve, through};
use crate::support::swap::swaps;
use crate::support::wire::Connection;

#[test]
fn slow_body_is_408_and_stores_nothing() {
    let server = Server::start(&["--request-timeout", "300ms"]);
    let mut client = Connection::open(server.address());
    client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 10\r\n\r\nhalf");
    client.read().says(408, "the body did not arrive in time");
    assert_eq!(client.end(), "");
    Connection::open(server.address()).ask("GET", "/v1/a", b"").says(404, "no such key");
}

#[test]
fn slow_head_is_disconnected() {
    let server = Server::start(&["--header-timeout", "300ms"]);
    let mut client = Connection::open(server.address());
    client.send("GET /v1/a HTTP/1.1\r\nhost:");
    let answer = client.end();
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408 "), "{answer:?}");
}

#[test]
fn silent_client_is_disconnected() {
    let server = Server::start(&["--header-timeout", "300ms"]);
    let mut silent = Connection::open(server.address());
    assert_eq!(silent.end(), "");
}

#[test]
fn idle_client_is_disconnected() {
    let server = Server::start(&["--idle-timeout", "300ms"]);
    let mut idle = Connection::open(server.address());
    idle.ask("GET", "/v1/a", b"").says(404, "no such key");
    assert_eq!(idle.end(), "");
}

#[test]
fn header_and_idle_timeouts_are_independent() {
    let server = Server::start(&["--header-timeout", "300ms"]);
    let mut client = Connection::open(server.address());
    for _ in 0..2 {
        client.ask("GET", "/v1/a", b"").says(404, "no such key");
        assert!(client.is_silent_for(Duration::from_millis(900)), "an idle client was cut as a slow one");
    }
    client.send("GET /v1/a HT");
    assert_eq!(client.end(), "", "half a head after others has all the time in the world");

    let server = Server::start(&["--idle-timeout", "300ms"]);
    let mut client = Connection::open(server.address());
    assert!(client.is_silent_for(Duration::from_millis(900)), "a client that has yet to ask was cut as an idle one");
    client.send("GET /v1/a HT");
    assert!(client.is_silent_for(Duration::from_millis(900)), "a slow client was cut as an idle one");
    client.send("TP/1.1\r\nhost: kvs\r\n\r\n");
    client.read().says(404, "no such key");
}

#[test]
fn client_that_reads_no_response_is_disconnected() {
    let server = Server::start(&["--idle-timeout", "300ms", "--max-value-bytes", "32MiB"]);
    let value = vec![b'x'; 32 << 20];
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", &value).status, 201);
    let mut client = Connection::open(server.address());
    client.send("GET /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n");
    // The server has closed its end.
    counts(&server, "kvs_limit_exceeded_total{limit=\"idle-timeout\"}", 1.0);
    assert!(client.end().len() < value.len());
}

#[test]
fn slow_client_delays_no_others() {
    let server = Server::start(&[]);
    let slow: Vec<_> = (0..20)
        .map(|_| {
            let mut client = Connection::open(server.address());
            client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 10\r\n\r\nhalf");
            client
        })
        .collect();
    let mut quick = Connection::open(server.address());
    assert_eq!(quick.ask("PUT", "/v1/a", b"quick").status, 201);
    assert_eq!(quick.ask("GET", "/v1/a", b"").body, b"quick");
    for mut client in slow {
        client.send(" whole");
        assert_eq!(client.read().status, 201);
    }
    assert_eq!(quick.ask("GET", "/v1/a", b"").body, b"half whole");
}

#[test]
fn connections_over_limit_wait_for_free_place() {
    let server = Server::start(&["--max-connections", "2"]);
    let open = || {
        let mut client = Connection::open(server.address());
        client.send("GET /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n");
        client
    };
    let (mut first, mut second) = (open(), open());
    first.read().says(404, "no such key");
    second.read().says(404, "no such key");

    let mut third = open();
    assert!(third.is_silent_for(Duration::from_millis(300)), "a third connection was served when two were allowed");
    drop(first);
    third.read().says(404, "no such key");
}

#[test]
fn many_clients_at_once_are_all_served() {
    let server = Server::start(&["--max-connections", "32"]);
    thread::scope(|scope| {
        for client in 0..100 {
            let server = &server;
            scope.spawn(move || {
                let mut connection = Connection::open(server.address());
                for n in 0..10 {
                    let (path, value) = (format!("/v1/{client}-{n}"), format!("value {client} {n}"));
                    assert_eq!(connection.ask("PUT", &path, value.as_bytes()).status, 201);
                    assert_eq!(connection.ask("GET", &path, b"").text(), value);
                }
            });
        }
    });
}

#[test]
fn trickling_body_is_408() {
    let server = Server::start(&["--request-timeout", "1h", "--min-body-rate", "1MiB"]);
    let mut client = Connection::open(server.address());
    client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 10\r\n\r\nhalf");
    client.read().says(408, "the body did not arrive in time");
    assert_eq!(client.end(), "");
}

#[test]
fn too_many_headers_are_431() {
    let server = Server::start(&["--max-headers", "10"]);
    let ask = |count: usize| {
        let mut client = Connection::open(server.address());
        client.send(format!("GET /v1/a HTTP/1.1\r\nhost: kvs\r\n{}\r\n", "x: y\r\n".repeat(count - 1)));
        client.read().status
    };
    assert_eq!(ask(10), 404);
    assert_eq!(ask(11), 431);
}

#[test]
fn too_long_target_is_414() {
    let server = Server::start(&["--max-target-bytes", "1KiB"]);
    let mut client = Connection::open(server.address());
    let path = |length: usize| format!("/v1/{}", "k".repeat(length - 4));
    client.ask("GET", &path(1_024), b"").says(404, "no such key");
    client.ask("GET", &path(1_025), b"").says(414, "the request target is too long");
    assert_eq!(client.end(), "");
    // Longer than the parser accepts.
    let mut client = Connection::open(server.address());
    let _ = client.try_send(format!("GET {} HTTP/1.1\r\nhost: kvs\r\n\r\n", path(65_600)));
    assert!(matches!(client.read().status, 414 | 431));
}

#[test]
fn connections_over_address_limit_are_closed() {
    let server = Server::start(&["--max-connections-per-address", "2"]);
    let ask = |client: &mut Connection| client.ask("GET", "/v1/a", b"").says(404, "no such key");
    let (mut first, mut second) = (Connection::open(server.address()), Connection::open(server.address()));
    ask(&mut first);
    ask(&mut second);
    assert_eq!(Connection::open(server.address()).end(), "");
    ask(&mut Connection::open_from("127.0.0.2", server.address()));
    drop(first);
    // The server notices it a little later.
    let mut again = loop {
        let mut client = Connection::open(server.address());
        if client.try_ask("GET", "/v1/a", b"").is_ok() {
            break client;
        }
    };
    ask(&mut again);
    ask(&mut second);
}

#[test]
fn requests_over_limit_are_503_at_once() {
    let server = Server::start(&["--max-requests", "2"]);
    let mut slow: Vec<_> = (0..2)
        .map(|_| {
            let mut client = Connection::open(server.address());
            client.send("PUT /v1/a HTTP/1.1\r\nhost: kvs\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n");
            assert_eq!(client.read().status, 100);
            client
        })
        .collect();
    let mut client = Connection::open(server.address());
    let refused = client.ask("GET", "/v1/a", b"");
    refused.says(503, "too many requests at once");
    assert_eq!(refused.header("retry-after"), Some("1"));
    for client in &mut slow {
        client.send("value");
        assert_eq!(client.read().status, 201);
    }
    assert_eq!(client.ask("GET", "/v1/a", b"").body, b"value");
}

/// A server with this soft and hard limit of open files.
fn with_open_files(soft: u32, hard: u32, args: &[&str]) -> Server {
    let data = TempDir::new().expect("a temporary directory can be made");
    let command = serve(data.path());
    let mut limited = through("sh", &command);
    limited.args(["-c", &format!("ulimit -Sn {soft} && ulimit -Hn {hard} && exec \"$0\" \"$@\"")]);
    limited.arg(command.get_program()).args(command.get_args()).args(args);
    Server::spawn(limited, data)
}

#[test]
fn connections_leave_descriptors_to_log_and_admin() {
    let server = with_open_files(364, 364, &["--segment-bytes", "2MiB"]);
    server.says(
        "--max-connections 1000 needs 1256 open files, of which the process may have 364: at most 108 connections",
    );
    let mut writer = Connection::open(server.address());
    assert_eq!(writer.ask("PUT", "/v1/a", b"first").status, 201);
    let crowd: Vec<_> = (0..400).map(|_| Connection::open(server.address())).collect();
    let admin: Vec<_> = (0..8).map(|_| Connection::open(server.admin())).collect();
    until(&server, "all that can be are accepted", |now| now.get("kvs_connections") >= 108.0);
    // Meanwhile segments are created, compacted and removed, and the watermark file is written when there are no writes.
    for _ in 0..60 {
        assert_eq!(writer.ask("PUT", "/v1/a", &[b'x'; 200_000]).status, 201);
    }
    until(&server, "the log is compacted", |now| now.get("kvs_txlog_compactions_total") > 0.0);
    let watermark = server.data().join("log/watermark");
    let begun = Instant::now();
    while !watermark.exists() {
        assert!(begun.elapsed() < PATIENCE, "no watermark file was written");
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(writer.ask("GET", "/v1/a", b"").status, 200);
    assert_eq!(Connection::open(server.admin()).ask("GET", "/readyz", b"").status, 200);
    drop((crowd, admin));
    server.signal(Signal::TERM);
    server.ends_well();
}

#[test]
fn soft_limit_of_open_files_is_raised() {
    let server = with_open_files(100, 600, &["--max-connections", "400"]);
    let mut clients: Vec<_> = (0..400).map(|_| Connection::open(server.address())).collect();
    for client in &mut clients {
        client.ask("GET", "/v1/a", b"").says(404, "no such key");
    }
}

#[test]
fn too_low_open_file_limit_is_rejected() {
    let data = TempDir::new().expect("a temporary directory can be made");
    let command = serve(data.path());
    let mut limited = through("sh", &command);
    limited.args(["-c", "ulimit -n 200 && exec \"$0\" \"$@\""]).arg(command.get_program()).args(command.get_args());
    refused(limited).with(1, &["200 open files", "at least 320", "LimitNOFILE"]);
}

#[test]
fn work_waits_when_threads_are_refused() {
    let [home, data] = [(); 2].map(|()| TempDir::new().expect("a temporary directory can be made"));
    for directory in [&home, &data] {
        fs::set_permissions(directory.path(), Permissions::from_mode(0o777)).expect("it is ours");
    }
    let file = home.path().join("guest.wasm");
    fs::copy(guest(), &file).expect("the guest can be copied");
    let command = serve(data.path());
    let program = program_in(home.path());
    let mut unprivileged = through(program.to_str().expect("a temporary path is text"), &command);
    unprivileged.args(command.get_args()).arg(&file);
    let server = Server::spawn(by_nobody(unprivileged), data);
    // Longer than a runtime keeps idle threads by default: nothing else shows that these stay.
    thread::sleep(Duration::from_secs(12));
    let mut limit = Command::new("prlimit");
    limit.args(["--nproc=1:1", "--pid", &server.pid().to_string()]);
    assert!(by_nobody(limit).status().expect("prlimit is part of util-linux").success(), "no limit can be set");

    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/store/a", b"value").status, 201);
    client.ask("GET", "/trap", b"").says(500, "the store failed on this request");
    assert_eq!(client.ask("GET", "/store/a", b"").text(), "value");
    swaps(&server, &copy_of(DEFAULT_GUEST));
    let ready = Connection::open(server.admin()).ask("GET", "/readyz", b"");
    assert!(ready.status == 200 && ready.text().contains("[+]tasks ok\n"), "{}", ready.text());
    let stopped = server.terminate();
    assert!(stopped.stderr().iter().all(|line| !line.contains("panicked")), "{:?}", stopped.stderr());
}
