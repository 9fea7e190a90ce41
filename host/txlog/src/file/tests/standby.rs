//! The standby beside a primary that writes, rotates, compacts and ends.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use fastrand::Rng;

use super::beside::Beside;
use super::content::{Appended, Model, Outcome};
use super::incarnations::{open_os, os};
use super::mutants::{self, Mutant};
use super::*;
use crate::file::compact::{self, CompactionParams};
use crate::file::disk::File;
use crate::file::position::{self, Position};
use crate::file::segment::Numbers;
use crate::file::{Lock, StandbyLog, preallocate};
use crate::{Condition, HandOver, Handed, Standby};

/// A primary without threads.
pub struct Primary {
    pub shared: Arc<Shared>,
    pub writer: Writer,
    model: Model,
    time: u64,
    dice: Rng,
}

impl Primary {
    pub fn new(disk: &FakeDisk, dice: Rng) -> Self {
        let (shared, writer) = recover(Arc::new(disk.clone()), options()).unwrap();
        Self { shared, writer, model: Model::default(), time: 0, dice }
    }

    fn step(&mut self) {
        self.time += self.dice.u64(0..3);
        if self.dice.u8(0..5) == 0 {
            let now = self.time.saturating_sub(3);
            self.model.compactions.push((0, now));
            let params = CompactionParams { retain_from: u64::MAX, now, min_yield_percent: 0, keys: 100 };
            compact::run(&self.shared, &self.shared.catalog.sealed(), &params, &mut |_| Ok(())).unwrap();
            return;
        }
        for _ in 0..self.dice.usize(1..5) {
            self.commit();
        }
    }

    pub fn commit(&mut self) {
        let key = format!("key {}", self.dice.u8(0..9));
        let event = if self.dice.u8(0..4) == 0 {
            Event::Delete(key)
        } else {
            let expires = (self.dice.u8(0..6) == 0).then(|| self.time + self.dice.u64(0..9));
            let value = vec![self.dice.u8(..); self.dice.usize(0..900)];
            Event::Put(Put { key, value, metadata: Vec::new(), expires })
        };
        preallocate::preallocate_one(&self.shared).unwrap();
        let sequence = self.shared.queue.append(self.time, std::slice::from_ref(&event)).unwrap();
        self.writer.step(&self.shared).unwrap();
        self.model.entries.push(Appended { sequence, time: self.time, event, ends_group: true });
    }
}

/// A disk on which the primary writes before each read of the standby.
struct Between {
    disk: FakeDisk,
    primary: Arc<Mutex<Primary>>,
    goes_on: Arc<AtomicBool>,
}

impl Between {
    fn go_on(&self) {
        let mut primary = self.primary.lock().unwrap();
        if self.goes_on.load(Ordering::Relaxed) && primary.dice.u8(0..3) == 0 {
            primary.step();
        }
    }
}

/// What the standby never does.
const CHANGED: &str = "a standby changed something";

impl Disk for Between {
    fn list(&self) -> io::Result<Vec<String>> {
        self.go_on();
        self.disk.list()
    }

