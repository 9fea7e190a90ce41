//! Frames of format 2: kinds, flags, epochs and incarnations, and what refuses a wrong one.

use super::compaction::{compact_at, fill};
use super::formats::open_in;
use super::incarnations::{begun, closed, os, wrong};
use super::*;
use crate::Incarnation;
use crate::file::frame::{Builder, CLOSE, ENTRIES, INCARNATION};
use crate::file::segment::Numbers;
use crate::file::{Home, Offline, incarnations};
use crate::incarnation::JUMP;

/// Adds a frame whose checksums are right to the newest segment of a log, or to its spare.
fn forge(disk: &FakeDisk, to_spare: bool, frame: impl FnOnce(&Shared) -> (Builder, u32)) {
    let home = Home { disk: Arc::new(disk.clone()), data: "data".into(), env: kvs_runtime::Env::real() };
    let shared = Shared::read(home, &options()).unwrap();
    let segment = shared.catalog.all().into_iter().rfind(|segment| segment.end > 512).unwrap();
    let (mut frame, epoch) = frame(&shared);
    frame.seal(shared.log, epoch, 0, segment.after);
    let (name, at) = match to_spare {
        true => (Numbers::one(segment.numbers.last + 1).file_name(), 512),
        false => (segment.numbers.file_name(), segment.end as usize),
    };
    let mut bytes = disk.read(&name);
    bytes[at..at + frame.bytes().len()].copy_from_slice(frame.bytes());
    disk.put(&name, bytes);
}

#[test]
fn unknown_frame_is_refused_by_name() {
    let field = b"\x0b\0\x03xyz\x03\0abc\0\0";
    let cases: [(u8, u32, u32, &[u8], &str); 7] = [
        (3, 0, 0, b"", "the frame is of kind 3, which this binary does not know; use a newer kvs"),
        (200, 0, 0, b"", "the frame is of kind 200, which this binary does not know; use a newer kvs"),
        (CLOSE, 4, 0, b"", "the frame has the flags 0x4, which this binary does not know; use a newer kvs"),
        (CLOSE, 1, 0, field, "has the optional field `xyz`, which this binary does not know; use a newer kvs"),
        (CLOSE, 1, 0, b"\x09\0\x03xyz", "the optional fields of a frame are longer than it"),
        (ENTRIES, 0, 0, b"", "a frame of kind 0 has 0 entries"),
        (CLOSE, 0, 1, b"", "a frame of kind 1 has 1 entries"),
    ];
    for (kind, flags, count, body, what) in cases {
        let disk = closed(5);
        forge(&disk, false, |_| {
            let mut frame = Builder::new(6, Vec::new());
            (frame.kind, frame.flags, frame.count) = (kind, flags, count);
            frame.body().extend_from_slice(body);
            (frame, 9)
        });
        let names = disk.names();
        let error = format!("{:#}", open(&disk.copy()).err().expect(what));
        assert!(error.contains(what) && error.contains("data/log/0000000001.seg at byte "), "{error}");
        assert_eq!(disk.names(), names, "nothing is cut off");
        let wrong = wrong(&disk);
        assert!(wrong.len() == 1 && wrong[0].contains(what), "{wrong:?}");
    }
    // No field at all is no field that is unknown.
    let disk = closed(5);
    forge(&disk, false, |_| {
        let mut frame = Builder::new(6, Vec::new());
        (frame.kind, frame.flags) = (CLOSE, 1);
        frame.body().extend_from_slice(&[0, 0]);
        (frame, 9)
    });
    assert_eq!(wrong(&disk), Vec::<String>::new());
    assert_eq!(replayed(&open(&disk).unwrap()).len(), 5);
}

#[test]
fn unknown_frame_in_an_older_segment_is_refused() {
    let disk = closed(5);
    forge(&disk, false, |_| {
        let mut frame = Builder::new(6, Vec::new());
        (frame.kind, frame.flags) = (CLOSE, 4);
        (frame, 9)
    });
    // Its last frame, as the next segment calls it.
    let bytes = disk.read("0000000001.seg");
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let chain = u32::from_le_bytes(bytes[end - 4..end].try_into().unwrap());
    let log = uuid::Uuid::from_slice(&bytes[16..32]).unwrap();
    let mut frame = Builder::new(6, Vec::new());
    super::super::entry::encode(frame.body(), 0, 1, &put("a", b""));
    frame.count = 1;
    frame.seal(log, 9, 5, chain);
    let mut spare = disk.read("0000000002.seg");
    spare[512..512 + frame.bytes().len()].copy_from_slice(frame.bytes());
    disk.put("0000000002.seg", spare);
    let log = open(&disk).unwrap();
    let error = log.replay(0, &mut |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("0000000001.seg at byte") && error.contains("has the flags 0x4"), "{error}");
}

