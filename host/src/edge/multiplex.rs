//! The turns of one HTTP/2 connection, and its requests, which run where it does.
//!
//! A task of its own for each would spread what one client asks at once over all threads, and everybody else would wait
//! behind it. So a connection is one task, whatever comes on it, and goes to the end of the queue when its turn is over.

use std::convert::Infallible;
use std::future::poll_fn;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hyper::rt::Executor;
use tokio::time::Instant;

/// How long a turn is: time for some small requests, whose answers leave together.
const SLICE: Duration = Duration::from_micros(100);

/// When the turn of a connection is over. It begins with whoever asks first.
#[derive(Clone, Default)]
pub struct Turn {
    over: Arc<Mutex<Option<Instant>>>,
}

impl Turn {
    /// Whether others have theirs first. Who asks is woken for the next.
    pub fn is_over(&self, context: &Context<'_>) -> bool {
        let now = Instant::now();
        let over = now >= *lock(&self.over).get_or_insert(now + SLICE);
        if over {
            context.waker().wake_by_ref();
        }
        over
    }

    fn end(&self) {
        *lock(&self.over) = None;
    }
}

type Request = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Takes the requests that begin, to be run.
#[derive(Clone)]
pub struct Streams {
    begun: Arc<Mutex<Vec<Request>>>,
    /// Apart, since requests know of it: what they stand in they would keep for ever.
    turn: Turn,
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, request: F) {
        let (turn, mut request) = (self.turn.clone(), Box::pin(request));
        let in_turn = poll_fn(
            move |context: &mut Context<'_>| {
                if turn.is_over(context) { Poll::Pending } else { request.as_mut().poll(context) }
            },
        );
        lock(&self.begun).push(Box::pin(in_turn));
    }
}

impl Streams {
    pub fn new(turn: &Turn) -> Self {
        Self { begun: Arc::default(), turn: turn.clone() }
    }

    /// Runs them. To be polled after the connection, which begins them, at the end of every turn.
    pub async fn run(self) -> Infallible {
        let mut running = FuturesUnordered::new();
        poll_fn(|context: &mut Context<'_>| {
            running.extend(mem::take(&mut *lock(&self.begun)));
            // What was read has had its time, however much came: requests have their own.
            self.turn.end();
            while let Poll::Ready(Some(())) = running.poll_next_unpin(context) {}
            self.turn.end();
            Poll::Pending
        })
        .await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_ends_takes_what_it_has_just_begun_with_it() {
        let (streams, held) = (Streams::new(&Turn::default()), Arc::new(()));
        let (executor, holds) = (streams.clone(), Arc::clone(&held));
        executor.execute(async move { drop(holds) });
        drop((executor, streams.run()));
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