    fn create(&self, _: &str) -> io::Result<Arc<dyn File>> {
        panic!("{CHANGED}")
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn File>> {
        self.go_on();
        self.disk.open(name)
    }

    fn rename(&self, _: &str, _: &str) -> io::Result<()> {
        panic!("{CHANGED}")
    }

    fn remove(&self, _: &str) -> io::Result<()> {
        panic!("{CHANGED}")
    }

    fn sync(&self) -> io::Result<()> {
        panic!("{CHANGED}")
    }
}

/// Follows for a while, with pauses in which the log can be compacted under the standby.
fn follow(seed: u64) -> Outcome<u64> {
    let mut dice = Rng::with_seed(seed);
    let disk = FakeDisk::default();
    let primary = Arc::new(Mutex::new(Primary::new(&disk, dice.fork())));
    let goes_on = Arc::new(AtomicBool::new(true));
    let between = Between { disk, primary: primary.clone(), goes_on: goes_on.clone() };
    // In every second history most segments are opened again when they are read.
    let max_open = if seed.is_multiple_of(2) { u64::MAX } else { seed % 3 };
    let mut standby = Beside::new(Arc::new(between), &options()).with_open(max_open);
    let mut passes = 0;
    for _ in 0..40 {
        for _ in 0..dice.usize(0..4) * dice.usize(0..4) {
            primary.lock().unwrap().step();
        }
        let before = standby.applied;
        standby.pass();
        passes += u64::from(standby.applied > before);
        let primary = primary.lock().unwrap();
        standby.check(&primary.model).map_err(|what| format!("{what}; seed {seed}"))?;
    }
    // Left alone it sees everything.
    goes_on.store(false, Ordering::Relaxed);
    standby.pass();
    let primary = primary.lock().unwrap();
    if standby.applied != primary.model.newest() {
        return Err(format!("it ends with {} of {}; seed {seed}", standby.applied, primary.model.newest()));
    }
    standby.check(&primary.model)?;
    Ok(passes)
}

#[test]
fn follower_under_rotation_and_compaction_misses_nothing() {
    let histories = count("KVS_FOLLOWER_HISTORIES", 40);
    let passes: u64 = (0..histories).map(|seed| follow(seed).unwrap()).sum();
    assert!(passes > 15 * histories, "{passes}");
}

#[test]
fn every_mutant_of_the_follower_is_found() {
    for mutant in [Mutant::OldestOpenedFirst, Mutant::PositionReadFirst, Mutant::ForgottenIgnored] {
        mutants::set(Some(mutant));
        // The last where most segments are opened again, the others where all stay open.
        let first = u64::from(mutant == Mutant::ForgottenIgnored);
        let found = (first..5_000).step_by(2).find_map(|seed| follow(seed).err());
        mutants::set(None);
        assert!(found.is_some(), "{mutant:?}");
        println!("{mutant:?}: {}", found.unwrap_or_default());
    }
}

fn on(data: &std::path::Path) -> Options {
    Options { data: data.into(), segment_bytes: 1 << 20, ..options() }
}

/// Applies what is new, as a server does.
fn take_in(standby: &StandbyLog) -> Vec<Owned> {
    let mut until = 0;
    let entries = gather(|receive| {
        until = standby.replay(standby.appended(), receive)?;
        Ok(until)
    });
    standby.follow(until);
    entries.unwrap()
}

fn committed(log: &dyn TransactionLog, key: &str) -> u64 {
    let sequence = log.append(1, &[put(key, b"value")]).unwrap();
    block_on(log.watermark().reached(sequence)).unwrap();
    sequence
}

#[test]
fn standby_follows_and_takes_over_where_the_primary_ends() {
    let directory = tempfile::tempdir().unwrap();
    let primary = FileLog::open(on(directory.path())).unwrap();
    committed(&primary, "before");
    let standby = StandbyLog::open(on(directory.path()), |_| ()).unwrap();
    assert_eq!((standby.appended(), standby.append(1, &[put("key", &[])])), (1, Err(AppendError::ReadOnly)));
    assert!(matches!(standby.condition(), Condition::But(what) if what.starts_with("standby of process ")));
    for number in 0..100 {
        committed(&primary, &number.to_string());
    }
    eventually(|| standby.news().borrow().newest == 101);
    assert_eq!(take_in(&standby).len(), 100);
    assert_eq!(standby.watermark().durable(), 101);

    let last = committed(&primary, "last");
    primary.close().unwrap();
    eventually(|| standby.news().borrow().holder.is_none());
    assert_eq!(standby.news().borrow().newest, last);
    // What was not followed yet comes first.
    assert_eq!(standby.append(1, &[put("key", &[])]), Err(AppendError::ReadOnly));
    assert_eq!(take_in(&standby).len(), 1);
    standby.begin().unwrap();
    assert_eq!(committed(&standby, "next"), last + 1);
    assert!(
        FileLog::open(on(directory.path())).is_err_and(|error| error.to_string().contains("is in use by process "))
    );
    standby.close().unwrap();
}

#[test]
fn standby_finds_what_compaction_retained() {
    let directory = tempfile::tempdir().unwrap();
    let options = Options { group_bytes: 1 << 19, ..on(directory.path()) };
    let primary = FileLog::open(options.clone()).unwrap();
    let standby = StandbyLog::open(options, |_| ()).unwrap();
    assert_eq!((primary.retained(), standby.retained()), (0, 0));
    for _ in 0..40 {
        let sequence = primary.append(1, &[put("key", &[b'v'; 1 << 18])]).unwrap();
        block_on(primary.watermark().reached(sequence)).unwrap();
    }
    eventually(|| {
        standby.replay(0, &mut |_| Ok(())).unwrap();
        standby.retained() > 0 && standby.retained() == primary.retained()
    });
}

#[test]
fn standby_without_primary_is_the_primary() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("new");
    let first = StandbyLog::open(on(&data), |_| ()).unwrap();
    assert_eq!((committed(&first, "key"), first.condition()), (1, Condition::Well));
    let second = StandbyLog::open(on(&data), |_| ()).unwrap();
    let third = StandbyLog::open(on(&data), |_| ()).unwrap();
    drop(first);
    // One of them has it, and the other waits.
    let is_primary = |log: &StandbyLog| log.news().borrow().holder.is_none();
    eventually(|| is_primary(&second) || is_primary(&third));
    let (primary, standby) = if is_primary(&second) { (second, third) } else { (third, second) };
    primary.begin().unwrap();
    assert_eq!(committed(&primary, "key"), 2);
    eventually(|| standby.news().borrow().newest == 2);
    assert!(!is_primary(&standby));
}

