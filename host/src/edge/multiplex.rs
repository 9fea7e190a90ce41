//! Executor for the requests of one HTTP/2 connection, which run in its task and share its time slices.
//!
//! With a task for each request, the concurrent requests of one client would spread over all threads, and delay all other
//! clients. So a connection is one task, which yields at the end of its time slice.

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

/// Length of a time slice: enough for some small requests, whose responses are sent together.
const SLICE_TIME: Duration = Duration::from_micros(100);

/// Time slice of a connection. It begins with the first check.
#[derive(Clone, Default)]
pub struct TimeSlice {
    over: Arc<Mutex<Option<Instant>>>,
}

impl TimeSlice {
    /// Returns whether the slice is over. If so, the task is woken for the next one.
    pub fn is_over(&self, context: &Context<'_>) -> bool {
        let now = Instant::now();
        let over = now >= *lock(&self.over).get_or_insert(now + SLICE_TIME);
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

/// Executor of new requests.
#[derive(Clone)]
pub struct RequestExecutor {
    begun: Arc<Mutex<Vec<Request>>>,
    /// Separate from `begun`, since requests hold it: a reference to the queue would be a cycle.
    slice: TimeSlice,
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for RequestExecutor {
    fn execute(&self, request: F) {
        let (slice, mut request) = (self.slice.clone(), Box::pin(request));
        let in_turn = poll_fn(
            move |context: &mut Context<'_>| {
                if slice.is_over(context) { Poll::Pending } else { request.as_mut().poll(context) }
            },
        );
        lock(&self.begun).push(Box::pin(in_turn));
    }
}

impl RequestExecutor {
    pub fn new(slice: &TimeSlice) -> Self {
        Self { begun: Arc::default(), slice: slice.clone() }
    }

    /// Runs the requests. To be polled after the connection, which starts them, at the end of every slice.
    pub async fn run(self) -> Infallible {
        let mut running = FuturesUnordered::new();
        poll_fn(|context: &mut Context<'_>| {
            running.extend(mem::take(&mut *lock(&self.begun)));
            // Requests have their own slice, independent of the reads before.
            self.slice.end();
            while let Poll::Ready(Some(())) = running.poll_next_unpin(context) {}
            self.slice.end();
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
    fn dropped_executor_drops_new_requests() {
        let (streams, held) = (RequestExecutor::new(&TimeSlice::default()), Arc::new(()));
        let (executor, holds) = (streams.clone(), Arc::clone(&held));
        executor.execute(async move { drop(holds) });
        drop((executor, streams.run()));
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
