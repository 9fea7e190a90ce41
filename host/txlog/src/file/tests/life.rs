//! The log from its first entry to its last, on a disk that does its work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::compaction::fill;
use super::*;
use crate::Entry;
use crate::file::largest_group;

#[test]
fn what_was_appended_comes_back_in_order_and_whole() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    let events = [
        put("a", b"1"),
        Event::Delete("a".into()),
        put("", b""),
        Event::Put(Put {
            key: "käy\n\t".into(),
            value: (0..=255).collect(),
            metadata: vec![("content-type".into(), "text/plain".into()), (String::new(), "ü".into())],
            expires: Some(u64::MAX),
        }),
    ];
    assert_eq!(append(&log, 7, &events[..2]), 1);
    assert_eq!(append(&log, 8, &events[2..]), 3);
    assert!(durable(&log, 4));
    let expected: Vec<Owned> =
        events.iter().zip(1..).map(|(event, at)| (at, if at < 3 { 7 } else { 8 }, describe_owned(event))).collect();
    assert_eq!(replayed(&log), expected);
    assert_eq!(replayed_after(&log, 2).unwrap(), expected[2..]);
    log.close().unwrap();
    assert_eq!(replayed(&open(&disk).unwrap()), expected);
}

#[test]
fn an_empty_group_writes_nothing() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    assert_eq!(log.append(1, &[]).unwrap(), 1);
    commit(&log, put("a", b"1"));
    assert_eq!(log.append(1, &[]).unwrap(), 2);
    assert_eq!(log.appended(), 1);
    assert_eq!(replayed(&log).len(), 1);
}

#[test]
fn a_group_that_is_too_large_is_refused_before_anything_changed() {
    let log = open(&FakeDisk::default()).unwrap();
    let refused = log.append(1, &[put("a", &[0; GROUP_BYTES as usize])]);
    assert!(matches!(refused, Err(AppendError::TooLarge(GROUP_BYTES))));
    // The largest that is taken: 25 bytes are the entry's own.
    assert_eq!(commit(&log, put("a", &[0; GROUP_BYTES as usize - 26])), 1);
}

#[test]
fn segments_that_cannot_hold_the_largest_group_or_are_too_large_are_refused() {
    let group_bytes = largest_group(SEGMENT_BYTES);
    let too_small = Options { group_bytes: group_bytes + 1, ..options() };
    let too_large = Options { segment_bytes: 1 << 32, ..options() };
    for (options, least) in [(too_small, 4097), (too_large, 2631)] {
        let error = FileLog::open_on(Arc::new(FakeDisk::default()), options, None).err().unwrap().to_string();
        assert!(error.contains(&format!("between {least} and 4294967295")), "{error}");
    }
    let largest = Options { segment_bytes: u32::MAX.into(), ..options() };
    for options in [Options { group_bytes, ..options() }, largest] {
        assert!(FileLog::open_on(Arc::new(FakeDisk::default()), options, None).is_ok());
    }
}

#[test]
fn it_goes_on_where_it_was_after_being_closed() {
    let disk = FakeDisk::default();
    for round in 0..20_u64 {
        let log = open(&disk).unwrap();
        assert_eq!(log.appended(), round * 5);
        assert_eq!(replayed(&log).len() as u64, round * 5);
        for number in 1..=5 {
            assert_eq!(commit(&log, put("key", &[7; 200])), round * 5 + number);
        }
        log.close().unwrap();
        assert!(matches!(log.append(1, &[put("a", b"1")]), Err(AppendError::Unavailable)));
    }
    assert!(disk.names().len() > 5, "{:?}", disk.names());
}

#[test]
fn that_it_was_closed_is_written_once_and_where_there_is_room() {
    let (disk, name) = (FakeDisk::default(), "0000000001.seg");
    let log = open(&disk).unwrap();
    commit(&log, put("key", b""));
    log.close().unwrap();
    let closed = disk.read(name);
    open(&disk).unwrap().close().unwrap();
    assert!(disk.read(name) == closed);

    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    // They take the segment to its last byte.
    for _ in 0..2 {
        commit(&log, put("key", &[1; 1700]));
    }
    log.close().unwrap();
    assert_eq!(disk.read(name).len() as u64, SEGMENT_BYTES);
    assert_eq!(replayed(&open(&disk).unwrap()).len(), 2);
}

