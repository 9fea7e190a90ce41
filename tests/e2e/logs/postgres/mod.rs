//! The log in PostgreSQL: each test starts its own server, kills it, pauses it, locks its tables or disconnects it.

mod backup;
mod clocks;
mod commands;
mod incarnations;
mod opening;
mod past;
mod replication;
mod standby;
mod supervision;
mod takeover;

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::support::guests::{DEFAULT_GUEST, component};
use crate::support::load::{Clients, run_until_killed, under_load};
use crate::support::mount::Mount;
use crate::support::postgres::database::{Database, give};
use crate::support::postgres::proxy::{Proxy, Way};
use crate::support::postgres::{DEPOSED, WHOLE, is_deposed, start};
use crate::support::readiness::{AWAY, WELL, becomes_ready, ready};
use crate::support::requests::{get, put};
use crate::support::server::{PATIENCE, Server, serve_refused};
use crate::support::swap::{status, swap, swaps};
use crate::support::wire::Connection;
use crate::support::zoo;

#[test]
fn entries_are_rows_and_survive_kill() {
    let database = Database::start();
    let url = database.url();
    let server = start(&url);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"1").etag(), Some(1));
    assert_eq!(client.ask("PUT", "/v1/%C3%A4?ttl=1000", b"\x00\xff").etag(), Some(2));
    assert_eq!(client.ask("DELETE", "/v1/a", b"").status, 200);
    let typed = [("content-type", "text/plain; charset=\"utf-8\"")];
    assert_eq!(client.ask_with("PUT", "/v1/typed", &typed, b"x").status, 201);
    let rows = "SELECT sequence, event_type, convert_from(key, 'UTF8'), value, metadata, expires - time BETWEEN 999000 AND 1001000 \
                FROM kvs.transactions ORDER BY sequence";
    assert_eq!(
        database.sql(rows),
        [
            r"1|2|a|\x31||",
            r"2|2|ä|\x00ff||t",
            "3|1|a|||",
            r#"4|2|typed|\x78|[["content-type","text/plain; charset=\"utf-8\""]]|"#
        ]
    );
    // Another directory: nothing of the log is in it.
    drop(server.kill());
    let server = start(&url);
    let mut client = Connection::open(server.address());
    client.ask("GET", "/v1/a", b"").says(404, "no such key");
    let value = client.ask("GET", "/v1/%C3%A4", b"");
    assert_eq!((value.status, value.etag(), &value.body[..]), (200, Some(2), &b"\x00\xff"[..]));
    assert!(value.header("expires").is_some());
    assert_eq!(client.ask("GET", "/v1/typed", b"").header("content-type"), Some("text/plain; charset=\"utf-8\""));
    assert_eq!(client.ask("PUT", "/v1/a", b"2").etag(), Some(5));
    server.terminate();
    assert_eq!(database.sql("SELECT epoch, holder, last FROM kvs.writer"), ["2||5"]);
}

/// Other clients with the password can write to the database; the server must detect foreign rows.
#[test]
fn foreign_rows_end_server_and_stay() {
    let row = "INSERT INTO kvs.transactions (sequence, time, event_type, key) VALUES (2, 0, 1, 'theirs')";
    for (theirs, said) in [(row, "23505"), ("UPDATE kvs.writer SET last = 7", "its newest entry is 7")] {
        let database = Database::start();
        let server = start(&database.url());
        assert_eq!(put(&server, "a", "1"), 201);
        database.sql(theirs);
        // The other one is detected without a write.
        if theirs == row {
            assert_eq!(put(&server, "a", "2"), 500);
        }
        let (status, stopped) = server.ends();
        let last = stopped.stderr().last().expect("it says why");
        assert!(status.code() == Some(1) && last.contains(said), "{status}, it said: {last}");
        assert_eq!(
            database.sql("SELECT count(*) FROM kvs.transactions WHERE convert_from(value, 'UTF8') = '2'"),
            ["0"]
        );
    }
}

#[test]
fn kills_under_load_lose_nothing() {
    let database = Database::start();
    let url = database.url();
    let mut clients = Clients::new(&mut zoo::dice());
    for _ in 0..3 {
        let server = Server::start(&["--txlog", &url]);
        clients.settle(server.address());
        run_until_killed(&server, &mut clients, 1_000);
        assert!(clients.unknown() > 0, "the kill met no write in flight, and showed nothing");
        server.ends();
        assert_eq!(database.sql(WHOLE), ["t"]);
    }
    clients.settle(start(&url).address());
}

