//! Checks at the start: unusable databases, TLS, and settings that weaken durability.

use std::time::{Duration, Instant};

use crate::support::certificates::{Authority, Kind};
use crate::support::postgres::database::Database;
use crate::support::postgres::pooler::Pooler;
use crate::support::postgres::proxy::{Proxy, Way};
use crate::support::postgres::start;
use crate::support::readiness::{AWAY, WELL, becomes_ready, ready};
use crate::support::requests::{get, put};
use crate::support::server::{Server, serve_refused};

#[test]
fn unusable_database_is_one_line_without_password() {
    let mut database = Database::start();
    let url = database.url();
    let secret = |rest: &str| {
        format!("postgres://postgres:secret@127.0.0.1:{}", rest.replace("PORT", &database.port().to_string()))
    };
    let refused = |url: &str, expected: &[&str]| {
        let refused = serve_refused(&["--txlog", url, "--txlog-timeout", "1s"]);
        refused.with(1, expected);
        assert!(!refused.line.contains("secret"), "{refused}");
    };
    refused(
        &secret("PORT/postgres?sslmode=disable"),
        &["password authentication failed for user \"postgres\"", "28P01"],
    );
    refused(&secret("1/postgres?sslmode=disable"), &["127.0.0.1:1", "refused"]);
    refused(&secret("PORT/postgres"), &["does not support TLS", "sslmode=disable"]);
    refused(&secret("PORT/postgres?colour=red"), &["URL of the log", "colour"]);
    refused(&secret("PORT/postgres?sslmode=never"), &["sslmode must be disable, prefer"]);
    refused("postgres://postgres@127.0.0.1?passfile=/nowhere", &["cannot read the password file /nowhere"]);
    refused("postgress://postgres:secret@localhost/postgres", &["--txlog must be `file` or postgres://"]);
    refused(&url.replace("/postgres?", "/nothere?"), &["database \"nothere\" does not exist"]);

    database.sql("CREATE ROLE weak LOGIN PASSWORD 'p:a%s+s wörd'");
    refused(&url.replace("//postgres@", "//weak@"), &["the schema kvs cannot be made", "permission denied"]);
    database.sql("CREATE DATABASE latin ENCODING 'SQL_ASCII' TEMPLATE template0");
    refused(&url.replace("/postgres?", "/latin?"), &["its encoding is SQL_ASCII"]);
    database.sql("CREATE SCHEMA kvs; CREATE TABLE kvs.transactions (colour text)");
    refused(&url, &["the schema kvs cannot be made", "\"transactions\" already exists"]);
    database.sql("DROP SCHEMA kvs CASCADE");

    let server = start(&url);
    assert_eq!((put(&server, "a", "1"), put(&server, "b", "2")), (201, 201));
    server.terminate();
    database.sql("INSERT INTO kvs.migrations VALUES (7)");
    refused(&url, &["its schema kvs is of version 7", "knows versions up to 5", "or a newer one"]);
    database.sql(
        "DELETE FROM kvs.migrations WHERE version = 7; ALTER TABLE kvs.transactions RENAME COLUMN expires TO ends",
    );
    refused(&url, &["the tables in the schema kvs have an unexpected shape", "\"expires\""]);
    database.sql("ALTER TABLE kvs.transactions RENAME COLUMN ends TO expires");
    database.sql("INSERT INTO kvs.transactions VALUES (3, 0, 1, 'c')");
    refused(&url, &["kvs.transactions contains sequence 3", "last one in kvs.writer is 2"]);
    database.sql(
        "DELETE FROM kvs.transactions WHERE sequence = 3; UPDATE kvs.transactions SET key = '\\xff' WHERE sequence = 2",
    );
    refused(&url, &["sequence 2 is corrupted: its key is not UTF-8"]);
    database.sql("UPDATE kvs.transactions SET key = 'b', metadata = '{}' WHERE sequence = 2");
    refused(&url, &["sequence 2 is corrupted: its metadata"]);
    database.sql("UPDATE kvs.transactions SET metadata = NULL");
    database.kill();
    refused(&url, &["127.0.0.1", "refused"]);
}

/// The server counts the time of a statement until its last row, and the replay reads slowly.
#[test]
fn replay_longer_than_timeout_is_served() {
    let database = Database::start();
    let server = start(&database.url());
    // More than the buffers between the database and kvs hold.
    let value = "x".repeat(512 << 10);
    for number in 0..64 {
        assert_eq!(put(&server, &number.to_string(), &value), 201);
    }
    server.terminate();
    let proxy = Proxy::to(database.port());
    // Of a response of 64 KiB, so that no wait for a row comes near the timeout.
    proxy.set(Way::Slow(Duration::from_millis(10)));
    let begun = Instant::now();
    let server = start(&database.url_at(proxy.port));
    assert!(begun.elapsed() > Duration::from_secs(2), "the replay is not longer than the timeout");
    proxy.set(Way::Open);
    assert_eq!(get(&server, "63"), (200, value));
    becomes_ready(&server, 200, WELL);
    server.terminate();
}

