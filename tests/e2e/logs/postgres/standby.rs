//! Standbys: stale reads, rejected requests, and writes and watches over takeovers.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::support::events::Events;
use crate::support::guests::{brittle, guest};
use crate::support::load::{Clients, under_load};
use crate::support::metrics::counts;
use crate::support::postgres::database::Database;
use crate::support::postgres::proxy::{Proxy, Way};
use crate::support::postgres::{DEPOSED, WHOLE, has_lease, is_deposed, stand_by, start};
use crate::support::readiness::{AWAY, STANDS_BY, UP_TO_DATE, WELL, becomes_ready, ready};
use crate::support::requests::{answer, get, get_stale, put, send, shows};
use crate::support::server::{PATIENCE, Process, Server, kvs, serve, serve_refused};
use crate::support::wire::{Connection, STALE};
use crate::support::zoo;

const REFUSED: &str = "this server stands by; another one takes writes";

#[test]
fn standby_follows_and_writes_nothing() {
    let mut database = Database::start();
    let url = database.url();
    let server = start(&url);
    assert_eq!((put(&server, "a", "1"), put(&server, "b", "1")), (201, 201));
    let standby = stand_by(&url, &["--shards", "3"]);
    assert_eq!(get_stale(&standby, "a"), (200, "1".into()));

    // Waiting requests are woken.
    let typed = [("content-type", "text/plain")];
    let waiting = Connection::open(standby.address());
    let mut watching = Events::open(&standby, "/v1?watch&prefix=a", &STALE);
    thread::scope(|scope| {
        let mut waiting = waiting;
        let woken = scope
            .spawn(move || waiting.ask_with("GET", "/v1/a?wait=100s", &[("if-none-match", "\"1\""), STALE[0]], b""));
        let stored = Connection::open(server.address()).ask_with("PUT", "/v1/a", &typed, b"2");
        assert_eq!(stored.status, 201);
        let woken = woken.join().expect("it is answered");
        assert_eq!((woken.text(), woken.header("content-type")), ("2", Some("text/plain")));
    });
    let seen = watching.next().expect("it continues");
    let metadata = json!({"content-type": "text/plain"});
    assert_eq!((seen.id, seen.data), (3, json!({"key": "a", "value": "2", "metadata": metadata})));
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("DELETE", "/v1/b", b"").status, 200);
    shows(&standby, "b", 404, "");
    assert_eq!(client.ask("PUT", "/v1/c?ttl=1", b"short").status, 201);
    shows(&standby, "c", 200, "short");
    shows(&standby, "c", 404, "");
    let list = Connection::open(standby.address()).ask_with("GET", "/v1", &STALE, b"");
    assert!(list.text().contains("\"key\":\"a\"") && !list.text().contains("\"key\":\"c\""), "{}", list.text());
    let query = |headers: &[(&str, &str)]| {
        Connection::open(standby.address()).ask_with("QUERY", "/v1", headers, br#"["a", "b"]"#)
    };
    let values = query(&STALE);
    assert!(values.status == 200 && values.text().contains("\"value\":\"2\""), "{}", values.text());
    assert_eq!(query(&[]).status, 503);

    // The primary deleted the expired key.
    database.becomes("SELECT last FROM kvs.writer", "6");
    becomes_ready(&standby, 200, UP_TO_DATE);
    let operation = json!([{"op": "check", "key": "a", "if_none_match": "*"}]).to_string();
    for (method, path, body) in [("PUT", "/v1/a", ""), ("DELETE", "/v1/nothing", ""), ("POST", "/v1", &*operation)] {
        let refused = Connection::open(standby.address()).ask(method, path, body.as_bytes());
        refused.says(503, &format!("{REFUSED}; the primary is {}", server.url("")));
        assert_eq!(refused.header("retry-after"), Some("1"));
    }
    let metrics = Connection::open(standby.admin()).ask("GET", "/metrics", b"");
    assert!(metrics.text().contains("\nkvs_txlog_role 1\n"), "{}", metrics.text());

    // It survives an outage of the database, as the primary does.
    database.kill();
    becomes_ready(&standby, 200, AWAY.trim_start_matches("[+]log ok, but "));
    assert_eq!(get_stale(&standby, "a"), (200, "2".into()));
    database.start_again();
    becomes_ready(&server, 200, WELL);
    assert_eq!(put(&server, "d", "new"), 201);
    shows(&standby, "d", 200, "new");
    assert_eq!(database.sql("SELECT epoch, last FROM kvs.writer"), ["1|7"]);
    standby.terminate();
    assert_eq!(put(&server, "a", "3"), 201);
}

