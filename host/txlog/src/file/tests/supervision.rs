//! Threads of the log that die.

use std::io;

use kvs_runtime::{BoxedTask, BoxedWork, Env, Spawn, Tasks};

use super::*;

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
