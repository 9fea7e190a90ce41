use std::time::Instant;

use super::*;
use crate::Event;
use crate::cluster::frame::{Entries, Holder, Restored};
use crate::remote::queue::Batch;

const LOG: Uuid = Uuid::from_u128(7);

/// Frames of a log, and the end of it after each.
fn frames(count: u64) -> Vec<(Bytes, Tip)> {
    let holder = Holder { id: Uuid::from_u128(8), name: "process 1".into(), url: None, lease_ms: 1_000 };
    let mut tip = Tip::default();
    let claim = tip.claim(LOG, &holder);
    let mut frames = vec![(claim, tip)];
    for sequence in 0..count {
        let mut batch = Batch::<Entries>::new(sequence, sequence + 1, Instant::now());
        batch.push(5, &Event::Delete(format!("key-{sequence}")));
        let frame = tip.entries(LOG, &mut batch);
        frames.push((frame, tip));
    }
    frames
}

fn bytes(frames: &[(Bytes, Tip)]) -> Vec<Bytes> {
    frames.iter().map(|(bytes, _)| bytes.clone()).collect()
}

/// A copy in a directory, complete.
fn made(directory: &Directory, base: u64, parts: &[&[(Bytes, Tip)]]) -> PathBuf {
    assert!(directory.lock().unwrap());
    let copy = directory.create(LOG, base).unwrap();
    parts.iter().for_each(|frames| copy.append(&bytes(frames)).unwrap());
    directory.complete(&copy).unwrap();
    copy.path
}

async fn read(part: &Part, from: u64) -> Vec<Bytes> {
    part.read(from, Duration::ZERO).await.unwrap()
}

#[tokio::test]
async fn copy_is_read_back_and_continued() {
    let data = tempfile::tempdir().unwrap();
    let directory = Directory::new(data.path());
    let all = frames(600);
    made(&directory, 0, &[&all[..1], &all[1..400]]);
    let copy = Arc::new(directory.open(LOG).unwrap().unwrap());
    assert_eq!((copy.tip(), copy.damage()), (all[399].1, None));
    copy.append(&bytes(&all[400..])).unwrap();
    let part = Part { copy: Arc::clone(&copy), is_snapshot: false };
    let mut found = Vec::new();
    while found.len() < all.len() {
        found.extend(read(&part, found.len() as u64 + 1).await);
    }
    assert_eq!(found, bytes(&all));
    assert!(read(&part, 602).await.is_empty());
    // Another process must not write it, and another log is not in it.
    assert!(!Directory::new(data.path()).lock().unwrap());
    assert!(directory.open(Uuid::from_u128(9)).unwrap().is_none());
}

#[tokio::test]
async fn copy_with_snapshot_replaces_the_one_before() {
    let data = tempfile::tempdir().unwrap();
    let directory = Directory::new(data.path());
    let all = frames(20);
    let former = made(&directory, 0, &[&all]);
    let snapshot = Snapshot { tip: all[9].1, restored: Restored::default() };
    let mut last = snapshot.encode();
    last.seal(LOG, 0, snapshot.tip.sequence, 0);
    let last = (Bytes::from(last.into_buffer()), Tip::default());
    let path = made(&directory, 10, &[std::slice::from_ref(&last), &all[10..]]);
    assert!(!former.exists());
    let copy = Arc::new(directory.open(LOG).unwrap().unwrap());
    assert_eq!((copy.tip(), copy.snapshot()), (all[20].1, Some(snapshot)));
    let part = Part { copy: Arc::clone(&copy), is_snapshot: false };
    assert_eq!(read(&part, 11).await, bytes(&all[10..]));
    assert!(part.read(10, Duration::ZERO).await.is_err());
    assert_eq!(part.ends().await.unwrap().first, 11);
    assert_eq!(read(&Part { copy, is_snapshot: true }, 1).await, std::slice::from_ref(&last.0));
    // Without its snapshot it is of no use, and neither is one of another position.
    fs::write(&path, bytes(&all[10..]).concat()).unwrap();
    assert!(directory.open(LOG).unwrap().is_none());
    fs::write(&path, last.0).unwrap();
    fs::rename(&path, path.with_file_name(format!("{LOG}-11"))).unwrap();
    assert!(directory.open(LOG).unwrap().is_none());
}

#[test]
fn damage_anywhere_leaves_the_frames_before_it() {
    let data = tempfile::tempdir().unwrap();
    let directory = Directory::new(data.path());
    let all = frames(3);
    let path = made(&directory, 0, &[&all]);
    let whole = fs::read(&path).unwrap();
    let before = |at: usize| {
        let mut end = 0;
        let complete = all.iter().take_while(|(bytes, _)| {
            end += bytes.len();
            end <= at
        });
        complete.last().map_or(Tip::default(), |(_, tip)| *tip)
    };
    for bit in 0..whole.len() * 8 {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, flipped).unwrap();
        let copy = Copy::open(path.clone(), LOG, 0).unwrap();
        assert_eq!(copy.tip(), before(bit / 8), "bit {bit}");
        assert!(copy.damage().is_some(), "bit {bit}");
    }
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let copy = Copy::open(path.clone(), LOG, 0).unwrap();
        assert_eq!((copy.tip(), copy.damage()), (before(length), None), "{length} bytes");
        copy.truncate().unwrap();
        let missing = all.iter().filter(|(_, tip)| tip.position > copy.tip().position).cloned().collect::<Vec<_>>();
        copy.append(&bytes(&missing)).unwrap();
        assert!(fs::read(&path).unwrap() == whole, "{length} bytes are not continued");
    }
}

#[test]
fn incomplete_copies_of_killed_processes_are_removed() {
    let data = tempfile::tempdir().unwrap();
    let directory = Directory::new(data.path());
    assert!(directory.lock().unwrap());
    let other = Uuid::from_u128(9);
    for (log, base) in [(LOG, 5), (other, 5), (LOG, 9)] {
        directory.create(log, base).unwrap();
    }
    let mut left: Vec<_> =
        fs::read_dir(data.path().join(DIRECTORY)).unwrap().map(|file| file.unwrap().path()).collect();
    left.sort();
    let mut expected =
        [(LOG, 9), (other, 5)].map(|(log, base)| data.path().join(format!("{DIRECTORY}/{log}-{base}.tmp")));
    expected.sort();
    assert_eq!(left, expected);
}