/// The spare of a standby applies writes of the primary, and after a takeover those of the standby.
#[test]
fn spare_of_standby_follows_primary() {
    let database = Database::start();
    let url = database.url();
    let server = start(&url);
    let standby = stand_by(&url, &[brittle(), "--shards", "1", "--spare", "--stale-reads"]);
    let traps = || {
        counts(&standby, "kvs_guest_spares", 1.0);
        let answer = Connection::open(standby.address()).ask("GET", "/trap/v1/a", b"");
        answer.says(500, "the store failed on this request");
    };
    for value in ["1", "2", "3"] {
        assert_eq!(put(&server, "a", value), 201);
        shows(&standby, "a", 200, value);
        traps();
        assert_eq!(get(&standby, "a"), (200, value.into()));
    }
    server.kill();
    becomes_ready(&standby, 200, WELL);
    assert_eq!(put(&standby, "a", "4"), 201);
    traps();
    assert_eq!(get(&standby, "a"), (200, "4".into()));
    assert_eq!(put(&standby, "a", "5"), 201);
    counts(&standby, "kvs_guest_promotions_total{cause=\"spare\"}", 4.0);
    counts(&standby, "kvs_guest_promotions_total{cause=\"takeover\"}", 1.0);
    standby.terminate();
}

#[test]
fn standby_waits_for_unavailable_database() {
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    let server = start(&database.url());
    assert_eq!(put(&server, "a", "1"), 201);
    thread::scope(|scope| {
        proxy.set(Way::Deaf);
        let standby = scope.spawn(|| stand_by(&database.url_at(proxy.port), &[]));
        proxy.kept_something();
        proxy.set(Way::Reset);
        proxy.set(Way::Open);
        let standby = standby.join().expect("it stands by");
        standby.says("database unavailable, standby retries to connect");
        assert_eq!(get_stale(&standby, "a"), (200, "1".into()));
    });
    let nowhere = database.url().replace("/postgres?", "/nothere?");
    serve_refused(&["--standby", "--txlog", &nowhere]).with(1, &["database \"nothere\" does not exist"]);
}

#[test]
fn append_on_standby_is_read_only() {
    let database = Database::start();
    let server = start(&database.url());
    let standby = stand_by(&database.url(), &[guest()]);
    let response = Connection::open(standby.address()).ask_with("GET", "/append-to/a", &STALE, b"");
    assert!(response.text().contains("ReadOnly"), "{}", response.text());
    assert_eq!(put(&server, "a", "1"), 201);
    assert_eq!(database.sql("SELECT last FROM kvs.writer"), ["1"]);
}

