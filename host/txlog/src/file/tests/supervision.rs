//! Threads of the log that die, or cannot be started.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::SystemTime;

use kvs_runtime::{BoxedTask, BoxedWork, Clock, Env, Spawn, Tasks, Time};
use rustix::io::Errno;

use super::*;
use crate::file::StandbyLog;
use crate::{Condition, Standby};

/// Real threads, of which one panics as it begins.
struct Saboteur(&'static str);

impl Spawn for Saboteur {
    fn thread(&self, name: &str, work: BoxedWork) -> io::Result<()> {
        std::thread::Builder::new().name(name.into()).spawn(work).map(drop)
    }

    fn task(&self, name: &str, _task: BoxedTask) {
        panic!("a log in files has no task {name}");
    }

    fn begins(&self, name: &str) {
        assert_ne!(name, self.0, "sabotage");
    }
}

#[test]
fn log_fails_with_any_of_its_threads() {
    for thread in ["log writer", "log spare", "log compactor"] {
        let tasks = Tasks::given(Arc::new(Saboteur(thread)));
        let options = Options { env: Env { tasks, ..Env::real() }, ..options() };
        let log = FileLog::open_on_disk(Arc::new(FakeDisk::default()), options).unwrap();
        let reason = block_on(log.watermark().latched());
        assert!(reason.starts_with("the transaction log failed: it panicked: "), "{reason}");
        assert!(reason.contains("sabotage"), "{thread}: {reason}");
        assert!(log.append(1, &[put("a", b"")]).is_err(), "{thread}");
        assert!(log.close().is_err(), "{thread}");
    }
}

#[test]
fn log_whose_disk_panics_fails() {
    let disk = FakeDisk::default();
    let log = open(&disk).unwrap();
    disk.before_each(|_| panic!("sabotage"));
    let sequence = append(&log, 1, &[put("a", b"")]);
    assert!(!durable(&log, sequence));
    assert!(log.failure().unwrap().contains("sabotage"));
}

/// Real threads, of which there is one too few when the first of this name is to be started.
struct Scarce {
    name: &'static str,
    was_short: AtomicBool,
    writers: Arc<AtomicUsize>,
}

impl Spawn for Scarce {
    fn thread(&self, name: &str, work: BoxedWork) -> io::Result<()> {
        if name == self.name && !self.was_short.swap(true, Ordering::Relaxed) {
            return Err(Errno::AGAIN.into());
        }
        let (writers, writes) = (Arc::clone(&self.writers), usize::from(name == "log writer"));
        writers.fetch_add(writes, Ordering::Relaxed);
        let work = move || {
            work();
            writers.fetch_sub(writes, Ordering::Relaxed);
        };
        std::thread::Builder::new().name(name.into()).spawn(work).map(drop)
    }

    fn task(&self, name: &str, _task: BoxedTask) {
        panic!("a log in files has no task {name}");
    }
}

#[test]
fn takeover_is_repeated_after_a_shortage() {
    for name in ["log writer", "log spare"] {
        let directory = tempfile::tempdir().unwrap();
        let on = |env| Options { data: directory.path().into(), segment_bytes: 1 << 20, env, ..options() };
        let primary = FileLog::open(on(Env::real())).unwrap();
        commit(&primary, put("key", b""));
        let threads = Arc::new(Scarce { name, was_short: AtomicBool::new(false), writers: Arc::default() });
        let standby =
            StandbyLog::open(on(Env { tasks: Tasks::given(threads.clone()), ..Env::real() }), |_| ()).unwrap();
        drop(primary);
        eventually(|| standby.news().borrow().holder.is_none());
        assert!(threads.was_short.load(Ordering::Relaxed), "{name}");
        standby.follow(1);
        standby.begin().unwrap();
        let sequence = standby.append(1, &[put("key", b"")]).unwrap();
        block_on(standby.watermark().reached(sequence)).unwrap();
        // That of the first attempt has ended.
        eventually(|| threads.writers.load(Ordering::Relaxed) == 1);
    }
}

/// The clock of the system, which is set ahead.
#[derive(Default)]
struct Ahead(AtomicU64);

impl Time for Ahead {
    fn now(&self) -> Instant {
        Instant::now() + Duration::from_secs(self.0.load(Ordering::Relaxed))
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }

    fn sleep(&self, _: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        unreachable!("no task of the log sleeps")
    }
}

#[test]
fn standby_that_stands_still_reports_its_age() {
    let directory = tempfile::tempdir().unwrap();
    let on = || Options { data: directory.path().into(), ..options() };
    let primary = FileLog::open(on()).unwrap();
    commit(&primary, put("before", b""));
    let time = Arc::new(Ahead::default());
    let env = Env { clock: Clock::given(Arc::clone(&time) as _), ..Env::real() };
    let standby = StandbyLog::open(Options { env, ..on() }, |_| ()).unwrap();
    assert!(matches!(standby.condition(), Condition::But(what) if what.starts_with("standby of process ")));
    // Its thread ends.
    standby.close().unwrap();
    time.0.store(3_600, Ordering::Relaxed);
    let expected = "standby cannot follow the log: it has not looked at it for 360";
    assert!(matches!(standby.condition(), Condition::Unfit(what) if what.starts_with(expected)));
}
