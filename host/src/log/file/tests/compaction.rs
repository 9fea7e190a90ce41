//! Compaction: the store stays the same, whoever reads the log and however far they had come.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::disk::Operation;
use super::*;
use crate::log::Forgotten;
use crate::log::file::Damage;
use crate::log::file::compact::{self, Effort, Outcome};
use crate::log::file::compactor::Debt;
use crate::log::file::disk::Disk;
use crate::log::file::segment::Numbers;

type Store = BTreeMap<String, (u64, Vec<u8>)>;

pub fn compact_at(log: &FileLog, now: u64, worth_percent: u64, keys: usize) -> Outcome {
    let effort = Effort { now, worth_percent, keys };
    compact::run(&log.shared, &log.shared.catalog.sealed(), &effort, &mut |_| Ok(())).unwrap()
}

/// Applies what comes after a sequence to a store, and returns how far that went.
fn catch_up(log: &FileLog, after: u64, store: &mut Store) -> anyhow::Result<u64> {
    replay_into(store, |receive| log.replay(after, receive))
}

fn replay_into(store: &mut Store, replay: impl FnOnce(&mut Receive<'_>) -> anyhow::Result<u64>) -> anyhow::Result<u64> {
    replay(&mut |entries| {
        for entry in entries {
            match &entry.event {
                EventRef::Put(put) => drop(store.insert(put.key.into(), (entry.sequence, put.value.into()))),
                EventRef::Delete(key) => drop(store.remove(*key)),
            }
        }
        Ok(())
    })
}

fn store(log: &FileLog) -> Store {
    let mut store = Store::new();
    catch_up(log, 0, &mut store).unwrap();
    store
}

fn fill(log: &FileLog, puts: u64) {
    for number in 0..puts {
        commit(log, put(&format!("key {}", number % 3), &[number as u8; 500]));
    }
}

#[test]
fn what_was_superseded_goes_and_the_newest_stays() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    fill(&log, 40);
    let before = store(&log);
    let outcome = compact_at(&log, 1, 25, 100);
    assert!(outcome.saved > 15_000, "{outcome:?}");
    assert_eq!(store(&log), before);
    let sealed = log.shared.catalog.sealed();
    assert_eq!(sealed.len(), 1);
    assert!(disk.read(&sealed[0].numbers.file_name()).len() < 512 + 3 * 700);
    log.close().unwrap();
    let log = open(&disk).unwrap();
    assert_eq!(log.appended(), 40);
    assert_eq!(store(&log), before);
    assert_eq!(commit(&log, put("key 0", b"")), 41);
}

#[test]
fn deletes_go_with_what_they_deleted_and_sequences_are_not_given_again() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    for number in 0..20 {
        commit(&log, put(&format!("key {number}"), &[1; 300]));
    }
    for number in 0..20 {
        commit(&log, Event::Delete(format!("key {number}")));
    }
    // So that what was said so far is in sealed segments.
    fill(&log, 7);
    compact_at(&log, 1, 25, 100);
    assert!(replayed(&log).iter().all(|(sequence, ..)| *sequence > 40));
    let sealed = log.shared.catalog.sealed();
    assert_eq!(sealed[0].first, 1);
    log.close().unwrap();
    let log = open(&disk).unwrap();
    assert_eq!(log.appended(), 47);
}

#[test]
fn a_delete_stays_while_an_older_put_does() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    // The first segment is hardly worth compacting: one small put of it is dead.
    commit(&log, put("victim", b"1"));
    for number in 0..12 {
        commit(&log, put(&format!("steady {number}"), &[1; 500]));
    }
    commit(&log, Event::Delete("victim".into()));
    fill(&log, 20);
    let before = store(&log);
    compact_at(&log, 1, 25, 100);
    let all = replayed(&log);
    assert!(all.iter().any(|entry| entry.2.starts_with("put \"victim\"")), "the segment was left alone");
    assert!(all.iter().any(|entry| entry.2 == "delete \"victim\""));
    assert_eq!(store(&log), before);
    // With all effort both go.
    compact_at(&log, 1, 0, 100);
    assert!(!replayed(&log).iter().any(|entry| entry.2.contains("victim")));
    assert_eq!(store(&log), before);
}

