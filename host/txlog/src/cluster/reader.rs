//! Verified reading: frames are handed on only if each follows the one before it.
//!
//! A replica can be behind, or have lost frames without noticing. Each read may be answered by another one, so a frame that
//! is missing or damaged is read again several times before the log counts as damaged. None is ever skipped.
//!
//! Owns: the retries. Must never know: what is done with the frames.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use super::Shared;
use super::engine::ReadError;
use super::frame::{Kind, Tip, is_mutant};

/// Number of reads after which a frame counts as damaged.
const ATTEMPTS: u32 = 8;
const RETRY_DELAY: Duration = Duration::from_millis(50);

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
    /// Reads the frames after `tip`, and moves it on to the last of them. Waits for one at most this long.
    pub async fn read(&self, tip: &mut Tip, wait: Duration) -> Result<Vec<Read>, Failure> {
        let mut why = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                self.metrics.rereads.add(1);
                self.env.clock.sleep(RETRY_DELAY * attempt).await;
            }
            let frames = match self.engine.read(tip.position + 1, wait).await {
                Ok(frames) => frames,
                Err(ReadError::Missing(_)) if is_mutant("GapSkipped") => {
                    tip.position += 1;
                    continue;
                }
                Err(ReadError::Missing(reason)) => {
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
                        reason.clone_into(&mut why);
                        break;
                    }
                }
            }
            if !read.is_empty() {
                return Ok(read);
            }
        }
        Err(Failure::Damaged(format!("frame {} of {} cannot be read: {why}", tip.position + 1, self.name)))
    }
}

/// Number of frames between two that the index has.
const STEP: u64 = 64;

/// Positions of some frames, by sequence.
#[derive(Default)]
pub struct Index(Mutex<Vec<Tip>>);

impl Index {
    /// Notes the end of the log before a frame.
    pub fn note(&self, tip: Tip) {
        let mut tips = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if tips.last().map_or(0, |last| last.position) + STEP <= tip.position {
            tips.push(tip);
        }
    }

    /// Returns the newest known end of the log with no entry after this sequence.
    pub fn before(&self, sequence: u64) -> Tip {
        let tips = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let after = tips.partition_point(|tip| tip.sequence <= sequence);
        after.checked_sub(1).map_or_else(Tip::default, |index| tips[index])
    }
}
