//! Backups of a log in a database: restored into files, and back.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::process::Signal;

use crate::support::backup::{done, restore, restored, take, temporary};
use crate::support::metrics::counts;
use crate::support::postgres::database::Database;
use crate::support::postgres::start;
use crate::support::requests::{get, put};
use crate::support::server::{Server, refused};
use crate::support::wire::Connection;

#[test]
fn backup_moves_log_between_database_and_files() {
    let database = Database::start();
    let url = database.url();
    let server = start(&url);
    let mut client = Connection::open(server.address());
    for n in 0..30 {
        client.ask("PUT", &format!("/v1/key-{}", n % 10), format!("{n}").as_bytes());
    }
    client.ask("PUT", "/v1/typed?ttl=1000", b"\xff");
    assert_eq!(client.ask("DELETE", "/v1/key-3", b"").status, 200);
    let files = temporary();
    let [first, second, third] = ["first", "second", "third"].map(|name| files.path().join(name));
    assert_eq!(take(&server, &first, &[]), 32);
    assert_eq!((put(&server, "key-4", "later"), take(&server, &second, &["--since", "32"])), (201, 33));
    server.terminate();

    let in_files = restored(&[first.clone(), second], &[]);
    assert_eq!((get(&in_files, "key-4"), get(&in_files, "key-3").0), ((200, "later".into()), 404));
    let next = Connection::open(in_files.address()).ask("PUT", "/v1/new", b"").etag().expect("it is written");
    assert!(next > 1 << 40, "{next}");
    assert_eq!(take(&in_files, &third, &[]), next);

    database.sql("CREATE DATABASE other");
    let other = url.replace("/postgres?", "/other?");
    // Of the current schema, and of one that a server would migrate.
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../host/txlog/testdata/format-1/postgres.sql");
    let older = database.create("older");
    database.load("older", &fs::read(fixture).expect("it is in the tree"));
    for (name, url) in [("postgres", &url), ("older", &older)] {
        let state = || {
            let shape = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'kvs' ORDER BY 1, 2";
            let tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'kvs' ORDER BY 1";
            let rows = database.sql_in(name, tables);
            let rows = rows.iter().map(|table| database.sql_in(name, &format!("SELECT * FROM kvs.{table} ORDER BY 1")));
            (database.sql_in(name, shape), rows.collect::<Vec<_>>())
        };
        let untouched = state();
        refused(restore(std::slice::from_ref(&first), &["--txlog", url]))
            .with(1, &["there is a log in it already", "--txlog"]);
        assert_eq!(state(), untouched, "{name}");
    }
    done(restore(&[third], &["--txlog", &other]));
    let server = start(&other);
    assert_eq!(
        (get(&server, "key-4"), get(&server, "new"), get(&server, "key-3").0),
        ((200, "later".into()), (200, String::new()), 404)
    );
    let typed = Connection::open(server.address()).ask("GET", "/v1/typed", b"");
    assert_eq!((typed.status, typed.body), (200, b"\xff".to_vec()));
    let mut client = Connection::open(server.address());
    // Tags of the common history hold, those of the lost future do not.
    assert_eq!(client.ask_with("PUT", "/v1/new", &[("if-match", &format!("\"{}\"", next + 1))], b"").status, 412);
    let written = client.ask_with("PUT", "/v1/new", &[("if-match", &format!("\"{next}\""))], b"1");
    assert!(written.etag().is_some_and(|etag| etag > next + (1 << 40)));
    let server = server.terminate().restart(&["--txlog", &other, "--txlog-timeout", "1s"]);
    assert_eq!(get(&server, "new"), (200, "1".into()));
}

#[test]
fn read_only_server_has_writes_before_it_in_backup() {
    let database = Database::start();
    let server = Server::start(&["--txlog", &database.url(), "--txlog-timeout", "60s", "--request-timeout", "60s"]);
    assert_eq!(put(&server, "a", "1"), 201);
    database.signal(Signal::STOP);
    let continued = AtomicBool::new(false);
    thread::scope(|scope| {
        let write = scope.spawn(|| put(&server, "a", "2"));
        counts(&server, "kvs_txlog_unsynced_entries", 1.0);
        let on = scope.spawn(|| {
            let answer = Connection::open(server.admin()).ask("PUT", "/read-only", b"");
            (answer.status, continued.load(Ordering::Relaxed))
        });
        counts(&server, "kvs_read_only", 1.0);
        // An answer that waits for nothing takes less than all these.
        (0..100).for_each(|_| Connection::open(server.admin()).ask("GET", "/read-only", b"").says(200, "on"));
        continued.store(true, Ordering::Relaxed);
        database.signal(Signal::CONT);
        assert_eq!(on.join().expect("it is answered"), (200, true), "status, and whether the write could be durable");
        assert_eq!(write.join().expect("it is answered"), 201);
    });
    assert_eq!(take(&server, &temporary().path().join("full"), &[]), 2);
}
