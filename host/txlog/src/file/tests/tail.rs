//! What a crash leaves at the end of the log, and what no crash leaves.

use std::io::ErrorKind;

use super::disk::Operation;
use super::*;
use crate::file::disk::Disk;

/// A log of one segment whose frames begin at the returned offsets; the last offset is where the last frame ends. It was
/// not closed.
fn crashed(frames: u64) -> (FakeDisk, Vec<u64>) {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    let mut offsets = vec![512];
    for number in 1..=frames {
        commit(&log, put(&format!("key {number}"), &[number as u8; 50]));
        offsets.push(offsets.last().unwrap() + 64 + (25 + 5 + 50_u64).next_multiple_of(8));
    }
    (disk.copy(), offsets)
}

fn entries(disk: &FakeDisk) -> anyhow::Result<u64> {
    let entries = recovered(disk)?;
    assert!(entries.iter().zip(1..).all(|(entry, sequence)| entry.0 == sequence), "never wrong data");
    Ok(entries.len() as u64)
}

const NAME: &str = "0000000001.seg";

#[test]
fn tail_torn_at_any_byte_is_truncated() {
    let (disk, offsets) = crashed(3);
    let whole = disk.read(NAME);
    for torn_at in offsets[2]..offsets[3] {
        let disk = disk.copy();
        let mut bytes = whole.clone();
        bytes[torn_at as usize..].fill(0);
        let unfinished = bytes != whole;
        disk.put(NAME, bytes);
        let kept = if unfinished { 2 } else { 3 };
        assert_eq!(entries(&disk).unwrap(), kept, "torn at {torn_at}");
        let copies = disk.names().iter().filter(|name| name.ends_with(".torn")).count();
        assert_eq!(copies, usize::from(unfinished && torn_at > offsets[2]), "torn at {torn_at}");
        let log = open(&disk).unwrap();
        assert_eq!(commit(&log, put("again", b"")), kept + 1);
        drop(log);
        assert_eq!(entries(&disk).unwrap(), kept + 1);
    }
}

#[test]
fn tail_with_any_bad_sector_is_truncated() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    commit(&log, put("first", b"1"));
    commit(&log, put("second", &[0xee; 1900]));
    let disk = disk.copy();
    let whole = disk.read(NAME);
    for sector in 1..5 {
        for byte in [0, 0x55] {
            let disk = disk.copy();
            let mut bytes = whole.clone();
            // Of the frames: the first is before byte 608.
            bytes[(sector * 512).max(608)..(sector + 1) * 512].fill(byte);
            disk.put(NAME, bytes);
            assert_eq!(entries(&disk).unwrap(), 1, "sector {sector} of {byte}");
            assert_eq!(entries(&disk).unwrap(), 1, "and it stays so");
        }
    }
}

#[test]
fn copy_of_torn_tail_has_its_bytes() {
    let (disk, offsets) = crashed(2);
    let mut bytes = disk.read(NAME);
    bytes[offsets[1] as usize + 70] ^= 1;
    let torn = bytes[offsets[1] as usize..].to_vec();
    disk.put(NAME, bytes);
    assert_eq!(entries(&disk).unwrap(), 1);
    let copy = disk.read(&format!("{NAME}.{}.1.torn", offsets[1]));
    assert_eq!(torn[..copy.len()], copy);
    assert!(torn[copy.len()..].iter().all(|byte| *byte == 0));
}

#[test]
fn torn_tail_is_not_copied_on_full_disk() {
    let (torn, offsets) = crashed(2);
    let mut bytes = torn.read(NAME);
    bytes[offsets[1] as usize + 70] ^= 1;
    torn.put(NAME, bytes.clone());
    let failing = |error: ErrorKind| {
        let disk = torn.copy();
        disk.before_each(move |operation| match operation {
            Operation::Create { name, .. } if name.contains(".torn") => Err(error.into()),
            _ => Ok(()),
        });
        disk
    };
    let full = failing(ErrorKind::StorageFull);
    assert_eq!(entries(&full).unwrap(), 1);
    assert!(!full.names().iter().any(|name| name.contains(".torn")));
    let broken = failing(ErrorKind::Other);
    assert!(entries(&broken).is_err());
    assert_eq!(broken.read(NAME), bytes, "nothing was cut");
}

#[test]
fn corruption_before_last_frame_is_located() {
    let (disk, offsets) = crashed(3);
    for frame in [0, 1] {
        let disk = disk.copy();
        let mut bytes = disk.read(NAME);
        bytes[offsets[frame] as usize + 70] ^= 1;
        disk.put(NAME, bytes.clone());
        let error = format!("{:#}", open(&disk).err().unwrap());
        let place = format!("data/log/{NAME} is damaged at byte {}: the checksum of a frame is wrong", offsets[frame]);
        assert!(error.contains(&place), "{error}");
        assert!(error.contains("; `kvs txlog verify --data-dir data` lists"), "{error}");
        assert_eq!(disk.read(NAME), bytes, "nothing was changed");
    }
}