/// Duplicates the descriptors of a lock, as another process gets them.
fn passed(handed: &Handed) -> Handed {
    let descriptors = handed.lock.as_ref().unwrap().descriptors();
    let lock = Lock::from_descriptors(descriptors.map(|descriptor| descriptor.try_clone_to_owned().unwrap()));
    Handed { lock: Some(lock), position: handed.position.clone() }
}

#[test]
fn log_is_handed_over_and_its_lock_is_never_free() {
    let directory = tempfile::tempdir().unwrap();
    let primary = FileLog::open(on(directory.path())).unwrap();
    committed(&primary, "before");
    let next = StandbyLog::open(on(directory.path()), |_| ()).unwrap();
    let other = StandbyLog::open(on(directory.path()), |_| ()).unwrap();
    let handed = primary.hand_over().unwrap();
    assert!(primary.append(1, &[put("key", &[])]).is_err());
    next.receive(passed(&handed));
    drop(handed);
    eventually(|| next.news().borrow().holder.is_none());
    take_in(&next);
    next.begin().unwrap();
    // Without an incarnation: the log was closed.
    assert_eq!(committed(&next, "after"), 2);
    eventually(|| other.news().borrow().newest == 2);
    assert!(other.read_only().is_some(), "the lock was free");
    // In turn.
    let handed = next.hand_over().unwrap();
    assert!(Lock::attempt(directory.path(), None).unwrap().is_none());
    drop((next, primary));
    other.receive(handed);
    eventually(|| other.news().borrow().holder.is_none());
}

#[test]
fn log_is_taken_back_with_what_another_process_appended() {
    let directory = tempfile::tempdir().unwrap();
    let primary = FileLog::open(on(directory.path())).unwrap();
    committed(&primary, "before");
    let handed = primary.hand_over().unwrap();
    primary.take_back(passed(&handed)).unwrap();
    assert_eq!(committed(&primary, "kept"), 2);

    let next = StandbyLog::open(on(directory.path()), |_| ()).unwrap();
    let handed = primary.hand_over().unwrap();
    next.receive(passed(&handed));
    eventually(|| next.news().borrow().holder.is_none());
    take_in(&next);
    next.begin().unwrap();
    assert_eq!(committed(&next, "by the next"), 3);
    drop(next);
    primary.take_back(handed).unwrap();
    assert_eq!((primary.appended(), primary.watermark().durable()), (3, 3));
    assert_eq!(committed(&primary, "last"), 4);
    assert_eq!(replayed(&primary).len(), 4);
}

#[test]
fn log_that_ends_elsewhere_is_not_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let primary = FileLog::open(on(directory.path())).unwrap();
    committed(&primary, "before");
    let next = StandbyLog::open(on(directory.path()), |_| ()).unwrap();
    let handed = primary.hand_over().unwrap();
    let position = handed.position.replace("sequence 1 ", "sequence 2 ");
    next.receive(Handed { position, ..passed(&handed) });
    eventually(|| next.watermark().failure().is_some());
    let reason = next.watermark().failure().unwrap();
    assert!(reason.contains("the log was handed over at sequence 2 of "), "{reason}");
    drop(next);
    primary.take_back(handed).unwrap();
    assert_eq!(committed(&primary, "kept"), 2);
}

/// Whether a standby looks at a directory that another log has, and leaves it alone.
fn leaves_alone() -> bool {
    let directory = tempfile::tempdir().unwrap();
    let primary = FileLog::open(on(directory.path())).unwrap();
    // One that takes it over can fail at that: both change the files.
    let Ok(standby) = StandbyLog::open(on(directory.path()), |_| ()) else { return false };
    let is_alone = standby.read_only().is_some() && primary.failure().is_none();
    drop((standby, primary));
    is_alone
}

#[test]
fn live_primary_is_not_taken_over() {
    assert!(leaves_alone());
    mutants::set(Some(Mutant::TakenUnlocked));
    let found = !leaves_alone();
    mutants::set(None);
    assert!(found);
}

#[test]
fn position_of_another_log_is_not_followed() {
    let disk = FakeDisk::default();
    let mut primary = Primary::new(&disk, Rng::with_seed(1));
    primary.commit();
    let mut standby = Beside::new(Arc::new(disk.clone()), &options());
    standby.pass();
    assert_eq!(standby.applied, 1);
    let other = FakeDisk::default();
    let mut others = Primary::new(&other, Rng::with_seed(2));
    (0..9).for_each(|_| others.commit());
    for name in other.names() {
        disk.put(&name, other.read(&name));
    }
    standby.pass();
    assert_eq!(standby.applied, 1);
    let known = standby.known().unwrap();
    let before = Before { known: Some(known), ..Before::default() };
    let refused = Shared::begin(Arc::new(disk), options(), before).err().unwrap();
    assert!(format!("{refused:#}").contains("another log than the one that was followed"), "{refused:#}");
}

