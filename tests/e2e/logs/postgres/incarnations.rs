//! Incarnations of a log in a database: which starts begin one, and that no sequence is assigned twice and no entry missed.

use std::path::Path;
use std::sync::Arc;

use kvs_txlog::change_feed::{ChangeFeed, PositionError};
use kvs_txlog::postgres::{Existing, PostgresLog, Url};
use kvs_txlog::{Event, TransactionLog};
use rustix::process::Signal;

use crate::support::events::Events;
use crate::support::postgres::database::Database;
use crate::support::postgres::{stand_by, start};
use crate::support::readiness::{UP_TO_DATE, WELL, becomes_ready, ready};
use crate::support::requests::{get, put};
use crate::support::server::{PATIENCE, Server, refused};
use crate::support::txlog::{done, log};
use crate::support::wire::{Connection, Response, STALE};

/// More entries than any lost future has.
const JUMP: u64 = 1 << 40;
const COUNT: &str = "SELECT count(*) FROM kvs.incarnations";
const BEGINS: &str = "beginning incarnation";

fn ask(server: &Server, method: &str, path: &str, header: (&str, &str)) -> Response {
    Connection::open(server.address()).ask_with(method, path, &[header], b"x")
}

/// Puts a key, and returns its entity tag.
fn tag(server: &Server, key: &str) -> u64 {
    let stored = Connection::open(server.address()).ask("PUT", &format!("/v1/{key}"), b"x");
    assert!(matches!(stored.status, 200 | 201 | 204), "{stored:?}");
    stored.etag().expect("it has a tag")
}

fn start_os(url: &str) -> Server {
    Server::start(&["--txlog", url, "--txlog-timeout", "1s", "--durability", "os"])
}

#[track_caller]
fn sees(events: &mut Events, sequences: &[u64]) {
    for sequence in sequences {
        assert_eq!(events.next().expect("the watch continues").id, *sequence);
    }
}

#[test]
fn restored_dump_begins_incarnation() {
    let database = Database::start();
    let server = start(&database.url());
    assert_eq!([tag(&server, "a"), tag(&server, "b"), tag(&server, "a")], [1, 2, 3]);
    // Dump of a running server.
    let dump = database.dump();
    assert_eq!([tag(&server, "a"), tag(&server, "b")], [4, 5]);
    server.terminate();

    let mut firsts = Vec::new();
    for name in ["restored", "again"] {
        let url = database.create(name);
        database.load(name, &dump);
        let server = start(&url);
        server.says(BEGINS);
        assert_eq!(get(&server, "a"), (200, "x".into()));
        // The lost tags and positions, before anything is written and after.
        let lost = |server: &Server| {
            assert_eq!(ask(server, "PUT", "/v1/a", ("if-match", "\"4\"")).status, 412);
            assert_eq!(ask(server, "GET", "/v1/b", ("if-none-match", "\"5\"")).status, 200);
            assert_eq!(ask(server, "GET", "/v1?watch&since=4", ("accept", "*/*")).status, 410);
        };
        lost(&server);
        let mut before = Events::open(&server, "/v1?watch&since=3", &[]);
        let mut newest = Events::open(&server, "/v1?watch", &[]);
        assert_eq!(newest.begin, 3);
        let first = tag(&server, "a");
        assert!(first > 5 + JUMP / 2, "{first}");
        assert_eq!(tag(&server, "b"), first + 1);
        lost(&server);
        sees(&mut before, &[first, first + 1]);
        sees(&mut newest, &[first, first + 1]);
        sees(&mut Events::open(&server, "/v1?watch&since=1", &[]), &[2, 3, first, first + 1]);
        server.terminate();
        // A clean restart begins none.
        let server = start(&url);
        assert_eq!(tag(&server, "a"), first + 2);
        sees(&mut Events::open(&server, "/v1?watch&since=0", &[]), &[1, 2, 3, first, first + 1, first + 2]);
        assert_eq!(database.sql_in(name, COUNT), ["1"]);
        server.terminate();
        assert_eq!(
            done(&["verify", "--txlog", &url]).0,
            format!("schema kvs: version 5\nthe log is sound: 6 entries, newest sequence {}\n", first + 2)
        );
        firsts.push(first);
    }
    assert!(firsts[0].abs_diff(firsts[1]) > 1_000, "two restores of one dump differ: {firsts:?}");
    let parents = ["restored", "again"].map(|name| database.sql_in(name, "SELECT parent FROM kvs.incarnations"));
    assert_eq!(parents[0], parents[1], "both continue the log that was dumped");

    // The original continues as before.
    let server = start(&database.url());
    assert_eq!(tag(&server, "a"), 6);
    assert_eq!(database.sql(COUNT), ["0"]);
}

