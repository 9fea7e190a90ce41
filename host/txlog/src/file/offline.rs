//! A log that nobody serves from: opened, put right as at a start, and read or compacted by one thread.

use std::path::Path;
use std::sync::Arc;

use anyhow::bail;
use kvs_runtime::Env;

use super::catalog::Segment;
use super::compact::{self, Effort};
use super::disk::Directory;
use super::garbage::KEYS;
use super::lock::Lock;
use super::{DEFAULT_SEGMENT_BYTES, Durability, Home, Options, Shared, replay};
use crate::Receive;

pub struct Offline {
    shared: Arc<Shared>,
    _lock: Lock,
}

impl Offline {
    /// Refuses a log that is in use, and one that is not there: only `serve` and `import` begin one.
    pub fn open(data: &Path) -> anyhow::Result<Self> {
        let (home, lock) = take(data)?;
        let options = Options {
            data: home.data,
            segment_bytes: DEFAULT_SEGMENT_BYTES,
            group_bytes: 0,
            durability: Durability::Sync,
            env: home.env,
        };
        let (shared, _) = Shared::recover(home.disk, options)?;
        Ok(Self { shared, _lock: lock })
    }

    /// The newest sequence.
    pub fn newest(&self) -> u64 {
        self.shared.queue.appended()
    }

    pub fn replay(&self, receive: &mut Receive<'_>) -> anyhow::Result<u64> {
        replay::replay(&self.shared, 0, receive)
    }

    /// Drops all that can be dropped, and returns the bytes saved. `progress` hears of the bytes read.
    pub fn compact(&self, progress: &mut dyn FnMut(u64)) -> anyhow::Result<u64> {
        let effort = Effort { now: self.shared.clock().unix_ms(), worth_percent: 0, keys: KEYS };
        let outcome = compact::run(&self.shared, &self.written(), &effort, &mut |bytes| {
            progress(bytes);
            Ok(())
        })?;
        Ok(outcome.saved)
    }

    /// Without a writer no segment is written any more. Those after the last entry are spares.
    fn written(&self) -> Vec<Segment> {
        let mut segments = self.shared.catalog.all();
        while segments.last().is_some_and(|segment| segment.last < segment.first) {
            segments.pop();
        }
        segments
    }
}

/// Takes the lock of a log that is there.
pub fn take(data: &Path) -> anyhow::Result<(Home, Lock)> {
    let directory = data.join("log");
    if !directory.is_dir() {
        bail!("there is no log in {}; give the data directory of a store with --data-dir", data.display());
    }
    let lock = Lock::take(data)?;
    Ok((Home { disk: Arc::new(Directory::new(directory)), data: data.into(), env: Env::real() }, lock))
}