#[test]
fn a_little_that_is_dead_in_each_segment_is_too_much_in_all() {
    let options = Options { segment_bytes: 16 << 10, ..options() };
    let log = FileLog::open_on(Arc::new(FakeDisk::default()), options, None).unwrap();
    let key = |round: i32, number: i32| format!("{round:0100}/{number:050}");
    let live = |round: i32| (2..8).map(move |number| put(&key(round, number), b""));
    for round in 1..15 {
        let first = append(&log, 1, &live(-round).collect::<Vec<_>>());
        assert!(durable(&log, first + 5));
    }
    // All but worth it in each segment: a fifth was deleted later, and as much deletes what was before. It may go only
    // when all that was deleted does, the little in the first segment too.
    append(&log, 1, &[Event::Delete(key(-1, 2))]);
    for round in 0..100 {
        let doomed = (0..2).map(|number| put(&key(round, number), b""));
        let deletes = (0..2).map(|number| Event::Delete(key(round - 1, number)));
        let group: Vec<_> = live(round).chain(doomed).chain(deletes).collect();
        let first = append(&log, 1, &group);
        assert!(durable(&log, first + 9));
    }
    let before = store(&log);
    let sealed: u64 = log.shared.catalog.sealed().iter().map(|segment| segment.end).sum();
    let outcome = compact_at(&log, 1, 25, 1000);
    let left: u64 = log.shared.catalog.sealed().iter().map(|segment| segment.end).sum();
    assert!(sealed * 3 > outcome.needed * 4 && left * 3 <= outcome.needed * 4, "{sealed} {left} {outcome:?}");
    assert_eq!(store(&log), before);
}

#[test]
fn what_has_expired_goes_and_what_is_younger_than_the_grace_stays() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    for expires in [10, 20, 30] {
        let key = format!("until {expires}");
        let put = Put { key, value: vec![1; 100], metadata: vec![("a".into(), "b".into())], expires: Some(expires) };
        append(&log, 5, &[Event::Put(put)]);
    }
    append(&log, 15, &[put("deleted", &[1; 100]), Event::Delete("deleted".into())]);
    append(&log, 25, &[put("deleted later", &[1; 100]), Event::Delete("deleted later".into())]);
    fill(&log, 7);
    compact_at(&log, 20, 0, 100);
    let keys: Vec<_> = replayed(&log).into_iter().map(|entry| entry.2).filter(|entry| !entry.contains("key")).collect();
    assert_eq!(keys.len(), 2, "{keys:?}");
    assert!(keys[0].starts_with("put \"until 30\"") && keys[0].contains("(\"a\", \"b\")"), "{keys:?}");
    assert_eq!(keys[1], "delete \"deleted later\"");
}

#[test]
fn whoever_missed_a_delete_is_told_so() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    commit(&log, put("a", &[1; 1000]));
    let mut follower = Store::new();
    let after = catch_up(&log, 0, &mut follower).unwrap();
    commit(&log, Event::Delete("a".into()));
    fill(&log, 20);
    compact_at(&log, 1, 25, 100);
    let error = catch_up(&log, after, &mut follower).unwrap_err();
    assert!(error.is::<Forgotten>());
    assert!(catch_up(&log, 2, &mut follower).is_ok());
    log.close().unwrap();
    let error = catch_up(&open(&disk).unwrap(), after, &mut follower).unwrap_err();
    assert!(error.is::<Forgotten>(), "a restart does not forget that");
}

