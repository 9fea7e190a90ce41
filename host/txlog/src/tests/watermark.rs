//! Tests of the watermark, one step after the other.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use crate::{OutcomeUnknown, Watermark};

fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn durable_sequence_is_reached_at_once() {
    let watermark = Watermark::new(7);
    assert!(matches!(poll(pin!(watermark.reached(7))), Poll::Ready(Ok(()))));
}

#[test]
fn advance_releases_waiters_up_to_it() {
    let watermark = Watermark::new(0);
    let (mut first, mut second) = (pin!(watermark.reached(1)), pin!(watermark.reached(2)));
    assert!(poll(first.as_mut()).is_pending());
    assert!(poll(second.as_mut()).is_pending());
    watermark.advance(1);
    assert!(matches!(poll(first.as_mut()), Poll::Ready(Ok(()))));
    assert!(poll(second.as_mut()).is_pending());
}

#[test]
fn waiters_that_gave_up_do_not_add_up() {
    let watermark = Watermark::new(0);
    let mut patient = pin!(watermark.reached(1));
    assert!(poll(patient.as_mut()).is_pending());
    for _ in 0..100_000 {
        assert!(poll(pin!(watermark.reached(1))).is_pending());
        assert!(watermark.waiters() <= 2_048);
    }
    watermark.advance(1);
    assert!(matches!(poll(patient.as_mut()), Poll::Ready(Ok(()))));
}

#[test]
fn latch_fails_current_and_future_waiters() {
    let watermark = Watermark::new(3);
    let mut waiting = pin!(watermark.reached(4));
    let mut latched = pin!(watermark.latched());
    assert!(poll(waiting.as_mut()).is_pending());
    assert!(poll(latched.as_mut()).is_pending());
    watermark.latch("fdatasync: input/output error".into());
    assert!(matches!(poll(waiting.as_mut()), Poll::Ready(Err(OutcomeUnknown))));
    assert!(matches!(poll(pin!(watermark.reached(5))), Poll::Ready(Err(OutcomeUnknown))));
    assert!(matches!(poll(pin!(watermark.reached(3))), Poll::Ready(Ok(()))));
    assert_eq!(poll(latched.as_mut()), Poll::Ready("fdatasync: input/output error".into()));
}
