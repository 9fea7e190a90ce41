//! What `kvs txlog` does with a log that nobody uses.

use super::*;
use crate::file::verify::verify_in;
use crate::file::{Finding, Home, Offline, disk::Disk};

/// What verification says: how many entries, and what is wrong or torn.
fn verified(disk: &FakeDisk) -> (u64, Vec<String>) {
    let home = Home { disk: Arc::new(disk.clone()), data: "data".into(), env: Env::real() };
    let (mut all, mut covered, mut said) = (0, vec![(0, 0)], Vec::new());
    let names = disk.names();
    let mut report = |finding| match finding {
        Finding::Sound { entries, first, last, .. } => {
            all += entries;
            covered.push((first, last));
        }
        Finding::Torn(what) => said.push(format!("torn: {what}")),
        Finding::Corrupt(what) => said.push(what),
    };
    verify_in(&home, &mut report, &mut |_| ()).unwrap();
    assert_eq!(disk.names(), names, "nothing is changed");
    // Every sequence is covered, each once.
    let no_gaps = covered.is_sorted_by(|(_, last), (first, _)| last + 1 == *first);
    assert!(no_gaps || !said.is_empty(), "{covered:?}");
    (all, said)
}

/// Some segments, compacted or not, and one that was closed.
fn log_of(puts: u64, compacted: bool) -> FakeDisk {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    for number in 0..puts {
        commit(&log, put(&format!("key {}", number % 9), &[number as u8; 500]));
    }
    if compacted {
        super::compaction::compact_at(&log, 1, 0, 100);
    }
    log.close().unwrap();
    disk
}

#[test]
fn verify_accepts_intact_log() {
    assert_eq!(verified(&log_of(40, false)), (40, vec![]));
    let (entries, said) = verified(&log_of(40, true));
    assert!((9..18).contains(&entries) && said.is_empty(), "{entries} {said:?}");
    // Of one whose newest entries compaction has dropped.
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    while log.shared().catalog.sealed().len() < 2 {
        commit(&log, Event::Delete("nothing".into()));
    }
    super::compaction::compact_at(&log, 1, 0, 100);
    log.close().unwrap();
    let (entries, said) = verified(&disk);
    assert!(entries < log.appended() && said.is_empty(), "{entries} {said:?}");
}

/// A fault of the writer, not damage: all checksums are right.
#[test]
fn verify_finds_gap_in_uncompacted_segment() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    append(&log, 1, &[put("a", b""), put("b", b"")]);
    assert!(durable(&log, 2));
    let (disk, name) = (disk.copy(), "0000000001.seg");
    let sound = disk.read(name);
    let (head, body) = (512, 512 + 64);
    let forge = |at: usize, byte: u8| {
        let mut bytes = sound.clone();
        bytes[at] = byte;
        for (from, to, checksum) in [(body, body + 56, head + 48), (head, head + 60, head + 60)] {
            let right = crc32c::crc32c(&bytes[from..to]).to_le_bytes();
            bytes[checksum..checksum + 4].copy_from_slice(&right);
        }
        disk.put(name, bytes);
        verified(&disk)
    };
    assert_eq!(forge(head + 8, 1), (2, vec![]), "what is there is written once more");
    let frame = format!("data/log/{name} at byte {head}: the sequences of a frame are out of order");
    assert_eq!(forge(head + 8, 2), (0, vec![frame]));
    let entry = format!("data/log/{name} at byte {head}: the sequence of an entry is out of order");
    for offset in [0, 2] {
        assert_eq!(forge(body + 26, offset), (0, vec![entry.clone()]));
    }
}

#[test]
fn verify_finds_every_flipped_bit() {
    for compacted in [false, true] {
        let disk = log_of(12, compacted);
        let sound = verified(&disk).0;
        for name in disk.names().iter().filter(|name| name.ends_with(".seg")) {
            let whole = disk.read(name);
            for bit in 0..whole.len() * 8 {
                let disk = disk.copy();
                let mut bytes = whole.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                disk.put(name, bytes);
                let (entries, said) = verified(&disk);
                assert!(!said.is_empty() && entries <= sound, "bit {bit} of {name}");
            }
        }
    }
}

#[test]
fn verify_continues_after_corruption() {
    let disk = log_of(40, false);
    let mut bytes = disk.read("0000000002.seg");
    bytes[600] ^= 1;
    disk.put("0000000002.seg", bytes);
    disk.remove("0000000004.seg").unwrap();
    let (entries, said) = verified(&disk);
    assert!(entries >= 20, "{entries}");
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].starts_with("data/log/0000000002.seg at byte 512: the checksum of a frame is wrong"), "{said:?}");
    assert_eq!(said[1], "data/log/0000000004.seg is missing");
}

