//! The supervisor: the only place that starts threads and tasks, and detects their end.
//!
//! Each is started with a name and a policy for its end:
//!
//! - **Restart**: it is restarted with a backoff, after an error is logged and `kvs_task_restarts_total{task}` is
//!   incremented. For stateless tasks: reloaders, sweeps, the ticker.
//! - **Fail**: the error is passed to a callback. For essential threads and tasks: those of the log, with which the log
//!   fails, the server stops serving, and the process exits with 1.
//! - **Detach**: its end is normal; a panic is logged and counted in `kvs_task_panics_total{task}`. For connections,
//!   requests, and work with an awaited result.
//!
//! This applies to builds with unwinding panics: all but the profile `dist`, where a panic aborts the process with a signal,
//! and its supervisor restarts it; acknowledged writes are in the log. An error returned by a task is handled alike in both.
//!
//! Owns: names, counters and backoffs. Must never know: the purpose of a task.

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

/// Backoff before consecutive restarts: doubled from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// Running time after which the backoff is reset.
const BACKOFF_RESET: Duration = Duration::from_secs(60);

pub type BoxedTask = Pin<Box<dyn Future<Output = ()> + Send>>;
pub type BoxedWork = Box<dyn FnOnce() + Send>;

/// An injected spawner of threads and tasks, of a simulation or a model checker.
pub trait Spawn: Send + Sync + 'static {
    /// Starts a thread.
    fn thread(&self, name: &str, work: BoxedWork) -> io::Result<()>;
    /// Starts a task.
    fn task(&self, name: &str, task: BoxedTask);
    /// Called within a thread or task at each start and restart. A panic here counts as a panic of the task.
    fn begins(&self, _name: &str) {}
}

/// The supervisor. Clones share their counters.
#[derive(Clone)]
pub struct Tasks {
    spawn: Spawner,
    ledger: Arc<Mutex<BTreeMap<&'static str, Record>>>,
}

#[derive(Clone)]
enum Spawner {
    /// In the current tokio runtime.
    System,
    In(Handle),
    Given(Arc<dyn Spawn>),
}

/// Counters and state of the tasks with one name.
#[derive(Default)]
struct Record {
    restarts: u64,
    panics: u64,
    /// The error, while the task waits for a restart.
    down: Option<String>,
}

impl Tasks {
    /// Creates a supervisor for threads of the operating system and tasks of the current tokio runtime.
    pub fn system() -> Self {
        Self { spawn: Spawner::System, ledger: Arc::default() }
    }

    pub fn given(spawn: Arc<dyn Spawn>) -> Self {
        Self { spawn: Spawner::Given(spawn), ledger: Arc::default() }
    }

    /// Returns this supervisor with tasks in the given runtime.
    pub fn in_runtime(&self, runtime: &Handle) -> Self {
        let spawn = match &self.spawn {
            Spawner::System | Spawner::In(_) => Spawner::In(runtime.clone()),
            Spawner::Given(spawn) => Spawner::Given(Arc::clone(spawn)),
        };
        Self { spawn, ledger: Arc::clone(&self.ledger) }
    }

    /// Policy *restart*: restarts a task that panics or returns an error, until it returns success.
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

    /// Policy *fail*: passes the panic or error of a task to `failed`.
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

    /// Policy *detach*: a task that may end at any time. It costs no more than a plain spawn.
    pub fn detach(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let witness = Witness { tasks: self.clone(), name };
        let task = async move {
            witness.tasks.begins(name);
            task.await;
            drop(witness);
        };
        self.spawn(name, task);
    }

    /// Runs `work` within the current task. A panic is logged and counted as one of a detached task, and returned as an error.
    pub async fn caught<T>(&self, name: &'static str, work: impl Future<Output = T>) -> Result<T> {
        let ended = AssertUnwindSafe(work).catch_unwind().await;
        caught(ended.map(Ok)).inspect_err(|error| {
            error!(task = name, "task panicked: {error:#}");
            self.ledger().entry(name).or_default().panics += 1;
        })
    }

    /// Policy *restart* for a thread, which is created once and repeats the work.
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

    /// Returns a description of the tasks that wait for a restart.
    pub fn condition(&self) -> Option<String> {
        let ledger = self.ledger();
        let down = ledger.iter().filter_map(|(name, record)| {
            let reason = record.down.as_ref()?;
            Some(format!("the task `{name}` failed, restarting: {reason}"))
        });
        let down: Vec<_> = down.collect();
        (!down.is_empty()).then(|| down.join("; "))
    }

    /// Returns the number of restarts of tasks with this name.
    pub fn restarts(&self, name: &str) -> u64 {
        self.ledger().get(name).map_or(0, |record| record.restarts)
    }

    /// Returns the number of panics of detached tasks with this name.
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

    /// Marks a task as down until the returned guard is dropped: at its restart, or when it is aborted.
    fn goes_down(&self, name: &'static str, error: &Error, pause: Duration) -> Down {
        error!(task = name, "task failed, restarting in {pause:.0?}: {error:#}");
        let mut ledger = self.ledger();
        let record = ledger.entry(name).or_default();
        record.restarts += 1;
        record.down = Some(format!("{error:#}"));
        drop(ledger);
        Down { tasks: self.clone(), name }
    }

    fn ledger(&self) -> MutexGuard<'_, BTreeMap<&'static str, Record>> {
        // Every change under this lock is complete.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Measured for Tasks {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let ledger = self.ledger();
        let restarts = ledger.iter().map(|(name, record)| ([("task", *name)], record.restarts));
        page.counters("task_restarts", "Restarts of background tasks that failed", restarts)?;
        let panics = ledger.iter().map(|(name, record)| ([("task", *name)], record.panics));
        page.counters("task_panics", "Panics of tasks that are not restarted", panics)
    }
}

/// Guard of a task that is down.
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

/// Guard that reports the panic of a detached task, when it is dropped by unwinding.
struct Witness {
    tasks: Tasks,
    name: &'static str,
}

impl Drop for Witness {
    fn drop(&mut self) {
        if std::thread::panicking() {
            error!(task = self.name, "task panicked");
            self.tasks.ledger().entry(self.name).or_default().panics += 1;
        }
    }
}

#[derive(Default)]
struct Backoff {
    pause: Duration,
}

impl Backoff {
    /// Returns the backoff after a run of this duration.
    fn next(&mut self, ran: Duration) -> Duration {
        self.pause = if ran >= BACKOFF_RESET { BACKOFF.0 } else { (self.pause * 2).clamp(BACKOFF.0, BACKOFF.1) };
        self.pause
    }
}

/// Turns a panic into an error.
fn caught<T>(ended: std::thread::Result<Result<T>>) -> Result<T> {
    ended.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Err(anyhow!("it panicked: {}", text.unwrap_or("for an unknown reason")))
    })
}

#[cfg(test)]
mod tests;
