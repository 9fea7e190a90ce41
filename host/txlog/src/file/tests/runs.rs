//! Compaction runs: concurrent with writes, on failing disks, over corruption, after a crash, and the size of the log.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::compaction::{Store, compact_at, fill, replay_into, store};
use super::disk::Operation;
use super::*;
use crate::file::Damage;
use crate::file::compact::{self, CompactionParams};
use crate::file::compactor::Debt;
use crate::file::disk::Disk;
use crate::file::segment::{self, Numbers};

#[test]
fn commit_does_not_wait_for_compaction() {
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

/// Waits until the next segment is preallocated: after that only commits and compaction write.
pub fn wait_for_preallocated_segment(log: &FileLog, disk: &FakeDisk) {
    let spare = Numbers::one(log.shared.catalog.all().last().unwrap().numbers.last + 1).file_name();
    eventually(|| disk.names().contains(&spare));
}

#[test]
fn compaction_syncs_in_commit_sized_pieces() {
    let disk = FakeDisk::default();
    let segment_bytes = 16 << 20;
    let options = Options { segment_bytes, group_bytes: 1 << 20, ..options() };
    let log = FileLog::open_on(Arc::new(disk.clone()), options, None).unwrap();
    for number in 0..40 {
        commit(&log, put(&format!("key {}", number % 10), &vec![1; 1_000_000]));
    }
    // Preallocation writes larger pieces.
    wait_for_preallocated_segment(&log, &disk);
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
fn compaction_reports_every_byte_once() {
    let options = Options { segment_bytes: 16 << 20, group_bytes: 1 << 20, ..options() };
    let log = FileLog::open_on(Arc::new(FakeDisk::default()), options, None).unwrap();
    for number in 0..40 {
        commit(&log, put(&format!("key {}", number % 10), &vec![1; 1_000_000]));
    }
    let sealed = log.shared.catalog.sealed();
    let bytes: u64 = sealed.iter().map(|segment| segment.end - segment::HEAD_BYTES).sum();
    let (params, mut reported) =
        (CompactionParams { retain_from: u64::MAX, now: 1, min_yield_percent: 0, keys: 100 }, 0);
    let pause = &mut |more| {
        reported += more;
        Ok(())
    };
    assert_eq!(compact::run(&log.shared, &sealed, &params, pause).unwrap().passes, 1);
    assert_eq!(reported, 2 * bytes, "one pass of analysis, and one that copies the live entries");
}

#[test]
fn interrupted_compaction_preserves_the_log() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    fill(&log, 40);
    let before = store(&log);
    // For every operation at which it can be interrupted.
    for operations in 0.. {
        let disk = disk.copy();
        let (shared, _) = recover(Arc::new(disk.clone()), options()).unwrap();
        disk.kill_after(Some(operations));
        let params = CompactionParams { retain_from: u64::MAX, now: 1, min_yield_percent: 25, keys: 100 };
        let done = compact::run(&shared, &shared.catalog.sealed(), &params, &mut |_| Ok(()));
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
        // The run is repeated.
        compact::run(&shared, &shared.catalog.sealed(), &params, &mut |_| Ok(())).unwrap();
        drop(shared);
        let log = open(&disk).unwrap();
        assert_eq!(self::store(&log), before, "stopped after {operations}, and started again");
    }
}

#[test]
fn only_failed_sync_of_compaction_fails_log() {
    // Whether the sync fails or the creation of the file, the error, and whether it is fatal.
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
        // Many times the growth that the write stall allows during a run.
        fill(&log, 100);
        assert_eq!((log.failure(), store(&log).len()), (None, 3));
        log.close().unwrap();
    }
}

#[test]
fn compaction_retries_after_disk_error() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    fill(&log, 40);
    let (tried, attempts) = std::sync::mpsc::channel();
    let before = AtomicU64::new(0);
    disk.before_each(move |operation| match operation {
        Operation::Create { name, .. } if name.contains('-') => {
            let _ = tried.send(());
            if before.fetch_add(1, Ordering::Relaxed) == 0 { Err(ErrorKind::StorageFull.into()) } else { Ok(()) }
        }
        _ => Ok(()),
    });
    let all = log.shared.catalog.bytes();
    log.compact_in_background().unwrap();
    for _ in 0..2 {
        attempts.recv_timeout(Duration::from_secs(60)).unwrap();
    }
    eventually(|| log.shared.catalog.bytes() < all / 2);
}

