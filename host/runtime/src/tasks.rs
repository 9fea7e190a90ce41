//! The supervisor: the one place that starts threads and tasks, and notices when one dies.
//!
//! Each is started with its name and with what its end means:
//!
//! - **Restart**: it is started again, with a backoff, after an error is logged and `kvs_task_restarts_total{task}` is
//!   raised. For parts that keep no state of their own: reloaders, sweeps, the ticker.
//! - **Fail**: whoever started it is handed the error. For parts that nothing can go on without: the threads and tasks of
//!   the log, with which the log fails, the server stops serving, and the process exits with 1.
//! - **Detach**: its end is normal, and a panic is logged and counted in `kvs_task_panics_total{task}`. For connections,
//!   requests, and work whose result somebody waits for.
//!
//! That is what builds with unwinding panics do: all but the profile `dist`. There a panic ends the process at once, with a
//! signal and hence not with 0, and whatever supervises it starts it again; what was acknowledged is in the log. An error
//! that a task returns is the same in both.
//!
//! Owns: names, counts and backoffs. Must never know: what a task does.

mod handles;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Error, Result, anyhow};
use futures_util::FutureExt;
use futures_util::future::abortable;
use kvs_metrics::{Measured, Page};
use tokio::runtime::Handle;
use tracing::error;

use crate::Clock;
pub use handles::{Task, Thread};

/// The pauses before restarts that follow on each other: doubled from the first to the last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// A task that ran for so long has not failed again for the same reason.
const QUIET: Duration = Duration::from_secs(60);

pub type BoxedTask = Pin<Box<dyn Future<Output = ()> + Send>>;
pub type BoxedWork = Box<dyn FnOnce() + Send>;

/// Threads and tasks that are given from outside: those of a simulation or of a model checker.
pub trait Spawn: Send + Sync + 'static {
    /// Starts a thread.
    fn thread(&self, name: &str, work: BoxedWork) -> io::Result<()>;
    /// Starts a task.
    fn task(&self, name: &str, task: BoxedTask);
    /// Called within a thread or task whenever it begins, also again. A panic in here is one of it.
    fn begins(&self, _name: &str) {}
}

/// Starts threads and tasks. Clones share what is counted.
#[derive(Clone)]
pub struct Tasks {
    spawn: Spawner,
    ledger: Arc<Mutex<BTreeMap<&'static str, Record>>>,
}

#[derive(Clone)]
enum Spawner {
    /// In the tokio runtime of whoever starts a task.
    System,
    In(Handle),
    Given(Arc<dyn Spawn>),
}

/// What is known of the tasks of one name.
#[derive(Default)]
struct Record {
    restarts: u64,
    panics: u64,
    /// Why it does not run, while it waits to be started again.
    down: Option<String>,
}

impl Tasks {
    /// The operating system's threads, and tasks of the tokio runtime in which they are started.
    pub fn system() -> Self {
        Self { spawn: Spawner::System, ledger: Arc::default() }
    }

    pub fn given(spawn: Arc<dyn Spawn>) -> Self {
        Self { spawn: Spawner::Given(spawn), ledger: Arc::default() }
    }

    /// The same, with tasks in this runtime whoever starts them.
    pub fn in_runtime(&self, runtime: &Handle) -> Self {
        let spawn = match &self.spawn {
            Spawner::System | Spawner::In(_) => Spawner::In(runtime.clone()),
            Spawner::Given(spawn) => Spawner::Given(Arc::clone(spawn)),
        };
        Self { spawn, ledger: Arc::clone(&self.ledger) }
    }

