//! Backups of a log in files: what is restored, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvs_runtime::{Env, Random};
use tempfile::TempDir;

use super::{Chain, Reader, Until, check, write};
use crate::change::Change;
use crate::file::{self, Durability, FileLog, Offline, Options};
use crate::{Event, Forgotten, Put, TransactionLog};

fn open_log(data: &Path) -> FileLog {
    open_retaining(data, Duration::ZERO)
}

fn open_retaining(data: &Path, retain: Duration) -> FileLog {
    FileLog::open(options(data, retain)).expect("the log opens")
}

fn options(data: &Path, retain: Duration) -> Options {
    let (durability, env) = (Durability::Sync, Env::real());
    let (segment_bytes, group_bytes, advertise) = (1 << 18, 1 << 16, None);
    Options { data: data.into(), segment_bytes, group_bytes, durability, retain, advertise, env }
}

fn put(key: &str, value: &str) -> Event {
    let metadata = vec![("content-type".into(), "text/plain".into())];
    Event::Put(Put { key: key.into(), value: value.into(), metadata, expires: None })
}

/// Appends events, each a millisecond after the one before, and waits until they are durable.
async fn append(log: &FileLog, events: &[Event]) {
    for event in events {
        let sequence = log.append(1_000 + log.appended(), std::slice::from_ref(event)).expect("there is room");
        log.watermark().reached(sequence).await.expect("the disk is well");
    }
}

fn backup(log: &dyn TransactionLog, since: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(log, since, &mut bytes).expect("the log is readable");
    bytes
}

/// Entries as text.
fn content(log: &dyn TransactionLog) -> Vec<String> {
    let mut all = Vec::new();
    let replayed = log.replay(0, &mut |entries| {
        all.extend(
            entries.iter().map(|entry| format!("{} {} {:?}", entry.sequence, entry.time, Change::of(entry).event)),
        );
        Ok(())
    });
    replayed.expect("the log is readable");
    all
}

fn open(path: &Path) -> anyhow::Result<Box<dyn Read>> {
    Ok(Box::new(fs::File::open(path)?))
}

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    fn add(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).expect("the file is written");
        path
    }
}

fn restore(files: &[PathBuf], until: Option<Until>) -> anyhow::Result<(TempDir, Chain)> {
    let chain = check(files, until, &open)?;
    let data = tempfile::tempdir()?;
    let replay = |receive: &mut crate::Receive<'_>| chain.replay(&open, receive);
    file::restore(data.path(), &chain.restoration(&Random::system(), &replay)?)?;
    Ok((data, chain))
}

fn refusal(files: &[PathBuf], until: Option<Until>) -> String {
    format!("{:#}", check(files, until, &open).expect_err("it is refused"))
}

#[tokio::test]
async fn restored_log_has_the_entries_and_a_new_incarnation() {
    let (directory, files) = (tempfile::tempdir().unwrap(), Files::new());
    let log = open_log(directory.path());
    append(&log, &[put("a", "1"), put("b", "2"), Event::Delete("a".into())]).await;
    let full = files.add("full", &backup(&log, 0));
    append(&log, &[put("c", "3")]).await;

    let (data, _) = restore(&[full], None).unwrap();
    let restored = open_log(data.path());
    assert_eq!(content(&restored), content(&log)[..3]);
    assert_eq!((restored.id(), restored.appended()), (log.id(), 3));
    let [incarnation] = restored.history().incarnations()[..] else { panic!("{:?}", restored.history()) };
    assert_eq!((incarnation.fork, incarnation.parent), (3, log.id()));
    assert!(restored.history().contains(3) && !restored.history().contains(4));
    append(&restored, &[put("c", "4")]).await;
    assert_eq!(restored.appended(), incarnation.first);
    drop(restored);

    // A later start takes the directory for what it is, and the log is whole.
    let restored = open_log(data.path());
    assert_eq!((restored.history().incarnations().len(), content(&restored).len()), (1, 4));
    drop(restored);
    let mut sound = true;
    file::verify(data.path(), &mut |finding| sound &= matches!(finding, file::Finding::Sound { .. }), &mut |_| {})
        .unwrap();
    assert!(sound);
}

