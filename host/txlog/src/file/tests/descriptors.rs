//! A log with more segments than the process may have open files.

use std::env;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::process::{Resource, Rlimit, setrlimit};

use super::*;
use crate::file::disk::Directory;
use crate::file::follower::Follower;
use crate::file::home::Home;

const OPEN_FILES: u64 = 40;
const SEGMENTS: u64 = 70;
/// The limit is one of the process, so a test has one of its own, which has this variable.
const LIMITED: &str = "KVS_LIMITED_TEST";

#[test]
fn log_with_more_segments_than_open_files_is_read() {
    if env::var_os(LIMITED).is_none() {
        let test = "file::tests::descriptors::log_with_more_segments_than_open_files_is_read";
        let mut limited = Command::new(env::current_exe().unwrap());
        let output = limited.args(["--exact", test, "--nocapture"]).env(LIMITED, "1").output().unwrap();
        let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
        return;
    }
    setrlimit(Resource::Nofile, Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) }).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let disk = Arc::new(Directory::new(directory.path().into()));
    let log = FileLog::open_on(disk.clone(), options(), None).unwrap();
    for number in 0..SEGMENTS {
        commit(&log, put(&format!("key {number}"), &[1; 1_900]));
    }
    assert!(log.shared().catalog.all().len() as u64 >= SEGMENTS);

    // All shards of a standby read at once: each waits for the others when it has read something.
    let follower = Follower::new(Home { disk: disk.clone(), data: "data".into(), env: Env::real() });
    let readers = AtomicUsize::new(0);
    let read = || {
        let mut entries = 0;
        let until = follower.replay(0, &mut |read| {
            if entries == 0 {
                readers.fetch_add(1, Ordering::SeqCst);
                eventually(|| readers.load(Ordering::SeqCst) == 8);
            }
            entries += read.len() as u64;
            Ok(())
        });
        (until.unwrap(), entries)
    };
    let read: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(read)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(read, [(SEGMENTS, SEGMENTS); 8]);

    log.close().unwrap();
    let log = FileLog::open_on(disk, options(), None).unwrap();
    assert_eq!(replayed(&log).len() as u64, SEGMENTS);
}
