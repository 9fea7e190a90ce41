//! Tombstones below the compaction horizon: a reader that has handed over the put must find its delete.

use std::sync::mpsc;
use std::thread;

use super::compaction::{Store, compact_at, fill, replay_into, store};
use super::*;
use crate::file::compact::{self, CompactionParams};
use crate::file::restore::restore_on;
use crate::{History, Incarnation, Restoration};

const STEADY: u64 = 12;

fn put_victim_and_others(log: &FileLog) {
    commit(log, put("victim", b"1"));
    put_others(log);
}

/// Fills segments with keys that are live until the next call.
fn put_others(log: &FileLog) {
    for number in 0..STEADY {
        commit(log, put(&format!("steady {number}"), &[1; 500]));
    }
}

/// Deletes "victim", and compacts such that the put, the delete and a newer horizon remain.
fn delete_victim_below_horizon(log: &FileLog) {
    let delete = commit(log, Event::Delete("victim".into()));
    commit(log, Event::Delete("nothing".into()));
    fill(log, 20);
    compact_at(log, 1, 25, 100);
    check(log, delete);
}

fn check(log: &FileLog, delete: u64) {
    let victims: Vec<_> = replayed(log).into_iter().filter(|entry| entry.2.contains("victim")).collect();
    assert!(victims.len() == 2 && victims[1].0 == delete, "{victims:?}");
    assert!(log.shared().catalog.horizon() > delete, "a younger tombstone was dropped");
}

/// Merges all segments into few, and returns what a replay builds that begins when the first is being written, and
/// continues after its first segment when the run has ended.
fn read_during_a_run(disk: &FakeDisk, log: &FileLog) -> Store {
    let params = CompactionParams { retain_from: u64::MAX, now: 1, min_yield_percent: 0, keys: 100 };
    let (begins, begun) = mpsc::channel();
    let (ends, ended) = mpsc::channel();
    let mut first = Some((begins, ended));
    let mut read = Store::new();
    thread::scope(|scope| {
        // Dropped when something panics here, so that the reader ends.
        let ends = ends;
        let mut reader = Some(|| {
            let replayed = replay_into(&mut read, |receive| {
                log.replay(0, &mut |entries| {
                    receive(entries)?;
                    if let Some((begins, ended)) = first.take() {
                        begins.send(()).unwrap();
                        let _ = ended.recv();
                    }
                    Ok(())
                })
            });
            replayed.unwrap();
        });
        let shared = log.shared();
        let is_merged = |name: &String| name.starts_with("0000000001-") && name.ends_with(".tmp");
        compact::run(&shared, &shared.catalog.sealed(), &params, &mut |_| {
            if disk.names().iter().any(is_merged)
                && let Some(reader) = reader.take()
            {
                scope.spawn(reader);
                begun.recv_timeout(Duration::from_secs(30)).unwrap();
            }
            Ok(())
        })
        .unwrap();
        assert!(reader.is_none(), "no segments were merged");
        ends.send(()).unwrap();
    });
    read
}

fn check_reader_during_a_run(disk: &FakeDisk, log: &FileLog) {
    // What fills the segments of the put and of the delete is superseded: they are merged.
    put_others(log);
    fill(log, 20);
    let horizon = log.shared().catalog.horizon();
    let read = read_during_a_run(disk, log);
    assert!(!read.contains_key("victim"), "a deleted key came back");
    assert_eq!(read, store(log));
    let is_left = || replayed(log).iter().any(|entry| entry.2 == "delete \"victim\"");
    assert!(is_left(), "for the reader");
    // Nobody reads: it is dropped, and the horizon stays.
    compact_at(log, 1, 0, 100);
    assert!(!is_left() && log.shared().catalog.horizon() == horizon);
}

#[test]
fn tombstone_below_horizon_is_kept_for_reader() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    put_victim_and_others(&log);
    delete_victim_below_horizon(&log);
    check_reader_during_a_run(&disk, &log);
}

#[test]
fn tombstone_of_restored_log_is_kept_for_reader() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    put_victim_and_others(&log);
    log.close().unwrap();
    // A restored segment spans no incarnation, so that the put and the delete are in two of them.
    disk.become_copy();
    let log = open(&disk).unwrap();
    delete_victim_below_horizon(&log);

    let last = log.appended();
    let history = History::clone(&log.history());
    let random = log.shared().home.env.random.uuid().unwrap();
    let incarnation = Incarnation::after(history.at(log.id(), last), last, random, 1);
    let replay = |receive: &mut Receive<'_>| log.replay(0, receive).map(drop);
    let restored = FakeDisk::default();
    restore_on(&restored, &Restoration { log: log.id(), history, last, incarnation, replay: &replay }).unwrap();
    let log = open(&restored).unwrap();
    let delete = replayed(&log).into_iter().find(|entry| entry.2 == "delete \"victim\"").unwrap().0;
    check(&log, delete);
    check_reader_during_a_run(&restored, &log);
}
