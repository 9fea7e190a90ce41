//! Verified reading: frames are handed on only if each follows the one before it.
//!
//! A replica can be behind, or have lost frames without noticing. Each read may be answered by another one, so a frame that
//! is missing or damaged is read again several times before the log counts as damaged. None is ever skipped.
//!
//! Owns: the retries. Must never know: what is done with the frames.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use super::Shared;
use super::engine::{Engine, ReadError};
use super::frame::{Kind, Restored, Tip, is_mutant};

/// Number of reads after which a frame counts as damaged.
const ATTEMPTS: u32 = 8;
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// Maximum time to wait for the first frame.
const WAIT: Duration = Duration::from_millis(250);

/// A frame that follows the one before it.
pub struct Read {
    pub bytes: Bytes,
    pub kind: Kind,
    /// The end of the log before it.
    pub before: Tip,
}

/// Why nothing could be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The engine does not answer.
    #[error("{0}")]
    Silent(String),
    /// No replica that answered has a frame that follows.
    #[error("{0}")]
    Damaged(String),
    /// The log is not there any more.
    #[error("{0}")]
    Gone(String),
    /// Compaction has dropped the frame since, and a snapshot has its entries.
    #[error("{0}")]
    Dropped(String),
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Unavailable(reason) => Self::Silent(reason),
            ReadError::Missing(reason) => Self::Damaged(reason),
            ReadError::Gone(reason) => Self::Gone(reason),
        }
    }
}

impl Shared {
    /// Reads what the log was restored from, which its first frame says, or a snapshot that replaces it.
    pub async fn read_restored(&self) -> Result<(), Failure> {
        if self.restored.get().is_some() {
            return Ok(());
        }
        if let Some(snapshot) = self.find_snapshot().await? {
            let _ = self.restored.set(snapshot.restored);
            return Ok(());
        }
        let first = self.read(&mut Tip::default(), WAIT).await?.into_iter().next();
        let first = first.ok_or_else(|| Failure::Silent(format!("frame 1 of {} cannot be read yet", self.name)))?;
        let restored = if let Kind::Restored(restored) = first.kind { restored } else { Restored::default() };
        let _ = self.restored.set(restored);
        Ok(())
    }

    /// Reads the frames after `tip`, and moves it on to the last of them. Waits for one at most this long.
    pub async fn read(&self, tip: &mut Tip, wait: Duration) -> Result<Vec<Read>, Failure> {
        self.read_in((&self.engine, &self.name), tip, wait).await
    }

    /// Like [`read`](Self::read), in the log or in a snapshot.
    pub async fn read_in(
        &self,
        (engine, name): (&Arc<dyn Engine>, &str),
        tip: &mut Tip,
        wait: Duration,
    ) -> Result<Vec<Read>, Failure> {
        let mut why = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                self.metrics.rereads.add(1);
                self.env.clock.sleep(RETRY_DELAY * attempt).await;
            }
            let frames = match engine.read(tip.position + 1, wait).await {
                Ok(frames) => frames,
                Err(ReadError::Missing(_)) if is_mutant("GapSkipped") => {
                    tip.position += 1;
                    continue;
                }
                Err(ReadError::Missing(reason)) => {
                    if engine.ends().await.is_ok_and(|ends| ends.first > tip.position + 1) {
                        return Err(Failure::Dropped(format!("frame {} was dropped by compaction", tip.position + 1)));
                    }
                    self.suspect(engine, *tip, &reason);
                    why = reason;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            if frames.is_empty() {
                return Ok(Vec::new());
            }
            let mut read = Vec::with_capacity(frames.len());
            for bytes in frames {
                let before = *tip;
                match tip.accept(self.log, &bytes) {
                    Ok(kind) => read.push(Read { bytes, kind, before }),
                    Err(reason) => {
                        self.suspect(engine, before, &format!("frame {} of {name}: {reason}", before.position + 1));
                        reason.clone_into(&mut why);
                        break;
                    }
                }
            }
            if !read.is_empty() {
                return Ok(read);
            }
        }
        Err(Failure::Damaged(format!("frame {} of {name} cannot be read: {why}", tip.position + 1)))
    }
}

/// Number of frames between two that the index keeps until compaction drops them.
const STEP: u64 = 64;
/// Number of the newest frames that it has all of: standbys replay from there.
const RECENT: usize = 256;

/// Positions of frames, by sequence.
#[derive(Default)]
pub struct Index(Mutex<Known>);

#[derive(Default)]
struct Known {
    sparse: BTreeMap<u64, Tip>,
    recent: VecDeque<Tip>,
}

impl Index {
    /// Notes the end of the log before a frame.
    pub fn note(&self, tip: Tip) {
        let Known { sparse, recent } = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if tip.position.is_multiple_of(STEP) {
            // The newest with this sequence: a read that begins there skips the heartbeats before it.
            let known = sparse.entry(tip.sequence).or_insert(tip);
            if known.position < tip.position {
                *known = tip;
            }
        }
        if recent.back().is_none_or(|newest| newest.position < tip.position) {
            if recent.len() == RECENT {
                recent.pop_front();
            }
            recent.push_back(tip);
        }
    }

    /// Forgets what compaction has dropped, when `first` is the first frame.
    pub fn drop_before(&self, first: u64) {
        let Known { sparse, .. } = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sparse.retain(|_, tip| tip.position + 1 >= first);
    }

    /// Returns the newest known end of the log that has no entry after this sequence.
    pub fn before(&self, sequence: u64) -> Tip {
        let Known { sparse, recent } = &*self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let after = recent.partition_point(|tip| tip.sequence <= sequence);
        let recent = after.checked_sub(1).map(|index| recent[index]);
        let sparse = sparse.range(..=sequence).next_back().map(|(_, tip)| *tip);
        // Recent frames have a gap where a replay has noted some before the newest ones were read.
        recent.into_iter().chain(sparse).max_by_key(|tip| tip.position).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_finds_recent_frames_exactly_and_others_nearby() {
        let index = Index::default();
        let tip = |position: u64| {
            let mut tip = Tip::default();
            (tip.position, tip.sequence) = (position, position * 10);
            tip
        };
        // A replay of older frames runs beside the newest ones.
        (5_000..6_000).for_each(|position| index.note(tip(position)));
        (0..5_000).for_each(|position| index.note(tip(position)));
        assert_eq!(index.before(59_995), tip(5_999));
        assert_eq!(index.before(59_000), tip(5_900));
        let found = index.before(33_333);
        assert!(found.sequence <= 33_333 && found.position + STEP > 3_333, "{found:?}");
        assert_eq!(index.before(3), tip(0));
    }
}
