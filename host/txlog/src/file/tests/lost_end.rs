//! A log that has lost its end, which looks like a torn write: a standby knows better.

use fastrand::Rng;

use super::beside::Beside;
use super::standby::Primary;
use super::*;
use crate::file::position::{self, Position};
use crate::file::segment::Numbers;
use crate::file::{Damage, Lock, StandbyLog, frame};
use crate::{Condition, Standby};

/// A corrupt frame at the end looks like a torn write, and is none: the primary had published it.
#[test]
fn corrupt_end_that_was_published_is_not_taken_over() {
    let disk = FakeDisk::default();
    let mut primary = Primary::new(&disk, Rng::with_seed(1));
    primary.commit();
    let mut standby = Beside::new(Arc::new(disk.clone()), &options());
    standby.pass();
    primary.commit();
    let name = corrupt_end(&disk);
    let bytes = disk.read(&name);
    standby.pass();
    assert_eq!(standby.applied, 1);
    let known = Before { known: standby.known(), ..Before::default() };
    let refused = Shared::begin(Arc::new(disk.clone()), options(), known).err().unwrap();
    assert!(format!("{refused:#}").contains("ends with sequence 1, but 2 had been durable"), "{refused:#}");
    assert!(disk.read(&name) == bytes, "it was changed");
}

/// Whether a start that followed nothing refuses the log, as one that has lost its end.
fn is_known_to_lack_its_end(disk: &FakeDisk) -> bool {
    let refused = Shared::begin(Arc::new(disk.copy()), options(), Before::default()).err();
    refused.is_some_and(|error| format!("{error:#}").contains("ends with sequence 1, but 2 had been durable"))
}

/// Corrupts the last frame that was published, and returns the name of its segment.
fn corrupt_end(disk: &FakeDisk) -> String {
    let Position { segment, offset, .. } = position::read(disk).unwrap().unwrap();
    let name = Numbers::one(segment).file_name();
    let mut bytes = disk.read(&name);
    bytes[offset as usize - frame::ALIGNMENT] ^= 1;
    disk.put(&name, bytes);
    name
}

#[test]
fn lost_end_is_recorded_on_a_full_disk() {
    let disk = FakeDisk::default();
    let mut primary = Primary::new(&disk, Rng::with_seed(1));
    primary.commit();
    primary.writer.mark(&primary.shared).unwrap();
    primary.commit();
    let mut standby = Beside::new(Arc::new(disk.clone()), &options());
    standby.pass();
    corrupt_end(&disk);
    disk.set_full(true);
    let known = Before { known: standby.known(), ..Before::default() };
    let refused = Shared::begin(Arc::new(disk.clone()), options(), known).err().unwrap();
    assert!(refused.is::<Damage>(), "{refused:#}");
    assert!(is_known_to_lack_its_end(&disk));
}

#[test]
fn standby_keeps_lock_until_lost_end_is_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let options = || Options { data: directory.path().into(), ..options() };
    std::fs::create_dir(directory.path().join("log")).unwrap();
    let disk = FakeDisk::default();
    let lock = Lock::attempt(directory.path(), None).unwrap();
    let primary = FileLog::open_on(Arc::new(disk.clone()), options(), lock).unwrap();
    let standby = StandbyLog::open_on(Arc::new(disk.clone()), options(), |_| ()).unwrap();
    commit(&primary, put("a", b"1"));
    commit(&primary, put("a", b"2"));
    eventually(|| standby.news().borrow().newest == 2);
    // As if it was killed.
    disk.kill_after(Some(0));
    primary.append(1, &[put("a", b"3")]).unwrap();
    eventually(|| primary.failure().is_some());
    disk.kill_after(None);
    corrupt_end(&disk);
    if disk.names().iter().any(|name| name == "watermark") {
        disk.remove("watermark").unwrap();
    }
    disk.set_full(true);
    drop(primary);
    let why = || match standby.condition() {
        Condition::Unfit(why) => why,
        condition => format!("{condition:?}"),
    };
    eventually(|| why().contains("2 had been durable, and this cannot be recorded"));
    assert!(Lock::attempt(directory.path(), None).unwrap().is_none(), "another server would lose an entry");
    assert!(!is_known_to_lack_its_end(&disk) && standby.watermark().failure().is_none());
    disk.set_full(false);
    eventually(|| standby.watermark().failure().is_some());
    assert!(is_known_to_lack_its_end(&disk), "{}", why());
}
