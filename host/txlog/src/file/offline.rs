//! Offline access to a log that no server uses: recovered as at a start, then read, compacted or forked by one thread.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use kvs_runtime::Env;
use uuid::Uuid;

use super::catalog::Segment;
use super::compact::{self, CompactionParams};
use super::disk::{Directory, Disk};
use super::liveness::{self, MAX_KEYS};
use super::lock::Lock;
use super::{Before, DEFAULT_SEGMENT_BYTES, Durability, Home, Options, Shared, replay};
use crate::{AppendError, Event, History, Incarnation, Receive, TransactionLog, Watermark};

/// A log opened offline.
pub struct Offline {
    shared: Arc<Shared>,
    _lock: Lock,
}

impl Offline {
    /// Opens a log that exists and is not in use: only `serve` and `import` create one.
    pub fn open(data: &Path) -> anyhow::Result<Self> {
        let (home, lock) = take(data)?;
        let shared = Shared::read(home, &options(data))?;
        Ok(Self { shared, _lock: lock })
    }

    /// Begins a new incarnation of a log whose copy cannot be recognised as one, such as a block-level clone.
    pub fn fork(data: &Path) -> anyhow::Result<Incarnation> {
        let (home, _lock) = take(data)?;
        fork(home.disk, options(data))
    }

    /// Drops every entry that can be dropped, and returns the bytes saved. `progress` is called with the bytes read.
    pub fn compact(&self, progress: &mut dyn FnMut(u64)) -> anyhow::Result<u64> {
        let written = self.written();
        let params = CompactionParams {
            now: self.now(&written)?,
            retain_from: self.shared.retain_from(),
            min_yield_percent: 0,
            keys: MAX_KEYS,
        };
        let outcome = compact::run(&self.shared, &written, &params, &mut |bytes| {
            progress(bytes);
            Ok(())
        })?;
        Ok(outcome.saved)
    }

    /// Returns the time, never before that of the newest entry: no server has replayed the log into the clock.
    fn now(&self, written: &[Segment]) -> anyhow::Result<u64> {
        let mut newest = None;
        for segment in written.iter().rev() {
            if newest.is_some() {
                break;
            }
            liveness::walk(&self.shared, segment, &mut |_| Ok(()), &mut |entry| newest = Some(entry.time))?;
        }
        let clock = self.shared.clock();
        Ok(newest.map_or(0, |time| clock.not_before(time)).max(clock.steady_ms()))
    }

    /// Returns all segments but the preallocated ones, which follow the last entry. Without a writer all are sealed.
    fn written(&self) -> Vec<Segment> {
        let mut segments = self.shared.catalog.all();
        while segments.last().is_some_and(|segment| segment.last < segment.first) {
            segments.pop();
        }
        segments
    }
}

impl TransactionLog for Offline {
    fn append(&self, _: u64, _: &[Event]) -> Result<u64, AppendError> {
        Err(AppendError::ReadOnly)
    }

    fn appended(&self) -> u64 {
        self.shared.queue.appended()
    }

    fn watermark(&self) -> &Watermark {
        &self.shared.watermark
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> anyhow::Result<u64> {
        replay::replay(&self.shared, after, receive)
    }

    fn id(&self) -> Uuid {
        self.shared.log
    }

    fn retained(&self) -> u64 {
        self.shared.catalog.retained()
    }

    fn history(&self) -> Arc<History> {
        self.shared.history.clone()
    }

    fn close(&self) -> anyhow::Result<()> {
        Ok(())
    }
}

fn options(data: &Path) -> Options {
    Options {
        data: data.into(),
        segment_bytes: DEFAULT_SEGMENT_BYTES,
        group_bytes: 0,
        durability: Durability::Sync,
        retain: Duration::ZERO,
        advertise: None,
        env: Env::real(),
    }
}

/// See [`Offline::fork`].
pub fn fork(disk: Arc<dyn Disk>, options: Options) -> anyhow::Result<Incarnation> {
    let data = options.data.display().to_string();
    let home = Home { disk: disk.clone(), data: options.data.clone(), env: options.env.clone() };
    if Shared::read(home, &options)?.queue.appended() == 0 {
        bail!("the log in {data} is empty: there is nothing to continue");
    }
    let before = Before { asked: Some("`kvs txlog fork` asked for it"), ..Before::default() };
    let (shared, _) = Shared::begin(disk, options, before)?;
    let begun = shared.history.incarnations().last().copied();
    begun.with_context(|| format!("the log in {data} did not begin a new incarnation"))
}

/// Locks a log that exists.
pub fn take(data: &Path) -> anyhow::Result<(Home, Lock)> {
    let directory = data.join("log");
    if !directory.is_dir() {
        bail!("there is no log in {}; pass the data directory of a store with --data-dir", data.display());
    }
    let env = Env::real();
    let lock = Lock::take(data, None, &env.clock)?;
    Ok((Home { disk: Arc::new(Directory::new(directory)), data: data.into(), env }, lock))
}