#[test]
fn dump_restored_in_place_begins_incarnation() {
    let database = Database::start();
    let server = start(&database.url());
    assert_eq!(tag(&server, "a"), 1);
    let dump = database.dump();
    assert_eq!(tag(&server, "a"), 2);
    server.terminate();
    database.sql("DROP SCHEMA kvs CASCADE");
    database.load("postgres", &dump);
    let server = start(&database.url());
    let line = server.says(BEGINS);
    assert!(line.contains("the table kvs.writer differs from"), "{line}");
    assert!(tag(&server, "a") > JUMP);
    assert_eq!(ask(&server, "GET", "/v1?watch&since=2", ("accept", "*/*")).status, 410);
}

#[test]
fn database_on_new_timeline_begins_incarnation() {
    let mut database = Database::start();
    let server = start(&database.url());
    assert_eq!(tag(&server, "a"), 1);
    server.terminate();
    // A crash recovery stays on its timeline.
    database.kill();
    database.start_again();
    let server = start(&database.url());
    assert_eq!(tag(&server, "a"), 2);
    server.terminate();
    database.recover();
    let server = start(&database.url());
    let line = server.says(BEGINS);
    assert!(line.contains("the timeline differs from"), "{line}");
    assert!(tag(&server, "a") > JUMP);
    assert_eq!(database.sql(COUNT), ["1"]);
}

#[test]
fn location_is_compared_as_far_as_readable() {
    let database = Database::start();
    database.sql(
        "CREATE ROLE weak LOGIN PASSWORD 'p:a%s+s wörd'; GRANT CREATE ON DATABASE postgres TO weak; \
         REVOKE EXECUTE ON FUNCTION pg_control_system FROM PUBLIC; REVOKE EXECUTE ON FUNCTION pg_walfile_name FROM PUBLIC",
    );
    let weak = |url: &str| url.replace("//postgres@", "//weak@");
    let server = start(&weak(&database.url()));
    assert_eq!(tag(&server, "a"), 1);
    server.terminate();
    let known =
        "SELECT system IS NULL, database IS NULL, relation IS NULL, timeline IS NULL, durable FROM kvs.identity";
    assert_eq!(database.sql(known), ["t|f|f|t|t"]);
    // A copy is detected by known properties, and a property that becomes known begins no incarnation.
    database.sql("CREATE DATABASE copied TEMPLATE postgres");
    let copy = database.url().replace("/postgres?", "/copied?");
    for (url, name, known_now, count) in [
        (weak(&copy), "copied", "t|f|f|t|t", "1"),
        (copy, "copied", "f|f|f|f|t", "1"),
        (database.url(), "postgres", "f|f|f|f|t", "0"),
        (weak(&database.url()), "postgres", "f|f|f|f|t", "0"),
    ] {
        let server = start(&url);
        put(&server, "a", "y");
        server.terminate();
        assert_eq!(database.sql_in(name, known), [known_now], "{name}");
        assert_eq!(database.sql_in(name, COUNT), [count], "{name}");
    }
}