#[test]
fn a_delete_stays_while_somebody_reads() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    commit(&log, put("a", &[1; 1000]));
    commit(&log, Event::Delete("a".into()));
    fill(&log, 20);
    let mut follower = Store::new();
    let mut compacted = false;
    log.replay(0, &mut |entries| {
        for entry in entries {
            match &entry.event {
                EventRef::Put(put) => drop(follower.insert(put.key.into(), (entry.sequence, put.value.into()))),
                EventRef::Delete(key) => drop(follower.remove(*key)),
            }
        }
        if !std::mem::replace(&mut compacted, true) {
            compact_at(&log, 1, 0, 100);
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(follower, store(&log));
    assert!(replayed(&log).iter().any(|entry| entry.2 == "delete \"a\""));
}

#[test]
fn a_write_waits_for_nothing_that_compaction_does() {
    let disk = FakeDisk::default();
    let log = Arc::new(open(&disk).unwrap());
    fill(&log, 40);
    let (reached, stops) = std::sync::mpsc::channel();
    let (go_on, held) = std::sync::mpsc::channel();
    let (reached, held) = (std::sync::Mutex::new(reached), std::sync::Mutex::new(held));
    disk.before_each(move |operation| {
        if std::thread::current().name() == Some("compaction") {
            reached.lock().unwrap().send(operation.clone()).unwrap();
            // Ends the test where it failed.
            let _ = held.lock().unwrap().recv();
        }
        Ok(())
    });
    let work = {
        let log = log.clone();
        move || compact_at(&log, 1, 25, 100).saved
    };
    let compaction = std::thread::Builder::new().name("compaction".into()).spawn(work).unwrap();
    let mut held = Vec::new();
    while !compaction.is_finished() {
        let Ok(operation) = stops.recv_timeout(Duration::from_millis(10)) else { continue };
        let sequence = append(&log, 1, &[put("key", &[1; 500])]);
        assert!(durable(&log, sequence), "a commit waited for {operation:?}");
        held.push(operation);
        go_on.send(()).unwrap();
    }
    assert!(compaction.join().unwrap() > 15_000);
    let renamed = held.iter().any(|operation| matches!(operation, Operation::Rename { .. }));
    let removed = held.iter().filter(|operation| matches!(operation, Operation::Remove { .. })).count();
    assert!(renamed && removed > 5, "{held:?}");
    disk.before_each(|_| Ok(()));
}

#[test]
fn what_is_compacted_is_synced_in_pieces_no_larger_than_a_commit() {
    let disk = FakeDisk::default();
    let segment_bytes = 16 << 20;
    let options = Options { segment_bytes, group_bytes: 1 << 20, ..options() };
    let log = FileLog::open_on(Arc::new(disk.clone()), options, None).unwrap();
    for number in 0..40 {
        commit(&log, put(&format!("key {}", number % 10), &vec![1; 1_000_000]));
    }
    // The spare is written in larger pieces: once it is there, nothing else is.
    let spare = Numbers::one(log.shared.catalog.all().last().unwrap().numbers.last + 1).file_name();
    eventually(|| disk.names().contains(&spare));
    disk.record();
    assert!(compact_at(&log, 1, 0, 100).saved > 0);
    let (mut compacted, mut unsynced, mut most) = (None, 0, 0);
    for recorded in disk.take_record() {
        match recorded.operation {
            Operation::Create { name, file } if name.contains('-') => compacted = Some(file),
            Operation::Write { file, bytes, .. } if compacted == Some(file) => unsynced += bytes.len() as u64,
            Operation::Sync { file } if compacted == Some(file) => (most, unsynced) = (most.max(unsynced), 0),
            _ => {}
        }
    }
    assert_eq!(unsynced, 0);
    assert!((1_000_000..=super::super::queue::FRAME_BYTES).contains(&most), "{most}");
}

#[test]
fn a_disk_that_fails_compaction_does_not_fail_the_log() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    fill(&log, 40);
    let before = store(&log);
    // Wherever it is stopped.
    for operations in 0.. {
        let disk = disk.copy();
        let (shared, _) = Shared::recover(Arc::new(disk.clone()), options()).unwrap();
        disk.kill_after(Some(operations));
        let effort = Effort { now: 1, worth_percent: 25, keys: 100 };
        let done = compact::run(&shared, &shared.catalog.sealed(), &effort, &mut |_| Ok(()));
        disk.kill_after(None);
        let mut store = Store::new();
        replay_into(&mut store, |receive| replay::replay(&shared, 0, receive)).unwrap();
        assert_eq!(store, before, "stopped after {operations}");
        match done {
            Ok(_) => {
                assert!(operations > 10);
                break;
            }
            Err(error) => assert!(!error.is::<Damage>(), "{error}"),
        }
        // It is tried again.
        compact::run(&shared, &shared.catalog.sealed(), &effort, &mut |_| Ok(())).unwrap();
        drop(shared);
        let log = open(&disk).unwrap();
        assert_eq!(self::store(&log), before, "stopped after {operations}, and started again");
    }
}

#[test]
fn a_disk_that_fails_stops_compaction_and_one_that_fails_to_sync_stops_the_log() {
    // Whether the sync fails or the file cannot be made, with which error, and whether that is the end.
    for (sync, error, fatal) in [
        (false, ErrorKind::PermissionDenied, false),
        (false, ErrorKind::StorageFull, false),
        (true, ErrorKind::StorageFull, false),
        (true, ErrorKind::Other, true),
    ] {
        let disk = FakeDisk::default();
        let log = open(&disk).unwrap();
        fill(&log, 40);
        let (tried, attempts) = std::sync::mpsc::channel();
        let file = AtomicU64::new(u64::MAX);
        disk.before_each(move |operation| {
            let fails = match operation {
                Operation::Create { name, file: made } if name.contains('-') => {
                    file.store(*made as u64, Ordering::Relaxed);
                    !sync
                }
                Operation::Sync { file: synced } => sync && file.load(Ordering::Relaxed) == *synced as u64,
                _ => false,
            };
            if !fails {
                return Ok(());
            }
            let _ = tried.send(());
            Err(error.into())
        });
        log.compact_in_background().unwrap();
        attempts.recv_timeout(Duration::from_secs(20)).unwrap();
        if fatal {
            eventually(|| log.failure().is_some());
            continue;
        }
        // Many times what the log may grow by while a run is under way.
        fill(&log, 100);
        assert_eq!((log.failure(), store(&log).len()), (None, 3));
        log.close().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_commit_waits_for_a_part_of_a_run_in_proportion_to_what_it_writes(
        needed in 0..1_u64 << 40, segment_bytes in 1_u64 << 16..1 << 32, bytes in 1_u64..4 << 20, done in 0.0..1.0,
    ) {
        // As large as it can be when a run falls due: a third of it may be dead, or is in the segment just sealed.
        let sealed = needed + needed / 2 + segment_bytes;
        let mut debt = Debt::new(sealed, sealed, Some(needed), segment_bytes);
        debt.work = 2 * sealed;
        prop_assert_eq!(debt.bound, 2 * needed + 2 * segment_bytes);
        debt.done = (debt.work as f64 * done) as u64;
        let before = debt.limit();
        debt.done += 8 * bytes + 8;
        prop_assert!(debt.limit() >= (before + bytes).min(debt.bound));
        debt.done = debt.work;
        prop_assert_eq!(debt.limit(), debt.bound);
    }
}

#[test]
fn more_keys_than_the_table_holds_take_more_passes_and_come_to_the_same() {
    let mut left = Vec::new();
    for keys in [2, 7, 1000] {
        let disk = FakeDisk::default();
        let log = open(&disk).unwrap();
        for round in 0..4 {
            for number in 0..50 {
                commit(&log, put(&format!("key {number}"), &[round; 100]));
            }
            for number in (0..50).step_by(5) {
                commit(&log, Event::Delete(format!("key {number}")));
            }
        }
        fill(&log, 7);
        let before = store(&log);
        compact_at(&log, 1, 0, keys);
        assert_eq!(store(&log), before);
        left.push(replayed(&log));
    }
    assert_eq!(left[0], left[2]);
    assert_eq!(left[1], left[2]);
}

#[test]
fn damage_is_not_compacted_away() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    fill(&log, 40);
    let mut bytes = disk.read("0000000002.seg");
    bytes[600] ^= 1;
    disk.put("0000000002.seg", bytes);
    let names = disk.names();
    let effort = Effort { now: 1, worth_percent: 25, keys: 100 };
    let error = compact::run(&log.shared, &log.shared.catalog.sealed(), &effort, &mut |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("0000000002.seg is damaged at byte 512"), "{error}");
    assert_eq!(disk.names(), names);
}

#[test]
fn what_compaction_left_behind_in_a_crash_is_removed() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    fill(&log, 40);
    let before = store(&log);
    let old = disk.copy();
    compact_at(&log, 1, 25, 100);
    drop(log);
    // The names of the old files had been removed, and the crash brought them back.
    for name in old.names().iter().filter(|name| name.as_str() < "0000000004.seg") {
        disk.put(name, old.read(name));
    }
    let log = open(&disk).unwrap();
    assert_eq!(store(&log), before);
    assert!(!disk.names().contains(&"0000000002.seg".into()));
    // A file that stands for others but is another log's does not count.
    let names: Vec<_> = disk.names().into_iter().filter(|name| name.contains('-')).collect();
    assert_eq!(names.len(), 1);
    disk.remove(&names[0]).unwrap();
    assert!(open(&disk).err().unwrap().root_cause().to_string().contains("0000000001.seg is missing"));
}