#[test]
fn wrong_incarnation_is_found() {
    let id = |number| uuid::Uuid::from_u128(number);
    let far = |fork| fork + JUMP;
    // The fork, the first sequence, and whether the parent is right.
    let cases = [
        (5, far(5), true, None),
        (5, far(5) - 1, true, Some("an incarnation begins too close to its fork")),
        (5, far(5), false, Some("an incarnation does not continue the one before it")),
        (6, far(6), true, Some("an incarnation does not continue the sequence before it")),
        (4, far(4), true, Some("an incarnation does not continue the sequence before it")),
    ];
    for (fork, first, is_child, what) in cases {
        let disk = closed(5);
        forge(&disk, true, |shared| {
            let parent = if is_child { shared.log } else { id(9) };
            (incarnations::frame(&[Incarnation { id: id(1), parent, fork, first }]).unwrap(), 9)
        });
        let wrong = wrong(&disk);
        match what {
            None => assert_eq!(wrong, Vec::<String>::new()),
            Some(what) => assert!(wrong.len() == 1 && wrong[0].contains(what), "{wrong:?}"),
        }
    }
    // Not where a segment begins.
    let disk = closed(5);
    forge(&disk, false, |shared| {
        let incarnation = Incarnation { id: id(1), parent: shared.log, fork: 5, first: far(5) };
        (incarnations::frame(&[incarnation]).unwrap(), 9)
    });
    let what = "a frame that begins an incarnation is not the first of its segment";
    assert!(wrong(&disk)[0].contains(what) && format!("{:#}", open(&disk).err().unwrap()).contains(what));
    assert_eq!(INCARNATION, 2);
}

#[test]
fn epoch_grows_and_never_goes_back() {
    let disk = FakeDisk::default();
    let epochs: Vec<_> = (0..3)
        .map(|_| {
            let (shared, mut writer) = recover(Arc::new(disk.clone()), options()).unwrap();
            shared.queue.append(1, &[put("a", b"")]).unwrap();
            writer.step(&shared).unwrap();
            writer.epoch
        })
        .collect();
    assert_eq!(epochs, [1, 2, 3]);
    forge(&disk, false, |_| {
        let mut frame = Builder::new(4, Vec::new());
        frame.kind = CLOSE;
        (frame, 2)
    });
    let wrong = wrong(&disk);
    assert!(wrong[0].ends_with("the epoch of a frame is lower than that of an earlier frame"), "{wrong:?}");
}

#[test]
fn compacted_log_keeps_epoch_and_ending() {
    let directory = tempfile::tempdir().unwrap();
    for epoch in 1..4 {
        let log = open_in(directory.path());
        fill(&log, 20);
        log.close().unwrap();
        Offline::open(directory.path()).unwrap().compact(&mut |_| ()).unwrap();
        let home = Home {
            disk: Arc::new(super::super::Directory::new(directory.path().join("log"))),
            data: "data".into(),
            env: kvs_runtime::Env::real(),
        };
        let ending = super::super::recovery::recover(&home, None).unwrap().ending;
        assert_eq!((ending.epoch, ending.is_closed()), (epoch, true));
        // Closed it was, so nothing is missing.
        let options = Options { data: directory.path().into(), segment_bytes: 8192, ..os() };
        let log = FileLog::open(options).unwrap();
        assert_eq!(begun(&log), []);
        drop(log);
    }
}

#[test]
fn frame_never_spans_a_jump() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    commit(&log, put("stays", b""));
    log.close().unwrap();
    disk.become_copy();
    let log = open(&disk).unwrap();
    fill(&log, 20);
    let before = super::compaction::store(&log);
    assert!(compact_at(&log, 0, 0, 100).saved > 0);
    assert_eq!(log.shared().catalog.sealed().len(), 1, "both are in one segment");
    assert_eq!(super::compaction::store(&log), before);
    let first = begun(&log)[0].first;
    assert!(replayed(&log).iter().all(|(sequence, ..)| *sequence == 1 || *sequence >= first));
}