#[test]
fn killed_database_loses_no_write_and_stops_no_read() {
    let mut database = Database::start();
    let server = start(&database.url());
    assert_eq!(put(&server, "kept", "here"), 201);
    let mut clients = Clients::new(&mut zoo::dice());
    for _ in 0..3 {
        under_load(&server, &mut clients, 500, || {
            database.kill();
            becomes_ready(&server, 200, AWAY);
        });
        assert_eq!(get(&server, "kept"), (200, "here".into()));
        let refused = Connection::open(server.address()).ask("PUT", "/v1/new", b"");
        assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
        database.start_again();
        becomes_ready(&server, 200, WELL);
        assert_eq!(put(&server, "new", "x"), 201);
        clients.settle(server.address());
        assert_eq!(database.sql(WHOLE), ["t"]);
    }
    let said = server.stderr();
    let count = |text: &str| said.iter().filter(|line| line.contains(text)).count();
    assert_eq!((count("database unavailable"), count("database available again")), (3, 3), "a line for each change");
    // The state of the server equals the log.
    server.terminate();
    clients.settle(start(&database.url()).address());
}

#[test]
fn hanging_database_delays_writes_up_to_timeout() {
    let database = Database::start();
    let server = start(&database.url());
    let mut clients = Clients::new(&mut zoo::dice());
    let is_closed = |is: u8| {
        let metrics = Connection::open(server.admin()).ask("GET", "/metrics", b"");
        assert!(
            metrics.text().contains(&format!("\nkvs_txlog_breaker{{state=\"closed\"}} {is}\n")),
            "{}",
            metrics.text()
        );
    };
    is_closed(1);
    under_load(&server, &mut clients, 500, || {
        database.signal(Signal::STOP);
        becomes_ready(&server, 200, AWAY);
        is_closed(0);
    });
    database.signal(Signal::CONT);
    becomes_ready(&server, 200, WELL);
    is_closed(1);
    clients.settle(server.address());
    under_load(&server, &mut clients, 500, || {
        let lock = database.lock("kvs.transactions");
        becomes_ready(&server, 200, AWAY);
        drop(lock);
        database.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'BEGIN; LOCK%'");
        becomes_ready(&server, 200, WELL);
    });
    clients.settle(server.address());
    assert_eq!(database.sql(WHOLE), ["t"]);
}

#[test]
fn stop_without_database_reports_unknown_sequences() {
    let database = Database::start();
    let server = start(&database.url());
    assert_eq!(put(&server, "a", "1"), 201);
    database.signal(Signal::STOP);
    assert_eq!(put(&server, "a", "2"), 504);
    server.signal(Signal::TERM);
    let (status, stopped) = server.ends();
    let last = stopped.stderr().last().expect("it says why");
    assert!(
        status.code() == Some(1) && last.contains("the outcome of entries from sequence 2 on is unknown"),
        "{status}: {last}"
    );
    database.signal(Signal::CONT);
}

#[test]
fn stop_waits_for_short_database_outage() {
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    let server = start(&database.url_at(proxy.port));
    assert_eq!(put(&server, "a", "1"), 201);
    proxy.set(Way::Lost);
    assert_eq!(put(&server, "a", "2"), 504);
    server.signal(Signal::TERM);
    for _ in 0..2 {
        proxy.kept_something();
        proxy.set(Way::Reset);
        proxy.set(Way::Lost);
    }
    proxy.kept_something();
    proxy.set(Way::Open);
    server.ends_well();
    assert_eq!(database.sql("SELECT convert_from(value, 'UTF8') FROM kvs.transactions WHERE sequence = 2"), ["2"]);
}

#[test]
fn write_with_lost_response_is_applied_once() {
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    let url = database.url_at(proxy.port);
    // With few heartbeats, whose responses could be lost instead of that of a write.
    let patient = ["--txlog", &url, "--txlog-timeout", "1s", "--request-timeout", "3s", "--read-lease", "10s"];
    let server = Server::start(&patient);
    assert_eq!(put(&server, "a", "1"), 201);
    thread::scope(|scope| {
        proxy.set(Way::Deaf);
        let writing = scope.spawn(|| put(&server, "a", "2"));
        proxy.kept_something();
        // It is committed, but the server does not know.
        database.becomes("SELECT last FROM kvs.writer", "2");
        proxy.set(Way::Reset);
        proxy.set(Way::Open);
        assert_eq!(writing.join().expect("it is answered"), 201);
    });
    assert_eq!(database.sql("SELECT count(*) FROM kvs.transactions"), ["2"]);
    let looked_up = Connection::open(server.admin()).ask("GET", "/metrics", b"");
    assert!(looked_up.text().contains("\nkvs_txlog_lookups_total 1\n"), "{}", looked_up.text());

    let mut clients = Clients::new(&mut zoo::dice());
    for way in [Way::Slow(Duration::from_millis(2)), Way::Deaf, Way::Lost, Way::Reset] {
        under_load(&server, &mut clients, 300, || {
            proxy.set(way);
            if !matches!(way, Way::Slow(_)) {
                becomes_ready(&server, 200, AWAY);
                proxy.reset();
            }
            proxy.set(Way::Open);
            becomes_ready(&server, 200, WELL);
        });
        clients.settle(server.address());
        assert_eq!(database.sql(WHOLE), ["t"], "after {way:?}");
    }
}

