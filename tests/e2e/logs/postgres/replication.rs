//! A database with a synchronous standby: acknowledged and replayed entries are on it too.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvs_runtime::Env;
use kvs_txlog::file::Durability;
use kvs_txlog::postgres::{Existing, Manner, Options, PostgresLog, READ_LEASE, Url};
use kvs_txlog::{Event, TransactionLog};

use crate::support::load::SaysOver;
use crate::support::postgres::database::Database;
use crate::support::requests::put;
use crate::support::server::{PATIENCE, Server};

fn last(database: &Database) -> u64 {
    database.sql("SELECT last FROM kvs.writer")[0].parse().expect("it is a number")
}

/// Restarts the database until it shows more than `known`, and a statement waits again. A commit that waits for its standby
/// when the database is killed is shown by the next, without its standby.
fn shows_more_after_restart(database: &mut Database, known: u64) {
    while last(database) == known {
        database.waits_for_standby();
        database.kill();
        database.start_again();
    }
    database.waits_for_standby();
}

#[test]
fn write_without_synchronous_standby_is_not_acknowledged() {
    let mut database = Database::start();
    let mut standby = database.replicate();
    let server = Server::start(&["--txlog", &database.url(), "--txlog-timeout", "1s", "--request-timeout", "100s"]);
    assert_eq!(put(&server, "a", "0"), 201);
    let (acknowledged, is_over) = (AtomicU64::new(1), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                // A write that is rejected because the database is unavailable is retried.
                if put(&server, "a", "1") < 300 {
                    acknowledged.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        let _over = SaysOver(&is_over);
        standby.kill();
        database.waits_for_standby();
        let known = acknowledged.load(Ordering::SeqCst);
        shows_more_after_restart(&mut database, known);
        assert_eq!(acknowledged.load(Ordering::SeqCst), known, "after a restart");
        // The server of the database reports such a commit as a success, and warns.
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND pid = ";
        for _ in 0..3 {
            let pid = database.sql("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'").remove(0);
            database.sql(&format!("SELECT pg_cancel_backend({pid})"));
            database.becomes(&format!("{waiting}{pid}"), "0");
            database.waits_for_standby();
        }
        assert_eq!(acknowledged.load(Ordering::SeqCst), known, "after a wait was canceled");
        standby.start_again();
        let deadline = Instant::now() + PATIENCE;
        while acknowledged.load(Ordering::SeqCst) == known {
            assert!(Instant::now() < deadline, "nothing is acknowledged with the standby back");
            thread::sleep(Duration::from_millis(20));
        }
    });
    database.kill();
    standby.promote();
    assert_eq!(last(&standby), acknowledged.load(Ordering::SeqCst));
}

#[test]
fn replay_without_synchronous_standby_is_durable() {
    let mut database = Database::start();
    let mut standby = database.replicate();
    let options = Options {
        url: Url::from(&*database.url()),
        group_bytes: 1 << 20,
        durability: Durability::Sync,
        timeout: Duration::from_secs(1),
        manner: Manner { existing: Existing::Allowed, standby: false },
        lease: READ_LEASE,
        retain: Duration::ZERO,
        advertise: None,
        env: Env::real(),
    };
    let log = PostgresLog::open(&options).expect("the database is there");
    standby.kill();
    log.append(0, &[Event::Delete("a".into())]).expect("the database was there");
    shows_more_after_restart(&mut database, 0);
    let replay = || {
        let mut entries = 0;
        let until = log.replay(0, &mut |batch| {
            entries += batch.len();
            Ok(())
        });
        (until.expect("it can be read"), entries)
    };
    assert_eq!(replay(), (0, 0));
    standby.start_again();
    let deadline = Instant::now() + PATIENCE;
    while log.watermark().durable() == 0 {
        assert!(Instant::now() < deadline, "nothing becomes durable with the standby back");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(replay(), (1, 1));
}
