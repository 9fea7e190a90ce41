use std::sync::Arc;

use super::super::tests::{FakeDisk, append, commit, open, options, put, replayed};
use super::super::{FileLog, Options};
use super::*;
use crate::{Event, Put, TransactionLog};

#[test]
fn estimate_subtracts_expiries_and_deletes() {
    let mut expiring = [0; 40];
    // Within a second, within four, and much later.
    (expiring[0], expiring[2], expiring[20]) = (10, 200, 3_000);
    let clock = Clock::system();
    let estimate = |seconds| {
        let at = Instant::now().checked_sub(Duration::from_secs(seconds)).expect("this machine runs for longer");
        Estimate { live: 10_000, mean: 100, expiring, last: 9, at, passes: 1, hysteresis: 0 }
    };
    assert_eq!(
        [0, 1, 3, 4, 9].map(|seconds| estimate(seconds).live(&clock, &[])),
        [10_000, 9_990, 9_990, 9_790, 9_790]
    );
    let deletes = |last, deletes| Segment { deletes, ..Segment::empty(1, last, 0, 0) };
    assert_eq!(estimate(0).live(&clock, &[deletes(8, 5), deletes(9, 7), deletes(20, 1)]), 9_200);
    assert_eq!(estimate(0).live(&clock, &[deletes(20, 1_000)]), 0);
}

#[test]
fn low_yield_compaction_reschedules_after_growth() {
    let log = open(&FakeDisk::default()).unwrap();
    let shared = &*log.shared();
    for number in 0..800 {
        append(&log, 1, &[put(&format!("key {number}"), b"live"), Event::Delete(format!("nothing {number}"))]);
    }
    // Until the last delete is in a sealed segment.
    for _ in 0..9 {
        commit(&log, put("a", &[1; 500]));
    }
    // A reader prevents the dropping of the deletes.
    let reader = shared.catalog.reader(0).unwrap();
    let estimate = compact(shared).unwrap();
    drop(reader);
    let left = size(&shared.catalog.sealed());
    assert!(estimate.live < left * 6 / 10, "{} of {left}", estimate.live);
    {
        let mut state = shared.compactor.lock();
        state.ready = true;
        state.estimate = Some(estimate);
        shared.compactor.check(&mut state, shared);
    }
    let (least, mut most) = (left + left / 8, left);
    while shared.compactor.lock().debt.is_none() {
        most = size(&shared.catalog.sealed());
        commit(&log, put("a", &[1; 500]));
    }
    let due = size(&shared.catalog.sealed());
    assert!(most <= least && least < due, "{left}, then {most}, then {due}");
}

#[test]
fn write_stall_limit_follows_progress_of_the_run() {
    let log = open(&FakeDisk::default()).unwrap();
    let shared = &*log.shared();
    let compactor = &shared.compactor;
    let bytes = shared.catalog.bytes();
    let begin = bytes - 150;
    compactor.lock().debt = Some(Debt { begin, bound: begin + 800, work: u64::MAX, done: 0 });
    // One pass of analysis, and one that copies the live entries.
    compactor.begin(100);
    // Bytes read, by how much the log may have grown then, and whether it is close to that.
    for (read, growth, is_close) in [(0, 200, true), (30, 290, false), (170, 800, false), (50, 800, false)] {
        assert_eq!(compactor.advance(shared, read), is_close, "{read}");
        assert_eq!(compactor.limit.load(Ordering::Acquire), begin + growth, "{read}");
    }
    // A commit within the limit does not wait.
    compactor.stall_if_needed(shared, begin + 800 - bytes);
    let mut throttle = Throttle { shared, since: Instant::now() };
    assert!(throttle.pause(0).is_ok());
    compactor.stop();
    assert!(throttle.pause(0).is_err_and(|error| error.is::<Stopped>()));
}

#[test]
fn expired_entries_are_dropped_after_grace_period() {
    let log = open(&FakeDisk::default()).unwrap();
    let now = || log.shared().clock().unix_ms();
    for (key, expires) in [("long ago", 5), ("just now", now() - 1), ("later", now() + 1_000_000)] {
        let (key, value, metadata, expires) = (key.into(), Vec::new(), Vec::new(), Some(expires));
        append(&log, 1, &[Event::Put(Put { key, value, metadata, expires })]);
    }
    for _ in 0..9 {
        commit(&log, put("another", &[1; 500]));
    }
    compact(&log.shared()).unwrap();
    let left = replayed(&log).into_iter().map(|(sequence, ..)| sequence).filter(|sequence| *sequence < 4);
    assert_eq!(left.collect::<Vec<_>>(), [2, 3]);
}

/// The system's clock is a year behind the newest entry.
#[test]
fn log_ahead_of_the_clock_is_compacted() {
    for retain in [Duration::ZERO, Duration::from_secs(30)] {
        let options = Options { retain, ..options() };
        let log = FileLog::open_on(Arc::new(FakeDisk::default()), options, None).unwrap();
        let shared = log.shared();
        let ahead = shared.clock().unix_ms() + 365 * 86_400_000;
        // As the server does with each entry that it replays.
        shared.clock().not_before(ahead);
        let old = ahead - TOMBSTONE_GRACE_MS - 60_000;
        append(&log, old, &[put("deleted", &[1; 900]), Event::Delete("deleted".into())]);
        append(&log, old, &[put("superseded", &[1; 900])]);
        append(&log, old, &[put("superseded", b"")]);
        append(&log, ahead - 1_000, &[Event::Delete("superseded".into())]);
        for _ in 0..9 {
            append(&log, ahead, &[put("another", &[1; 500])]);
        }
        assert!(super::super::tests::durable(&log, log.appended()));
        compact(&shared).unwrap();
        let left = replayed(&log).into_iter().map(|(sequence, ..)| sequence).filter(|sequence| *sequence < 6);
        // A delete within its grace period, and what it replaces where that is retained.
        assert_eq!(left.collect::<Vec<_>>(), if retain.is_zero() { vec![5] } else { vec![4, 5] });
    }
}
