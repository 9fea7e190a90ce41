//! Detection of a disk that hangs: a call that does not return gives no error either. The writer notes when its work began, and
//! the condition of the log depends on how long that was ago.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvs_runtime::Clock;

use crate::Condition;

/// Duration of a commit from which on it is reported.
const SLOW: Duration = Duration::from_secs(1);
/// Duration from which on requests should not be sent here: writes end in a timeout, as do the reads that depend on them.
const HUNG: Duration = Duration::from_secs(10);

/// Cause of a wait of the writer.
#[derive(Clone, Copy)]
pub enum Cause {
    Disk,
    Compaction,
}

/// What the writer does now, and since when.
#[derive(Default)]
pub struct HangDetector(Mutex<Option<(Instant, Cause)>>);

impl HangDetector {
    /// Notes that the writer begins something that may not return.
    pub fn begin(&self, clock: &Clock, cause: Cause) {
        *self.lock() = Some((clock.now(), cause));
    }

    pub fn end(&self) {
        *self.lock() = None;
    }

    pub fn condition(&self, clock: &Clock) -> Condition {
        let Some((since, cause)) = *self.lock() else { return Condition::Well };
        let why = match cause {
            Cause::Disk => "the disk does not respond; look at the disk of --data-dir",
            Cause::Compaction => "the log grows faster than it is compacted",
        };
        let elapsed = clock.elapsed(since);
        // Without the time itself, so that the reason stays the same.
        if elapsed >= HUNG {
            Condition::Unfit(format!("no commit for more than {HUNG:?}: {why}"))
        } else if elapsed >= SLOW {
            Condition::But(format!("no commit for more than {SLOW:?}: {why}"))
        } else {
            Condition::Well
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Instant, Cause)>> {
        // Every change under this lock is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