#[test]
fn sslmode_selects_verification() {
    let database = Database::start();
    let (authority, other) = (Authority::new(), Authority::named("somebody else"));
    database.serve_tls(&authority.issue("database", Kind::Server, 1));
    let url = |tls: &str| database.url().replace("sslmode=disable", tls);
    let trusting = |tls: &str, authority: &Authority| url(&format!("{tls}sslrootcert={}", authority.file()));
    // The same machine under a name that is not in the certificate.
    let named = |url: String| url.replace("@127.0.0.1:", "@elsewhere.example:") + "&hostaddr=127.0.0.1";
    for (number, good) in [
        trusting("", &authority),
        trusting("sslmode=verify-full&", &authority),
        named(trusting("sslmode=verify-ca&", &authority)),
        named(url("sslmode=require")),
        url("sslmode=prefer"),
    ]
    .iter()
    .enumerate()
    {
        let server = Server::start(&["--txlog", good]);
        assert_eq!(put(&server, "a", &number.to_string()), 201, "{good}");
        assert_eq!(
            database.sql(
                "SELECT count(*) > 0 FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE ssl AND \
             application_name = 'kvs'"
            ),
            ["t"],
            "{good}"
        );
        server.terminate();
    }
    for (bad, expected) in [
        (url(""), "certificate"),
        (trusting("", &other), "certificate"),
        (trusting("sslmode=verify-ca&", &other), "certificate"),
        (named(trusting("", &authority)), "not valid for name"),
        (trusting("sslcert=/nowhere&", &authority), "sslcert and sslkey must be given together"),
        (url("sslrootcert=/nowhere"), "from /nowhere"),
    ] {
        serve_refused(&["--txlog", &bad, "--txlog-timeout", "2s"]).with(1, &["cannot open the log", expected]);
    }
    // With `prefer`, a server without TLS is accepted.
    let plain = Database::start();
    let server = start(&plain.url().replace("sslmode=disable", "sslmode=prefer"));
    assert_eq!((put(&server, "a", "1"), get(&server, "a")), (201, (200, "1".into())));
}

#[test]
fn client_certificate_is_presented() {
    let database = Database::start();
    let authority = Authority::new();
    database.serve_tls(&authority.issue("database", Kind::Server, 1));
    database.sql("CREATE ROLE keyholder LOGIN; GRANT CREATE ON DATABASE postgres TO keyholder");
    database.asks_for_certificates("keyholder", &authority.file());
    let (own, another) =
        (authority.issue("keyholder", Kind::Client, 2), authority.issue("somebody else", Kind::Client, 3));
    let url = |certificate: &str, key: &str| {
        let tls = format!("sslrootcert={}&sslcert={certificate}&sslkey={key}", authority.file());
        database.url().replace("//postgres@", "//keyholder@").replace("sslmode=disable", &tls)
    };
    let server = start(&url(&own.certificate, &own.key));
    assert_eq!((put(&server, "a", "1"), get(&server, "a")), (201, (200, "1".into())));
    assert_eq!(
        database.sql("SELECT DISTINCT usename FROM pg_stat_activity WHERE application_name = 'kvs'"),
        ["keyholder"]
    );
    server.terminate();
    let without = database.url().replace("//postgres@", "//keyholder@");
    let without = without.replace("sslmode=disable", &format!("sslrootcert={}", authority.file()));
    for (bad, expected) in [
        (without, "connection requires a valid client certificate"),
        (url(&another.certificate, &another.key), "certificate authentication failed for user \"keyholder\""),
        (url(&own.certificate, &another.key), "sslcert and sslkey do not match"),
        (url(&own.certificate, "/nowhere"), "cannot read sslkey from /nowhere"),
    ] {
        serve_refused(&["--txlog", &bad, "--txlog-timeout", "2s"]).with(1, &["cannot open the log", expected]);
    }
}

#[test]
fn weak_durability_of_database_is_reported() {
    let database = Database::start();
    database.sql("ALTER SYSTEM SET fsync = off");
    database.sql("ALTER ROLE postgres SET synchronous_commit = off; SELECT pg_reload_conf()");
    database.becomes("SHOW fsync", "off");
    for durability in ["sync", "os"] {
        let server = Server::start(&["--txlog", &database.url(), "--durability", durability]);
        server.says("WARN fsync is off");
        let (status, report) = ready(&server);
        // kvs sets it in any case.
        assert!(report.contains("[+]log ok, but fsync is off: ") && !report.contains("synchronous_commit"), "{report}");
        assert_eq!(status, 200);
        server.terminate();
    }
}

#[test]
fn later_change_of_condition_is_reported() {
    let database = Database::start();
    let server = start(&database.url());
    assert_eq!(put(&server, "a", "1"), 201);
    for name in ["fsync", "full_page_writes"] {
        becomes_ready(&server, 200, WELL);
        database.configure(name, "off");
        becomes_ready(&server, 200, &format!("[+]log ok, but {name} is off: a power cut"));
        server.says(&format!("WARN {name} is off"));
        database.configure(name, "on");
    }
    becomes_ready(&server, 200, WELL);
    // A failover to standbys that commits no longer wait for loses acknowledged writes.
    database.configure("synchronous_standby_names", "nobody");
    database.waits_for_standby();
    database.configure("synchronous_standby_names", "");
    becomes_ready(&server, 200, "[+]log ok, but synchronous_standby_names is empty now: a failover");
}

