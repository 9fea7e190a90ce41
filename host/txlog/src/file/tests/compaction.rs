//! Compaction preserves the store that a reader builds, at each position where the reader resumes.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::Forgotten;
use crate::file::catalog::Segment;
use crate::file::compact::{self, CompactionParams, Outcome};
use crate::file::frame;
use crate::file::segment::HEAD_BYTES;

pub type Store = BTreeMap<String, (u64, Vec<u8>)>;

pub fn compact_at(log: &FileLog, now: u64, min_yield_percent: u64, keys: usize) -> Outcome {
    let params = CompactionParams { retain_from: u64::MAX, now, min_yield_percent, keys };
    compact::run(&log.shared(), &log.shared().catalog.sealed(), &params, &mut |_| Ok(())).unwrap()
}

/// Applies what comes after a sequence to a store, and returns how far that went.
fn catch_up(log: &FileLog, after: u64, store: &mut Store) -> anyhow::Result<u64> {
    replay_into(store, |receive| log.replay(after, receive))
}

pub fn replay_into(
    store: &mut Store,
    replay: impl FnOnce(&mut Receive<'_>) -> anyhow::Result<u64>,
) -> anyhow::Result<u64> {
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

pub fn store(log: &FileLog) -> Store {
    let mut store = Store::new();
    catch_up(log, 0, &mut store).unwrap();
    store
}

pub fn fill(log: &FileLog, puts: u64) {
    for number in 0..puts {
        commit(log, put(&format!("key {}", number % 3), &[number as u8; 500]));
    }
}

#[test]
fn compaction_drops_superseded_entries() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    fill(&log, 40);
    let before = store(&log);
    let outcome = compact_at(&log, 1, 25, 100);
    assert!(outcome.saved > 15_000, "{outcome:?}");
    assert_eq!(store(&log), before);
    let sealed = log.shared().catalog.sealed();
    assert_eq!(sealed.len(), 1);
    assert!(disk.read(&sealed[0].numbers.file_name()).len() < 512 + 3 * 700);
    log.close().unwrap();
    let log = open(&disk).unwrap();
    assert_eq!(log.appended(), 40);
    assert_eq!(store(&log), before);
    assert_eq!(commit(&log, put("key 0", b"")), 41);
}

#[test]
fn dropped_tombstones_keep_their_sequences_used() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    for number in 0..20 {
        commit(&log, put(&format!("key {number}"), &[1; 300]));
    }
    for number in 0..20 {
        commit(&log, Event::Delete(format!("key {number}")));
    }
    // Seals the segments written so far.
    fill(&log, 7);
    compact_at(&log, 1, 25, 100);
    assert!(replayed(&log).iter().all(|(sequence, ..)| *sequence > 40));
    let sealed = log.shared().catalog.sealed();
    assert_eq!(sealed[0].first, 1);
    log.close().unwrap();
    let log = open(&disk).unwrap();
    assert_eq!(log.appended(), 47);
}

#[test]
fn tombstone_is_kept_while_older_put_exists() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    // A low-yield segment: one small put of it is superseded.
    commit(&log, put("victim", b"1"));
    for number in 0..12 {
        commit(&log, put(&format!("steady {number}"), &[1; 500]));
    }
    commit(&log, Event::Delete("victim".into()));
    fill(&log, 20);
    let before = store(&log);
    compact_at(&log, 1, 25, 100);
    let all = replayed(&log);
    assert!(all.iter().any(|entry| entry.2.starts_with("put \"victim\"")), "the segment was not rewritten");
    assert!(all.iter().any(|entry| entry.2 == "delete \"victim\""));
    assert_eq!(store(&log), before);
    // With all params both go.
    compact_at(&log, 1, 0, 100);
    assert!(!replayed(&log).iter().any(|entry| entry.2.contains("victim")));
    assert_eq!(store(&log), before);
}