#[test]
fn a_log_of_few_keys_is_never_larger_than_twice_what_is_needed_and_two_segments() {
    let disk = FakeDisk::default();
    let segment_bytes = 256 << 10;
    let options = Options { segment_bytes, group_bytes: 4096, durability: Durability::Os, ..options() };
    let log = Arc::new(FileLog::open_on(Arc::new(disk.clone()), options.clone(), None).unwrap());
    log.compact_in_background().unwrap();
    // Whenever anything is done to the disk, and the disk is memory: no real one is written to as fast.
    let most = Arc::new(AtomicU64::new(0));
    disk.before_each({
        let (log, most) = (Arc::downgrade(&log), most.clone());
        move |_| {
            if let Some(log) = log.upgrade() {
                most.fetch_max(log.shared.catalog.bytes(), Ordering::Relaxed);
            }
            Ok(())
        }
    });
    for number in 0..60_000_u64 {
        append(&log, 1, &[put(&format!("key {}", number % 10), &[number as u8; 400])]);
    }
    assert!(durable(&log, log.appended()));
    let needed = 10 * super::super::entry::size(&put("key 0", &[0; 400])) as u64;
    let most = most.load(Ordering::Relaxed);
    println!("at most {most} bytes, of 26 million written, {needed} needed, in segments of {segment_bytes}");
    assert!(most > segment_bytes, "something was written");
    assert!(most <= 2 * needed + 2 * segment_bytes, "{most}");
    let expected = store(&log);
    assert_eq!(expected.len(), 10);
    disk.before_each(|_| Ok(()));
    log.close().unwrap();
    assert!(store(&FileLog::open_on(Arc::new(disk), options, None).unwrap()) == expected);
}

