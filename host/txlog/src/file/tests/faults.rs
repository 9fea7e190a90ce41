//! The disk that fills up, runs short or fails under the log.

use std::future::pending;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use kvs_runtime::{Clock, Time};

use super::disk::Operation;
use super::*;
use crate::Condition;
use crate::file::disk::Disk;
use crate::file::preallocate;

/// Appends until there is no room for more; returns the newest sequence, and how the next append was rejected.
fn fill_up(log: &FileLog) -> (u64, AppendError) {
    loop {
        match log.append(1, &[put("key", &[1; 1000])]) {
            Ok(sequence) => assert!(durable(log, sequence), "what was accepted fits"),
            Err(error) => return (log.appended(), error),
        }
        // Where the spare was just taken, the writer does not know yet that there is no space for another.
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_full_disk_refuses_what_does_not_certainly_fit_and_heals() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    eventually(|| disk.names().contains(&"0000000002.seg".into()));
    disk.set_full(true);
    let (accepted, error) = fill_up(&log);
    assert!(accepted == 6 && matches!(error, AppendError::InsufficientStorage), "{accepted} {error:?}");
    assert!(matches!(log.condition(), Condition::But(reason) if reason.contains("the disk is full")));
    assert_eq!(replayed(&log).len() as u64, accepted, "reads go on");
    assert_eq!(commit(&log, put("small", b"")), accepted + 1, "and so do writes that fit");

    disk.set_full(false);
    eventually(|| log.append(1, &[put("key", &[1; 1000])]).is_ok());
    assert!(durable(&log, log.appended()));
    log.close().unwrap();
    assert_eq!(replayed(&open(&disk).unwrap()).len() as u64, accepted + 2);
}

#[test]
fn a_disk_that_is_still_full_at_the_next_start_takes_only_what_fits() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    eventually(|| disk.names().contains(&"0000000002.seg".into()));
    disk.set_full(true);
    let (known, _) = fill_up(&log);
    log.close().unwrap();
    let log = open(&disk).unwrap();
    assert!(matches!(log.append(1, &[put("key", &[1; 1000])]), Err(AppendError::InsufficientStorage)));
    assert_eq!(commit(&log, put("small", b"")), known + 1);
    disk.set_full(false);
    eventually(|| log.append(1, &[put("key", &[1; 1000])]).is_ok());
    assert!(durable(&log, known + 2));
}

#[test]
fn shortage_delays_segments_and_fails_nothing() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    eventually(|| disk.names().contains(&"0000000002.seg".into()));
    let short = Arc::new(AtomicBool::new(true));
    let is_short = Arc::clone(&short);
    disk.before_each(move |operation| match operation {
        Operation::Create { .. } if is_short.load(Ordering::SeqCst) => Err(io::ErrorKind::WouldBlock.into()),
        _ => Ok(()),
    });
    let (accepted, error) = fill_up(&log);
    assert!(matches!(error, AppendError::Unavailable), "{error:?}");
    assert!(matches!(log.condition(), Condition::But(reason) if reason.contains("no file descriptors")));
    assert_eq!(replayed(&log).len() as u64, accepted, "reads go on");
    short.store(false, Ordering::SeqCst);
    eventually(|| log.append(1, &[put("key", &[1; 1000])]).is_ok());
    assert!(durable(&log, log.appended()));
    // Neither does the watermark file, at the end.
    short.store(true, Ordering::SeqCst);
    log.close().unwrap();
    short.store(false, Ordering::SeqCst);
    assert_eq!(replayed(&open(&disk).unwrap()).len() as u64, accepted + 1);
}

#[test]
fn write_without_memory_is_repeated() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    let left = Arc::new(AtomicUsize::new(2));
    let times = Arc::clone(&left);
    disk.before_each(move |operation| match operation {
        Operation::Write { bytes, .. } if bytes.starts_with(b"FRME") && times.load(Ordering::SeqCst) > 0 => {
            times.fetch_sub(1, Ordering::SeqCst);
            Err(io::ErrorKind::WouldBlock.into())
        }
        _ => Ok(()),
    });
    assert_eq!(commit(&log, put("a", b"value")), 1);
    assert_eq!(left.load(Ordering::SeqCst), 0);
    log.close().unwrap();
    assert_eq!(replayed(&open(&disk).unwrap()).len(), 1);
}

#[test]
fn zeros_go_where_they_belong_and_no_further() {
    let disk = FakeDisk::default();
    disk.put("file", vec![1; 3 << 20]);
    let (from, to) = (100, (3 << 19) + 100);
    preallocate::zero(&*disk.open("file").unwrap(), from as u64, to as u64).unwrap();
    let bytes = disk.read("file");
    let (before, rest) = bytes.split_at(from);
    let (zeros, after) = rest.split_at(to - from);
    assert!(before.iter().chain(after).all(|byte| *byte == 1) && zeros.iter().all(|byte| *byte == 0));
}

#[test]
fn a_failing_sync_is_final() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    commit(&log, put("a", b"1"));
    disk.fail_syncs();
    let sequence = log.append(1, &[put("a", b"2")]).unwrap();
    assert!(!durable(&log, sequence));
    assert_eq!(log.watermark().durable(), 1);
    assert!(block_on(log.watermark().latched()).contains("sync failed"));
    assert!(matches!(log.append(1, &[put("a", b"3")]), Err(AppendError::Unavailable)));
    assert!(log.close().unwrap_err().to_string().contains("sync failed"));
}

#[test]
fn a_failing_write_is_final() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    // The spare is written to as well.
    eventually(|| disk.names().contains(&"0000000002.seg".into()));
    disk.fail_writes();
    let sequence = log.append(1, &[put("a", b"2")]).unwrap();
    assert!(!durable(&log, sequence));
    assert!(matches!(log.append(1, &[put("a", b"3")]), Err(AppendError::Unavailable)));
}