#[test]
fn low_yield_segments_are_rewritten_in_the_end() {
    let options = Options { segment_bytes: 64 << 10, ..options() };
    let log = FileLog::open_on(Arc::new(FakeDisk::default()), options, None).unwrap();
    let key = |round: i32, number: i32| format!("{round:0100}/{number:050}");
    let live = |round: i32| (2..8).map(move |number| put(&key(round, number), b""));
    for round in 1..57 {
        let first = append(&log, 1, &live(-round).collect::<Vec<_>>());
        assert!(durable(&log, first + 5));
    }
    // Just below the minimum yield in each segment: a fifth was deleted later, and as much are deletes of earlier entries.
    // Those can be dropped only with everything that was deleted, including the little in the first segment.
    append(&log, 1, &[Event::Delete(key(-1, 2))]);
    for round in 0..400 {
        let doomed = (0..2).map(|number| put(&key(round, number), b""));
        let deletes = (0..2).map(|number| Event::Delete(key(round - 1, number)));
        let group: Vec<_> = live(round).chain(doomed).chain(deletes).collect();
        let first = append(&log, 1, &group);
        assert!(durable(&log, first + 9));
    }
    let before = store(&log);
    let sealed: u64 = log.shared().catalog.sealed().iter().map(|segment| segment.end).sum();
    let outcome = compact_at(&log, 1, 25, 10_000);
    // Without the headers of files and frames.
    let entries = |segment: &Segment| segment.end - HEAD_BYTES - frame::HEAD_BYTES as u64;
    let left: u64 = log.shared().catalog.sealed().iter().map(entries).sum();
    assert!(sealed * 3 > outcome.live * 4 && left * 3 <= outcome.live * 4, "{sealed} {left} {outcome:?}");
    assert_eq!(store(&log), before);
}

#[test]
fn expired_entries_are_dropped_after_grace() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    for expires in [10, 20, 30] {
        let key = format!("until {expires}");
        let put = Put { key, value: vec![1; 100], metadata: vec![("a".into(), "b".into())], expires: Some(expires) };
        append(&log, 5, &[Event::Put(put)]);
    }
    append(&log, 15, &[put("deleted", &[1; 100]), Event::Delete("deleted".into())]);
    append(&log, 25, &[put("deleted later", &[1; 100]), Event::Delete("deleted later".into())]);
    for expires in [4_020, 100_020] {
        let put = Put { key: "much later".into(), value: vec![], metadata: vec![], expires: Some(expires) };
        append(&log, 15, &[Event::Put(put)]);
    }
    fill(&log, 7);
    let outcome = compact_at(&log, 20, 0, 100);
    let within: Vec<_> = (0..40).filter(|power| outcome.expiring[*power] > 0).collect();
    assert_eq!(within, [0, 2, 7], "seconds, as powers of two");
    let keys: Vec<_> = replayed(&log).into_iter().map(|entry| entry.2).filter(|entry| !entry.contains("key")).collect();
    assert_eq!(keys.len(), 3, "{keys:?}");
    assert!(keys[0].starts_with("put \"until 30\"") && keys[0].contains("(\"a\", \"b\")"), "{keys:?}");
    assert_eq!(keys[1], "delete \"deleted later\"");
    assert!(keys[2].starts_with("put \"much later\""), "{keys:?}");
}

#[test]
fn reader_behind_horizon_gets_an_error() {
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
    assert!(error.is::<Forgotten>(), "the horizon survives a restart");
}

#[test]
fn tombstone_is_kept_during_a_replay() {
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
fn replay_sees_newer_put_of_compacted_key() {
    let log = open(&FakeDisk::default()).unwrap();
    fill(&log, 20);
    commit(&log, put("a", b"old"));
    fill(&log, 20);
    let mut follower = Store::new();
    let mut compacted = false;
    replay_into(&mut follower, |receive| {
        log.replay(0, &mut |entries| {
            if !std::mem::replace(&mut compacted, true) {
                commit(&log, put("a", b"new"));
                fill(&log, 20);
                compact_at(&log, 1, 0, 100);
            }
            receive(entries)
        })
    })
    .unwrap();
    assert!(follower.contains_key("a"));
    assert_eq!(follower, store(&log));
}

#[test]
fn tombstone_is_kept_for_reader_starting_mid_run() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    commit(&log, put("a", &[1; 1000]));
    commit(&log, Event::Delete("a".into()));
    fill(&log, 20);
    let is_there = || replayed(&log).iter().any(|entry| entry.2 == "delete \"a\"");
    let params = CompactionParams { retain_from: u64::MAX, now: 1, min_yield_percent: 0, keys: 100 };
    let (shared, mut reader) = (log.shared(), None);
    let outcome = compact::run(&shared, &shared.catalog.sealed(), &params, &mut |_| {
        if reader.is_none() && disk.names().iter().any(|name| name.contains('-')) {
            reader = Some(shared.catalog.reader(0).unwrap());
        }
        Ok(())
    })
    .unwrap();
    assert!(reader.is_some() && is_there());
    assert!(outcome.saved > 0, "superseded entries are dropped: {outcome:?}");
    drop(reader);
    compact_at(&log, 1, 0, 100);
    assert!(!is_there());
}

