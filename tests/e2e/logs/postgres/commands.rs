//! `kvs txlog` for a log in a database: verify, print, export to files and back, compact, import the table of the book.

use tempfile::TempDir;

use crate::support::postgres::database::Database;
use crate::support::postgres::start;
use crate::support::requests::{get, put};
use crate::support::server::{Server, refused, serve};
use crate::support::txlog::{done, log};
use crate::support::wire::Connection;

#[test]
fn log_commands_work_on_database() {
    let database = Database::start();
    let url = database.url();
    refused(log(&["cat", "--txlog", &url])).with(1, &["cannot open the log", "there is no log in it"]);
    let server = start(&url);
    let mut client = Connection::open(server.address());
    for n in 0..30 {
        client.ask("PUT", &format!("/v1/key-{}", n % 10), format!("{n}\t").as_bytes());
    }
    client.ask("PUT", "/v1/typed?ttl=1000", b"\xff");
    client.ask("DELETE", "/v1/key-3", b"");
    refused(log(&["verify", "--txlog", &url])).with(1, &["it is in use by", "stop it first"]);
    server.terminate();
    let sound = "schema kvs: version 5\nthe log is sound: 32 entries, newest sequence 32\n";
    assert_eq!(done(&["verify", "--txlog", &url]).0, sound);

    // To files, and to another database.
    let (text, _) = done(&["export", "--txlog", &url]);
    assert_eq!(text.lines().count(), 32);
    let directory = TempDir::new().expect("a temporary directory can be made");
    let file = directory.path().join("text");
    std::fs::write(&file, &text).expect("the directory takes a file");
    let (file, data) = (file.to_str().expect("it is text"), directory.path().join("data"));
    let data = data.to_str().expect("it is text");
    done(&["import", "--data-dir", data, file]);
    assert_eq!(done(&["export", "--data-dir", data]).0, text);
    database.sql("CREATE DATABASE other");
    let other = url.replace("/postgres?", "/other?");
    assert_eq!(done(&["import", "--txlog", &other, file]).1, "imported 32 entries; the newest sequence is 32\n");
    assert_eq!(done(&["export", "--txlog", &other]).0, text);

    // The newest entries of nine keys and one that expires later are left, and no index, not even of a killed compaction.
    database.sql("CREATE INDEX transactions_key ON kvs.transactions (sequence)");
    assert!(done(&["compact", "--txlog", &url]).1.ends_with("compacted: 10 entries remain\n"));
    assert_eq!(database.sql("SELECT to_regclass('kvs.transactions_key') IS NULL"), ["t"]);
    assert_eq!(database.sql("SELECT last, forgotten FROM kvs.writer"), ["32|32"]);
    let server = start(&url);
    assert_eq!((get(&server, "key-4"), get(&server, "key-3").0), ((200, "24\t".into()), 404));
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/new", b"").etag(), Some(33));
    server.terminate();
}

#[test]
fn cloud_native_go_table_is_imported() {
    let database = Database::start();
    let url = database.url();
    let refuses = |expected: &[&str]| {
        let data = TempDir::new().expect("a temporary directory can be made");
        let data = data.path().join("data");
        refused(log(&["import", "--from", &url, "--data-dir", data.to_str().expect("it is text")])).with(1, expected);
        assert!(!data.exists(), "nothing is begun");
    };
    refuses(&["cannot read the table transactions", "\"transactions\" does not exist"]);
    database
        .sql("CREATE TABLE transactions (sequence BIGSERIAL PRIMARY KEY, event_type SMALLINT, key TEXT, value TEXT)");
    database.sql("INSERT INTO transactions (event_type, key, value) VALUES (2, 'a', '1'), (2, 'b', 'Hello, world ä'), (1, 'a', '')");
    database.sql("INSERT INTO transactions VALUES (9, 3, 'c', 'x')");
    refuses(&["the row with sequence 9", "its event_type is Some(3)"]);
    database.sql("UPDATE transactions SET event_type = 2, value = NULL WHERE sequence = 9");
    refuses(&["the row with sequence 9", "it puts no value"]);
    database.sql("UPDATE transactions SET value = 'x' WHERE sequence = 9");
    // Into the same database, and into files.
    let (_, said) = done(&["import", "--from", &url, "--txlog", &url]);
    assert_eq!(said, "imported 4 entries; the newest sequence is 4\n");
    let server = start(&url);
    assert_eq!((get(&server, "a").0, get(&server, "b")), (404, (200, "Hello, world ä".into())));
    assert_eq!(put(&server, "a", "2"), 201);
    let data = TempDir::new().expect("a temporary directory can be made");
    done(&["import", "--from", &url, "--data-dir", data.path().to_str().expect("it is text")]);
    let server = Server::spawn(serve(data.path()), data);
    assert_eq!(get(&server, "c"), (200, "x".into()));
}
