//! The open batch under every interleaving that a model checker comes upon: what was accepted is handed out once and in order, whatever ends the log, and nobody
//! waits for ever.

use std::sync::Arc;
use std::time::Duration;

use shuttle::thread::{self, JoinHandle};

use self::queue::{Queue, Work};
use crate::Event;
use crate::file::tests::mutants::{self, Mutant};
use crate::file::{entry, frame};
use crate::tests::model::{check, sync};

#[expect(clippy::duplicate_mod, reason = "the same code, with other primitives below it")]
#[path = "../../group_commit.rs"]
mod group_commit;
#[expect(dead_code, reason = "the scenarios do not use all of it")]
#[expect(clippy::duplicate_mod, reason = "the same code, with other primitives below it")]
#[path = "../queue.rs"]
mod queue;

/// Duration of a commit: long enough for a delay while threads are busy, and not otherwise.
const COMMIT: Duration = Duration::from_millis(1);

/// Room in a segment, hence in a frame and in the queue: for two groups, and for a third in a frame of its own.
const SEGMENT: u64 = 260;

fn empty() -> Arc<Queue> {
    Arc::new(Queue::new((0, 1), 1 << 20, None, SEGMENT, SEGMENT, sync::Clock))
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

/// Takes all there is, or this many events, in a thread of its own. Returns how many there were, and whether the log failed.
fn write(queue: &Arc<Queue>, most: u64) -> JoinHandle<(u64, bool)> {
    let queue = Arc::clone(queue);
    thread::spawn(move || {
        let (mut written, mut idle) = (0, Some(Duration::ZERO));
        while written < most {
            match queue.take(idle) {
                Work::Write(frame) => {
                    assert_eq!(frame.first, written + 1, "in order, and without a gap");
                    written += u64::from(frame.count);
                    queue.written(frame, 1 << 20, COMMIT);
                }
                // Once, or it would ask for ever.
                Work::Idle => idle = None,
                Work::Closed => return (written, false),
                Work::Failed => return (written, true),
            }
        }
        (written, false)
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
        let writer = write(&queue, u64::MAX);
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
        let writer = write(&queue, 4);
        let appending = [append(&queue, [1, 1]), append(&queue, [1, 1])];
        assert_eq!(appending.map(|appends| appends.join().unwrap()), [2, 2]);
        // With no end that would wake it.
        assert_eq!(writer.join().unwrap(), (4, false));
    });
}

#[test]
fn queue_that_fails_lets_the_writer_go() {
    check(|| {
        let queue = empty();
        let writer = write(&queue, u64::MAX);
        let appending = append(&queue, [1, 2]);
        let failing = end(&queue, Queue::fail);
        let accepted = appending.join().unwrap();
        failing.join().unwrap();
        let (written, has_failed) = writer.join().unwrap();
        assert!(has_failed && written <= accepted, "{written} of {accepted}");
    });
}

#[test]
fn queue_that_fails_while_it_closes_lets_the_writer_go() {
    check(|| {
        let queue = empty();
        let writer = write(&queue, u64::MAX);
        let appending = append(&queue, [1, 2]);
        let ending = [end(&queue, Queue::close), end(&queue, Queue::fail)];
        let accepted = appending.join().unwrap();
        ending.into_iter().for_each(|ends| ends.join().unwrap());
        let (written, has_failed) = writer.join().unwrap();
        assert!(if has_failed { written <= accepted } else { written == accepted }, "{written} of {accepted}");
    });
}

/// Returns a queue that delays a batch with one append, since two clients write and threads are busy.
fn delaying() -> Arc<Queue> {
    let queue = empty();
    for _ in 0..2 {
        queue.append(0, &[Event::Delete("k".into())]).unwrap();
    }
    assert_eq!(write(&queue, 2).join().unwrap(), (2, false));
    queue.set_idle(false);
    queue
}

/// Takes one event, in a thread of its own, while another thread appends it and then does this.
fn write_while(queue: &Arc<Queue>, then: fn(&Queue)) {
    let (writes, appends) = (Arc::clone(queue), Arc::clone(queue));
    let writing = thread::spawn(move || matches!(writes.take(None), Work::Write(frame) if frame.count == 1));
    let appending = thread::spawn(move || {
        appends.append(0, &[Event::Delete("k".into())]).unwrap();
        then(&appends);
    });
    appending.join().unwrap();
    assert!(writing.join().unwrap());
}

#[test]
fn idle_threads_wake_a_writer_that_delays() {
    check(|| write_while(&delaying(), |queue| queue.set_idle(true)));
}

#[test]
fn end_wakes_a_writer_that_delays() {
    check(|| write_while(&delaying(), Queue::close));
}

#[test]
#[should_panic(expected = "deadlock")]
fn idle_threads_that_do_not_lock_are_found() {
    check(|| {
        let queue = delaying();
        mutants::set(Some(Mutant::IdleUnlocked));
        write_while(&queue, |queue| queue.set_idle(true));
        mutants::set(None);
    });
}