/// An address that moves during a failover leads to a standby for a while, and sessions with that survive the move back.
#[test]
fn session_with_read_only_database_is_closed() {
    let mut database = Database::start();
    let standby = database.replicate();
    let proxy = Proxy::to(database.port());
    let server = start(&database.url_at(proxy.port));
    assert_eq!(put(&server, "a", "1"), 201);
    proxy.lead_to(standby.port());
    proxy.reset();
    becomes_ready(&server, 200, "read-only");
    assert_eq!((put(&server, "a", "2"), get(&server, "a")), (503, (200, "1".into())));
    proxy.lead_to(database.port());
    becomes_ready(&server, 200, WELL);
    assert_eq!(put(&server, "a", "3"), 201);
    // A session becomes read-only itself.
    database.configure("default_transaction_read_only", "on");
    becomes_ready(&server, 200, "read-only");
    database.kill();
    database.start_again();
    becomes_ready(&server, 200, "read-only");
    database.configure("default_transaction_read_only", "off");
    becomes_ready(&server, 200, WELL);
    assert_eq!(put(&server, "a", "4"), 201);
}

#[test]
fn session_with_two_failed_calls_is_closed() {
    let database = Database::start();
    let server = start(&database.url());
    assert_eq!(put(&server, "a", "1"), 201);
    let backend = "SELECT min(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = 1802924801 AND granted";
    let before = database.sql(backend).remove(0);
    let lock = database.lock("kvs.writer");
    database.becomes(&format!("SELECT ({backend}) IS DISTINCT FROM {before}"), "t");
    drop(lock);
    database.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'BEGIN; LOCK%'");
    becomes_ready(&server, 200, WELL);
    assert_eq!(put(&server, "a", "2"), 201);
}

#[test]
fn failing_replay_is_retried_up_to_limit() {
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    // Each shard reads for itself.
    let server = Server::start(&["--txlog", &database.url_at(proxy.port), "--txlog-timeout", "1s", "--shards", "1"]);
    assert_eq!(put(&server, "a", "1"), 201);
    let again = "retrying to read the log after sequence 0";
    proxy.set(Way::Reset);
    let swapped = swap(&server, &component(DEFAULT_GUEST));
    assert_eq!(swapped.status, 500, "{}", swapped.text());
    let tries = server.stderr().iter().filter(|line| line.contains(again)).count();
    assert_eq!(tries, 5);
    thread::scope(|scope| {
        let swapping = scope.spawn(|| swaps(&server, &component(DEFAULT_GUEST)));
        server.says_again(again, tries + 1);
        proxy.set(Way::Open);
        swapping.join().expect("what is away for a moment is waited for");
    });
    becomes_ready(&server, 200, WELL);
    assert_eq!((put(&server, "b", "2"), get(&server, "a")), (201, (200, "1".into())));
}

/// The rest is read in another snapshot, in which compaction may have dropped the delete of a key that was handed over.
#[test]
fn replay_that_reconnects_brings_no_deleted_key_back() {
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    let server = start(&database.url_at(proxy.port));
    let mut client = Connection::open(server.address());
    assert_eq!(put(&server, "gone", "x"), 201);
    for n in 0..100 {
        assert_eq!(client.ask("PUT", &format!("/v1/key-{n}"), &[b'x'; 200_000]).status, 201);
    }
    assert_eq!(client.ask("DELETE", "/v1/gone", b"").status, 200);
    proxy.set(Way::Slow(Duration::from_millis(30)));
    thread::scope(|scope| {
        let swapping = scope.spawn(|| swaps(&server, &component(DEFAULT_GUEST)));
        let begun = Instant::now();
        while status(&server)["swap"]["entries"].as_u64().is_none_or(|entries| entries == 0) {
            assert!(begun.elapsed() < PATIENCE, "nothing is replayed");
            thread::sleep(Duration::from_millis(1));
        }
        // As compaction does when the delete is older than an hour.
        database.sql(
            "DELETE FROM kvs.transactions WHERE key = 'gone'; UPDATE kvs.writer SET compacted = 102, forgotten = 102",
        );
        proxy.reset();
        proxy.set(Way::Open);
        swapping.join().expect("the log is replayed once more");
    });
    server.says("the log is replayed once more");
    assert_eq!((get(&server, "gone").0, get(&server, "key-99").0), (404, 200));
}

