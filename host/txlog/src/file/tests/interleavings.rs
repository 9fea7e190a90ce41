//! The open batch under every interleaving that a model checker comes upon: what was accepted is handed out once and in order, whatever ends the log, and nobody
//! waits for ever.

use std::sync::Arc;
use std::time::Duration;

use shuttle::thread::{self, JoinHandle};

use self::queue::{Queue, Work};
use crate::Event;
use crate::file::{entry, frame};
use crate::tests::model::{check, sync};

#[expect(dead_code, reason = "the scenarios do not use all of it")]
#[expect(clippy::duplicate_mod, reason = "the same code, with other primitives below it")]
#[path = "../queue.rs"]
mod queue;

/// Room in a segment, hence in a frame and in the queue: for two groups, and for a third in a frame of its own.
const SEGMENT: u64 = 260;

fn empty() -> Arc<Queue> {
    Arc::new(Queue::new((0, 1), 1 << 20, false, SEGMENT, SEGMENT, sync::Clock))
}

/// Appends groups in a thread of its own. Returns how many events were accepted.
fn append(queue: &Arc<Queue>, groups: [usize; 2]) -> JoinHandle<u64> {
    let queue = Arc::clone(queue);
    thread::spawn(move || {
        let append = |events: usize| match queue.append(0, &vec![Event::Delete("k".into()); events]) {
            Ok(first) => {
                assert!(first + events as u64 - 1 <= queue.appended());
                events as u64
            }
            Err(_) => 0,
        };
        groups.map(append).into_iter().sum()
    })
}

/// Takes all there is, in a thread of its own. Returns how many events there were, and whether the log failed.
fn write(queue: &Arc<Queue>) -> JoinHandle<(u64, bool)> {
    let queue = Arc::clone(queue);
    thread::spawn(move || {
        let (mut written, mut idle) = (0, Some(Duration::ZERO));
        loop {
            match queue.take(idle) {
                Work::Write(frame) => {
                    assert_eq!(frame.first, written + 1, "in order, and without a gap");
                    written += u64::from(frame.count);
                    queue.written(frame, 1 << 20);
                }
                // Once, or it would ask for ever.
                Work::Idle => idle = None,
                Work::Closed => return (written, false),
                Work::Failed => return (written, true),
            }
        }
    })
}

fn end(queue: &Arc<Queue>, how: fn(&Queue)) -> JoinHandle<()> {
    let queue = Arc::clone(queue);
    thread::spawn(move || {
        how(&queue);
        assert!(queue.append(0, &[Event::Delete("k".into())]).is_err(), "nothing is accepted after the end");
    })
}

#[test]
fn queue_that_closes_hands_out_all_that_it_accepted() {
    check(|| {
        let queue = empty();
        let writer = write(&queue);
        let appending = [append(&queue, [1, 2]), append(&queue, [2, 1])];
        let closing = end(&queue, Queue::close);
        let accepted = appending.map(|appends| appends.join().unwrap());
        closing.join().unwrap();
        assert_eq!(writer.join().unwrap(), (accepted.iter().sum(), false));
        assert_eq!(queue.appended(), accepted.iter().sum::<u64>());
    });
}

#[test]
fn queue_wakes_the_writer_for_each_append() {
    check(|| {
        let queue = empty();
        let writer = write(&queue);
        let appending = [append(&queue, [1, 1]), append(&queue, [1, 1])];
        let accepted: u64 = appending.map(|appends| appends.join().unwrap()).iter().sum();
        queue.close();
        assert_eq!(writer.join().unwrap(), (accepted, false));
    });
}

#[test]
fn queue_that_fails_lets_the_writer_go() {
    check(|| {
        let queue = empty();
        let writer = write(&queue);
        let appending = append(&queue, [1, 2]);
        let closing = end(&queue, Queue::close);
        let failing = end(&queue, Queue::fail);
        let accepted = appending.join().unwrap();
        closing.join().unwrap();
        failing.join().unwrap();
        let (written, has_failed) = writer.join().unwrap();
        assert!(if has_failed { written <= accepted } else { written == accepted }, "{written} of {accepted}");
    });
}