#[tokio::test]
async fn backup_of_a_restored_log_keeps_its_history() {
    let (directory, files) = (tempfile::tempdir().unwrap(), Files::new());
    let log = open_log(directory.path());
    append(&log, &[put("a", "1"), put("b", "2")]).await;
    let mut file = files.add("0", &backup(&log, 0));
    let mut last = (directory, log);
    for generation in 1..=3_usize {
        let (data, _) = restore(&[file], None).unwrap();
        let log = open_log(data.path());
        // Compaction drops entries in the background, and changes no state.
        assert_eq!(state(&log), state(&last.1));
        append(&log, &[put("a", "1"), Event::Delete("b".into())]).await;
        assert_eq!(log.history().incarnations().len(), generation);
        file = files.add(&generation.to_string(), &backup(&log, 0));
        last = (data, log);
    }
    // Compaction and another restore lead to the same state.
    let (data, log) = last;
    let newest = log.appended();
    drop(log);
    Offline::open(data.path()).unwrap().compact(&mut |_| {}).unwrap();
    let log = open_log(data.path());
    let compacted = files.add("compacted", &backup(&log, 0));
    let (data, _) = restore(&[compacted], None).unwrap();
    let restored = open_log(data.path());
    assert_eq!(content(&restored), content(&log));
    assert!(content(&log).len() < 4, "{:?}", content(&log));
    assert_eq!((restored.appended(), log.appended()), (newest, newest));
    // A reader from before the dropped deletes must start over.
    assert!(restored.replay(1, &mut |_| Ok(())).unwrap_err().is::<Forgotten>());
}

#[tokio::test]
async fn log_without_live_entries_is_restored() {
    let (directory, files) = (tempfile::tempdir().unwrap(), Files::new());
    let log = open_log(directory.path());
    let empty = files.add("empty", &backup(&log, 0));
    append(&log, &[put("a", "1"), Event::Delete("a".into())]).await;
    drop(log);
    Offline::open(directory.path()).unwrap().compact(&mut |_| {}).unwrap();
    let log = open_log(directory.path());
    assert!(content(&log).is_empty());
    let dropped = files.add("dropped", &backup(&log, 0));
    for (file, last) in [(empty, 0), (dropped, 2)] {
        let (data, chain) = restore(&[file], None).unwrap();
        let restored = open_log(data.path());
        assert_eq!((content(&restored).len(), restored.appended(), chain.last), (0, last, last));
        assert!(restored.history().contains(last) && !restored.history().contains(last + 1));
        append(&restored, &[put("b", "1")]).await;
        assert_eq!(content(&restored).len(), 1);
    }
}

#[tokio::test]
async fn chain_is_restored_in_order_only() {
    let (directory, files) = (tempfile::tempdir().unwrap(), Files::new());
    let log = open_log(directory.path());
    append(&log, &[put("a", "1"), put("b", "2")]).await;
    let full = files.add("full", &backup(&log, 0));
    append(&log, &[Event::Delete("a".into()), put("b", "3")]).await;
    let first = files.add("first", &backup(&log, 2));
    let nothing = files.add("nothing", &backup(&log, 4));
    append(&log, &[put("c", "4")]).await;
    let second = files.add("second", &backup(&log, 4));
    let all = [full.clone(), first.clone(), nothing.clone(), second.clone()];
    let (data, _) = restore(&all, None).unwrap();
    assert_eq!(content(&open_log(data.path())), content(&log));

    for (chain, expected) in [
        (vec![first.clone()], "incremental backup after sequence 2"),
        (vec![full.clone(), second.clone()], "missing or out of order"),
        (vec![full.clone(), second.clone(), first.clone()], "missing or out of order"),
        (vec![full.clone(), full.clone()], "missing or out of order"),
        (vec![full.clone(), first.clone(), first.clone()], "missing or out of order"),
    ] {
        let said = refusal(&chain, None);
        assert!(said.contains(expected) && said.contains("cannot restore "), "{said}");
    }
    let elsewhere = tempfile::tempdir().unwrap();
    let other = open_log(elsewhere.path());
    append(&other, &[put("a", "1"), put("b", "2"), put("c", "3")]).await;
    let other = files.add("other", &backup(&other, 2));
    assert!(refusal(&[full.clone(), other], None).contains("another log"));

    // The future of a restored log does not continue the backups of the lost one.
    let (data, _) = restore(std::slice::from_ref(&full), None).unwrap();
    let restored = open_log(data.path());
    append(&restored, &[put("z", "1")]).await;
    let continued = files.add("continued", &backup(&restored, 2));
    restore(&[full.clone(), continued.clone()], None).unwrap();
    let said = refusal(&[full, first, continued], None);
    assert!(said.contains("missing or out of order"), "{said}");
    let lost = write(&restored, 4, &mut Vec::new()).unwrap_err();
    assert!(lost.to_string().contains("sequence 4 is not in the history"), "{lost}");
}

