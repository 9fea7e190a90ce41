//! Values that expire.

use std::process::Stdio;
use std::thread;
use std::time::Instant;

use crate::log::kvs_at;
use crate::server::{PATIENCE, Server, Stopped};
use crate::wire::Connection;

/// Asks until the key is gone. Each time it must be the value or nothing.
#[track_caller]
fn expires(client: &mut Connection, path: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let got = client.ask("GET", path, b"");
        if got.status == 404 {
            return got.says(404, "no such key");
        }
        assert_eq!((got.status, got.text()), (200, "value"));
        assert!(got.header("expires").is_some());
        assert!(Instant::now() < deadline, "{path} does not expire");
    }
}

/// The lines of the log that delete.
fn deletes(stopped: &Stopped) -> usize {
    let mut dump = kvs_at(stopped.data());
    dump.args(["txlog", "cat"]);
    let output = dump.stdout(Stdio::piped()).output().expect("the binary under test can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").lines().filter(|line| line.contains("delete")).count()
}

#[test]
fn a_value_with_a_time_to_live_is_there_and_then_gone() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a?ttl=2", b"value").status, 201);
    assert_eq!(client.ask("PUT", "/v1/b?ttl=2", b"value").status, 201);
    assert_eq!(client.ask("PUT", "/v1/stays?ttl=1", b"value").status, 201);
    assert_eq!(client.ask("PUT", "/v1/stays", b"value").status, 201);
    let got = client.ask("GET", "/v1/stays", b"");
    assert_eq!((got.status, got.header("expires")), (200, None));
    expires(&mut client, "/v1/a");
    expires(&mut client, "/v1/b");
    assert_eq!(client.ask("HEAD", "/v1/b", b"").status, 404);
    assert_eq!(client.ask_with("PUT", "/v1/b", &[("if-none-match", "*")], b"again").status, 201);
    assert_eq!(client.ask("GET", "/v1/stays", b"").status, 200);
}

#[test]
fn a_time_to_live_goes_on_through_a_restart() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/soon?ttl=1", b"value");
    client.ask("PUT", "/v1/later?ttl=3600", b"value");
    let date = client.ask("GET", "/v1/later", b"").header("expires").map(str::to_owned);
    let server = server.kill().restart(&[]);
    let mut client = Connection::open(server.address());
    expires(&mut client, "/v1/soon");
    let got = client.ask("GET", "/v1/later", b"");
    assert_eq!((got.status, got.header("expires").map(str::to_owned)), (200, date));
}

#[test]
fn many_that_expire_at_once_are_deleted_in_the_log_while_requests_are_served() {
    let server = Server::start(&["--durability", "os"]);
    let count = 20_000;
    thread::scope(|scope| {
        for part in 0..4 {
            let server = &server;
            scope.spawn(move || {
                let mut client = Connection::open(server.address());
                for n in (part..count).step_by(4) {
                    assert_eq!(client.ask("PUT", &format!("/v1/{n}?ttl=1"), b"value").status, 201);
                }
            });
        }
    });
    // Sequences tell how many entries there are: a put and a delete for each, and the probes.
    let mut client = Connection::open(server.address());
    let deadline = Instant::now() + PATIENCE;
    let mut probes = 1;
    while client.ask("PUT", "/v1/probe", b"value").etag() < Some(2 * count + probes) {
        assert!(Instant::now() < deadline, "they are not deleted");
        probes += 1;
    }
    assert_eq!(deletes(&server.terminate()), count as usize);
}