#[derive(Clone, Debug)]
enum Step {
    Append(Vec<(u8, Option<u16>, Option<u64>)>),
    Compact { worth_percent: u64, keys: usize },
    CatchUp,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let size = proptest::option::weighted(0.7, 0..400_u16);
    let expires = proptest::option::weighted(0.2, 0..60_u64);
    let group = proptest::collection::vec((0..12_u8, size, expires), 1..4);
    prop_oneof![
        12 => group.prop_map(Step::Append),
        2 => (0..60_u64, 2..20_usize).prop_map(|(worth_percent, keys)| Step::Compact { worth_percent, keys }),
        1 => Just(Step::CatchUp),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn every_history_builds_the_same_store(steps in proptest::collection::vec(step(), 1..120)) {
        let disk = FakeDisk::default();
        let mut log = open(&disk).unwrap();
        let mut model: BTreeMap<String, (u64, Vec<u8>, Option<u64>)> = BTreeMap::new();
        let (mut follower, mut after) = (Store::new(), 0);
        for (time, step) in (1..).zip(&steps) {
            match step {
                Step::Append(group) => {
                    let events: Vec<_> = group.iter().map(|(key, size, expires)| match size {
                        Some(size) => Event::Put(Put {
                            key: key.to_string(),
                            value: vec![*key; usize::from(*size)],
                            metadata: Vec::new(),
                            expires: expires.map(|after| time + after),
                        }),
                        None => Event::Delete(key.to_string()),
                    }).collect();
                    let first = append(&log, time, &events);
                    prop_assert!(durable(&log, first + events.len() as u64 - 1));
                    for (sequence, event) in (first..).zip(events) {
                        match event {
                            Event::Put(put) => drop(model.insert(put.key, (sequence, put.value, put.expires))),
                            Event::Delete(key) => drop(model.remove(&key)),
                        }
                    }
                    prop_assert_eq!(log.appended(), log.watermark().durable());
                }
                Step::Compact { worth_percent, keys } => drop(compact_at(&log, time, *worth_percent, *keys)),
                Step::CatchUp => {
                    after = match catch_up(&log, after, &mut follower) {
                        Ok(after) => after,
                        Err(error) => {
                            prop_assert!(error.is::<Forgotten>());
                            follower.clear();
                            catch_up(&log, 0, &mut follower).unwrap()
                        }
                    };
                    // What has expired may be there or not.
                    follower.retain(|key, _| !model.get(key).is_some_and(|(.., expires)| expires.is_some_and(|at| at <= time)));
                    let mut expected = Store::new();
                    for (key, (sequence, value, expires)) in &model {
                        if expires.is_none_or(|at| at > time) {
                            expected.insert(key.clone(), (*sequence, value.clone()));
                        }
                    }
                    prop_assert_eq!(&follower, &expected);
                }
                Step::Restart => {
                    let appended = log.appended();
                    log.close().unwrap();
                    log = open(&disk).unwrap();
                    prop_assert_eq!(log.appended(), appended);
                }
            }
        }
    }
}