#[test]
fn guest_has_tick_after_promotion() {
    let database = Database::start();
    let server = start(&database.url());
    let standby = stand_by(&database.url(), &[guest(), "--guest-config", "fault=tick-appends", "--stale-reads"]);
    let begun = Instant::now();
    while !Connection::open(standby.address()).ask("GET", "/refusal", b"").text().contains("ReadOnly") {
        assert!(begun.elapsed() < PATIENCE, "no tick while it stands by");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(database.sql("SELECT last FROM kvs.writer"), ["0"]);
    server.terminate();
    database.becomes("SELECT last > 0 FROM kvs.writer", "t");
}

#[test]
fn position_that_standby_has_not_reached_is_503() {
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    let server = start(&database.url());
    let standby = stand_by(&database.url_at(proxy.port), &["--stale-reads"]);
    assert_eq!(put(&server, "a", "1"), 201);
    shows(&standby, "a", 200, "1");
    let resume = |method: &str, position: u64| {
        Connection::open(standby.address()).ask(method, &format!("/v1?watch&since={position}"), b"")
    };
    // It can read the end of the log, but not its entries.
    standby.signal(Signal::STOP);
    assert_eq!(put(&server, "a", "2"), 201);
    let held = database.lock("kvs.transactions");
    standby.signal(Signal::CONT);
    becomes_ready(&standby, 200, ", replication lag 1 entries\n");
    let refused = resume("GET", 2);
    refused.says(
        503,
        "the position 2 is not yet here: this server follows the log and has not come so far, or cannot find out",
    );
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(resume("GET", 3).status, 410);
    drop(held);
    database.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'BEGIN; LOCK%'");
    shows(&standby, "a", 200, "2");
    assert_eq!((resume("HEAD", 2).status, resume("GET", 3).status), (200, 410));

    // It cannot read the end of the log.
    proxy.set(Way::Reset);
    assert_eq!(put(&server, "a", "3"), 201);
    assert_eq!((resume("GET", 3).status, resume("GET", 4).status), (503, 503));
}

/// After a takeover it would have the epoch, and take no writes.
#[test]
fn standby_that_cannot_apply_an_entry_is_not_ready() {
    let database = Database::start();
    let server = start(&database.url());
    let standby = stand_by(&database.url(), &[]);
    standby.signal(Signal::STOP);
    assert_eq!(put(&server, "a", "1"), 201);
    let key = |key: &str| database.sql(&format!("UPDATE kvs.transactions SET key = '{key}' WHERE sequence = 1"));
    key("\\xff");
    standby.signal(Signal::CONT);
    becomes_ready(&standby, 503, "[-]replication cannot apply new entries of the log for ");
    becomes_ready(&standby, 503, "with sequence 1 is corrupted: its key is not UTF-8");
    server.kill();
    becomes_ready(&standby, 503, "[+]log ok, but failover in progress, replication lag 1 entries");
    key("a");
    becomes_ready(&standby, 200, WELL);
    assert_eq!((get(&standby, "a"), put(&standby, "a", "2")), ((200, "1".into()), 201));
}

#[test]
fn standby_takes_over_from_killed_primary() {
    let database = Database::start();
    let url = database.url();
    let server = start(&url);
    let standby = stand_by(&url, &["--shards", "3"]);
    let mut clients = Clients::new(&mut zoo::dice());
    let mut watching = Events::open(&standby, "/v1?watch&since=0", &STALE);
    thread::scope(|scope| {
        // All writes, in order, each once.
        let watching = scope.spawn(move || {
            for number in 1.. {
                let event = watching.next().expect("a watch continues over a takeover");
                assert_eq!(event.id, number);
                if event.data["key"] == "the end" {
                    return number;
                }
            }
            unreachable!("there is an end");
        });
        under_load(&server, &mut clients, 1_000, || server.signal(Signal::KILL));
        server.ends();
        becomes_ready(&standby, 200, WELL);
        clients.settle(standby.address());
        assert_eq!(database.sql(WHOLE), ["t"]);
        under_load(&standby, &mut clients, 1_000, || {});
        clients.settle(standby.address());
        assert_eq!(put(&standby, "the%20end", ""), 201);
        let last = watching.join().expect("the watch got every change");
        assert_eq!(database.sql("SELECT last FROM kvs.writer"), [last.to_string()]);
    });
    assert_eq!(database.sql(WHOLE), ["t"]);
    // Its state equals the log.
    standby.terminate();
    clients.settle(start(&url).address());
}

#[test]
fn standby_takes_over_from_paused_primary_and_fences_it() {
    let database = Database::start();
    let url = database.url();
    let paused = start(&url);
    let standby = stand_by(&url, &[]);
    let mut clients = Clients::new(&mut zoo::dice());
    under_load(&paused, &mut clients, 1_000, || {
        paused.signal(Signal::STOP);
        becomes_ready(&standby, 200, WELL);
        // Before the new primary has written: the previous entry matches, and only the epoch differs.
        paused.signal(Signal::CONT);
        paused.says(DEPOSED);
    });
    is_deposed(paused);
    clients.settle(standby.address());
    under_load(&standby, &mut clients, 500, || {});
    clients.settle(standby.address());
    assert_eq!(database.sql(WHOLE), ["t"]);
    standby.terminate();
    clients.settle(start(&url).address());
}

#[test]
fn deposed_primary_restarts_as_standby() {
    let database = Database::start();
    let url = database.url();
    let mut paused = Server::start(&["--txlog", &url, "--txlog-timeout", "1s", "--standby"]);
    let standby = stand_by(&url, &[]);
    assert_eq!(put(&paused, "a", "1"), 201);
    paused.signal(Signal::STOP);
    // It accepts this request when it resumes, and cannot write it.
    let mut lost = send(&paused, "PUT /v1/lost", "x");
    becomes_ready(&standby, 200, WELL);
    assert_eq!(put(&standby, "a", "2"), 201);
    paused.signal(Signal::CONT);
    paused.restarts_in_place();
    let answer = answer(&mut lost);
    assert!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
    becomes_ready(&paused, 200, STANDS_BY);
    shows(&paused, "a", 200, "2");
    assert_eq!(get_stale(&paused, "lost").0, 404);
    standby.terminate();
    becomes_ready(&paused, 200, WELL);
    assert_eq!((put(&paused, "a", "3"), get(&paused, "a")), (201, (200, "3".into())));
    assert_eq!(database.sql("SELECT last FROM kvs.writer"), ["3"]);
}

#[test]
fn resumed_primary_serves_no_stale_read() {
    let database = Database::start();
    let server = start(&database.url());
    let standby = stand_by(&database.url(), &[]);
    assert_eq!(put(&server, "a", "1"), 201);
    has_lease(&database);
    assert_eq!(get(&server, "a"), (200, "1".into()));
    server.signal(Signal::STOP);
    becomes_ready(&standby, 200, WELL);
    assert_eq!(put(&standby, "a", "2"), 201);
    // They arrive before it can detect the takeover.
    let mut reads: Vec<_> = (0..20).map(|_| send(&server, "GET /v1/a", "")).collect();
    server.signal(Signal::CONT);
    for read in &mut reads {
        let answer = answer(read);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 503 "), "{answer}");
    }
    is_deposed(server);
}

#[test]
fn disconnected_primary_with_standby_rejects_reads() {
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    let server = start(&database.url_at(proxy.port));
    assert_eq!(put(&server, "a", "1"), 201);
    // Without a standby, reads continue.
    proxy.set(Way::Reset);
    becomes_ready(&server, 200, AWAY);
    assert_eq!(get(&server, "a"), (200, "1".into()));
    proxy.set(Way::Open);
    becomes_ready(&server, 200, WELL);

    let standby = stand_by(&database.url(), &[]);
    has_lease(&database);
    proxy.set(Way::Reset);
    becomes_ready(&server, 503, "[-]log reads are refused");
    let refused = Connection::open(server.address()).ask("GET", "/v1/a", b"");
    refused.says(503, "another server may have taken the log over from this one: the database does not answer in time");
    assert_eq!(refused.header("retry-after"), Some("1"));
    let metrics = Connection::open(server.admin()).ask("GET", "/metrics", b"");
    assert!(metrics.text().contains("\nkvs_txlog_read_lease 0\n"), "{}", metrics.text());
    becomes_ready(&standby, 200, WELL);
    assert_eq!(put(&standby, "a", "2"), 201);
    proxy.set(Way::Open);
    is_deposed(server);
}

/// Another standby could take over from it meanwhile.
#[test]
fn new_primary_without_heartbeat_rejects_reads() {
    let database = Database::start();
    let server = start(&database.url());
    assert_eq!(put(&server, "a", "1"), 201);
    let standby = stand_by(&database.url(), &[]);
    // No statement of the next epoch is answered.
    database.sql(
        "CREATE FUNCTION hang() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF new.epoch > 1 AND new.epoch = old.epoch \
         THEN PERFORM pg_sleep(600); END IF; RETURN new; END $$",
    );
    database.sql("CREATE TRIGGER hang BEFORE UPDATE ON kvs.writer FOR EACH ROW EXECUTE FUNCTION hang()");
    server.kill();
    standby.says("promoted to primary");
    becomes_ready(&standby, 503, "[-]log reads are refused");
    let refused = Connection::open(standby.address()).ask("GET", "/v1/a", b"");
    refused.says(503, "another server may have taken the log over from this one: the database does not answer in time");
    database.sql("DROP TRIGGER hang ON kvs.writer");
    becomes_ready(&standby, 200, WELL);
    assert_eq!((get(&standby, "a"), put(&standby, "a", "2")), ((200, "1".into()), 201));
}

#[test]
fn primary_without_standby_needs_no_lease() {
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    let server = start(&database.url_at(proxy.port));
    let standby = stand_by(&database.url(), &[]);
    has_lease(&database);
    standby.terminate();
    database.becomes("SELECT lease IS NULL FROM kvs.writer", "t");
    assert_eq!(put(&server, "a", "1"), 201);
    proxy.set(Way::Reset);
    becomes_ready(&server, 200, AWAY);
    assert_eq!(get(&server, "a"), (200, "1".into()));
}

/// A server without `--standby` may take over from one that still serves reads.
#[test]
fn start_waits_for_end_of_lease() {
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    let server = start(&database.url_at(proxy.port));
    assert_eq!(put(&server, "a", "1"), 201);
    server.signal(Signal::STOP);
    database.sql("UPDATE kvs.writer SET lease = 3600000");
    proxy.reset();
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(["--txlog", &database.url()]);
    let _second = Process::spawn(command);
    let looks = "SELECT min(query_start) FROM pg_stat_activity WHERE query LIKE 'SELECT holder%'";
    database.becomes(&format!("SELECT ({looks}) IS NOT NULL"), "t");
    let begun = database.sql(looks).remove(0);
    database.becomes(&format!("SELECT ({looks}) > '{begun}'::timestamptz + interval '1 second'"), "t");
    assert_eq!(database.sql("SELECT epoch FROM kvs.writer"), ["1"]);
    database.sql("UPDATE kvs.writer SET lease = NULL");
    database.becomes("SELECT epoch FROM kvs.writer", "2");
    server.signal(Signal::CONT);
    is_deposed(server);
}

#[test]
fn idle_primary_detects_takeover() {
    let database = Database::start();
    let paused = start(&database.url());
    let standby = stand_by(&database.url(), &[]);
    paused.signal(Signal::STOP);
    becomes_ready(&standby, 200, WELL);
    paused.signal(Signal::CONT);
    is_deposed(paused);
}

#[test]
fn standby_does_not_preempt_live_primary() {
    let database = Database::start();
    let server = start(&database.url());
    let standby = stand_by(&database.url(), &[]);
    // The end of a lease is a matter of time.
    let begun = database.sql("SELECT clock_timestamp()").remove(0);
    database.becomes(&format!("SELECT seen - '{begun}' > interval '11 seconds' FROM kvs.writer"), "t");
    assert_eq!(put(&server, "a", "1"), 201);
    shows(&standby, "a", 200, "1");
    assert_eq!(database.sql("SELECT epoch FROM kvs.writer"), ["1"]);
}

#[test]
fn compaction_ahead_of_standby_loses_nothing() {
    let database = Database::start();
    let url = database.url();
    let mut server = start(&url);
    let standby = stand_by(&url, &[]);
    assert_eq!((put(&server, "gone", "1"), put(&server, "kept", "1")), (201, 201));
    for (round, deleted) in [("2", false), ("3", true)] {
        shows(&standby, "kept", 200, if deleted { "2" } else { "1" });
        let mut watching = Events::open(&standby, "/v1?watch", &STALE);
        standby.signal(Signal::STOP);
        assert_eq!((put(&server, "kept", "superseded"), put(&server, "kept", round)), (201, 201));
        if deleted {
            assert_eq!(Connection::open(server.address()).ask("DELETE", "/v1/gone", b"").status, 200);
        }
        server.terminate();
        let compacted = kvs().args(["txlog", "compact", "--txlog", &url]).output().expect("the binary can be started");
        assert!(compacted.status.success(), "{}", String::from_utf8_lossy(&compacted.stderr));
        server = start(&url);
        assert_eq!(put(&server, "more", round), 201);
        standby.signal(Signal::CONT);
        shows(&standby, "more", 200, round);
        assert_eq!(get_stale(&standby, "kept"), (200, round.into()));
        assert_eq!(get_stale(&standby, "gone").0, if deleted { 404 } else { 200 });
        // A watch that would miss a change ends without an event, and gets the reason when it resumes.
        assert!(watching.next().is_none(), "it would miss what was superseded");
        assert_eq!(Connection::open(standby.address()).ask_with("GET", "/v1?watch&since=2", &STALE, b"").status, 410);
    }
    // It applies the last entries of the former primary at the next poll.
    standby.signal(Signal::STOP);
    assert_eq!(put(&server, "more", "4"), 201);
    server.terminate();
    standby.signal(Signal::CONT);
    becomes_ready(&standby, 200, WELL);
    assert_eq!(get_stale(&standby, "more"), (200, "4".into()));
    assert_eq!((put(&standby, "gone", "again"), get_stale(&standby, "kept")), (201, (200, "3".into())));
    assert!(ready(&standby).1.starts_with(WELL));
}