#[tokio::test]
async fn point_in_time_is_restored() {
    let (directory, files) = (tempfile::tempdir().unwrap(), Files::new());
    let log = open_log(directory.path());
    append(&log, &[put("a", "1"), put("b", "2"), put("a", "3")]).await;
    let full = files.add("full", &backup(&log, 0));
    append(&log, &[put("a", "4"), put("c", "5")]).await;
    let chain = [full, files.add("rest", &backup(&log, 3))];
    // Entry 1 has the time 1000, and so on.
    for (until, last) in [
        (Until::Sequence(0), 0),
        (Until::Sequence(2), 2),
        (Until::Sequence(3), 3),
        (Until::Sequence(4), 4),
        (Until::Sequence(5), 5),
        (Until::Time(1), 0),
        (Until::Time(1_001), 2),
        (Until::Time(1_002), 3),
        (Until::Time(1_003), 4),
        (Until::Time(9_999), 5),
    ] {
        let (data, restored) = restore(&chain, Some(until)).unwrap();
        assert_eq!(restored.last, last, "{until:?}");
        let restored = open_log(data.path());
        assert_eq!(content(&restored), content(&log)[..last as usize], "{until:?}");
        // Nothing that the chain holds is given out again.
        assert!((last + 1..=5).all(|lost| !restored.history().contains(lost)), "{until:?}");
    }
    let said = refusal(&chain, Some(Until::Sequence(6)));
    assert!(said.contains("sequence 6 is not in the backup, which ends with 5"), "{said}");
}

#[tokio::test]
async fn compacted_past_is_refused_with_what_can_be_had() {
    let (directory, files) = (tempfile::tempdir().unwrap(), Files::new());
    let log = open_log(directory.path());
    append(&log, &[put("k", "1"), put("a", "2"), put("b", "3"), put("a", "4"), put("d", "5")]).await;
    drop(log);
    Offline::open(directory.path()).unwrap().compact(&mut |_| {}).unwrap();
    let log = open_log(directory.path());
    assert_eq!(content(&log).len(), 4);
    let full = files.add("full", &backup(&log, 0));
    append(&log, &[put("a", "6"), put("e", "7")]).await;
    let chain = [full, files.add("rest", &backup(&log, 5))];
    for until in [Until::Sequence(3), Until::Sequence(2), Until::Time(1_003)] {
        let said = refusal(&chain, Some(until));
        assert!(said.contains("it can be had from sequence 5, which is --until 1004ms, on"), "{said}");
    }
    for last in [0, 1, 5, 6, 7] {
        assert_eq!(restore(&chain, Some(Until::Sequence(last))).unwrap().1.last, last);
    }
}

