//! When an incarnation of the log begins, and what it changes.

use std::fs;

use super::compaction::{compact_at, fill};
use super::formats::{copy_files, open_in};
use super::runs::wait_for_preallocated_segment;
use super::*;
use crate::file::verify::verify_in;
use crate::file::{Finding, Home, Offline, offline};
use crate::incarnation::JUMP;
use crate::{Forgotten, Incarnation};

pub fn os() -> Options {
    Options { durability: Durability::Os, ..options() }
}

pub fn open_os(disk: &FakeDisk) -> FileLog {
    FileLog::open_on(Arc::new(disk.clone()), os(), None).unwrap()
}

/// A log that was closed after some entries, with a spare.
pub fn closed(entries: u64) -> FakeDisk {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    fill(&log, entries);
    wait_for_preallocated_segment(&log, &disk);
    log.close().unwrap();
    disk
}

pub fn begun(log: &FileLog) -> Vec<Incarnation> {
    log.history().incarnations().to_vec()
}

/// What is wrong.
pub fn wrong(disk: &FakeDisk) -> Vec<String> {
    let home = Home { disk: Arc::new(disk.clone()), data: "data".into(), env: kvs_runtime::Env::real() };
    let mut wrong = Vec::new();
    let mut report = |finding| match finding {
        Finding::Sound { .. } => {}
        Finding::Torn(what) | Finding::Corrupt(what) => wrong.push(what),
    };
    verify_in(&home, &mut report, &mut |_| ()).unwrap();
    wrong
}

#[test]
fn copy_gives_no_sequence_of_the_original() {
    let disk = closed(5);
    let copy = disk.copy();
    copy.become_copy();
    let (log, copied) = (open(&disk).unwrap(), open(&copy).unwrap());
    assert_eq!((log.appended(), copied.appended()), (5, 5));
    assert_eq!(copied.watermark().durable(), 5);
    assert_eq!(begun(&log), []);
    let [incarnation] = begun(&copied)[..] else { panic!("one begins") };
    assert_eq!((incarnation.fork, incarnation.parent), (5, copied.shared().log));
    assert_eq!(copied.replay(5, &mut |_| panic!("nothing came after it")).unwrap(), 5);

    let given = commit(&log, put("a", b""));
    assert!(!copied.history().contains(given) && copied.history().contains(5));
    let first = commit(&copied, put("a", b""));
    assert_eq!((first, copied.history().next(5)), (incarnation.first, first));
    assert!(first >= 5 + JUMP);
    assert_eq!(commit(&copied, put("a", b"")), first + 1);
    assert_eq!(replayed_after(&copied, 5).unwrap().len(), 2);
    copied.close().unwrap();
    assert_eq!(wrong(&copy), Vec::<String>::new());

    // It knows itself from now on.
    let log = open(&copy).unwrap();
    assert_eq!((log.appended(), begun(&log)), (first + 1, vec![incarnation]));
    assert_eq!(replayed(&log).len(), 7);
}

#[test]
fn incarnation_without_entries_is_continued() {
    let disk = closed(5);
    for copies in 1..=3 {
        disk.become_copy();
        let log = open(&disk).unwrap();
        let begun = begun(&log);
        assert_eq!((log.appended(), begun.len()), (5, copies));
        assert!(begun.windows(2).all(|pair| pair[1].fork + 1 == pair[0].first && pair[1].parent == pair[0].id));
        assert!(log.history().contains(5) && !log.history().contains(begun[copies - 1].first - 1));
        if copies == 2 {
            log.close().unwrap();
        }
    }
    let log = open(&disk).unwrap();
    assert_eq!(begun(&log).len(), 3);
    assert_eq!(commit(&log, put("a", b"")), begun(&log)[2].first);
    log.close().unwrap();
    assert_eq!(wrong(&disk), Vec::<String>::new());
    assert_eq!(replayed(&open(&disk).unwrap()).len(), 6);
}

