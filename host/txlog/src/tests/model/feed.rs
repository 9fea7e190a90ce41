//! The change feed: a subscriber gets each change after its position once, in order and not before it is durable, or is
//! canceled.

use std::sync::Arc;

use anyhow::Result;
use kvs_runtime::Env;
use shuttle::future::block_on;
use shuttle::thread::{self, JoinHandle};
use tokio::sync::oneshot;

use self::change_feed::ChangeFeed;
use self::subscribers::{Keys, Selection, lock};
use super::{check, sync};
use crate::{
    AppendError, Condition, Event, Forgotten, History, OutcomeUnknown, Receive, TransactionLog, Watermark, change,
};

#[expect(dead_code, reason = "the scenarios do not use all of it")]
#[expect(clippy::duplicate_mod, reason = "the same code, with other primitives below it")]
#[path = "../../change_feed.rs"]
mod change_feed;
#[expect(dead_code, reason = "the scenarios do not use all of it")]
#[expect(clippy::duplicate_mod, reason = "the same code, with other primitives below it")]
#[path = "../../subscribers.rs"]
mod subscribers;

/// A log of sequences without content, durable after each append.
struct Numbers {
    appended: sync::Mutex<u64>,
    /// Held during a sync.
    disk: sync::Mutex<()>,
    watermark: Watermark,
}

impl TransactionLog for Numbers {
    fn append(&self, _time: u64, events: &[Event]) -> Result<u64, AppendError> {
        let mut appended = lock(&self.appended);
        *appended += events.len() as u64;
        Ok(*appended - events.len() as u64 + 1)
    }

    fn appended(&self) -> u64 {
        *lock(&self.appended)
    }

    fn watermark(&self) -> &Watermark {
        &self.watermark
    }

    fn replay(&self, after: u64, _receive: &mut Receive<'_>) -> Result<u64> {
        Ok(after)
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}

/// Total number of appends, by two threads.
const ALL: u64 = 4;

struct Scenario {
    log: Arc<Numbers>,
    feed: Arc<ChangeFeed>,
    stop: oneshot::Sender<()>,
    running: JoinHandle<()>,
}

impl Scenario {
    /// Starts a feed whose queues hold at most this number of changes.
    fn begin(lag: usize) -> Self {
        let (appended, disk) = (sync::Mutex::new(0), sync::Mutex::new(()));
        let log = Arc::new(Numbers { appended, disk, watermark: Watermark::new(0) });
        let feed = ChangeFeed::new(Arc::clone(&log) as _, lag, Env::real());
        let (stop, mut stopped) = oneshot::channel();
        let runs = Arc::clone(&feed);
        let running = thread::spawn(move || {
            block_on(async {
                tokio::select! {
                    biased;
                    _ = &mut stopped => {}
                    _ = runs.run() => {}
                }
            });
        });
        Self { log, feed, stop, running }
    }

    fn append(&self, count: u64) -> JoinHandle<()> {
        let (log, feed) = (Arc::clone(&self.log), Arc::clone(&self.feed));
        thread::spawn(move || {
            for _ in 0..count {
                feed.append(0, &[Event::Delete("k".into())]).unwrap();
                let _syncing = lock(&log.disk);
                log.watermark.advance(log.appended());
            }
        })
    }

    /// Subscribes until it has all changes or is canceled. Returns the sequence of the last change if it was canceled.
    fn watch(&self) -> JoinHandle<Option<u64>> {
        let (log, feed) = (Arc::clone(&self.log), Arc::clone(&self.feed));
        thread::spawn(move || {
            let Some(mut watcher) = feed.watch(Selection::of([Keys::begin("k")])) else { return Some(0) };
            let mut last = watcher.from;
            while last < ALL {
                let Some(change) = block_on(watcher.next()) else {
                    assert!(watcher.position().is_none_or(|position| position <= last), "it skips a change");
                    return Some(last);
                };
                assert!(change.sequence <= log.watermark.durable(), "{} is not durable", change.sequence);
                assert_eq!(change.sequence, last + 1);
                last = change.sequence;
                // All changes are selected: a later position would skip one.
                assert!(watcher.position().is_none_or(|position| position <= last));
            }
            None
        })
    }

    fn end(self) {
        let _ = self.stop.send(());
        self.running.join().unwrap();
        assert!(self.feed.subscribers().is_empty(), "who leaves leaves nothing behind");
    }
}

#[test]
fn feed_brings_each_change_once_and_in_order() {
    check(|| {
        let scenario = Scenario::begin(100);
        let appending = [scenario.append(ALL / 2), scenario.append(ALL / 2)];
        let watching = [scenario.watch(), scenario.watch()];
        appending.into_iter().for_each(|appends| appends.join().unwrap());
        assert_eq!(watching.map(|watches| watches.join().unwrap()), [None, None]);
        scenario.end();
    });
}

#[test]
fn feed_cuts_a_slow_consumer_and_leaves_no_gap() {
    check(|| {
        let scenario = Scenario::begin(1);
        let appending = [scenario.append(ALL / 2), scenario.append(ALL / 2)];
        let watching = [scenario.watch(), scenario.watch()];
        appending.into_iter().for_each(|appends| appends.join().unwrap());
        for cut in watching.map(|watches| watches.join().unwrap()).into_iter().flatten() {
            // One change was pending, and another was queued.
            assert!(cut + 2 <= ALL, "it was cut off after {cut}");
        }
        scenario.end();
    });
}

#[test]
fn feed_that_ends_leaves_nobody_waiting() {
    check(|| {
        let scenario = Scenario::begin(100);
        let appending = scenario.append(1);
        let watching = [scenario.watch(), scenario.watch()];
        let ending = {
            let feed = Arc::clone(&scenario.feed);
            thread::spawn(move || feed.end())
        };
        appending.join().unwrap();
        ending.join().unwrap();
        for last in watching.map(|watches| watches.join().unwrap()) {
            assert!(last.is_some_and(|last| last <= 1));
        }
        scenario.end();
    });
}

#[test]
fn feed_accepts_no_append_after_they_are_rejected() {
    check(|| {
        let scenario = Scenario::begin(100);
        let feed = Arc::clone(&scenario.feed);
        let appending = thread::spawn(move || feed.append(0, &[Event::Delete("k".into())]));
        scenario.feed.reject_appends(true);
        let end = scenario.log.appended();
        if let Ok(sequence) = appending.join().unwrap() {
            assert!(sequence <= end, "{sequence} was appended after {end}");
        }
        scenario.end();
    });
}