    /// Policy *restart*: starts a task again when it panics or returns an error. Once it returns success it is over.
    pub fn restart<T, F>(&self, name: &'static str, clock: &Clock, make: impl FnMut() -> F + Send + 'static) -> Task
    where
        T: Send,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let (tasks, clock, mut make) = (self.clone(), clock.clone(), make);
        self.start(name, async move {
            let mut backoff = Backoff::default();
            loop {
                let begun = clock.now();
                let ended = AssertUnwindSafe(async {
                    tasks.begins(name);
                    make().await
                });
                let Err(error) = caught(ended.catch_unwind().await) else { return };
                let pause = backoff.next(clock.elapsed(begun));
                let down = tasks.goes_down(name, &error, pause);
                clock.sleep(pause).await;
                drop(down);
            }
        })
    }

    /// Policy *fail*: a task whose panic or error is handed to `failed`.
    pub fn fail<F>(&self, name: &'static str, task: F, failed: impl FnOnce(&Error) + Send + 'static) -> Task
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let tasks = self.clone();
        self.start(name, async move {
            let ended = AssertUnwindSafe(async {
                tasks.begins(name);
                task.await
            });
            if let Err(error) = caught(ended.catch_unwind().await) {
                failed(&error.context(format!("the task `{name}` ended")));
            }
        })
    }

    /// Policy *detach*: a task that may end at any time. Costs no more than to start it otherwise.
    pub fn detach(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let witness = Witness { tasks: self.clone(), name };
        let task = async move {
            witness.tasks.begins(name);
            task.await;
            drop(witness);
        };
        self.spawn(name, task);
    }

    /// Runs within a task. A panic is logged and counted as one of a detached task, and returned as an error.
    pub async fn caught<T>(&self, name: &'static str, work: impl Future<Output = T>) -> Result<T> {
        let ended = AssertUnwindSafe(work).catch_unwind().await;
        caught(ended.map(Ok)).inspect_err(|error| {
            error!(task = name, "a task panicked: {error:#}");
            self.ledger().entry(name).or_default().panics += 1;
        })
    }

    /// Policy *restart* for a thread, which is started once and runs the work again.
    pub fn restart_thread<T>(
        &self,
        name: &'static str,
        clock: &Clock,
        mut work: impl FnMut() -> Result<T> + Send + 'static,
    ) -> io::Result<Thread> {
        let (tasks, clock) = (self.clone(), clock.clone());
        self.thread(name, move || {
            let mut backoff = Backoff::default();
            loop {
                let begun = clock.now();
                let ended = catch_unwind(AssertUnwindSafe(|| {
                    tasks.begins(name);
                    work()
                }));
                let Err(error) = caught(ended) else { return };
                let pause = backoff.next(clock.elapsed(begun));
                let down = tasks.goes_down(name, &error, pause);
                clock.pause(pause);
                drop(down);
            }
        })
    }

    /// Policy *fail* for a thread.
    pub fn fail_thread(
        &self,
        name: &'static str,
        work: impl FnOnce() -> Result<()> + Send + 'static,
        failed: impl FnOnce(&Error) + Send + 'static,
    ) -> io::Result<Thread> {
        let tasks = self.clone();
        self.thread(name, move || {
            let ended = catch_unwind(AssertUnwindSafe(|| {
                tasks.begins(name);
                work()
            }));
            if let Err(error) = caught(ended) {
                failed(&error);
            }
        })
    }

    /// Policy *detach* for a thread.
    pub fn detach_thread(&self, name: &'static str, work: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
        let witness = Witness { tasks: self.clone(), name };
        self.thread(name, move || {
            witness.tasks.begins(name);
            work();
            drop(witness);
        })
    }

    /// What does not run and is about to be started again, for those who look after it.
    pub fn condition(&self) -> Option<String> {
        let ledger = self.ledger();
        let down = ledger.iter().filter_map(|(name, record)| {
            let reason = record.down.as_ref()?;
            Some(format!("the task `{name}` failed and is started again soon: {reason}"))
        });
        let down: Vec<_> = down.collect();
        (!down.is_empty()).then(|| down.join("; "))
    }

    /// How often tasks of this name were started again.
    pub fn restarts(&self, name: &str) -> u64 {
        self.ledger().get(name).map_or(0, |record| record.restarts)
    }

    /// How often detached tasks of this name panicked.
    pub fn panics(&self, name: &str) -> u64 {
        self.ledger().get(name).map_or(0, |record| record.panics)
    }

    fn start(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) -> Task {
        let (task, abort) = abortable(task);
        let (ended, handle) = Task::new(abort);
        self.spawn(name, async move {
            let _ = task.await;
            drop(ended);
        });
        handle
    }

    #[expect(clippy::disallowed_methods, reason = "the place where tasks are started")]
    fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        match &self.spawn {
            Spawner::System => drop(tokio::spawn(task)),
            Spawner::In(runtime) => drop(runtime.spawn(task)),
            Spawner::Given(spawn) => spawn.task(name, Box::pin(task)),
        }
    }

    #[expect(clippy::disallowed_methods, reason = "the place where threads are started")]
    fn thread(&self, name: &'static str, work: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
        let (ended, thread) = Thread::new();
        let work = move || {
            work();
            drop(ended);
        };
        match &self.spawn {
            Spawner::System | Spawner::In(_) => {
                std::thread::Builder::new().name(name.into()).spawn(work)?;
            }
            Spawner::Given(spawn) => spawn.thread(name, Box::new(work))?,
        }
        Ok(thread)
    }

    fn begins(&self, name: &str) {
        if let Spawner::Given(spawn) = &self.spawn {
            spawn.begins(name);
        }
    }

    /// Notes that a task does not run, until what this returns is dropped: at a restart, or when the task is aborted.
    fn goes_down(&self, name: &'static str, error: &Error, pause: Duration) -> Down {
        error!(task = name, "a task failed and is started again in {pause:.0?}: {error:#}");
        let mut ledger = self.ledger();
        let record = ledger.entry(name).or_default();
        record.restarts += 1;
        record.down = Some(format!("{error:#}"));
        drop(ledger);
        Down { tasks: self.clone(), name }
    }

    fn ledger(&self) -> MutexGuard<'_, BTreeMap<&'static str, Record>> {
        // Every change under this lock is whole.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Measured for Tasks {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let ledger = self.ledger();
        let restarts = ledger.iter().map(|(name, record)| ([("task", *name)], record.restarts));
        page.counters("task_restarts", "Restarts of background tasks that failed", restarts)?;
        let panics = ledger.iter().map(|(name, record)| ([("task", *name)], record.panics));
        page.counters("task_panics", "Panics of tasks that are not started again", panics)
    }
}

/// A task that does not run.
struct Down {
    tasks: Tasks,
    name: &'static str,
}

impl Drop for Down {
    fn drop(&mut self) {
        if let Some(record) = self.tasks.ledger().get_mut(self.name) {
            record.down = None;
        }
    }
}

/// Sees a detached task unwind. It is dropped in an orderly manner in any other case.
struct Witness {
    tasks: Tasks,
    name: &'static str,
}

impl Drop for Witness {
    fn drop(&mut self) {
        if std::thread::panicking() {
            error!(task = self.name, "a task panicked");
            self.tasks.ledger().entry(self.name).or_default().panics += 1;
        }
    }
}

#[derive(Default)]
struct Backoff {
    pause: Duration,
}

impl Backoff {
    /// The pause after a run that took so long.
    fn next(&mut self, ran: Duration) -> Duration {
        self.pause = if ran >= QUIET { PAUSES.0 } else { (self.pause * 2).clamp(PAUSES.0, PAUSES.1) };
        self.pause
    }
}

/// A panic is an error like others.
fn caught<T>(ended: std::thread::Result<Result<T>>) -> Result<T> {
    ended.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Err(anyhow!("it panicked: {}", text.unwrap_or("for an unknown reason")))
    })
}

#[cfg(test)]
mod tests;
