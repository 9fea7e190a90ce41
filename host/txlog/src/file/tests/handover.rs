//! A log that is handed over to another process, and does not get there.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::HandOver;
use crate::file::Lock;

/// A log on a simulated disk, with a lock in a real directory.
fn locked(disk: &FakeDisk) -> (tempfile::TempDir, FileLog) {
    let directory = tempfile::tempdir().unwrap();
    let options = Options { data: directory.path().into(), ..options() };
    std::fs::create_dir(directory.path().join("log")).unwrap();
    let lock = Lock::attempt(directory.path(), None).unwrap();
    let log = FileLog::open_on(Arc::new(disk.clone()), options, lock).unwrap();
    (directory, log)
}

#[test]
fn log_is_taken_back_after_a_shortage() {
    let disk = FakeDisk::default();
    let (_directory, log) = locked(&disk);
    commit(&log, put("a", b"1"));
    let handed = log.hand_over().unwrap();
    assert_eq!(log.reads_refused(), None, "what was read before can be answered");
    let denied = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&denied);
    disk.before_each(move |_| match counted.fetch_add(1, Ordering::Relaxed) {
        0..3 => Err(io::ErrorKind::WouldBlock.into()),
        _ => Ok(()),
    });
    log.take_back(handed).unwrap();
    assert!(denied.load(Ordering::Relaxed) > 3, "nothing was denied");
    commit(&log, put("a", b"2"));
    assert_eq!(log.reads_refused(), None);
}

#[test]
fn log_that_is_lost_in_a_handover_refuses_reads() {
    let disk = FakeDisk::default();
    let (directory, log) = locked(&disk);
    commit(&log, put("a", b"1"));
    disk.remove("position").unwrap();
    assert!(log.hand_over().is_err());
    assert!(Lock::attempt(directory.path(), None).unwrap().is_some(), "another process may have it");
    assert!(log.reads_refused().is_some());
}