#[test]
fn distant_frame_proves_torn_frame_was_durable() {
    // A megabyte is looked through at a time, from the eighth byte of the torn frame on.
    let border = (1 << 20) + 8;
    for size in [border - 64, border - 8, border, border + 8, 2 * border + 64] {
        let disk = FakeDisk::default();
        let options = Options { segment_bytes: 4 << 20, group_bytes: 3 << 20, ..options() };
        let log = FileLog::open_on(Arc::new(disk.clone()), options, None).unwrap();
        commit(&log, put("key", b""));
        commit(&log, put("key", &vec![1; size - 64 - 25 - 3]));
        commit(&log, put("key", b""));
        let (disk, torn) = (disk.copy(), 512 + 64 + 32);
        let mut bytes = disk.read(NAME);
        bytes[torn + 100] ^= 1;
        disk.put(NAME, bytes);
        let error = format!("{:#}", entries(&disk).expect_err("what had been durable is gone"));
        assert!(error.contains(&format!("according to the frame at byte {}", torn + size)), "{error}");
    }
}

#[test]
fn corrupt_last_entry_of_closed_log_is_not_torn() {
    let (disk, offsets) = crashed(2);
    open(&disk).unwrap().close().unwrap();
    let mut bytes = disk.read(NAME);
    bytes[offsets[1] as usize + 70] ^= 1;
    disk.put(NAME, bytes);
    assert!(open(&disk).is_err());
}

#[test]
fn corrupt_end_of_reopened_log_is_not_torn() {
    let (disk, offsets) = crashed(2);
    open(&disk).unwrap().close().unwrap();
    let log = open(&disk).unwrap();
    commit(&log, put("key", b"after it was opened again"));
    let disk = disk.copy();
    disk.remove("watermark").unwrap();
    for byte in 0..64 {
        let disk = disk.copy();
        let mut bytes = disk.read(NAME);
        bytes[offsets[2] as usize + byte] ^= 1;
        disk.put(NAME, bytes);
        let error = format!("{:#}", open(&disk).err().unwrap());
        assert!(error.contains(&format!("{NAME} is damaged at byte {}", offsets[2])), "{error}");
    }
}

#[test]
fn watermark_file_reveals_missing_end() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    commit(&log, put("a", b"1"));
    commit(&log, put("a", b"2"));
    // Written by itself when nothing comes for a while.
    eventually(|| disk.names().contains(&"watermark".into()));
    let disk = disk.copy();
    let mut bytes = disk.read(NAME);
    bytes[608..].fill(0);
    disk.put(NAME, bytes);
    let error = format!("{:#}", open(&disk).err().unwrap());
    assert!(error.contains("the log ends with sequence 1, but 2 had been durable"), "{error}");
}

#[test]
fn foreign_or_corrupt_watermark_file_is_ignored() {
    let closed = |entries: u64| {
        let disk = FakeDisk::default();
        let log = open(&disk).unwrap();
        for _ in 0..entries {
            commit(&log, put("a", b""));
        }
        log.close().unwrap();
        disk
    };
    let disk = closed(2);
    let mut of_more = disk.read("watermark");
    of_more[24] = 3;
    for bytes in [of_more, closed(3).read("watermark"), Vec::new()] {
        disk.put("watermark", bytes);
        assert_eq!(entries(&disk).unwrap(), 2);
    }
}

#[test]
fn unreadable_watermark_file_fails_recovery() {
    let (disk, _) = crashed(2);
    assert_eq!(entries(&disk).unwrap(), 2, "it need not be there");
    disk.put("watermark", vec![0; 36]);
    disk.refuse_to_open("watermark");
    let error = format!("{:#}", entries(&disk).unwrap_err());
    assert!(error.contains("open watermark"), "{error}");
}

#[test]
fn recovery_ignores_pages_of_failed_sync() {
    let (disk, offsets) = crashed(3);
    let mut bytes = disk.read(NAME);
    bytes[offsets[2] as usize..].fill(0);
    disk.put_on_disk(NAME, bytes);
    assert_eq!(entries(&disk).unwrap(), 2);
}

#[test]
fn unsynced_frames_prove_nothing_before_close() {
    let disk = FakeDisk::default();
    let options = Options { durability: Durability::Os, ..options() };
    let log = FileLog::open_on(Arc::new(disk.clone()), options, None).unwrap();
    for _ in 0..3 {
        commit(&log, put("key", &[9; 50]));
    }
    let lose = |disk: &FakeDisk, at: usize| {
        let mut bytes = disk.read(NAME);
        bytes[at] ^= 1;
        disk.put(NAME, bytes);
    };
    // The second or the third of three was lost in a power cut. The first was synced.
    for (at, left) in [(700, 1), (850, 2)] {
        let crashed = disk.copy();
        lose(&crashed, at);
        assert_eq!(entries(&crashed).unwrap(), left);
    }
    let crashed = disk.copy();
    lose(&crashed, 600);
    assert!(entries(&crashed).is_err());

    // To close the log is to sync it, and the frame at its end says so without the watermark file.
    log.close().unwrap();
    disk.remove("watermark").unwrap();
    lose(&disk, 700);
    assert!(entries(&disk).is_err());
}