#[test]
fn verify_finds_missing_frames_and_odd_names() {
    let disk = log_of(40, true);
    let name = disk.names().into_iter().find(|name| name.contains('-')).unwrap();
    let mut bytes = disk.read(&name);
    // All its frames, which are one.
    bytes[512..].fill(0);
    disk.put(&name, bytes);
    disk.put("3.seg", Vec::new());
    let missing = format!("data/log/{name} at byte 512: frames are missing at the end of the segment");
    let stranger = "data/log/3.seg is not a segment of a log; move it away".to_owned();
    assert_eq!(verified(&disk).1, [stranger, missing]);
}

#[test]
fn verify_accepts_torn_tail() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    commit(&log, put("a", b"1"));
    commit(&log, put("b", b"2"));
    let disk = disk.copy();
    let mut bytes = disk.read("0000000001.seg");
    bytes[612] ^= 1;
    disk.put("0000000001.seg", bytes);
    let (entries, said) = verified(&disk);
    assert_eq!((entries, said.len()), (1, 1));
    assert!(said[0].starts_with("torn: data/log/0000000001.seg at byte 608"), "{said:?}");
}

#[test]
fn verify_rejects_torn_write_in_older_segment() {
    let disk = log_of(40, false);
    let mut bytes = disk.read("0000000001.seg");
    let last = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[last] ^= 1;
    disk.put("0000000001.seg", bytes);
    let (_, said) = verified(&disk);
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].starts_with("data/log/0000000001.seg at byte "), "{said:?}");
    assert!(said[0].ends_with("yet a later segment exists"), "{said:?}");
}

#[test]
fn verify_finds_missing_end_before_empty_segment() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    for key in ["key 1", "key 2"] {
        commit(&log, put(key, &[1; 500]));
    }
    eventually(|| disk.names().contains(&"0000000002.seg".into()));
    log.close().unwrap();
    let mut bytes = disk.read("0000000001.seg");
    // The second of two frames of 600 bytes, after a head of 512.
    bytes[1112..].fill(0);
    disk.put("0000000001.seg", bytes);
    let expected = "the log ends with sequence 1, but 2 had been durable";
    assert_eq!(verified(&disk), (1, vec![expected.to_owned()]));
}

#[test]
fn offline_compaction_refuses_log_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path();
    let error = Offline::open(data).err().unwrap().to_string();
    assert!(error.starts_with("there is no log in"), "{error}");
    let options = Options { data: data.into(), ..options() };
    let log = FileLog::open(options.clone()).unwrap();
    for number in 0..40_u64 {
        commit(&log, put("key", &[number as u8; 500]));
    }
    commit(&log, put("gone", b""));
    commit(&log, Event::Delete("gone".into()));
    assert!(Offline::open(data).err().unwrap().to_string().contains("is in use by process"));
    log.close().unwrap();

    let offline = Offline::open(data).unwrap();
    assert!(offline.compact(&mut |_| ()).unwrap() > 0);
    assert_eq!(offline.compact(&mut |_| ()).unwrap(), 0, "there is nothing left to do");
    let mut left = Vec::new();
    offline
        .replay(0, &mut |entries| {
            left.extend(entries.iter().map(|entry| entry.sequence));
            Ok(())
        })
        .unwrap();
    assert_eq!((left, offline.appended()), (vec![40], 42));
    drop(offline);
    let log = FileLog::open(options).unwrap();
    assert_eq!(commit(&log, put("key", b"")), 43);
}

/// The system's clock is a year behind the newest entry, and no server has replayed the log.
#[test]
fn offline_compaction_drops_deletes_of_log_ahead_of_the_clock() {
    let directory = tempfile::tempdir().unwrap();
    let log = FileLog::open(Options { data: directory.path().into(), ..options() }).unwrap();
    let ahead = Env::real().clock.unix_ms() + 365 * 86_400_000;
    append(&log, ahead - 2, &[put("gone", b""), Event::Delete("gone".into())]);
    append(&log, ahead, &[put("stays", b"")]);
    log.close().unwrap();

    let offline = Offline::open(directory.path()).unwrap();
    offline.compact(&mut |_| ()).unwrap();
    let mut left = Vec::new();
    offline
        .replay(0, &mut |entries| {
            left.extend(entries.iter().map(|entry| entry.sequence));
            Ok(())
        })
        .unwrap();
    assert_eq!(left, [3]);
}
