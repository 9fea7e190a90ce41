//! The change feed, with an in-memory log.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use anyhow::{Context as _, Result};
use kvs_runtime::{BoxedTask, BoxedWork, Env, Spawn, Tasks};
use tokio::task;

use crate::change_feed::{ChangeFeed, Past, Subscription};
use crate::subscribers::{Keys, Selection, lock};
use crate::{AppendError, Entry, Event, EventRef, Forgotten, Put, PutRef, Receive, TransactionLog, Watermark};

/// In-memory log whose watermark a test advances.
struct Memory {
    /// None where an event was compacted away.
    entries: Mutex<Vec<Option<Event>>>,
    watermark: Watermark,
}

impl TransactionLog for Memory {
    fn append(&self, _time: u64, events: &[Event]) -> Result<u64, AppendError> {
        let mut entries = lock(&self.entries);
        let first = entries.len() as u64 + 1;
        entries.extend(events.iter().cloned().map(Some));
        Ok(first)
    }

    fn appended(&self) -> u64 {
        lock(&self.entries).len() as u64
    }

    fn watermark(&self) -> &Watermark {
        &self.watermark
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
        let (entries, durable) = (lock(&self.entries), self.watermark.durable());
        for sequence in after + 1..=durable {
            let entry = entries.get(sequence as usize - 1).context("it is damaged")?;
            let event = match entry {
                Some(Event::Put(Put { key, value, expires, .. })) => {
                    EventRef::Put(PutRef { key, value, metadata: &[], expires: *expires })
                }
                Some(Event::Delete(key)) => EventRef::Delete(key),
                None => continue,
            };
            receive(&[Entry { sequence, time: 0, event }])?;
        }
        Ok(durable.max(after))
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}

fn memory() -> Arc<Memory> {
    Arc::new(Memory { entries: Mutex::default(), watermark: Watermark::new(0) })
}

fn changes(lag_bytes: usize) -> Arc<ChangeFeed> {
    ChangeFeed::new(memory(), lag_bytes, Env::real())
}

fn begin(prefix: &str) -> Selection {
    Selection::of([Keys::begin(prefix)])
}

fn delete(changes: &ChangeFeed, key: &str) -> u64 {
    changes.append(0, &[Event::Delete(key.to_owned())]).expect("the in-memory log accepts every append")
}

/// Polls for the next change.
fn received(subscriber: &mut Subscription) -> Poll<Option<(u64, String)>> {
    let next = pin!(subscriber.next()).poll(&mut Context::from_waker(Waker::noop()));
    next.map(|change| change.map(|change| (change.sequence, change.key().to_owned())))
}

fn durable(changes: &ChangeFeed, sequence: u64) {
    changes.watermark().advance(sequence);
    changes.hand_out(sequence);
}

#[test]
fn subscriber_gets_durable_changes_of_its_keys() {
    let changes = changes(1_000);
    delete(&changes, "a0");
    let (mut all, mut some) =
        (changes.watch(begin("")).expect("the feed is open"), changes.watch(begin("a")).expect("the feed is open"));
    assert_eq!((all.from, some.from), (1, 1));
    for key in ["a1", "b2", "ä", ""] {
        delete(&changes, key);
    }
    assert!(received(&mut all).is_pending());
    durable(&changes, 3);
    assert_eq!(received(&mut all), Poll::Ready(Some((2, "a1".to_owned()))));
    assert_eq!(received(&mut all), Poll::Ready(Some((3, "b2".to_owned()))));
    assert_eq!(received(&mut some), Poll::Ready(Some((2, "a1".to_owned()))));
    assert!(received(&mut some).is_pending() && received(&mut all).is_pending());
    assert_eq!(changes.watch(begin("b")).expect("the feed is open").from, 5);
    durable(&changes, 5);
    assert_eq!(received(&mut all), Poll::Ready(Some((4, "ä".to_owned()))));
    assert_eq!(received(&mut all), Poll::Ready(Some((5, String::new()))));
    assert!(received(&mut some).is_pending());
}

#[test]
fn exact_selector_matches_one_key() {
    let changes = changes(1_000);
    let mut subscriber = changes.watch(Selection::of([Keys::One("a".into())])).expect("the feed is open");
    for key in ["", "ab", "a", "b"] {
        durable(&changes, delete(&changes, key));
    }
    assert_eq!(received(&mut subscriber), Poll::Ready(Some((3, "a".to_owned()))));
    assert!(received(&mut subscriber).is_pending());
    drop(subscriber);
    assert!(changes.subscribers().is_empty());
}

#[test]
fn changes_without_subscribers_are_not_kept() {
    let changes = changes(1_000);
    let kept = || lock(&changes.pending).len();
    delete(&changes, "a");
    assert_eq!(kept(), 0);
    let (first, second) = (
        changes.watch(begin("a")).expect("the feed is open"),
        changes.watch(Selection::of([Keys::One("a".into())])).expect("the feed is open"),
    );
    delete(&changes, "b");
    assert_eq!(kept(), 0);
    delete(&changes, "a");
    drop(first);
    delete(&changes, "a");
    delete(&changes, "ab");
    assert_eq!(kept(), 2);
    drop(second);
    let newest = delete(&changes, "a");
    assert_eq!(kept(), 2);
    durable(&changes, newest);
    assert_eq!(kept(), 0);
    assert!(changes.subscribers().is_empty());
}

#[test]
fn slow_consumer_does_not_affect_others() {
    let changes = changes(10);
    let (mut slow, mut fast) =
        (changes.watch(begin("")).expect("the feed is open"), changes.watch(begin("")).expect("the feed is open"));
    // A single change of any size is accepted.
    for (key, length) in [("a", 30), ("b", 6), ("c", 6)] {
        let sequence = delete(&changes, &key.repeat(length));
        durable(&changes, sequence);
        assert_eq!(received(&mut fast), Poll::Ready(Some((sequence, key.repeat(length)))));
    }
    assert_eq!(received(&mut slow), Poll::Ready(None));
    // After catching up the whole limit is available again.
    let newest = ["d", "e"].map(|key| delete(&changes, &key.repeat(5)));
    durable(&changes, newest[1]);
    for (sequence, key) in newest.into_iter().zip(["d", "e"]) {
        assert_eq!(received(&mut fast), Poll::Ready(Some((sequence, key.repeat(5)))));
    }
}

#[test]
fn unsubscribing_does_not_affect_others() {
    let changes = changes(1_000);
    let mut stays = changes.watch(begin("a")).expect("the feed is open");
    // Prefixes of the same length, equal, and longer.
    for prefix in ["b", "a", "ab"] {
        drop(changes.watch(begin(prefix)));
        let newest = delete(&changes, "abc");
        durable(&changes, newest);
        assert_eq!(received(&mut stays), Poll::Ready(Some((newest, "abc".to_owned()))));
    }
}

fn put(changes: &ChangeFeed, key: &str) -> u64 {
    let put = Put { key: key.to_owned(), value: Vec::new(), metadata: Vec::new(), expires: None };
    changes.append(0, &[Event::Put(put)]).expect("the in-memory log accepts every append")
}

fn keys(past: &Past) -> Vec<(u64, &str)> {
    past.changes.iter().map(|change| (change.sequence, change.key())).collect()
}

#[tokio::test]
async fn change_matching_two_selectors_comes_once() {
    let changes = changes(1_000);
    let selectors = [Keys::begin("a"), Keys::begin("ab"), Keys::One("abc".into()), Keys::begin("a")];
    let selection = Selection::of(selectors.into_iter().chain([Keys::One("x".into())]));
    let mut subscriber = changes.watch(selection.clone()).expect("the feed is open");
    for key in ["abc", "b", "a", "x", "xy", "ab"] {
        durable(&changes, put(&changes, key));
    }
    for expected in [(1, "abc"), (3, "a"), (4, "x"), (6, "ab")] {
        assert_eq!(received(&mut subscriber), Poll::Ready(Some((expected.0, expected.1.to_owned()))));
    }
    assert!(received(&mut subscriber).is_pending());
    let past = changes.past(&Arc::new(selection), 0).await.expect("the in-memory log can be read");
    assert_eq!(keys(&past), [(1, "abc"), (3, "a"), (4, "x"), (6, "ab")]);
    // Unsubscribing leaves nothing behind.
    drop(subscriber);
    assert!(changes.subscribers().is_empty());
    let mut other = changes.watch(begin("b")).expect("the feed is open");
    durable(&changes, put(&changes, "b"));
    assert_eq!(received(&mut other), Poll::Ready(Some((7, "b".to_owned()))));
}

#[tokio::test]
async fn puts_only_excludes_deletes() {
    let changes = changes(1_000);
    let selection = Selection { puts_only: true, ..begin("a") };
    let mut subscriber = changes.watch(selection.clone()).expect("the feed is open");
    durable(&changes, put(&changes, "a"));
    durable(&changes, delete(&changes, "a"));
    assert!(lock(&changes.pending).is_empty());
    durable(&changes, put(&changes, "ab"));
    assert_eq!(received(&mut subscriber), Poll::Ready(Some((1, "a".to_owned()))));
    assert_eq!(received(&mut subscriber), Poll::Ready(Some((3, "ab".to_owned()))));
    assert!(received(&mut subscriber).is_pending());
    let past = changes.past(&Arc::new(selection), 0).await.expect("the in-memory log can be read");
    assert_eq!((keys(&past), past.until), (vec![(1, "a"), (3, "ab")], 3));
}

#[tokio::test]
async fn guest_keys_require_their_own_prefix() {
    let changes = changes(1_000);
    let mut all = changes.watch(begin("")).expect("the feed is open");
    let mut own = changes.watch(begin("\u{1}")).expect("the feed is open");
    let mut one = changes.watch(Selection::of([Keys::One("\u{1}a".into())])).expect("the feed is open");
    durable(&changes, put(&changes, "\u{1}a"));
    durable(&changes, put(&changes, "a"));
    assert_eq!(received(&mut all), Poll::Ready(Some((2, "a".to_owned()))));
    assert!(received(&mut all).is_pending());
    for subscriber in [&mut own, &mut one] {
        assert_eq!(received(subscriber), Poll::Ready(Some((1, "\u{1}a".to_owned()))));
        assert!(received(subscriber).is_pending());
    }
    for (prefix, expected) in [("", (2, "a")), ("\u{1}", (1, "\u{1}a"))] {
        let past = changes.past(&Arc::new(begin(prefix)), 0).await.expect("the in-memory log can be read");
        assert_eq!(keys(&past), [expected], "{prefix:?}");
    }
}

#[test]
fn subscriber_without_keys_gets_only_the_end() {
    let changes = changes(1_000);
    let mut subscriber = changes.watch(Selection::default()).expect("the feed is open");
    durable(&changes, delete(&changes, "a"));
    assert!(received(&mut subscriber).is_pending());
    changes.close().expect("the in-memory log can be closed");
    assert_eq!(received(&mut subscriber), Poll::Ready(None));
}

#[test]
fn position_is_where_nothing_is_missed() {
    let feed = changes(100);
    let mut watches = feed.watch(begin("a")).expect("it has not ended");
    assert_eq!(watches.position(), Some(0));
    delete(&feed, "other");
    assert_eq!(watches.position(), Some(0), "it is not durable");
    durable(&feed, 1);
    assert_eq!(watches.position(), Some(1));
    assert_eq!((delete(&feed, "a"), delete(&feed, "other")), (2, 3));
    feed.watermark().advance(3);
    assert_eq!(watches.position(), Some(1), "it is durable, and not published");
    durable(&feed, 3);
    assert_eq!(watches.position(), None, "it is not delivered");
    assert_eq!(received(&mut watches), Poll::Ready(Some((2, "a".to_owned()))));
    assert_eq!(watches.position(), Some(3));
    feed.dismiss();
    assert_eq!(watches.position(), None, "it would miss changes");
    let ended = feed.watch(begin("a")).expect("it has not ended");
    feed.end();
    assert_eq!(ended.position(), Some(3));
    delete(&feed, "a");
    durable(&feed, 4);
    assert_eq!(ended.position(), None, "it came after the end");
}

#[test]
fn end_cancels_and_rejects_subscribers() {
    let changes = changes(1_000);
    let mut subscriber = changes.watch(begin("")).expect("the feed is open");
    changes.close().expect("the in-memory log can be closed");
    assert_eq!(received(&mut subscriber), Poll::Ready(None));
    assert!(changes.watch(begin("")).is_none());
}

/// Tokio tasks, the first of which panics as it begins.
#[derive(Default)]
struct Saboteur(AtomicBool);

impl Spawn for Saboteur {
    fn thread(&self, name: &str, _work: BoxedWork) -> io::Result<()> {
        panic!("the change feed has no thread {name}");
    }