#[test]
fn missing_renamed_or_foreign_segment_is_refused() {
    let make = || {
        let disk = FakeDisk::default();
        let log = open(&disk).unwrap();
        for number in 0..12_u8 {
            commit(&log, put("key", &[number; 700]));
        }
        disk.copy()
    };
    let refused = |disk: &FakeDisk, what: &str| {
        let error = format!("{:#}", entries(disk).expect_err(what));
        assert!(error.contains(what), "{error}");
        assert!(!error.contains('\n'), "{error}");
    };

    let disk = make();
    disk.remove("0000000001.seg").unwrap();
    refused(&disk, "0000000001.seg is missing");

    let disk = make();
    disk.remove("0000000002.seg").unwrap();
    refused(&disk, "0000000002.seg is missing");

    let disk = make();
    let (one, two) = (disk.read("0000000001.seg"), disk.read("0000000002.seg"));
    disk.put("0000000001.seg", two);
    disk.put("0000000002.seg", one);
    refused(&disk, "0000000001.seg was named 0000000002.seg");

    let disk = make();
    disk.put("0000000002.seg", make().read("0000000002.seg"));
    refused(&disk, "0000000002.seg belongs to another log than 0000000001.seg");

    let disk = make();
    let [one, two] = [700, 7].map(|bytes| {
        let disk = disk.copy();
        let log = open(&disk).unwrap();
        for _ in 0..40 {
            commit(&log, put("key", &vec![1; bytes]));
        }
        disk.copy()
    });
    one.put("0000000005.seg", two.read("0000000005.seg"));
    refused(&one, "0000000006.seg is damaged at byte 512: it does not follow 0000000005.seg");

    let disk = make();
    let mut bytes = disk.read("0000000001.seg");
    bytes[8] = 3;
    let checksum = crc32c::crc32c(&bytes[..508]);
    bytes[508..512].copy_from_slice(&checksum.to_le_bytes());
    disk.put("0000000001.seg", bytes);
    refused(&disk, "format version 3 and this binary reads 1 to 2; use the newer kvs");

    let disk = make();
    disk.put("3.seg", Vec::new());
    refused(&disk, "3.seg is not a segment of a log; move it away");

    let disk = make();
    disk.put("strange", vec![1; 100]);
    disk.put("strange.tmp", vec![1; 100]);
    disk.put("0000000009.seg.tmp", vec![1; 100]);
    assert_eq!(entries(&disk).unwrap(), 12);
    let left = |name: &str| disk.names().contains(&name.into());
    assert!(left("strange") && left("strange.tmp") && !left("0000000009.seg.tmp"));

    let disk = make();
    disk.put("watermark", vec![1; 36]);
    assert_eq!(entries(&disk).unwrap(), 12);
}

/// Of a file that had been of that log before, for instance.
#[test]
fn frames_of_another_log_are_ignored() {
    let [disk, other] = [(); 2].map(|()| crashed(2).0);
    let mut bytes = disk.read(NAME);
    bytes[512..].copy_from_slice(&other.read(NAME)[512..]);
    disk.put(NAME, bytes);
    assert_eq!(entries(&disk).unwrap(), 0);
}

/// As when files of one log that came from two backups are put together: every checksum is right.
#[test]
fn frame_with_wrong_predecessor_is_corruption() {
    let (start, offsets) = crashed(1);
    let [disk, other] = [b"one", b"two"].map(|value| {
        let disk = start.copy();
        let log = open(&disk).unwrap();
        for _ in 0..3 {
            commit(&log, put("key", value));
        }
        disk.copy()
    });
    let second = offsets[1] as usize..offsets[1] as usize + 64 + (25 + 3 + 3_usize).next_multiple_of(8);
    let mut bytes = disk.read(NAME);
    bytes[second.clone()].copy_from_slice(&other.read(NAME)[second.clone()]);
    disk.put(NAME, bytes);
    let error = format!("{:#}", entries(&disk).unwrap_err());
    let expected = format!("at byte {}: a frame does not follow the one before it", second.end);
    assert!(error.contains(&expected), "{error}");
}

#[test]
fn garbage_after_last_frame_is_truncated() {
    let (disk, offsets) = crashed(3);
    let mut bytes = disk.read(NAME);
    bytes.extend([0xa5; 1000]);
    disk.put(NAME, bytes);
    assert_eq!(entries(&disk).unwrap(), 3);
    assert!(disk.read(NAME)[offsets[3] as usize..].iter().all(|byte| *byte == 0));
    assert_eq!(entries(&disk).unwrap(), 3);
}
