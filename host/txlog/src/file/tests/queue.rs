//! The open batch by itself: what is accepted fits the segment, or what is left of it while the disk is full.

use std::future::pending;
use std::pin::Pin;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use proptest::prelude::*;

use kvs_runtime::{Clock, Time};

use super::*;
use crate::file::entry;
use crate::file::frame::Builder;
use crate::file::queue::{Queue, Shortage, Work};

/// Room in a segment: so little that the end is met soon and often.
const SEGMENT: u64 = 2_000;

#[derive(Clone, Debug)]
enum Step {
    Append(Vec<Event>),
    Take,
    Write,
}

fn event() -> impl Strategy<Value = Event> {
    let metadata = proptest::collection::vec(("[ä-ö]{0,4}", "[a-z]{0,9}"), 0..3);
    let put = ("k{0,30}", proptest::collection::vec(any::<u8>(), 0..60), metadata, any::<Option<u64>>());
    prop_oneof![
        "k{0,60}".prop_map(Event::Delete),
        put.prop_map(|(key, value, metadata, expires)| Event::Put(Put { key, value, metadata, expires })),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => proptest::collection::vec(event(), 1..4).prop_map(Step::Append),
        1 => Just(Step::Take),
        1 => Just(Step::Write),
    ]
}

fn take(queue: &Queue) -> Option<Builder> {
    match queue.take(Some(Duration::ZERO)) {
        Work::Write(frame) => Some(frame),
        _ => None,
    }
}

#[test]
fn no_more_waits_than_a_segment_holds() {
    let queue = Queue::new((0, 1), SEGMENT, None, SEGMENT, SEGMENT, Clock::system());
    // Of a hundred bytes each.
    let append = || queue.append(1, &[Event::Delete("k".repeat(75))]);
    let accepted = (0..100).take_while(|_| append().is_ok()).count();
    assert_eq!(accepted, 18, "and the head of their frame");
    assert!(matches!(append(), Err(AppendError::Unavailable)));
}

/// A clock that stands still, so that no delay ends by itself.
struct Standing(Instant);

impl Time for Standing {
    fn now(&self) -> Instant {
        self.0
    }

    fn wall(&self) -> SystemTime {
        UNIX_EPOCH
    }

    fn sleep(&self, _time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(pending())
    }
}

#[test]
fn batch_is_delayed_until_clients_are_back_or_threads_idle() {
    let clock = Clock::given(Arc::new(Standing(Instant::now())));
    let room = 4 * GROUP_BYTES;
    let queue = Queue::new((0, 1), room, None, room, GROUP_BYTES, clock);
    let append = || assert!(queue.append(1, &[Event::Delete("k".into())]).is_ok());
    // Takes a batch of `first` appends and of those that come while it is delayed.
    let commit = |first: usize, meanwhile: &(dyn Fn() + Sync)| {
        (0..first).for_each(|_| append());
        let frame = thread::scope(|scope| {
            let writer = scope.spawn(|| queue.take(None));
            eventually(|| queue.is_delayed() || writer.is_finished());
            meanwhile();
            writer.join().unwrap()
        });
        let Work::Write(frame) = frame else { panic!("there is work") };
        let count = frame.count;
        queue.written(frame, room, Duration::from_millis(1));
        count
    };
    assert_eq!(commit(3, &|| ()), 3);
    queue.set_idle(false);
    assert_eq!(commit(1, &|| (0..2).for_each(|_| append())), 3);
    assert_eq!(commit(2, &|| queue.set_idle(true)), 2);
    assert_eq!(commit(1, &|| ()), 1, "idle, and commits are fast");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_event_takes_the_bytes_it_is_counted_with(event in event()) {
        let mut body = Vec::new();
        entry::encode(&mut body, 1, 2, &event);
        prop_assert_eq!(body.len(), entry::size(&event));
        prop_assert_eq!(entry::decode(&mut &body[..], 7).map(|entry| entry.sequence), Some(8));
        // Nor is it taken for a delete, with something in it that would be lost.
        body[4] = 1;
        let loses = matches!(&event, Event::Put(put) if !put.value.is_empty() || !put.metadata.is_empty());
        prop_assert!(!loses || entry::decode(&mut &body[..], 7).is_none());
    }

    #[test]
    fn what_is_accepted_fits_when_nothing_else_does(
        mut room in 200..SEGMENT, steps in proptest::collection::vec(step(), 1..120),
    ) {
        let queue = Queue::new((0, 1), room, Some(Shortage::Space), SEGMENT, SEGMENT, Clock::system());
        let (mut taken, mut full) = (None, false);
        let mut write = |frame: Builder| {
            prop_assert!(frame.sealed_len() <= room, "{} bytes into {room}", frame.sealed_len());
            room -= frame.sealed_len();
            queue.written(frame, room, Duration::ZERO);
            Ok(())
        };
        for step in steps {
            match step {
                Step::Append(events) => full |= matches!(queue.append(1, &events), Err(AppendError::InsufficientStorage)),
                Step::Take if taken.is_none() => taken = take(&queue),
                Step::Write if let Some(frame) = taken.take() => write(frame)?,
                Step::Take | Step::Write => {}
            }
        }
        while let Some(frame) = taken.take().or_else(|| take(&queue)) {
            write(frame)?;
        }
        // Nor is anything refused that would fit without doubt: a frame of its own, with all its padding.
        prop_assert!(!full || queue.append(1, &[Event::Delete(String::new())]).is_ok() == (room >= 25 + 71));
    }
}
