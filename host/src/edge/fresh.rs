//! A value built from files (TLS configuration, tokens) that is reloaded when they change, or on SIGHUP.
//!
//! Users get the current value and can keep it for any time. If a reload fails, this is logged, and the current value is
//! kept.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use kvs_metrics::{Measured, Page};
use kvs_runtime::{Clock, Env, Task};
use kvs_txlog::Condition;
use kvs_txlog::file::disk::is_shortage;
use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tokio::task;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::changes::{Changes, LOOK};
use crate::signals::Listen;

/// Makes a value from its files. It is given the current one, if there is one.
type Make<T> = dyn Fn(Option<&T>) -> Result<T> + Send + Sync;

/// A reloadable value.
pub struct Fresh<T> {
    /// Name in log lines, with an article.
    what: &'static str,
    make: Box<Make<T>>,
    current: ArcSwap<T>,
    /// Notifies users of a new value.
    renewed: watch::Sender<()>,
    changes: Mutex<Changes>,
    clock: Clock,
    last: Arc<LastReload>,
}

/// Outcome of the last reload.
#[derive(Default)]
pub struct LastReload {
    /// Why it failed.
    failure: Mutex<Option<String>>,
    /// Time of the last success, in milliseconds since 1970.
    success_ms: AtomicU64,
}

/// Metrics of reloads, by what is reloaded.
pub struct Reloads(pub Vec<(&'static str, Arc<LastReload>)>);

impl Measured for Reloads {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let help = "1 if the last reload of these files succeeded";
        let successful = |last: &LastReload| u64::from(lock(&last.failure).is_none());
        let successes = self.0.iter().map(|(files, last)| ([("files", *files)], successful(last)));
        page.gauges("last_reload_successful", help, successes)?;
        let help = "Time of the last successful reload, or of the start, in seconds since 1970";
        let seconds = |last: &LastReload| last.success_ms.load(Ordering::Relaxed) / 1_000;
        let times = self.0.iter().map(|(files, last)| ([("files", *files)], seconds(last)));
        page.gauges("last_reload_success_timestamp_seconds", help, times)
    }
}

impl<T: Send + Sync + 'static> Fresh<T> {
    pub fn new(
        what: &'static str,
        files: Vec<PathBuf>,
        clock: Clock,
        make: impl Fn(Option<&T>) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Arc<Self>> {
        let changes = Mutex::new(Changes::of(files));
        let current = ArcSwap::from_pointee(make(None)?);
        let (renewed, last) = (watch::Sender::default(), Arc::<LastReload>::default());
        last.success_ms.store(clock.unix_ms(), Ordering::Relaxed);
        Ok(Arc::new(Self { what, make: Box::new(make), current, renewed, changes, clock, last }))
    }

    /// Returns the current value.
    pub fn get(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// Returns a receiver that changes with each reload.
    pub fn renewals(&self) -> watch::Receiver<()> {
        self.renewed.subscribe()
    }

    /// Whether the current value is that of the files.
    pub fn condition(&self) -> Condition {
        let failure = lock(&self.last.failure).clone();
        failure.map_or(Condition::Well, |reason| Condition::But(format!("an old one is in use: {reason}")))
    }

    pub fn last_reload(&self) -> Arc<LastReload> {
        Arc::clone(&self.last)
    }

    /// Starts the task of this name that keeps it fresh, to the end of the process.
    pub fn start(self: &Arc<Self>, name: &'static str, mut hangup: Listen, env: &Env) -> Task {
        let fresh = Arc::clone(self);
        env.tasks.restart(name, &env.clock, move || {
            let (fresh, hangup) = (Arc::clone(&fresh), hangup());
            async move { fresh.keep(hangup?).await }
        })
    }

    async fn keep(self: Arc<Self>, mut hangup: Signal) -> Result<Infallible> {
        let mut interval = interval(LOOK);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let asked = tokio::select! {
                signal = hangup.recv() => signal.is_some(),
                _ = interval.tick() => false,
            };
            let fresh = Arc::clone(&self);
            let looked = task::spawn_blocking(move || fresh.look(asked)).await;
            if let Err(panic) = &looked {
                // The current value is not that of the files.
                *lock(&self.last.failure) = Some(panic.to_string());
                lock(&self.changes).unread();
            }
            looked.with_context(|| format!("failed to reload {}", self.what))?;
        }
    }

    /// Makes a new value when the files have changed, or when `asked` to.
    fn look(&self, asked: bool) {
        let mut changes = lock(&self.changes);
        if !asked && !changes.settled() {
            return;
        }
        changes.reading();
        let made = (self.make)(Some(&self.current.load()));
        let failure = made.as_ref().err().map(|error| format!("{error:#}"));
        *lock(&self.last.failure) = failure;
        match made {
            Ok(made) => {
                self.current.store(Arc::new(made));
                self.last.success_ms.store(self.clock.unix_ms(), Ordering::Relaxed);
                self.renewed.send_replace(());
                info!("reloaded {}", self.what);
            }
            Err(error) => {
                // The files may be valid, and revoke an access: try again.
                if error.downcast_ref().is_some_and(is_shortage) {
                    changes.unread();
                }
                warn!("failed to reload {}, keeping the current one: {error:#}", self.what);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use tokio::signal::unix::SignalKind;
    use tokio::time::timeout;

    use super::*;
    use crate::signals::listen;

    #[tokio::test]
    async fn files_whose_reading_panicked_are_read_again() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file can be made");
        let reads = AtomicU32::new(0);
        // The first look is that of the start.
        let make = move |_: Option<&u32>| match reads.fetch_add(1, Ordering::Relaxed) {
            1 => panic!("sabotage"),
            count => Ok(count),
        };
        let fresh =
            Fresh::new("the file", vec![file.path().to_owned()], Clock::system(), make).expect("it can be made");
        let mut renewals = fresh.renewals();
        let env = Env::real();
        let keeping = fresh.start("reload", listen(SignalKind::hangup()).expect("signals can be received"), &env);
        std::fs::write(file.path(), "changed").expect("it can be written");
        timeout(std::time::Duration::from_secs(30), renewals.changed()).await.expect("in time").expect("it is kept");
        assert_eq!((*fresh.get(), env.tasks.restarts("reload")), (2, 1));
        assert!(matches!(fresh.condition(), Condition::Well));
        keeping.abort();
    }
}
