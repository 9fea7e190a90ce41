//! Time slices of a connection, and the executor for the requests of one with HTTP/2, which run in its task and share them.
//!
//! With a task for each request, the concurrent requests of one client would spread over all threads, and delay all other
//! clients. So a connection is one task, which yields at the end of its time slice. The requests of HTTP/1.1 run in it anyway,
//! many in a row where they are pipelined.

use std::convert::Infallible;
use std::future::poll_fn;
use std::mem;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hyper::rt::Executor;
use tokio::task::yield_now;
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
    pub fn is_over(&self, context: &mut Context<'_>) -> bool {
        let now = Instant::now();
        let over = now >= *lock(&self.over).get_or_insert(now + SLICE_TIME);
        if over {
            // Not at once: tokio looks at the sockets after 61 turns of tasks that are always ready. After this it has.
            let _ = pin!(yield_now()).poll(context);
        }
        over
    }

    /// Returns in a slice.
    pub async fn turn(&self) {
        poll_fn(|context| if self.is_over(context) { Poll::Pending } else { Poll::Ready(()) }).await;
    }

    /// Ends the slice in each turn of the task. To be polled after what takes time of it.
    pub async fn renew(self) -> Infallible {
        poll_fn(|_| {
            self.end();
            Poll::Pending
        })
        .await
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
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::sync::Notify;

    use super::*;

    /// Beside a task that has work without an end, one that waits for a socket is run as soon as there is something to read.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn sockets_are_polled_between_two_slices() {
        let (mut ours, mut theirs) = UnixStream::pair().expect("there is one");
        let slices = Arc::new(AtomicUsize::new(0));
        let (begun, counted) = (Arc::new(Notify::new()), Arc::clone(&slices));
        let begins = Arc::clone(&begun);
        let read = tokio::spawn(async move {
            begins.notify_one();
            theirs.read_u8().await.expect("it is open");
            counted.load(Ordering::Relaxed)
        });
        begun.notified().await;
        let (slice, counts) = (TimeSlice::default(), Arc::clone(&slices));
        let busy = tokio::spawn(async move {
            let work = async {
                ours.write_u8(1).await.expect("it is open");
                loop {
                    std::thread::sleep(2 * SLICE_TIME);
                    counts.fetch_add(1, Ordering::Relaxed);
                    slice.turn().await;
                }
            };
            tokio::select! {
                biased;
                () = work => {}
                never = slice.clone().renew() => match never {},
            }
        });
        let before = read.await.expect("it does not panic");
        busy.abort();
        assert!(before < 10, "{before} slices before the other task ran");
    }

    #[test]
    fn dropped_executor_drops_new_requests() {
        let (streams, held) = (RequestExecutor::new(&TimeSlice::default()), Arc::new(()));
        let (executor, holds) = (streams.clone(), Arc::clone(&held));
        executor.execute(async move { drop(holds) });
        drop((executor, streams.run()));
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
