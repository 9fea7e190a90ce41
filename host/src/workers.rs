//! Worker threads of the server's runtime: reports when all of them have run out of work, and when one has work again; and
//! distinguishes a worker from its tasks.
//!
//! Owns: the number of parked threads. Must never know: who is interested, or what the threads work on.

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::task;

thread_local! {
    /// Id of the task that a worker thread is to the runtime. Within the tasks that it runs there is another one.
    static WORKER: Cell<Option<task::Id>> = const { Cell::new(None) };
}

/// Worker threads of a runtime, which calls [`park`](Self::park) and [`unpark`](Self::unpark).
#[derive(Default)]
pub struct Workers {
    parked: AtomicUsize,
    observer: OnceLock<Observer>,
}

struct Observer {
    workers: usize,
    set_idle: Box<dyn Fn(bool) + Send + Sync>,
}

impl Workers {
    /// Reports from now on whether all of this number of threads are idle. There is one observer.
    pub fn observe(&self, workers: usize, set_idle: impl Fn(bool) + Send + Sync + 'static) {
        // A second one would be ignored.
        let _ = self.observer.set(Observer { workers, set_idle: Box::new(set_idle) });
    }

    /// A thread is about to wait for work.
    pub fn park(&self) {
        WORKER.set(task::try_id());
        self.report(self.parked.fetch_add(1, Ordering::AcqRel) + 1, true);
    }

    /// A thread has work again.
    pub fn unpark(&self) {
        self.report(self.parked.fetch_sub(1, Ordering::AcqRel), false);
    }

    /// Reports the first and the last step away from the state that all are parked. A report of `true` can come late, after
    /// one of `false`; it is corrected when that thread parks.
    fn report(&self, parked: usize, idle: bool) {
        if let Some(observer) = self.observer.get().filter(|observer| observer.workers == parked) {
            (observer.set_idle)(idle);
        }
    }
}

/// Returns whether this thread is a worker that runs no task now. The runtime does not survive its panic: it continues with one
/// worker less, and may never wake the others again.
pub fn is_between_tasks() -> bool {
    WORKER.get().is_some_and(|worker| task::try_id() == Some(worker))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn workers_are_idle_when_all_are_parked() {
        let reports = Arc::new(Mutex::new(Vec::new()));
        let workers = Workers::default();
        workers.park();
        let reported = Arc::clone(&reports);
        workers.observe(2, move |idle| reported.lock().unwrap().push(idle));
        workers.park();
        workers.unpark();
        workers.unpark();
        workers.park();
        assert_eq!(*reports.lock().unwrap(), [true, false]);
        workers.park();
        assert_eq!(*reports.lock().unwrap(), [true, false, true]);
    }
}