#[test]
fn deletes_make_compaction_due() {
    let log = open(&FakeDisk::default()).unwrap();
    let keys: Vec<_> = (0..300).map(|number| format!("key {number}")).collect();
    for some in keys.chunks(3) {
        append(&log, 1, &some.iter().map(|key| put(key, &[1; 500])).collect::<Vec<_>>());
    }
    assert!(durable(&log, 300));
    log.compact_in_background().unwrap();
    eventually(|| log.shared.metrics.compactions.get() > 0);
    let all = log.shared.catalog.bytes();
    // Far too few bytes to make a run due by size.
    for some in keys.chunks(50) {
        append(&log, 1, &some.iter().cloned().map(Event::Delete).collect::<Vec<_>>());
    }
    assert!(durable(&log, 600));
    eventually(|| log.shared.catalog.bytes() < all / 2);
    assert_eq!(store(&log).len(), 0);
}

#[test]
fn unsealed_deletes_make_next_compaction_due() {
    for is_reopened in [false, true] {
        let disk = FakeDisk::default();
        let mut log = open(&disk).unwrap();
        let keys: Vec<_> = (0..50).map(|number| format!("key {number}")).collect();
        for some in keys.chunks(3) {
            append(&log, 1, &some.iter().map(|key| put(key, &[1; 500])).collect::<Vec<_>>());
        }
        // In the newest segment, which is not compacted.
        append(&log, 1, &keys.iter().cloned().map(Event::Delete).collect::<Vec<_>>());
        assert!(durable(&log, 100));
        if is_reopened {
            drop(log);
            log = open(&disk).unwrap();
        }
        log.compact_in_background().unwrap();
        eventually(|| log.shared.metrics.compactions.get() > 0);
        let all = log.shared.catalog.bytes();
        // Just enough to begin the next segment.
        for _ in 0..6 {
            append(&log, 1, &[put("another", &[1; 500])]);
        }
        eventually(|| log.shared.catalog.bytes() < all / 2);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn write_stall_is_proportional_to_bytes_written(
        needed in 0..1_u64 << 40, segment_bytes in 1_u64 << 16..1 << 32, bytes in 1_u64..4 << 20, done in 0.0..1.0,
    ) {
        // The maximum size when a run becomes due: a third may be garbage, or is in the segment just sealed.
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
fn compaction_refuses_corrupt_segment() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    fill(&log, 40);
    let mut bytes = disk.read("0000000002.seg");
    bytes[600] ^= 1;
    disk.put("0000000002.seg", bytes);
    wait_for_preallocated_segment(&log, &disk);
    let names = disk.names();
    let params = CompactionParams { retain_from: u64::MAX, now: 1, min_yield_percent: 25, keys: 100 };
    let error = compact::run(&log.shared, &log.shared.catalog.sealed(), &params, &mut |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("0000000002.seg is damaged at byte 512"), "{error}");
    assert_eq!(disk.names(), names);
}

#[test]
fn recovery_removes_replaced_segments() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    fill(&log, 40);
    let before = store(&log);
    let old = disk.copy();
    compact_at(&log, 1, 25, 100);
    drop(log);
    // The removal of the old files was lost in the crash.
    for name in old.names().iter().filter(|name| name.as_str() < "0000000004.seg") {
        disk.put(name, old.read(name));
    }
    let log = open(&disk).unwrap();
    assert_eq!(store(&log), before);
    assert!(!disk.names().contains(&"0000000002.seg".into()));
    // A compacted segment of another log does not replace these.
    let names: Vec<_> = disk.names().into_iter().filter(|name| name.contains('-')).collect();
    assert_eq!(names.len(), 1);
    disk.remove(&names[0]).unwrap();
    assert!(open(&disk).err().unwrap().root_cause().to_string().contains("0000000001.seg is missing"));
}