/// A small backup with an incarnation, and every way to damage one byte or cut it off.
#[tokio::test]
async fn every_flipped_byte_and_every_cut_is_refused() {
    let (directory, files) = (tempfile::tempdir().unwrap(), Files::new());
    let log = open_log(directory.path());
    append(&log, &[put("a", "1")]).await;
    let (data, _) = restore(&[files.add("full", &backup(&log, 0))], None).unwrap();
    let log = open_log(data.path());
    append(&log, &[put("b", "2"), Event::Delete("a".into())]).await;
    let sound = backup(&log, 0);
    let read =
        |bytes: &[u8]| Reader::new(Cursor::new(bytes.to_vec())).and_then(|mut reader| reader.read(&mut |_| Ok(())));
    assert_eq!(read(&sound).unwrap().count, 3);
    for at in 0..sound.len() {
        for flip in [1, 0x80, 0xff] {
            let mut bytes = sound.clone();
            bytes[at] ^= flip;
            let said = read(&bytes).unwrap_err().to_string();
            assert!(said.contains("corrupted at byte ") || said.contains("cut off at byte "), "{at}: {said}");
        }
        let said = read(&sound[..at]).unwrap_err().to_string();
        assert!(said.contains(&format!("cut off at byte {at}")), "{at}: {said}");
    }
    let longer = read(&[&sound[..], b"x"].concat()).unwrap_err().to_string();
    assert!(longer.contains("something follows the trailer"), "{longer}");
    let mut newer = sound;
    newer[8] = 2;
    let checksum = crc32c::crc32c(&newer[..60]).to_le_bytes();
    newer[60..64].copy_from_slice(&checksum);
    let said = read(&newer).unwrap_err().to_string();
    assert!(said.contains("format version 2 and this binary reads 1"), "{said}");
}

#[tokio::test]
async fn second_restore_is_refused_and_changes_nothing() {
    let (directory, files) = (tempfile::tempdir().unwrap(), Files::new());
    let log = open_log(directory.path());
    append(&log, &[put("a", "1")]).await;
    let full = files.add("full", &backup(&log, 0));
    let (data, chain) = restore(std::slice::from_ref(&full), None).unwrap();
    let names = || {
        let mut names: Vec<_> =
            fs::read_dir(data.path().join("log")).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        names.into_iter().map(|path| (fs::read(&path).unwrap(), path)).collect::<Vec<_>>()
    };
    let before = names();
    let replay = |receive: &mut crate::Receive<'_>| chain.replay(&open, receive);
    let restoration = chain.restoration(&Random::system(), &replay).unwrap();
    let said = file::restore(data.path(), &restoration).unwrap_err().to_string();
    assert!(said.contains("there is a log in ") && said.contains("already"), "{said}");
    assert!(before == names());
    // One that fails on the way leaves nothing, and can be repeated.
    let target = tempfile::tempdir().unwrap();
    let failing = |receive: &mut crate::Receive<'_>| {
        chain.replay(&open, receive)?;
        anyhow::bail!("the backup was removed")
    };
    let failed = file::restore(target.path(), &chain.restoration(&Random::system(), &failing).unwrap()).unwrap_err();
    assert!(format!("{failed:#}").contains("the backup was removed"), "{failed:#}");
    assert_eq!(fs::read_dir(target.path().join("log")).unwrap().count(), 0);
    file::restore(target.path(), &restoration).unwrap();
}

#[tokio::test]
async fn interrupted_restore_is_named_and_repeated() {
    let (directory, files) = (tempfile::tempdir().unwrap(), Files::new());
    let log = open_log(directory.path());
    append(&log, &[put("a", "1")]).await;
    let full = files.add("full", &backup(&log, 0));
    let (data, chain) = restore(std::slice::from_ref(&full), None).unwrap();
    let replay = |receive: &mut crate::Receive<'_>| chain.replay(&open, receive);
    let restoration = chain.restoration(&Random::system(), &replay).unwrap();
    // As if it had been killed before the last rename, that of the oldest segment.
    let segments = data.path().join("log");
    let oldest = segments.join("0000000001.seg");
    fs::rename(&oldest, oldest.with_extension("seg.tmp")).unwrap();
    let reason = format!("a restore into {} was interrupted; remove {}", data.path().display(), segments.display());
    for said in [
        file::restore(data.path(), &restoration).unwrap_err(),
        FileLog::open(options(data.path(), Duration::ZERO)).err().expect("it lacks its beginning"),
    ] {
        assert!(format!("{said:#}").contains(&reason), "{said:#}");
    }
    fs::remove_dir_all(&segments).unwrap();
    file::restore(data.path(), &restoration).unwrap();
    open_log(data.path());
}