#[test]
fn merged_segments_fit_segment_size() {
    let log = open(&FakeDisk::default()).unwrap();
    for number in 0..8 {
        for key in [&format!("key {number}"), "dead", "dead"] {
            commit(&log, put(key, &[1; 460]));
        }
    }
    fill(&log, 7);
    compact_at(&log, 1, 0, 100);
    let ends: Vec<_> = log.shared().catalog.sealed().iter().map(|segment| segment.end).collect();
    // In addition to entries, a frame has a header and padding.
    assert!(ends.len() == 2 && ends.iter().all(|end| *end <= SEGMENT_BYTES + 71), "{ends:?}");
}

#[test]
fn compaction_learns_segment_ends() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    for number in 0..20 {
        commit(&log, put(&format!("key {number}"), &[1; 700]));
    }
    let ends = |log: &FileLog| log.shared().catalog.sealed().iter().map(|segment| segment.end).collect::<Vec<_>>();
    let known = ends(&log);
    log.close().unwrap();
    let log = open(&disk).unwrap();
    assert_ne!(ends(&log), known, "segments are not read at the start");
    compact_at(&log, 1, 100, 100);
    assert_eq!(ends(&log), known);
}

#[test]
fn small_key_table_takes_more_passes() {
    let mut left = Vec::new();
    for (keys, one_pass) in [(2, false), (7, false), (1000, true)] {
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
        let passes = compact_at(&log, 1, 0, keys).passes;
        assert!(if one_pass { passes == 1 } else { passes >= before.len() as u64 / keys as u64 }, "{passes}");
        assert_eq!(store(&log), before);
        left.push(replayed(&log));
    }
    assert_eq!(left[0], left[2]);
    assert_eq!(left[1], left[2]);
}

#[test]
fn key_table_stays_within_its_size() {
    let log = open(&FakeDisk::default()).unwrap();
    for number in 0..100 {
        commit(&log, put(&format!("key {number}"), &[1; 100]));
    }
    let sealed = log.shared().catalog.sealed().last().unwrap().last;
    let passes = compact_at(&log, 1, 0, 10).passes;
    assert!(passes >= sealed / 10, "{passes} for {sealed}");
}

#[derive(Clone, Debug)]
enum Step {
    Append(Vec<(u8, Option<u16>, Option<u64>)>),
    Compact {
        min_yield_percent: u64,
        keys: usize,
    },
    CatchUp,
    Restart,
    /// Closes the log and opens a copy.
    Copy,
}

fn step() -> impl Strategy<Value = Step> {
    let size = proptest::option::weighted(0.7, 0..400_u16);
    let expires = proptest::option::weighted(0.2, 0..60_u64);
    let group = proptest::collection::vec((0..12_u8, size, expires), 1..4);
    prop_oneof![
        12 => group.prop_map(Step::Append),
        2 => (0..60_u64, 2..20_usize).prop_map(|(min_yield_percent, keys)| Step::Compact { min_yield_percent, keys }),
        1 => Just(Step::CatchUp),
        1 => Just(Step::Restart),
        1 => Just(Step::Copy),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn compaction_preserves_every_history(steps in proptest::collection::vec(step(), 1..120)) {
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
                Step::Compact { min_yield_percent, keys } => drop(compact_at(&log, time, *min_yield_percent, *keys)),
                Step::CatchUp => {
                    after = match catch_up(&log, after, &mut follower) {
                        Ok(after) => after,
                        Err(error) => {
                            prop_assert!(error.is::<Forgotten>());
                            follower.clear();
                            catch_up(&log, 0, &mut follower).unwrap()
                        }
                    };
                    // Expired entries may be there or not.
                    follower.retain(|key, _| !model.get(key).is_some_and(|(.., expires)| expires.is_some_and(|at| at <= time)));
                    let mut expected = Store::new();
                    for (key, (sequence, value, expires)) in &model {
                        if expires.is_none_or(|at| at > time) {
                            expected.insert(key.clone(), (*sequence, value.clone()));
                        }
                    }
                    prop_assert_eq!(&follower, &expected);
                }
                Step::Restart | Step::Copy => {
                    let appended = log.appended();
                    log.close().unwrap();
                    if matches!(step, Step::Copy) {
                        disk.become_copy();
                    }
                    log = open(&disk).unwrap();
                    prop_assert_eq!(log.appended(), appended);
                }
            }
        }
    }
}
