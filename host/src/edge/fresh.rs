//! What is made from files, made anew when the files change or the process is told to (SIGHUP).
//!
//! Whoever uses it takes what is in force at that moment and keeps it for as long as it likes. What cannot be made is
//! told, and what was in force stays.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use arc_swap::ArcSwap;
use tokio::signal::unix::Signal;
use tokio::task;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

/// How often the files are looked at. Asking beats being told here: it also sees links that are turned to another
/// directory, as container platforms do, and file systems of other machines.
const LOOK: Duration = Duration::from_secs(1);

pub struct Fresh<T> {
    /// In log lines, with an article.
    what: &'static str,
    files: Vec<PathBuf>,
    make: Box<dyn Fn() -> Result<T> + Send + Sync>,
    current: ArcSwap<T>,
    seen: Mutex<Seen>,
}

struct Seen {
    /// The files as they were when they were last read, and as they were when last looked at.
    read: Marks,
    looked: Marks,
}

/// What tells one state of the files from another.
type Marks = Vec<Option<(u64, u64, i64, i64, u64)>>;

impl<T: Send + Sync + 'static> Fresh<T> {
    pub fn new(
        what: &'static str,
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<T> + Send + Sync + 'static,
    ) -> Result<Arc<Self>> {
        let read = marks(&files);
        let current = ArcSwap::from_pointee(make()?);
        let seen = Mutex::new(Seen { looked: read.clone(), read });
        Ok(Arc::new(Self { what, files, make: Box::new(make), current, seen }))
    }

    /// What is in force.
    pub fn get(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// Keeps it fresh, to the end of the process.
    pub async fn keep(self: Arc<Self>, mut hangup: Signal) {
        let mut interval = interval(LOOK);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let told = tokio::select! {
                heard = hangup.recv() => heard.is_some(),
                _ = interval.tick() => false,
            };
            let fresh = Arc::clone(&self);
            let looked = task::spawn_blocking(move || {
                if told || fresh.changed() {
                    fresh.make()
                }
            });
            if let Err(panic) = looked.await {
                warn!("{} could not be read again: {panic}", self.what);
            }
        }
    }

    /// Whether the files are others than those that were read, and have been for a while: who replaces two files does
    /// it one after the other.
    fn changed(&self) -> bool {
        let now = marks(&self.files);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let settled = now == seen.looked;
        seen.looked = now;
        settled && seen.looked != seen.read
    }

    fn make(&self) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        // Before they are read, so that a change in between is seen as one.
        seen.read = marks(&self.files);
        match (self.make)() {
            Ok(made) => {
                self.current.store(Arc::new(made));
                info!("{} was read again and is in force", self.what);
            }
            Err(error) => warn!("{} could not be read again, the old one stays in force: {error:#}", self.what),
        }
    }
}

fn marks(files: &[PathBuf]) -> Marks {
    let mark = |file: &PathBuf| {
        let metadata = fs::metadata(file).ok()?;
        Some((metadata.dev(), metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len()))
    };
    files.iter().map(mark).collect()
}