#[tokio::test]
async fn large_log_is_restored_in_segments() {
    let (directory, files) = (tempfile::tempdir().unwrap(), Files::new());
    let log = open_log(directory.path());
    let value = "v".repeat(60_000);
    let events: Vec<_> = (0..100).map(|key| put(&format!("{key}"), &value)).collect();
    for chunk in events.chunks(10) {
        append(&log, chunk).await;
    }
    let full = files.add("full", &backup(&log, 0));
    // Frames of about a mebibyte.
    assert!((6_000_000..6_100_000).contains(&fs::metadata(&full).unwrap().len()));
    let (data, _) = restore(&[full], None).unwrap();
    assert_eq!(content(&open_log(data.path())), content(&log));
}

#[tokio::test]
async fn backup_ends_with_the_error_of_its_output() {
    struct Full(Arc<std::sync::Mutex<usize>>);
    impl std::io::Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let mut room = self.0.lock().unwrap();
            *room = room.checked_sub(bytes.len()).ok_or(std::io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let log = open_log(directory.path());
    append(&log, &[put("a", "1"), put("b", "2")]).await;
    let whole = backup(&log, 0).len();
    for room in [0, 64, whole - 1] {
        let mut full = Full(Arc::new(room.into()));
        assert!(write(&log, 0, &mut full).is_err(), "{room}");
    }
}

/// The newest value of each key, up to where it is padded.
fn state(log: &dyn TransactionLog) -> BTreeMap<String, String> {
    let mut state = BTreeMap::new();
    let replayed = log.replay(0, &mut |entries| {
        for entry in entries {
            match Change::of(entry).event {
                Event::Delete(key) => drop(state.remove(&key)),
                Event::Put(put) => {
                    let value = String::from_utf8(put.value).unwrap();
                    state.insert(put.key, value.trim_end_matches('v').to_owned());
                }
            }
        }
        Ok(())
    });
    replayed.expect("the log is readable");
    state
}

#[tokio::test]
async fn every_state_of_the_retained_part_is_restored() {
    let (directory, files) = (tempfile::tempdir().unwrap(), Files::new());
    let log = open_retaining(directory.path(), Duration::from_secs(3_600));
    let (padding, now) = ("v".repeat(50_000), Env::real().clock.unix_ms());
    let mut states = vec![BTreeMap::new()];
    // The first half is from long ago.
    for number in 1..=60_u64 {
        let (key, mut state) = (["a", "b", "c"][(number % 3) as usize], states[number as usize - 1].clone());
        let event = if number == 40 {
            state.remove(key);
            Event::Delete(key.into())
        } else {
            state.insert(key.into(), number.to_string());
            put(key, &format!("{number}{padding}"))
        };
        states.push(state);
        let time = if number <= 30 { 1_000 + number } else { now };
        let sequence = log.append(time, std::slice::from_ref(&event)).unwrap();
        log.watermark().reached(sequence).await.unwrap();
    }
    let count =
        |from| content(&log).iter().filter(|entry| from <= entry.split(' ').next().unwrap().parse().unwrap()).count();
    let begun = Env::real().clock.now();
    while count(1) > 50 {
        assert!(Env::real().clock.elapsed(begun) < Duration::from_secs(60), "nothing is compacted");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(count(31), 30, "the retained part is whole");
    assert!((3..=30).contains(&log.retained()), "{}", log.retained());
    let full = [files.add("full", &backup(&log, 0))];
    for last in 30..=60 {
        let (data, _) = restore(&full, Some(Until::Sequence(last))).unwrap();
        assert_eq!(state(&open_log(data.path())), states[last as usize], "{last}");
    }
    let said = refusal(&full, Some(Until::Sequence(2)));
    assert!(said.contains("it can be had from sequence "), "{said}");
    // What is known of it outlives a restart.
    let retained = log.retained();
    drop(log);
    assert!((retained..=30).contains(&open_log(directory.path()).retained()));
}