#[test]
fn moved_directory_is_no_copy() {
    let directory = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| directory.path().join(name));
    let log = open_in(&one);
    commit(&log, put("a", b""));
    log.close().unwrap();
    fs::rename(&one, &two).unwrap();
    assert_eq!(begun(&open_in(&two)), []);
    fs::create_dir(&one).unwrap();
    fs::rename(two.join("log"), one.join("log")).unwrap();
    assert_eq!(begun(&open_in(&one)), []);
}

#[test]
fn copied_directory_is_recognised() {
    let directory = tempfile::tempdir().unwrap();
    let [original, copy] = ["original", "copy"].map(|name| directory.path().join(name));
    let log = open_in(&original);
    commit(&log, put("a", b""));
    log.close().unwrap();
    copy_files(&original, &copy);
    assert_eq!(begun(&open_in(&copy)).len(), 1);
    assert_eq!(begun(&open_in(&copy)).len(), 1, "once");

    // Restored into the directory that it was in.
    for file in fs::read_dir(copy.join("log")).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    copy_files(&original, &copy);
    assert_eq!(begun(&open_in(&copy)).len(), 1);
    // Without the file that tells.
    fs::remove_file(original.join("log/identity")).unwrap();
    assert_eq!(begun(&open_in(&original)).len(), 1);
    assert_eq!(begun(&open_in(&original)).len(), 1, "once");
}

#[test]
fn empty_log_begins_no_incarnation() {
    let disk = FakeDisk::default();
    open(&disk).unwrap().close().unwrap();
    disk.become_copy();
    assert_eq!(begun(&open(&disk).unwrap()), []);
    let error = offline::fork(Arc::new(disk), options()).unwrap_err().to_string();
    assert_eq!(error, "the log in data is empty: there is nothing to continue");
}

#[test]
fn unclean_os_run_begins_an_incarnation() {
    for durability in [Durability::Os, Durability::Sync] {
        let disk = closed(5);
        let log = open_os(&disk);
        commit(&log, put("a", b""));
        let next = |disk: &FakeDisk| {
            let options = Options { durability, ..options() };
            FileLog::open_on(Arc::new(disk.clone()), options, None).unwrap()
        };
        let killed = disk.copy();
        let log = next(&killed);
        let [incarnation] = begun(&log)[..] else { panic!("one begins") };
        assert_eq!(incarnation.fork, 6);
        // Killed again, before and after it has appended something.
        let killed = killed.copy();
        let log = next(&killed);
        assert_eq!(begun(&log), [incarnation]);
        assert_eq!(commit(&log, put("a", b"")), incarnation.first);
        let again = if durability == Durability::Os { 2 } else { 1 };
        assert_eq!(begun(&next(&killed.copy())).len(), again);
    }
}

#[test]
fn clean_close_begins_no_incarnation() {
    let disk = closed(5);
    let log = open_os(&disk);
    commit(&log, put("a", b""));
    log.close().unwrap();
    let log = open_os(&disk);
    assert_eq!(begun(&log), []);
    // To the last byte of the segment: a frame that says so goes to the next.
    let room = || SEGMENT_BYTES - log.shared().catalog.all().last().unwrap().end;
    while !(300..1_900).contains(&room()) {
        commit(&log, put("a", &[1; 300]));
    }
    commit(&log, put("a", &vec![1; room() as usize - 64 - 26]));
    assert_eq!(room(), 0);
    log.close().unwrap();
    assert_eq!(begun(&open_os(&disk)), []);
}

#[test]
fn unclean_sync_run_begins_no_incarnation() {
    let disk = closed(5);
    let log = open(&disk).unwrap();
    commit(&log, put("a", b""));
    let killed = disk.copy();
    assert_eq!(begun(&open(&killed).unwrap()), []);
    // The writer cannot be identified where this run may lose what clients saw.
    assert_eq!(begun(&open_os(&disk.copy())).len(), 1);
}

