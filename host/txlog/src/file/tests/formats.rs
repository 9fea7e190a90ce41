//! Logs that were written by each format: they open for ever.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::file::disk::Directory;
use crate::file::{Damage, Finding, Home, Offline, offline, verify};
use crate::{Incarnation, text};

/// A data directory of the fixtures.
pub fn directory(format: u32, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("testdata/format-{format}/{name}"))
}

/// The log of a data directory, on a disk in memory.
pub fn load(data: &Path) -> FakeDisk {
    let disk = FakeDisk::default();
    for file in fs::read_dir(data.join("log")).unwrap() {
        let file = file.unwrap();
        disk.put(file.file_name().to_str().unwrap(), fs::read(file.path()).unwrap());
    }
    disk
}

/// As `kvs txlog export` prints it.
fn exported(log: &FileLog) -> String {
    let mut lines = String::new();
    log.replay(0, &mut |entries| {
        entries.iter().for_each(|entry| text::print(entry, &mut lines));
        Ok(())
    })
    .unwrap();
    lines
}

fn recorded(format: u32, name: &str) -> String {
    fs::read_to_string(directory(format, &format!("{name}.export.tsv"))).unwrap()
}

/// The sequence of the last entry.
fn newest(export: &str) -> u64 {
    export.lines().last().map_or(0, |line| line.split('\t').next().unwrap().parse().unwrap())
}

/// A copy of a fixture: to open a log can change it.
fn copied(format: u32, name: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_files(&directory(format, name), copy.path());
    copy
}

/// Copies the log of a data directory into another.
pub fn copy_files(from: &Path, to: &Path) {
    fs::create_dir_all(to.join("log")).unwrap();
    for file in fs::read_dir(from.join("log")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join("log").join(file.file_name())).unwrap();
    }
}

pub fn open_in(data: &Path) -> FileLog {
    FileLog::open(Options { data: data.into(), segment_bytes: 8192, ..options() }).unwrap()
}

/// The same without compaction, which would change at any moment what is exported.
fn open_without_compaction(data: &Path) -> FileLog {
    let options = Options { data: data.into(), segment_bytes: 8192, ..options() };
    FileLog::open_on(Arc::new(Directory::new(data.join("log"))), options, None).unwrap()
}

/// The formats of the files, which are sound, in ascending order.
fn formats(data: &Path) -> Vec<u32> {
    let mut formats = Vec::new();
    let mut report = |finding| match finding {
        Finding::Sound { format, .. } => formats.push(format),
        Finding::Torn(what) | Finding::Corrupt(what) => panic!("{what}"),
    };
    verify(data, &mut report, &mut |_| ()).unwrap();
    // Compaction may have rewritten one in between.
    formats.sort_unstable();
    formats.dedup();
    formats
}

#[test]
fn format_1_opens_and_goes_on_in_format_2() {
    for name in ["clean", "compacted", "killed", "torn", "empty"] {
        let data = copied(1, name);
        let mut export = recorded(1, name);
        let mut log = open_without_compaction(data.path());
        assert!(exported(&log) == export, "{name}");
        assert_eq!(log.appended(), newest(&export), "{name}");
        for round in 0..3 {
            let sequence = commit(&log, put("next", b""));
            // Nobody can tell whether it was copied before it had an identity.
            assert_eq!((sequence, log.history().incarnations()), (newest(&export) + 1, &[][..]), "{name}");
            export = exported(&log);
            log.close().unwrap();
            if round == 0 {
                assert_eq!(formats(data.path()), [1, 2], "{name}");
            }
            log = open_without_compaction(data.path());
            assert!(exported(&log) == export, "{name}");
        }
    }
}

#[test]
fn format_1_corruption_is_refused_with_its_place() {
    let data = copied(1, "corrupt");
    let log = open_in(data.path());
    let error = log.replay(0, &mut |_| Ok(())).unwrap_err();
    let damage = error.downcast_ref::<Damage>().expect("it is damaged");
    assert_eq!((damage.file.file_name().unwrap().to_str(), damage.offset), (Some("0000000003.seg"), 10_112));
}

#[test]
fn format_1_compacts_to_format_2() {
    let data = copied(1, "clean");
    Offline::open(data.path()).unwrap().compact(&mut |_| ()).unwrap();
    let log = open_in(data.path());
    assert_eq!((log.appended(), log.history().incarnations()), (newest(&recorded(1, "clean")), &[][..]));
    drop(log);
    assert_eq!(formats(data.path()), [2]);
}

#[test]
fn format_1_copy_is_noticed_once_it_was_opened() {
    let data = copied(1, "killed");
    drop(open_in(data.path()));
    let copy = tempfile::tempdir().unwrap();
    copy_files(data.path(), copy.path());
    let log = open_in(copy.path());
    assert_eq!(log.history().incarnations()[0].fork, log.appended());
}

/// The logs of format 2, each without what came of it by being opened.
const FORMAT_2: [&str; 7] = ["clean", "compacted", "killed", "torn", "empty", "incarnations", "compacted-incarnations"];