#[test]
fn unclean_end_begins_incarnation_where_commits_may_be_lost() {
    let database = Database::start();
    let url = database.url();
    let server = start(&url);
    assert_eq!(tag(&server, "a"), 1);
    server.kill();
    // Its commits were durable, and so are those of the next, which ends cleanly.
    let server = start(&url);
    assert_eq!(tag(&server, "a"), 2);
    server.terminate();
    let server = start_os(&url);
    assert_eq!(tag(&server, "a"), 3);
    server.terminate();
    let server = start_os(&url);
    assert_eq!(tag(&server, "a"), 4);
    assert_eq!(database.sql(COUNT), ["0"]);
    server.kill();
    // The next writer, with durable commits too.
    let server = start(&url);
    let line = server.says(BEGINS);
    assert!(line.contains("its primary did not close it") && line.contains("follows on 4"), "{line}");
    let mut watch = Events::open(&server, "/v1?watch&since=3", &[]);
    let first = tag(&server, "a");
    assert!(first > JUMP);
    sees(&mut watch, &[4, first]);
    server.kill();
    assert_eq!(tag(&start(&url), "a"), first + 1);
    assert_eq!(database.sql(COUNT), ["1"]);

    for count in ["2", "3"] {
        // The run before was killed.
        let server = start_os(&url);
        server.says(BEGINS);
        assert_eq!(database.sql(COUNT), [count]);
        server.kill();
    }
    database.sql("ALTER SYSTEM SET fsync = off");
    database.sql("SELECT pg_reload_conf()");
    database.becomes("SHOW fsync", "off");
    let server = start(&url);
    server.says("fsync is off");
    server.terminate();
    assert_eq!(database.sql(COUNT), ["4"]);
    // Without an entry in between, each jump is from where the last one ended.
    let jumps = format!("SELECT bool_and(first - fork >= {JUMP}), count(DISTINCT fork) FROM kvs.incarnations");
    assert_eq!(database.sql(&jumps), ["t|4"]);
    let newest: u64 = database.sql("SELECT max(first) FROM kvs.incarnations")[0].parse().expect("a number");
    let server = start(&url);
    assert_eq!(tag(&server, "a"), newest);
    sees(&mut Events::open(&server, "/v1?watch&since=4", &[]), &[first, first + 1, newest]);
}

#[test]
fn standbys_follow_incarnation_without_gap() {
    let database = Database::start();
    let url = database.url();
    let server = start_os(&url);
    assert_eq!([tag(&server, "a"), tag(&server, "b")], [1, 2]);
    let standbys = [stand_by(&url, &["--durability", "os"]), stand_by(&url, &["--durability", "os"])];
    let mut watches = standbys.each_ref().map(|standby| Events::open(standby, "/v1?watch", &STALE));
    assert_eq!(tag(&server, "a"), 3);
    watches.iter_mut().for_each(|watch| sees(watch, &[3]));
    server.signal(Signal::KILL);
    server.ends();
    // One of them takes over, and the other follows it.
    let begun = std::time::Instant::now();
    let primary = loop {
        let well = standbys.iter().position(|standby| ready(standby).1.contains(WELL));
        if let Some(index) = well {
            break index;
        }
        assert!(begun.elapsed() < PATIENCE, "none takes over");
    };
    let [primary, standby] = [&standbys[primary], &standbys[1 - primary]];
    primary.says(BEGINS);
    assert_eq!(database.sql("SELECT epoch FROM kvs.writer"), ["2"], "one takes over, once");
    // Nothing is missing while the incarnation has no entry.
    becomes_ready(standby, 200, UP_TO_DATE);
    let first = tag(primary, "b");
    assert!(first > JUMP);
    assert_eq!(tag(primary, "a"), first + 1);
    watches.iter_mut().for_each(|watch| sees(watch, &[first, first + 1]));
    becomes_ready(standby, 200, UP_TO_DATE);
    assert_eq!(database.sql("SELECT epoch FROM kvs.writer"), ["2"]);
    for server in [primary, standby] {
        sees(&mut Events::open(server, "/v1?watch&since=2", &STALE), &[3, first, first + 1]);
        assert_eq!(ask(server, "GET", "/v1?watch&since=4", STALE[0]).status, 410);
        let metrics = Connection::open(server.admin()).ask("GET", "/metrics", b"");
        assert!(metrics.text().contains("\nkvs_txlog_replication_lag_entries 0\n"), "{}", metrics.text());
    }
}

