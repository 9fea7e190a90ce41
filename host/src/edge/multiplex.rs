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

/// Takes the requests that begin, to be run.
#[derive(Clone)]
pub struct Streams(Arc<Mutex<State>>);

struct State {
    begun: Vec<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// When the time of this turn is over.
    over: Instant,
}

impl Default for Streams {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State { begun: Vec::new(), over: Instant::now() })))
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, request: F) {
        let (streams, mut request) = (self.clone(), Box::pin(request));
        let in_time = poll_fn(move |context: &mut Context<'_>| {
            if Instant::now() < streams.state().over {
                return request.as_mut().poll(context);
            }
            context.waker().wake_by_ref();
            Poll::Pending
        });
        self.state().begun.push(Box::pin(in_time));
    }
}

impl Streams {
    /// Runs them. To be polled after the connection, which begins them.
    pub async fn run(self) -> Infallible {
        let mut running = FuturesUnordered::new();
        poll_fn(|context: &mut Context<'_>| {
            let begun = {
                let mut state = self.state();
                state.over = Instant::now() + SLICE;
                mem::take(&mut state.begun)
            };
            running.extend(begun);
            while let Poll::Ready(Some(())) = running.poll_next_unpin(context) {}
            Poll::Pending
        })
        .await
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