#[test]
fn segments_of_another_size_are_taken_over() {
    let disk = FakeDisk::default();
    let sizes = [4096, 65536, 4096, 8192];
    for (round, segment_bytes) in sizes.into_iter().enumerate() {
        let options = Options { segment_bytes, group_bytes: segment_bytes - 600, ..options() };
        let log = FileLog::open_on(Arc::new(disk.clone()), options, None).unwrap();
        commit(&log, put("large", &vec![1; segment_bytes as usize - 700]));
        commit(&log, put("small", b""));
        assert_eq!(replayed(&log).len(), 2 * (round + 1));
        log.close().unwrap();
    }
}

#[test]
fn many_append_at_once_and_a_replay_runs_beside_them() {
    let disk = FakeDisk::default();
    let log = Arc::new(open(&disk).unwrap());
    let running = Arc::new(AtomicBool::new(true));
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let log = log.clone();
            thread::spawn(move || {
                for number in 0..500 {
                    let key = format!("{writer}/{number}");
                    let sequence = append(&log, 1, &[put(&key, b"first"), put(&key, &[2; 100])]);
                    if number % 50 == 0 {
                        assert!(durable(&log, sequence + 1));
                    }
                }
            })
        })
        .collect();
    let reader = thread::spawn({
        let (log, running) = (log.clone(), running.clone());
        move || {
            let (mut seen, mut after) = (0, 0);
            while running.load(Ordering::Relaxed) || after < log.watermark().durable() {
                after = log
                    .replay(after, &mut |entries| {
                        for entry in entries {
                            seen += 1;
                            assert_eq!(entry.sequence, seen, "nothing twice and nothing left out");
                        }
                        Ok(())
                    })
                    .unwrap();
                assert_eq!(after, seen);
            }
            seen
        }
    });
    for writer in writers {
        writer.join().unwrap();
    }
    assert!(durable(&log, log.appended()));
    running.store(false, Ordering::Relaxed);
    assert_eq!(reader.join().unwrap(), 8 * 500 * 2);
    log.close().unwrap();

    // A group was all or nothing, and in one place.
    let all = replayed(&open(&disk).unwrap());
    assert_eq!(all.len(), 8 * 500 * 2);
    for pair in all.chunks(2) {
        assert_eq!(pair[0].2.split(' ').nth(1), pair[1].2.split(' ').nth(1));
    }
}

/// Shown by damage at the beginning, which a full replay meets and a later one does not.
#[test]
fn catching_up_reads_only_what_is_near_its_end() {
    let disk = FakeDisk::default();
    let options = Options { segment_bytes: 8 << 20, group_bytes: 1 << 20, ..options() };
    let log = FileLog::open_on(Arc::new(disk.clone()), options, None).unwrap();
    let newest = (0..40).map(|number| commit(&log, put(&format!("{number}"), &[1; 100_000]))).last().unwrap();
    let marks = log.shared().catalog.all()[0].marks.len();
    assert!((1..10).contains(&marks), "{marks} places kept of 40 frames");
    let name = &disk.names()[0];
    let mut bytes = disk.read(name);
    bytes[1_000] ^= 1;
    disk.put(name, bytes);

    assert!(replayed_after(&log, 0).is_err());
    for after in newest - 8..=newest {
        assert_eq!(replayed_after(&log, after).unwrap().len() as u64, newest - after);
    }
}

#[test]
fn a_replay_hands_over_a_thousand_entries_or_a_megabyte_at_once() {
    let options = Options { segment_bytes: 8 << 20, group_bytes: 4 << 20, ..options() };
    let log = FileLog::open_on(Arc::new(FakeDisk::default()), options, None).unwrap();
    let batches = |events: &[Event]| {
        let after = append(&log, 1, events) - 1;
        assert!(durable(&log, log.appended()));
        let mut batches = Vec::new();
        let mut count = |entries: &[Entry<'_>]| {
            batches.push(entries.len());
            Ok(())
        };
        log.replay(after, &mut count).unwrap();
        batches
    };
    assert_eq!(batches(&vec![put("small", b""); 2_500]), [1_000, 1_000, 500]);
    let large = [400_000, 400_000, 400_000, 1_500_000, 0, 0].map(|size| put("large", &vec![1; size]));
    assert_eq!(batches(&large), [2, 1, 1, 2]);
}

