//! Model checking of the watermark: in every interleaving each waiter is released, and none before the log is durable.

use std::sync::Arc;

use shuttle::future::block_on;
use shuttle::thread;

use self::watermark::Watermark;
use super::{check, sync};

#[expect(dead_code, reason = "the scenarios do not use all of it")]
#[expect(clippy::duplicate_mod, reason = "the same code, with other primitives below it")]
#[path = "../../watermark.rs"]
mod watermark;

/// Waits in its own thread. Returns whether the sequence became durable.
fn wait_for(watermark: &Arc<Watermark>, sequence: u64) -> thread::JoinHandle<bool> {
    let watermark = Arc::clone(watermark);
    thread::spawn(move || {
        let is_durable = block_on(watermark.reached(sequence)).is_ok();
        assert!(!is_durable || watermark.durable() >= sequence, "{sequence} was released early");
        is_durable
    })
}

#[test]
fn watermark_releases_all_who_wait() {
    check(|| {
        let watermark = Arc::new(Watermark::new(0));
        let waiting = [3, 1, 2].map(|sequence| wait_for(&watermark, sequence));
        watermark.advance(1);
        watermark.advance(3);
        for waits in waiting {
            assert!(waits.join().unwrap());
        }
    });
}

#[test]
fn watermark_that_latches_releases_all() {
    check(|| {
        let watermark = Arc::new(Watermark::new(0));
        let waiting = [1, 2].map(|sequence| wait_for(&watermark, sequence));
        let server = {
            let watermark = Arc::clone(&watermark);
            thread::spawn(move || block_on(watermark.latched()))
        };
        watermark.advance(1);
        watermark.latch("no disk".into());
        assert_eq!(waiting.map(|waits| waits.join().unwrap()), [true, false]);
        assert_eq!(server.join().unwrap(), "no disk");
    });
}

#[test]
fn watermark_that_latches_keeps_what_is_durable() {
    check(|| {
        let watermark = Arc::new(Watermark::new(0));
        let waiting = [1, 2].map(|sequence| wait_for(&watermark, sequence));
        let deposed = {
            let watermark = Arc::clone(&watermark);
            thread::spawn(move || watermark.latch("deposed".into()))
        };
        watermark.advance(1);
        deposed.join().unwrap();
        let [first, second] = waiting.map(|waits| waits.join().unwrap());
        // A second wait for a durable sequence succeeds.
        assert!(!second && block_on(watermark.reached(1)).is_ok(), "{first} {second}");
    });
}
