//! The requests of one HTTP/2 connection, which run where their connection does.
//!
//! A task of its own for each would spread what one client asks at once over all threads, and everybody else would wait
//! behind it. So a connection is one task, whatever comes on it, and goes to the end of the queue when its time is over.

use std::convert::Infallible;
use std::future::poll_fn;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hyper::rt::Executor;

/// How long requests are begun or gone on with before others have their turn: some small ones, whose answers leave
/// together.
const SLICE: Duration = Duration::from_micros(100);

type Request = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Takes the requests that begin, to be run.
#[derive(Clone)]
pub struct Streams {
    begun: Arc<Mutex<Vec<Request>>>,
    /// When the time of this turn is over. Apart, since requests know of it: what they stand in they would keep for ever.
    over: Arc<Mutex<Instant>>,
}

impl Default for Streams {
    fn default() -> Self {
        Self { begun: Arc::default(), over: Arc::new(Mutex::new(Instant::now())) }
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, request: F) {
        let (over, mut request) = (Arc::clone(&self.over), Box::pin(request));
        let in_time = poll_fn(move |context: &mut Context<'_>| {
            if Instant::now() < *lock(&over) {
                return request.as_mut().poll(context);
            }
            context.waker().wake_by_ref();
            Poll::Pending
        });
        lock(&self.begun).push(Box::pin(in_time));
    }
}

impl Streams {
    /// Runs them. To be polled after the connection, which begins them.
    pub async fn run(self) -> Infallible {
        let mut running = FuturesUnordered::new();
        poll_fn(|context: &mut Context<'_>| {
            *lock(&self.over) = Instant::now() + SLICE;
            running.extend(mem::take(&mut *lock(&self.begun)));
            while let Poll::Ready(Some(())) = running.poll_next_unpin(context) {}
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
        let (streams, held) = (Streams::default(), Arc::new(()));
        let (executor, holds) = (streams.clone(), Arc::clone(&held));
        executor.execute(async move { drop(holds) });
        drop((executor, streams.run()));
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