#[test]
fn later_change_of_synchronous_commit_loses_nothing() {
    let mut database = Database::start();
    let server = start(&database.url());
    assert_eq!(put(&server, "a", "0"), 201);
    // Asynchronous commits are written after this delay.
    database.configure("wal_writer_delay", "10s");
    database.configure("synchronous_commit", "off");
    for _ in 0..20 {
        assert_eq!(put(&server, "a", "1"), 201);
    }
    database.kill();
    database.start_again();
    becomes_ready(&server, 200, WELL);
    assert_eq!(put(&server, "a", "2"), 201);
    assert_eq!(database.sql("SELECT count(*) FROM kvs.transactions"), ["22"]);
}

#[test]
fn start_waits_for_slow_database() {
    let database = Database::start();
    let proxy = Proxy::to(database.port());
    proxy.set(Way::Slow(Duration::from_millis(120)));
    let server = Server::start(&["--txlog", &database.url_at(proxy.port), "--txlog-timeout", "100ms"]);
    becomes_ready(&server, 200, AWAY);
    proxy.set(Way::Open);
    becomes_ready(&server, 200, WELL);
}

#[test]
fn table_that_a_crash_empties_is_refused() {
    const UNLOGGED: &str = "it keeps these tables of the schema kvs UNLOGGED: transactions, ";
    let mut database = Database::start();
    let server = start(&database.url());
    assert_eq!(put(&server, "a", "1"), 201);
    database.sql("ALTER TABLE kvs.transactions SET UNLOGGED");
    becomes_ready(&server, 200, UNLOGGED);
    assert_eq!((put(&server, "a", "2"), get(&server, "a")), (503, (200, "1".into())));
    database.sql("ALTER TABLE kvs.transactions SET LOGGED");
    becomes_ready(&server, 200, WELL);
    assert_eq!(put(&server, "a", "2"), 201);
    server.terminate();
    database.sql("ALTER TABLE kvs.transactions SET UNLOGGED");
    serve_refused(&["--txlog", &database.url()]).with(1, &[UNLOGGED, "SET LOGGED"]);
    database.kill();
    database.start_again();
    database.sql("ALTER TABLE kvs.transactions SET LOGGED");
    serve_refused(&["--txlog", &database.url()]).with(1, &["kvs.transactions lacks the row of sequence 2,"]);
}

#[test]
fn truncated_table_is_refused() {
    let database = Database::start();
    let server = start(&database.url());
    for n in 0..3 {
        assert_eq!(put(&server, "a", &n.to_string()), 201);
    }
    database.sql("TRUNCATE kvs.transactions");
    // More was written since.
    assert_eq!(put(&server, "b", "1"), 201);
    server.terminate();
    let refused = || serve_refused(&["--txlog", &database.url()]);
    refused().with(1, &["kvs.transactions lacks the row of sequence 3,", "or the table was truncated"]);
    database.sql("TRUNCATE kvs.transactions");
    refused().with(1, &["kvs.transactions lacks the row of sequence 4,"]);
    // The way to go on with what is left.
    database.sql("UPDATE kvs.writer SET compacted = last, forgotten = last");
    let server = start(&database.url());
    assert_eq!((get(&server, "a").0, put(&server, "a", "5")), (404, 201));
}

#[test]
fn read_only_database_is_rejected_at_start() {
    let database = Database::start();
    let standby = database.replicate();
    serve_refused(&["--txlog", &standby.url()]).with(1, &["it is a standby of another database, and read-only"]);
    database.sql("ALTER ROLE postgres SET default_transaction_read_only = on");
    serve_refused(&["--txlog", &database.url()]).with(1, &["it is read-only: default_transaction_read_only is on"]);
}

#[test]
fn transaction_pooler_is_rejected() {
    let database = Database::start();
    for mode in ["transaction", "statement"] {
        let pooler = Pooler::start(&database, mode);
        let refused = serve_refused(&["--txlog", &pooler.url(), "--txlog-timeout", "5s"]);
        refused.with(1, &[if mode == "statement" { "pool" } else { "pool_mode = session" }]);
    }
    let mut pooler = Pooler::start(&database, "session");
    let server = start(&pooler.url());
    assert_eq!((put(&server, "a", "1"), get(&server, "a")), (201, (200, "1".into())));
    // It is configured otherwise while it is used.
    pooler.restart("transaction");
    becomes_ready(
        &server,
        200,
        &format!("rejecting writes: {} is a connection pooler, such as PgBouncer", pooler.address()),
    );
    assert_eq!((put(&server, "a", "2"), get(&server, "a")), (503, (200, "1".into())));
    pooler.restart("session");
    becomes_ready(&server, 200, WELL);
    assert_eq!(put(&server, "a", "2"), 201);
}