#[test]
fn first_answer_of_an_os_run_is_on_disk() {
    let disk = closed(5);
    let log = open_os(&disk);
    disk.record();
    commit(&log, put("a", b""));
    commit(&log, put("a", b""));
    let synced =
        disk.take_record().iter().filter(|done| matches!(done.operation, disk::Operation::Sync { .. })).count();
    assert_eq!(synced, 1, "and the others are not");
}

#[test]
fn forked_log_goes_on_far_beyond() {
    let directory = tempfile::tempdir().unwrap();
    let log = open_in(directory.path());
    commit(&log, put("a", b""));
    assert!(Offline::fork(directory.path()).unwrap_err().to_string().contains("is in use by process"));
    log.close().unwrap();
    let Incarnation { id, fork, first, .. } = Offline::fork(directory.path()).unwrap();
    assert_eq!(fork, 1);
    let log = open_in(directory.path());
    assert_eq!(begun(&log)[0].id, id);
    assert_eq!((begun(&log).len(), commit(&log, put("a", b""))), (1, first));
}

#[test]
fn reading_offline_begins_no_incarnation() {
    let directory = tempfile::tempdir().unwrap();
    let [original, copy] = ["original", "copy"].map(|name| directory.path().join(name));
    let log = open_in(&original);
    fill(&log, 40);
    log.close().unwrap();
    copy_files(&original, &copy);
    let offline = Offline::open(&copy).unwrap();
    assert_eq!(offline.appended(), 40);
    offline.compact(&mut |_| ()).unwrap();
    drop(offline);
    let log = open_in(&copy);
    assert_eq!((log.appended(), begun(&log).len()), (40, 1), "and the next start begins one");
}

/// A log of several incarnations, each with entries, of which some are deletes of nothing.
pub fn several() -> (FakeDisk, Vec<Incarnation>) {
    let disk = closed(20);
    for _ in 0..3 {
        disk.become_copy();
        let log = open(&disk).unwrap();
        fill(&log, 10);
        for _ in 0..20 {
            commit(&log, Event::Delete("nothing".into()));
        }
        fill(&log, 3);
        log.close().unwrap();
    }
    let known = begun(&open(&disk).unwrap());
    assert_eq!(known.len(), 3);
    (disk, known)
}

#[test]
fn compaction_keeps_incarnations_of_its_segments() {
    let (disk, known) = several();
    let log = open(&disk).unwrap();
    let before = super::compaction::store(&log);
    // Too early for the deletes, so nothing is below the horizon.
    compact_at(&log, 0, 0, 100);
    assert_eq!(super::compaction::store(&log), before);
    let sealed = log.shared().catalog.sealed();
    assert!(sealed.iter().any(|segment| segment.incarnations.len() > 1), "{sealed:?}");
    log.close().unwrap();
    assert_eq!(wrong(&disk), Vec::<String>::new());
    let log = open(&disk).unwrap();
    assert_eq!(begun(&log), known);
    assert_eq!(super::compaction::store(&log), before);
    for incarnation in known {
        assert!(!log.history().contains(incarnation.fork + 1) && log.history().contains(incarnation.first));
    }
}

#[test]
fn compaction_drops_incarnations_below_horizon() {
    let (disk, known) = several();
    let log = open(&disk).unwrap();
    fill(&log, 20);
    // The first run makes the horizon, and the second drops what is below it.
    for _ in 0..2 {
        compact_at(&log, 1, 0, 100);
        fill(&log, 20);
    }
    let horizon = log.shared().catalog.horizon();
    assert!(horizon > known[2].first);
    log.close().unwrap();
    assert_eq!(wrong(&disk), Vec::<String>::new());
    let log = open(&disk).unwrap();
    assert_eq!(begun(&log), known[2..], "the next continues the newest");
    for position in [known[0].fork + 1, known[0].first - 1, known[1].first - 1, known[1].first] {
        let error = log.replay(position, &mut |_| Ok(())).unwrap_err();
        assert!(error.is::<Forgotten>(), "{position}");
    }
    assert_eq!(super::compaction::store(&log).len(), 3);
}
