//! Values that expire.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tempfile::TempDir;

use crate::support::events::Events;
use crate::support::file_log::{YEAR, next_year, write_a_year_ahead};
use crate::support::log::{kvs_at, of_files};
use crate::support::metrics::Metrics;
use crate::support::requests::expires;
use crate::support::server::{PATIENCE, Server, Stopped, kvs, serve};
use crate::support::wire::Connection;

/// The deletes in the log.
fn deletes(stopped: &Stopped) -> usize {
    let mut dump = kvs_at(stopped.data());
    dump.args(["txlog", "cat"]);
    let output = dump.stdout(Stdio::piped()).output().expect("the binary under test can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text").lines().filter(|line| line.contains("delete")).count()
}

#[test]
fn value_with_ttl_expires() {
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
fn watcher_gets_expiry_in_time() {
    const KEYS: usize = 10;
    let server = Server::start(&[]);
    let mut watch = Events::open(&server, "/v1?watch", &[]);
    let mut late = thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let (mut due, mut late) = (BTreeMap::new(), Vec::new());
            while late.len() < KEYS {
                let data = watch.next().expect("the watch continues").data;
                let key = data["key"].as_str().expect("a key is text").to_owned();
                match data["expires"].as_i64() {
                    Some(at) => drop(due.insert(key, at)),
                    None => late.push(now_ms() - due[&key]),
                }
            }
            late
        });
        let mut client = Connection::open(server.address());
        for key in 0..KEYS {
            assert_eq!(client.ask("PUT", &format!("/v1/{key}?ttl=1"), b"value").status, 201);
            // Expiries spread over one second: a server that checks once a second would be late with most.
            thread::sleep(Duration::from_millis(97));
        }
        watching.join().expect("all expire")
    });
    late.sort_unstable();
    // Most of them, since the machine is shared.
    assert!((-20..300).contains(&late[KEYS / 2]), "they are late by {late:?} ms");
}

#[test]
fn ttl_continues_over_restart() {
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
fn mass_expiry_does_not_delay_requests() {
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
    // Sequences show how many entries there are: a put and a delete for each, and the probes.
    let mut client = Connection::open(server.address());
    let deadline = Instant::now() + PATIENCE;
    let mut probes = 1;
    while client.ask("PUT", "/v1/probe", b"value").etag() < Some(2 * count + probes) {
        assert!(Instant::now() < deadline, "they are not deleted");
        probes += 1;
    }
    assert_eq!(deletes(&server.terminate()), count as usize);
}

/// In milliseconds since 1970.
fn now_ms() -> i64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later than 1970");
    i64::try_from(time.as_millis()).expect("it is a time")
}

/// The line of the clock in `/readyz`.
fn clock(server: &Server) -> String {
    let ready = Connection::open(server.admin()).ask("GET", "/readyz", b"");
    assert_eq!(ready.status, 200);
    ready.text().lines().find(|line| line.contains("clock")).expect("it has such a line").to_owned()
}

#[test]
fn ttl_ends_after_run_with_clock_ahead() {
    of_files!();
    let data = TempDir::new().expect("a temporary directory can be made");
    write_a_year_ahead(data.path());
    let mut server = Server::spawn(serve(data.path()), data);
    for path in ["/v1/a", "/v1/b"] {
        let mut client = Connection::open(server.address());
        expires(&mut client, "/v1/before");
        assert_eq!(client.ask("PUT", &format!("{path}?ttl=1"), b"value").status, 201);
        expires(&mut client, path);
        assert_eq!(client.ask("GET", "/v1/stays", b"").status, 200);
        assert!(clock(&server).starts_with("[+]clock ok, but the system clock is 11months "), "{}", clock(&server));
        let behind = Metrics::of(&server).get("kvs_clock_behind_seconds");
        assert!((YEAR.as_secs_f64() - 60.0..YEAR.as_secs_f64() + 600.0).contains(&behind), "{behind} s");
        server = server.terminate().restart(&[]);
    }
}

#[test]
fn imported_future_entries_keep_their_remaining_ttl() {
    let data = TempDir::new().expect("a temporary directory can be made");
    let time = next_year();
    let mut import = kvs_at(data.path());
    let mut import =
        import.args(["txlog", "import", "-"]).stdin(Stdio::piped()).spawn().expect("the binary can be started");
    let text = format!("1\t2\ta\tvalue\t{time}\t{}\n2\t2\tb\tvalue\t{time}\t\n", time + 1_000);
    import.stdin.take().expect("it is piped").write_all(text.as_bytes()).expect("it is read");
    assert!(import.wait().expect("it ends").success());
    let server = Server::spawn(serve(data.path()), data);
    let mut client = Connection::open(server.address());
    expires(&mut client, "/v1/a");
    assert_eq!(client.ask("GET", "/v1/b", b"").status, 200);
    assert_eq!(clock(&server), "[+]clock ok");
}

#[test]
fn durations_without_unit_are_seconds() {
    let server = Server::start(&["--idle-timeout", "75"]);
    for ttl in ["3600", "3600s", "1h"] {
        let put = kvs()
            .args(["put", "a", "1", "--ttl", ttl])
            .env("KVS_URL", server.url(""))
            .output()
            .expect("the binary under test can be started");
        assert!(put.status.success(), "{ttl}");
        let mut client = Connection::open(server.address());
        assert_eq!(client.ask("PUT", &format!("/v1/b?ttl={ttl}"), b"1").status, 201);
        let list = client.ask("GET", "/v1", b"").text().to_owned();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later than 1970").as_millis();
        let expires: Vec<u128> = list
            .split("\"expires\":")
            .skip(1)
            .filter_map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
            .collect();
        let is_an_hour = |at: &u128| (3_400_000..=3_601_000).contains(&at.saturating_sub(now));
        assert!(expires.len() == 2 && expires.iter().all(is_an_hour), "{ttl}: {list} at {now}");
    }
    for wait in ["1", "1s", "1000ms"] {
        let mut client = Connection::open(server.address());
        let tag = client.ask("GET", "/v1/a", b"").etag().expect("it is there");
        let begun = Instant::now();
        let condition = format!("\"{tag}\"");
        let waited = client.ask_with("GET", &format!("/v1/a?wait={wait}"), &[("if-none-match", &condition)], b"");
        assert_eq!(waited.status, 304, "{wait}");
        assert!(begun.elapsed() >= Duration::from_millis(990), "{wait} is {:?}", begun.elapsed());
    }
}