#[test]
fn fork_begins_incarnation_at_rest() {
    let database = Database::start();
    let url = database.url();
    let server = start(&url);
    assert_eq!(tag(&server, "a"), 1);
    server.terminate();

    let at_rest = || PostgresLog::at_rest(&Url::from(url.as_str()), Existing::Required).expect("it is at rest");
    let forked = at_rest();
    let [one, two] = [forked.fork(), forked.fork()].map(|begun| begun.expect("it can be forked"));
    assert_eq!(one.fork, 1);
    assert_eq!(two.fork, one.first - 1);
    assert_eq!(two.parent, one.id);
    assert_eq!(forked.history().incarnations(), [one, two]);
    assert_eq!(forked.append(0, &[Event::Delete("a".into())]).expect("it is taken"), two.first);
    forked.close().expect("it is written");

    let feed = ChangeFeed::new(Arc::new(at_rest()), 1_000, kvs_runtime::Env::real());
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime can be made");
    let position = |sequence: u64| runtime.block_on(feed.position(&sequence.to_string()));
    for known in [0, 1, two.first] {
        assert_eq!(position(known), Ok(known));
    }
    for lost in [2, one.first, two.first - 1, two.first + 1] {
        assert_eq!(position(lost), Err(PositionError::Unknown(lost)));
    }
    feed.close().expect("it is closed");

    // Its export can be imported into another log.
    let text = done(&["export", "--txlog", &url]).0;
    assert_eq!(text.lines().count(), 2);
    let server = start(&url);
    assert_eq!(tag(&server, "a"), two.first + 1);
    assert_eq!(database.sql(COUNT), ["2"]);
    server.terminate();
    assert!(done(&["compact", "--txlog", &url]).1.ends_with("compacted: 1 entries remain\n"));
    // A row restored into the gap is not an entry.
    database.sql("INSERT INTO kvs.transactions (sequence, time, event_type, key) VALUES (2, 0, 1, 'lost')");
    let verify = log(&["verify", "--txlog", &url]);
    refused(verify).with(1, &["contains sequence 2, which is in no incarnation of the log"]);
}

#[test]
fn older_version_cannot_take_over() {
    let database = Database::start();
    let server = start(&database.url());
    assert_eq!(tag(&server, "a"), 1);
    // As a standby of schema version 2 that was started before the migration.
    database.sql(
        "DO $$ BEGIN UPDATE kvs.writer SET epoch = epoch + 1; RAISE 'it was taken'; \
         EXCEPTION WHEN check_violation THEN NULL; END $$",
    );
    assert_eq!(tag(&server, "a"), 2);
}

#[test]
fn earlier_formats_are_migrated() {
    let database = Database::start();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../host/txlog/testdata/format-1");
    let read = |name: String| std::fs::read_to_string(fixtures.join(name)).expect("it is in the tree");
    // Version 2 without its migration, which dropped this index, is version 1.
    let older = "DELETE FROM kvs.migrations WHERE version = 2; \
        CREATE INDEX transactions_key ON kvs.transactions (substr(sha256(key), 1, 16), sequence);";
    for (name, fixture, before, version) in
        [("plain", "postgres", "", 2), ("compacted", "postgres-compacted", "", 2), ("oldest", "postgres", older, 1)]
    {
        let url = database.create(name);
        database.load(name, read(format!("{fixture}.sql")).as_bytes());
        database.load(name, before.as_bytes());
        let recorded = read(format!("{fixture}.export.tsv"));
        let sound = read(format!("{fixture}.verify.txt"));
        let verified = format!("schema kvs: version 5, migrated from version {version}\n{sound}");
        assert_eq!(done(&["verify", "--txlog", &url]).0, verified, "{name}");
        assert_eq!(done(&["export", "--txlog", &url]).0, recorded, "{name}");
        assert_eq!(database.sql_in(name, "SELECT max(version) FROM kvs.migrations"), ["5"]);
        assert_eq!(database.sql_in(name, "SELECT to_regclass('kvs.transactions_key') IS NULL"), ["t"]);
        let newest: u64 = database.sql_in(name, "SELECT last FROM kvs.writer")[0].parse().expect("a number");
        let server = start(&url);
        let stored = tag(&server, "written%20on");
        // Expired keys were deleted before.
        assert!((newest + 1..newest + 10).contains(&stored), "{stored} after {newest}");
        assert_eq!(get(&server, "empty%20value"), (200, String::new()));
        server.terminate();
        let server = start(&url);
        assert_eq!(get(&server, "written%20on"), (200, "x".into()));
        assert!(tag(&server, "once%20more") > stored);
        server.terminate();
        assert!(done(&["export", "--txlog", &url]).0.starts_with(&recorded), "{name}");
        assert_eq!(database.sql_in(name, COUNT), ["0"]);
    }
}
