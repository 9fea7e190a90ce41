//! Snapshots: the live entries of a prefix of the log, in frames of their own, so that the engine can drop the prefix.
//!
//! A snapshot is made from durable frames, which never change, so it is right whichever process makes it, at any time: it needs no fence.
//! Its last frame says which prefix that is; one without it is not complete, and never used. The frame of the log that follows
//! names the checksum of the last one of the prefix, so the log continues from no other snapshot than its own.
//!
//! Owns: which snapshot is used, and the order in which it and the log are read. Must never know: when one is made.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::Shared;
use super::copy::{Copy, Part};
use super::engine::{Engine, ReadError};
use super::frame::{Kind, Snapshot, Tip};
use super::reader::{Failure, Read};

/// Attempts to read the last frame of a snapshot: a replica can be behind, or damaged.
const ATTEMPTS: u32 = 4;
const RETRY_DELAY: Duration = Duration::from_millis(50);

impl Shared {
    /// Returns the snapshot that is used instead of the frames of its prefix.
    pub fn snapshot(&self) -> Option<Snapshot> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Uses a snapshot from now on, unless the present one is newer.
    pub fn set_snapshot(&self, snapshot: Snapshot) {
        let mut known = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_none_or(|known| known.tip.position < snapshot.tip.position) {
            *known = Some(snapshot);
        }
    }

    /// Finds the newest complete snapshot, and uses it.
    pub async fn find_snapshot(&self) -> Result<Option<Snapshot>, Failure> {
        let mut positions = self.engine.snapshots().await?;
        positions.sort_unstable();
        for position in positions.into_iter().rev() {
            if let Some(snapshot) = self.read_snapshot(position).await? {
                self.set_snapshot(snapshot);
                break;
            }
        }
        Ok(self.snapshot())
    }

    /// Reads the last frame of a snapshot; None if it is not complete.
    pub async fn read_snapshot(&self, position: u64) -> Result<Option<Snapshot>, Failure> {
        let engine = self.engine.snapshot(position);
        for attempt in 0..ATTEMPTS {
            self.env.clock.sleep(RETRY_DELAY * attempt).await;
            let last = match engine.ends().await {
                Ok(ends) => ends.last,
                Err(ReadError::Gone(_)) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            if last == 0 {
                return Ok(None);
            }
            let frames = match engine.read(last, Duration::ZERO).await {
                Ok(frames) => frames,
                Err(ReadError::Missing(_)) => continue,
                Err(ReadError::Gone(_)) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            let found = frames.first().and_then(|bytes| Snapshot::of_last(self.log, bytes));
            if let Some(snapshot) = found.filter(|snapshot| snapshot.tip.position == position) {
                return Ok(Some(snapshot));
            }
        }
        Ok(None)
    }
}

/// A pass over the frames of a snapshot, and then over those of the log.
pub struct Scan<'s> {
    shared: &'s Shared,
    /// The snapshot, its name for messages, and the end of its frames as far as they were read.
    snapshot: Option<(Arc<dyn Engine>, String, Tip)>,
    /// The local copy of the log, and its name, while it has the next frames.
    copy: Option<(Arc<dyn Engine>, String)>,
    /// The end of the log as far as its entries were read.
    tip: Tip,
}

impl<'s> Scan<'s> {
    /// Begins with a snapshot, or with the first frame of the log.
    pub fn from_snapshot(shared: &'s Shared, snapshot: Option<&Snapshot>) -> Self {
        let tip = snapshot.map_or_else(Tip::default, |snapshot| snapshot.tip);
        let snapshot = snapshot.map(|snapshot| {
            let position = snapshot.tip.position;
            (shared.engine.snapshot(position), format!("snapshot {position} of the {}", shared.name), Tip::default())
        });
        Self { shared, snapshot, copy: None, tip }
    }

    /// Begins with the frame of the log after `tip`.
    pub fn after(shared: &'s Shared, tip: Tip) -> Self {
        Self { shared, snapshot: None, copy: None, tip }
    }

    /// Begins with the local copy, and continues in the log.
    pub fn from_copy(shared: &'s Shared, copy: &Arc<Copy>) -> Self {
        let snapshot = copy.snapshot();
        let tip = snapshot.as_ref().map_or_else(Tip::default, |snapshot| snapshot.tip);
        let part = |is_snapshot| -> Arc<dyn Engine> { Arc::new(Part { copy: Arc::clone(copy), is_snapshot }) };
        let snapshot = snapshot.map(|_| (part(true), copy.name(), Tip::default()));
        Self { shared, snapshot, copy: Some((part(false), copy.name())), tip }
    }

    /// Returns the end of the log as far as it was read; None while the snapshot is.
    pub fn tip(&self) -> Option<Tip> {
        self.snapshot.is_none().then_some(self.tip)
    }

    /// Reads the next frames, and returns whether they are of the log; none if there are none yet.
    pub async fn next(&mut self, wait: Duration) -> Result<(bool, Vec<Read>), Failure> {
        let Some((engine, name, tip)) = &mut self.snapshot else {
            if let Some((copy, name)) = &self.copy {
                match self.shared.read_in((copy, name), &mut self.tip, Duration::ZERO).await {
                    Ok(frames) if !frames.is_empty() => return Ok((true, frames)),
                    // The engine has what follows, and what cannot be read here.
                    _ => self.copy = None,
                }
            }
            return Ok((true, self.shared.read(&mut self.tip, wait).await?));
        };
        let frames = self.shared.read_in((engine, name), tip, wait).await.map_err(|failure| match failure {
            // A later one has replaced it.
            Failure::Gone(reason) => Failure::Dropped(reason),
            failure => failure,
        })?;
        if frames.last().is_some_and(|frame| matches!(frame.kind, Kind::Snapshot(_))) {
            self.snapshot = None;
        }
        Ok((false, frames))
    }
}