/// Zeros look like the end of a log.
#[test]
fn a_replay_tells_that_the_end_of_a_segment_is_missing() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    for number in 0..8 {
        commit(&log, put(&format!("{number}"), &[1; 1000]));
    }
    let sealed = &log.shared().catalog.sealed()[0];
    let name = sealed.numbers.file_name();
    let mut bytes = disk.read(&name);
    bytes[sealed.end as usize - 1096..].fill(0);
    disk.put(&name, bytes);
    let error = replayed_after(&log, 0).unwrap_err().to_string();
    assert!(
        error.contains(&format!("{name} is damaged")) && error.contains("frames are missing at the end of the segment"),
        "{error}"
    );
}

#[test]
fn the_receiver_stops_a_replay() {
    let log = open(&FakeDisk::default()).unwrap();
    commit(&log, put("a", b"1"));
    let error = log.replay(0, &mut |_| anyhow::bail!("enough")).unwrap_err();
    assert_eq!(error.to_string(), "enough");
}

#[test]
fn a_real_directory_is_locked_by_one() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("new").join("data");
    let options = Options { data: data.clone(), ..options() };
    let log = FileLog::open(options.clone()).unwrap();
    commit(&log, put("a", b"1"));
    let error = FileLog::open(options.clone()).err().unwrap().to_string();
    let (data, pid) = (data.display(), std::process::id());
    assert_eq!(
        error,
        format!("data directory {data} is in use by process {pid}; stop it, or give another directory with --data-dir")
    );
    log.close().unwrap();
    assert_eq!(replayed(&FileLog::open(options).unwrap()).len(), 1);
}

#[test]
fn lock_survives_removal_of_its_file() {
    let directory = tempfile::tempdir().unwrap();
    let options = Options { data: directory.path().into(), ..options() };
    let log = FileLog::open(options.clone()).unwrap();
    std::fs::remove_file(directory.path().join("LOCK")).unwrap();
    let error = FileLog::open(options.clone()).err().unwrap().to_string();
    assert!(error.contains("is in use by another process"), "{error}");
    log.close().unwrap();
    assert!(FileLog::open(options).is_ok());
}

#[test]
fn holder_that_is_ending_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let options = Options { data: directory.path().into(), ..options() };
    FileLog::open(options.clone()).unwrap().close().unwrap();
    let mut ended = std::process::Command::new("true").spawn().unwrap();
    ended.wait().unwrap();
    std::fs::write(directory.path().join("LOCK"), format!("{}\n", ended.id())).unwrap();
    let held = std::fs::File::open(directory.path().join("log")).unwrap();
    held.lock().unwrap();
    let opening = std::thread::spawn(move || FileLog::open(options).map(drop));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!opening.is_finished());
    drop(held);
    opening.join().unwrap().unwrap();
}

#[test]
fn what_was_compacted_is_gone_from_a_real_directory() {
    let directory = tempfile::tempdir().unwrap();
    let log = FileLog::open(Options { data: directory.path().into(), ..options() }).unwrap();
    fill(&log, 100);
    eventually(|| log.shared().catalog.all().len() <= 2);
    log.close().unwrap();
    let is_there = |segment: &str| directory.path().join("log").join(segment).exists();
    assert!(!is_there("0000000001.seg") && !is_there("0000000002.seg"));
}

#[test]
fn a_data_directory_that_is_none_is_said_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    for data in [file.clone(), file.join("below")] {
        let error = format!("{:#}", FileLog::open(Options { data, ..options() }).err().unwrap());
        assert!(error.ends_with("is not a directory; give a directory with --data-dir"), "{error}");
        assert!(!error.contains('\n'));
    }
}