#[test]
fn a_segment_that_cannot_be_made_is_final_unless_it_is_for_want_of_room() {
    for (error, fatal) in [(io::ErrorKind::Other, true), (io::ErrorKind::StorageFull, false)] {
        let disk = FakeDisk::default();
        let (tried, attempts) = std::sync::mpsc::channel();
        let log = open(&disk).unwrap();
        eventually(|| disk.names().contains(&"0000000002.seg".into()));
        disk.before_each(move |operation| match operation {
            Operation::Create { name, .. } if name.starts_with("0000000003") => {
                let _ = tried.send(());
                Err(error.into())
            }
            _ => Ok(()),
        });
        // Into the second segment, when the third is made.
        let newest = append(&log, 1, &[put("a", &[1; 1_900])]).max(append(&log, 1, &[put("a", &[1; 1_900])]));
        attempts.recv_timeout(Duration::from_secs(20)).unwrap();
        if fatal {
            eventually(|| log.failure().is_some());
        } else {
            assert!(durable(&log, newest) && log.failure().is_none());
        }
    }
}

#[test]
fn a_watermark_file_that_cannot_be_written_is_final() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    commit(&log, put("a", b"1"));
    disk.before_each(|operation| match operation {
        Operation::Rename { to, .. } if to == "watermark" => Err(io::Error::other("rename failed")),
        _ => Ok(()),
    });
    assert!(log.close().unwrap_err().to_string().contains("rename failed"));
}

#[test]
fn stopped_preallocator_leaves_spare_incomplete() {
    let disk = FakeDisk::default();
    let options = Options { segment_bytes: 4 * preallocate::PIECE_BYTES, ..options() };
    let (shared, _writer) = recover(Arc::new(disk.clone()), options).unwrap();
    let pieces = Arc::new(AtomicUsize::new(0));
    let (counted, stopped) = (pieces.clone(), shared.clone());
    disk.before_each(move |operation| {
        if matches!(operation, Operation::Sync { .. }) && counted.fetch_add(1, Ordering::SeqCst) == 1 {
            stopped.preallocator.stop();
        }
        Ok(())
    });
    preallocate::run(&shared).unwrap();
    assert_eq!(pieces.load(Ordering::SeqCst), 2, "of four");
    assert!(!disk.names().iter().any(|name| name.starts_with("0000000002")), "{:?}", disk.names());
}

/// A clock that a test moves.
struct Moved {
    begun: Instant,
    seconds: AtomicU64,
}

impl Moved {
    fn new() -> Arc<Self> {
        Arc::new(Self { begun: Instant::now(), seconds: AtomicU64::new(0) })
    }

    fn options(self: &Arc<Self>) -> Options {
        Options { env: Env { clock: Clock::given(self.clone()), ..Env::real() }, ..options() }
    }

    /// Checks the condition of a log whose writer has just begun to wait.
    fn check(&self, log: &FileLog, why: &str) {
        assert_eq!(log.condition(), Condition::Well);
        self.seconds.fetch_add(1, Ordering::SeqCst);
        let condition = log.condition();
        assert!(matches!(&condition, Condition::But(reason) if reason.contains(why)), "{condition:?}");
        self.seconds.fetch_add(8, Ordering::SeqCst);
        assert_eq!(log.condition(), condition);
        self.seconds.fetch_add(1, Ordering::SeqCst);
        let condition = log.condition();
        assert!(matches!(&condition, Condition::Unfit(reason) if reason.contains(why)), "{condition:?}");
    }
}

impl Time for Moved {
    fn now(&self) -> Instant {
        self.begun + Duration::from_secs(self.seconds.load(Ordering::SeqCst))
    }

    fn wall(&self) -> SystemTime {
        UNIX_EPOCH
    }

    fn sleep(&self, _time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(pending())
    }
}

#[test]
fn disk_that_hangs_makes_the_log_unfit() {
    let disk = FakeDisk::default();
    let time = Moved::new();
    let log = FileLog::open_on(Arc::new(disk.clone()), time.options(), None).unwrap();
    commit(&log, put("a", b"1"));
    eventually(|| disk.names().contains(&"0000000002.seg".into()));
    let hangs = Arc::new(AtomicBool::new(true));
    let (begins, begun) = std::sync::mpsc::channel();
    let until = hangs.clone();
    disk.before_each(move |operation| {
        if matches!(operation, Operation::Sync { .. }) && until.load(Ordering::SeqCst) {
            let _ = begins.send(());
            eventually(|| !until.load(Ordering::SeqCst));
        }
        Ok(())
    });
    let sequence = append(&log, 1, &[put("a", b"2")]);
    begun.recv_timeout(Duration::from_secs(30)).unwrap();
    time.check(&log, "the disk does not respond");
    hangs.store(false, Ordering::SeqCst);
    assert!(durable(&log, sequence));
    eventually(|| log.condition() == Condition::Well);
}

#[test]
fn stall_by_compaction_makes_the_log_unfit() {
    let time = Moved::new();
    let log = FileLog::open_on(Arc::new(FakeDisk::default()), time.options(), None).unwrap();
    let shared = log.shared();
    commit(&log, put("a", b"1"));
    shared.compactor.stall();
    let sequence = append(&log, 1, &[put("a", b"2")]);
    eventually(|| shared.compactor.is_stalled());
    time.check(&log, "the log grows faster than it is compacted");
    shared.compactor.stop();
    assert!(durable(&log, sequence));
    eventually(|| log.condition() == Condition::Well);
}