#[test]
fn format_2_opens_for_ever() {
    for name in FORMAT_2 {
        let data = copied(2, name);
        let export = recorded(2, name);
        let log = open_in(data.path());
        assert!(exported(&log) == export, "{name}");
        let history = log.history();
        let lines: Vec<_> = history.incarnations().iter().map(line).collect();
        let known = fs::read_to_string(directory(2, &format!("{name}.incarnations.tsv"))).unwrap();
        let known: Vec<_> = known.lines().collect();
        assert_eq!(lines[..known.len()], known, "{name}");
        // It is a copy, and an empty one gave no sequences.
        let begun = usize::from(name != "empty");
        assert_eq!(lines.len(), known.len() + begun, "{name}");
        assert_eq!(commit(&log, put("next", b"")), history.next(newest(&export)), "{name}");
        log.close().unwrap();
        assert_eq!(formats(data.path()), [2], "{name}");
        let log = open_in(data.path());
        assert_eq!(*log.history(), *history, "{name}");
    }
}

fn line(incarnation: &Incarnation) -> String {
    let Incarnation { id, parent, fork, first } = incarnation;
    format!("{id}\t{parent}\t{fork}\t{first}")
}

/// Writes the fixtures of the format that is written now, those that are not there: `cargo test --release -p kvs-txlog
/// make_fixtures -- --ignored`. They are made once, before a format is released.
#[test]
#[ignore = "it writes to testdata/"]
fn make_fixtures() {
    let options = |durability| Options { segment_bytes: 8192, durability, ..options() };
    let open = |disk: &FakeDisk| FileLog::open_on(Arc::new(disk.clone()), options(Durability::Sync), None).unwrap();
    for name in FORMAT_2 {
        if directory(2, name).exists() {
            continue;
        }
        let mut disk = FakeDisk::default();
        if name != "empty" {
            let log = open(&disk);
            write_zoo(&log, 1_700_000_000_000);
            log.close().unwrap();
            write_zoo(&open(&disk), 1_700_000_100_000);
        }
        match name {
            "killed" | "torn" => {
                let log = open(&disk);
                commit(&log, put("last", &[0xe5; 200]));
                disk = disk.copy();
                if name == "torn" {
                    let segment = log.shared().catalog.all().last().unwrap().clone();
                    let mut bytes = disk.read(&segment.numbers.file_name());
                    bytes[segment.end as usize - 100..segment.end as usize].fill(0);
                    disk.put(&segment.numbers.file_name(), bytes);
                }
            }
            "compacted" => {
                super::compaction::compact_at(&open(&disk), 1_700_000_050_000, 0, 1_000);
            }
            "incarnations" | "compacted-incarnations" => {
                disk.become_copy();
                write_zoo(&open(&disk), 1_700_000_200_000);
                // Not closed, and written without syncs.
                let log = FileLog::open_on(Arc::new(disk.clone()), options(Durability::Os), None).unwrap();
                write_zoo(&log, 1_700_000_300_000);
                disk = disk.copy();
                offline::fork(Arc::new(disk.clone()), options(Durability::Sync)).unwrap();
                // Before it has an entry.
                disk.become_copy();
                let log = open(&disk);
                write_zoo(&log, 1_700_000_400_000);
                if name == "compacted-incarnations" {
                    super::compaction::compact_at(&log, 1_700_000_150_000, 0, 1_000);
                    super::compaction::compact_at(&log, 1_700_000_150_000, 0, 1_000);
                }
                log.close().unwrap();
            }
            _ => drop(open(&disk)),
        }
        save(name, &disk);
    }
}

/// Entries of all kinds.
fn write_zoo(log: &FileLog, time: u64) {
    let metadata = vec![("content-type".into(), "text/plain; charset=utf-8".into()), (String::new(), "ü".into())];
    for number in 0..12_u64 {
        let key = format!("käy {}", number % 7);
        let value = vec![number as u8; number as usize * 90];
        let expires = (number % 5 == 0).then_some(time + 3_600_000);
        let event = Event::Put(Put { key, value, metadata: metadata.clone(), expires });
        let gone = format!("gone {}", number % 2);
        let first = append(log, time + number, &[event, put(&gone, b"1"), Event::Delete(gone.clone())]);
        assert!(durable(log, first + 2));
    }
}

fn save(name: &str, disk: &FakeDisk) {
    // Nothing writes to a copy.
    let disk = disk.copy();
    let log = directory(2, name).join("log");
    fs::create_dir_all(&log).unwrap();
    for file in disk.names().into_iter().filter(|file| !file.ends_with(".tmp")) {
        fs::write(log.join(&file), disk.read(&file)).unwrap();
    }
    let shared =
        Shared::read(Home { disk: Arc::new(disk), data: "data".into(), env: kvs_runtime::Env::real() }, &options())
            .unwrap();
    let mut export = String::new();
    replay::replay(&shared, 0, &mut |entries| {
        entries.iter().for_each(|entry| text::print(entry, &mut export));
        Ok(())
    })
    .unwrap();
    fs::write(directory(2, &format!("{name}.export.tsv")), export).unwrap();
    let known: String = shared.history.incarnations().iter().map(|one| line(one) + "\n").collect();
    fs::write(directory(2, &format!("{name}.incarnations.tsv")), known).unwrap();
}