    fn task(&self, _name: &str, task: BoxedTask) {
        task::spawn(task);
    }

    fn begins(&self, _name: &str) {
        assert!(self.0.swap(true, Ordering::Relaxed), "sabotage");
    }
}

#[tokio::test]
async fn feed_restarts_after_panic() {
    let tasks = Tasks::given(Arc::new(Saboteur::default()));
    let changes = ChangeFeed::new(memory(), 1_000, Env { tasks: tasks.clone(), ..Env::real() });
    changes.start();
    while tasks.restarts("change feed") == 0 {
        task::yield_now().await;
    }
    let mut subscriber = changes.watch(begin("")).expect("the feed is open");
    let sequence = delete(&changes, "a");
    changes.watermark().advance(sequence);
    assert_eq!(subscriber.next().await.map(|change| change.sequence), Some(sequence));
}

#[tokio::test]
async fn end_of_feed_task_cancels_subscribers() {
    let changes = changes(1_000);
    let mut subscriber = changes.watch(begin("")).expect("the feed is open");
    let feed = changes.start();
    task::yield_now().await;
    feed.abort();
    feed.ended().await;
    assert!(subscriber.next().await.is_none());
}

#[tokio::test]
async fn history_chunk_is_limited_in_size() {
    let changes = changes(1_000);
    for _ in 0..9 {
        delete(&changes, &"a".repeat(1 << 20));
    }
    changes.watermark().advance(9);
    for (after, until) in [(0, 4), (4, 8), (8, 9)] {
        assert_eq!(
            changes.past(&Arc::new(begin("a")), after).await.expect("the in-memory log can be read").until,
            until
        );
    }
}

#[tokio::test]
async fn gap_in_history_is_an_error() {
    let memory = memory();
    let changes = ChangeFeed::new(Arc::clone(&memory) as _, 1_000, Env::real());
    for key in ["a", "b", "c"] {
        delete(&changes, key);
    }
    changes.watermark().advance(3);
    assert_eq!(changes.past(&Arc::new(begin("")), 0).await.expect("the in-memory log can be read").until, 3);
    for missing in 0..3 {
        let event = lock(&memory.entries)[missing].take();
        let left = changes.read(0, |_| true).await.expect("the in-memory log can be read");
        assert_eq!((left.changes.len(), left.until, left.gap), (2, 3, true));
        assert!(changes.past(&Arc::new(begin("")), 0).await.is_err_and(|error| error.is::<Forgotten>()));
        // A reader that had seen it misses nothing.
        assert!(changes.past(&Arc::new(begin("")), missing as u64 + 1).await.is_ok());
        lock(&memory.entries)[missing] = event;
    }
    changes.watermark().advance(4);
    assert!(changes.read(0, |_| true).await.is_err(), "a read error is not skipped");
}

#[tokio::test]
async fn history_chunks_end_at_the_watermark() {
    let changes = changes(1_000);
    for n in 0..25_000 {
        delete(&changes, if n % 5 == 0 { "a" } else { "b" });
    }
    changes.watermark().advance(24_000);
    let (mut after, mut pieces) = (0, Vec::new());
    loop {
        let past = changes.past(&Arc::new(begin("a")), after).await.expect("the in-memory log can be read");
        assert!(past.changes.iter().all(|change| change.sequence > after && change.key() == "a"));
        if past.until == after {
            break;
        }
        after = past.until;
        pieces.push((past.changes.len(), past.until));
    }
    assert_eq!(pieces, [(2_000, 10_000), (2_000, 20_000), (800, 24_000)]);
}