#[test]
fn log_that_lost_what_was_followed_is_not_taken_over() {
    let disk = FakeDisk::default();
    let mut primary = Primary::new(&disk, Rng::with_seed(1));
    primary.commit();
    let before = disk.copy();
    primary.commit();
    let mut standby = Beside::new(Arc::new(disk), &options());
    standby.pass();
    let known = Before { known: standby.known(), ..Before::default() };
    let refused = Shared::begin(Arc::new(before.clone()), options(), known).err().unwrap();
    assert!(format!("{refused:#}").contains("ends with sequence 1, but 2 had been durable"), "{refused:#}");
    // A process that followed nothing does not take it over either.
    let names = before.names();
    let refused = Shared::begin(Arc::new(before.clone()), options(), Before::default()).err().unwrap();
    assert!(format!("{refused:#}").contains("ends with sequence 1, but 2 had been durable"), "{refused:#}");
    assert_eq!(before.names(), names);
}

/// With `--durability os` frames are published before they are synced. A page that could not be written is in memory only.
#[test]
fn unsynced_page_lost_before_a_followed_mark_is_found() {
    let disk = FakeDisk::default();
    let log = open_os(&disk);
    let mut standby = Beside::new(Arc::new(disk.clone()), &os());
    let mut ends = Vec::new();
    for number in 1..=4 {
        commit(&log, put("key", &[number; 50]));
        ends.push(position::read(&disk).unwrap().unwrap());
        // The first is synced.
        if number > 1 {
            standby.pass();
        }
    }
    let (known, killed) = (standby.known().unwrap(), disk.copy());
    assert!(known.marks.iter().any(|(segment, mark)| (*segment, mark.offset) == (ends[1].segment, ends[1].offset)));
    let whole = killed.copy();
    let before = || Before { known: Some(known.clone()), ..Before::default() };
    let (shared, _) = Shared::begin(Arc::new(whole), os(), before()).unwrap();
    assert_eq!(shared.history.incarnations()[0].fork, 4);

    let name = Numbers::one(ends[0].segment).file_name();
    let mut bytes = killed.read(&name);
    bytes[ends[0].offset as usize..ends[1].offset as usize].fill(0);
    killed.put_on_disk(&name, bytes);
    let refused = Shared::begin(Arc::new(killed), os(), before()).err().unwrap();
    assert!(format!("{refused:#}").contains("ends with sequence 1, but 4 had been durable"), "{refused:#}");
}

#[test]
fn log_fails_where_the_position_cannot_be_published() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    commit(&log, put("key", &[]));
    let position = disk.content().0[position::NAME];
    disk.before_each(move |operation| match operation {
        super::disk::Operation::Write { file, .. } if *file == position => Err(io::Error::other("write failed")),
        _ => Ok(()),
    });
    append(&log, 1, &[put("key", &[])]);
    eventually(|| log.failure().is_some());
    // The entry is there, and was not acknowledged.
    assert_eq!((log.watermark().durable(), recovered(&disk.copy()).unwrap().len()), (1, 2));
}

#[test]
fn full_disk_without_a_position_file_does_not_keep_the_log_from_opening() {
    let disk = FakeDisk::default();
    drop(open(&disk).unwrap());
    disk.remove(position::NAME).unwrap();
    disk.set_full(true);
    let log = open(&disk).unwrap();
    commit(&log, put("key", &[]));
    let mut standby = Beside::new(Arc::new(disk), &options());
    standby.pass();
    assert_eq!(standby.applied, 0);
}

#[test]
fn position_is_read_as_written() {
    let disk = FakeDisk::default();
    assert_eq!(position::read(&disk).unwrap(), None);
    let file = position::open(&disk).unwrap().unwrap();
    assert_eq!(position::read(&disk).unwrap(), None, "nothing was written");
    let written = Position { log: uuid::Uuid::from_u128(7), sequence: 1, segment: 2, offset: 3, chain: 4 };
    written.write(&*file).unwrap();
    assert_eq!(position::read(&disk).unwrap(), Some(written));
    let mut bytes = disk.read(position::NAME);
    bytes[40] ^= 1;
    disk.put(position::NAME, bytes);
    assert_eq!(position::read(&disk).unwrap(), None);
    disk.put(position::NAME, b"short".to_vec());
    assert_eq!(position::read(&disk).unwrap(), None);
}
