//! Watchdog of the worker threads that serve: reports one that no longer runs tasks, and all of them when a new task is not run.
//!
//! It has a thread of its own, and counts its checks rather than time: on a busy machine, or after the process was stopped, it is
//! delayed like the workers.
//!
//! Owns: what counts as stuck. Must never know: what the workers work on.

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use kvs_runtime::Env;
use kvs_txlog::Condition;
use tokio::runtime::Handle;
use tracing::error;

/// Interval of the checks.
const INTERVAL: Duration = Duration::from_secs(1);
/// Number of checks without progress after which a worker is stuck. A call of a guest leaves its worker to others.
const CHECKS: u32 = 10;

/// Watchdog of the workers of a runtime.
pub struct Watchdog {
    runtime: Handle,
    env: Env,
    /// Number of heartbeats that were run.
    heartbeats: Arc<AtomicU64>,
    watched: Mutex<Watched>,
}

struct Watched {
    /// Of each worker the number of its parks and unparks, and its time with tasks, which it adds up when it has run some.
    workers: Vec<Progress<(u64, Duration)>>,
    heartbeats: Progress<u64>,
    /// Number of heartbeats that were sent.
    sent: u64,
}

/// Progress at the last check, and since when there has been none.
struct Progress<T> {
    last: T,
    since: SystemTime,
    checks: u32,
}

impl Watchdog {
    /// Starts the thread.
    pub fn start(runtime: &Handle, env: &Env) -> io::Result<Arc<Self>> {
        let now = env.clock.wall();
        let count = runtime.metrics().num_workers();
        let workers = (0..count).map(|_| Progress::new((0, Duration::ZERO), now)).collect();
        let watched = Mutex::new(Watched { workers, heartbeats: Progress::new(0, now), sent: 0 });
        let (runtime, env) = (runtime.clone(), env.clone());
        let watchdog = Arc::new(Self { runtime, env, heartbeats: Arc::default(), watched });
        let watching = Arc::clone(&watchdog);
        let watch = move || -> anyhow::Result<Infallible> {
            loop {
                watching.env.clock.pause(INTERVAL);
                watching.check();
            }
        };
        watchdog.env.tasks.restart_thread("watchdog", &watchdog.env.clock, watch)?;
        Ok(watchdog)
    }

    /// Condition of the workers, for `/readyz`.
    pub fn condition(&self) -> Condition {
        self.lock().stuck().map_or(Condition::Well, Condition::Unfit)
    }

    fn check(&self) {
        let (metrics, now) = (self.runtime.metrics(), self.env.clock.wall());
        let mut watched = self.lock();
        let was_stuck = watched.stuck().is_some();
        for (worker, progress) in watched.workers.iter_mut().enumerate() {
            let parks = metrics.worker_park_unpark_count(worker);
            // An odd number is that of a worker which is parked.
            progress.check((parks, metrics.worker_total_busy_duration(worker)), parks % 2 == 1, now);
        }
        let run = self.heartbeats.load(Ordering::Relaxed);
        let is_run = run == watched.sent;
        watched.heartbeats.check(run, is_run, now);
        if is_run {
            watched.sent += 1;
            self.send();
        }
        if let Some(reason) = watched.stuck().filter(|_| !was_stuck) {
            error!("worker threads are stuck, restart the server: {reason}");
        }
    }

    /// Sends a heartbeat: a task that waits for a timer.
    fn send(&self) {
        let (heartbeats, clock) = (Arc::clone(&self.heartbeats), self.env.clock.clone());
        let _runtime = self.runtime.enter();
        self.env.tasks.detach("heartbeat", async move {
            clock.sleep(Duration::from_millis(1)).await;
            heartbeats.fetch_add(1, Ordering::Relaxed);
        });
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        // Every change under this lock is whole.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched {
    fn stuck(&self) -> Option<String> {
        let count = self.workers.len();
        let workers = self.workers.iter().enumerate().filter_map(|(worker, progress)| {
            let since = progress.stuck()?;
            Some(format!("worker thread {} of {count} has not finished a task since {since}", worker + 1))
        });
        let heartbeats = self.heartbeats.stuck();
        let heartbeats = heartbeats.map(|since| format!("no worker thread has run a new task since {since}"));
        let stuck: Vec<_> = workers.chain(heartbeats).collect();
        (!stuck.is_empty()).then(|| stuck.join("; "))
    }
}

impl<T: PartialEq> Progress<T> {
    fn new(last: T, since: SystemTime) -> Self {
        Self { last, since, checks: 0 }
    }

    fn check(&mut self, progress: T, is_idle: bool, now: SystemTime) {
        if is_idle || progress != self.last {
            *self = Self::new(progress, now);
        } else {
            self.checks += 1;
        }
    }

    /// Returns the time since when there has been no progress, if that is long.
    fn stuck(&self) -> Option<humantime::Rfc3339Timestamp> {
        (self.checks >= CHECKS).then(|| humantime::format_rfc3339_seconds(self.since))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::runtime::Builder;

    use super::*;

    #[test]
    fn stuck_workers_are_reported_until_they_go_on() {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
        let watchdog = Watchdog::start(runtime.handle(), &Env::real()).expect("a thread");
        let until = |expected: Option<&str>| {
            loop {
                watchdog.check();
                match (watchdog.condition(), expected) {
                    (Condition::Unfit(reason), Some(expected)) if reason.contains(expected) => return,
                    (Condition::Well, None) => return,
                    _ => std::thread::yield_now(),
                }
            }
        };
        let stick = || {
            let (free, freed) = mpsc::channel::<()>();
            runtime.spawn(async move {
                let _ = freed.recv();
            });
            free
        };
        until(None);
        let first = stick();
        until(Some("of 2 has not finished a task since 20"));
        let second = stick();
        until(Some("no worker thread has run a new task since 20"));
        drop((first, second));
        until(None);
    }
}