#[test]
fn paused_primary_is_fenced_off() {
    let database = Database::start();
    let url = database.url();
    let paused = start(&url);
    assert_eq!(put(&paused, "a", "1"), 201);
    serve_refused(&["--txlog", &url])
        .with(1, &["cannot open the log in the database \"postgres\" at 127.0.0.1", "it is in use by"]);
    let mut clients = Clients::new(&mut zoo::dice());
    let mut taken = None;
    under_load(&paused, &mut clients, 500, || {
        paused.signal(Signal::STOP);
        // The end of a lease is a matter of time.
        let unseen = "SELECT clock_timestamp() - seen > interval '10 seconds' FROM kvs.writer";
        database.becomes(unseen, "t");
        taken = Some(start(&url));
        // Before the new primary has written: the previous entry matches, and only the epoch differs.
        paused.signal(Signal::CONT);
        paused.says(DEPOSED);
    });
    is_deposed(paused);
    let server = taken.expect("it was started");
    assert_eq!(put(&server, "a", "2"), 201);
    assert_eq!(get(&server, "a"), (200, "2".into()));
    assert_eq!(ready(&server).0, 200);
    clients.settle(server.address());
    assert_eq!(database.sql(WHOLE), ["t"]);
    assert_eq!(put(&server, "a", "4"), 201);
    server.terminate();
}

#[test]
fn full_database_rejects_writes_until_there_is_space() {
    let database = Database::start();
    let server = start(&database.url());
    let mount = Mount::tmpfs();
    let filler = mount.filler(12 << 20);
    std::fs::create_dir(mount.data()).expect("there is room so far");
    give(&mount.data());
    database.sql(&format!("CREATE TABLESPACE small LOCATION '{}'", mount.data().display()));
    database.sql("ALTER TABLE kvs.transactions SET TABLESPACE small");
    let (mut client, mut rng) = (Connection::open(server.address()), zoo::dice());
    let mut put = |number: u64| {
        let value: Vec<u8> = (0..100_000).map(|_| rng.u8(..)).collect();
        client.ask("PUT", &format!("/v1/key-{number}"), &value).status
    };
    // More than the disk can hold.
    let statuses: Vec<_> = (0..200).map(&mut put).take_while(|status| *status != 507).collect();
    let stored = statuses.iter().filter(|status| **status == 201).count();
    assert!(stored > 50 && statuses.ends_with(&[504]) && statuses.len() == stored + 1, "{statuses:?}");
    assert_eq!(Connection::open(server.address()).ask("GET", "/v1/key-7", b"").status, 200);
    let (status, report) = ready(&server);
    assert!(status == 200 && report.contains("(53100)"), "{report}");
    std::fs::remove_file(filler).expect("it is there");
    becomes_ready(&server, 200, WELL);
    assert_eq!(put(1_000), 201);
    // The one whose outcome was unknown was written in the end.
    assert_eq!(database.sql("SELECT count(*) FROM kvs.transactions"), [format!("{}", stored + 2)]);
    assert_eq!(database.sql(WHOLE), ["t"]);
    server.terminate();
    database.sql("ALTER TABLE kvs.transactions SET TABLESPACE pg_default");
}

#[test]
fn compaction_deletes_superseded_rows_and_watches_get_410() {
    let database = Database::start();
    let url = database.url();
    // A pass over all rows takes longer than a second on a busy machine.
    let server = Server::start(&["--txlog", &url, "--txlog-timeout", "30s"]);
    let mut client = Connection::open(server.address());
    assert_eq!(put(&server, "gone", "x"), 201);
    client.ask("DELETE", "/v1/gone", b"");
    for round in 0..101 {
        let puts: Vec<_> = (0..1_000)
            .map(|n| json!({"op": "put", "key": format!("{{all}}{n}"), "value": format!("{round}")}))
            .collect();
        assert_eq!(client.ask("POST", "/v1", json!(puts).to_string().as_bytes()).status, 200);
    }
    // The delete is younger than an hour, and stays.
    database.becomes("SELECT count(*) FROM kvs.transactions", "1001");
    assert_eq!(client.ask("GET", "/v1?watch&since=1", b"").status, 410);
    database.becomes("SELECT last, forgotten, compacted > 0 FROM kvs.writer", "101002|0|t");
    server.terminate();
    let server = start(&url);
    assert_eq!((get(&server, "{all}7"), get(&server, "gone").0), ((200, "100".into()), 404));
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/{all}7", b"").etag(), Some(101_003));
    swaps(&server, &component(DEFAULT_GUEST));
    assert_eq!(get(&server, "{all}8"), (200, "100".into()));
}
