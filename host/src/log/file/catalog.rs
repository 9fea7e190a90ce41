//! The segments that make up the log now, oldest first, and what each holds.
//!
//! Owns: the agreement between the writer, which adds to the end, compaction, which puts one file in the place of
//! several, and readers, which must see neither half done.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::disk::{Disk, File};
use super::segment::{Compacted, Numbers};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub numbers: Numbers,
    /// The sequences it covers; none while `last` is below `first`.
    pub first: u64,
    pub last: u64,
    /// The checksum of the last frame before it, and what the next segment must find as that: the checksum of its own
    /// last frame, or in a compacted segment of the last that it stands for.
    pub before: u32,
    pub after: u32,
    /// The checksum of its own last frame; `before` when it has none.
    pub tip: u32,
    /// Where its frames end, once known: that of an older segment is found by reading it.
    pub end: Option<u64>,
}

impl Segment {
    /// A segment made ahead, at the moment the writer comes to it.
    pub fn empty(number: u64, last: u64, chain: u32) -> Self {
        let (before, after, tip) = (chain, chain, chain);
        let end = Some(super::segment::HEAD_BYTES);
        Self { numbers: Numbers::one(number), first: last.wrapping_add(1), last, before, after, tip, end }
    }

    pub fn compacted(numbers: Numbers, compacted: &Compacted) -> Self {
        let Compacted { first, last, before, after, tip, end } = *compacted;
        Self { numbers, first, last, before, after, tip, end: Some(end) }
    }
}

pub struct Catalog {
    state: Mutex<State>,
}

struct State {
    segments: Vec<Segment>,
    /// How often compaction has put new segments in the place of old ones.
    swaps: u64,
}

impl Catalog {
    pub fn new(segments: Vec<Segment>) -> Self {
        Self { state: Mutex::new(State { segments, swaps: 0 }) }
    }

    /// The newest segment was written to.
    pub fn extend(&self, end: u64, last: u64, chain: u32) {
        if let Some(segment) = self.lock().segments.last_mut() {
            (segment.end, segment.last, segment.after, segment.tip) = (Some(end), last, chain, chain);
        }
    }

    pub fn push(&self, segment: Segment) {
        self.lock().segments.push(segment);
    }

    pub fn swaps(&self) -> u64 {
        self.lock().swaps
    }

    /// The segment with the first entry after a sequence, opened. It is opened under the lock, so that it cannot be
    /// removed in between; once open it can be read to its end even when it was.
    pub fn open_after(&self, sequence: u64, disk: &dyn Disk) -> io::Result<Option<(Segment, Arc<dyn File>)>> {
        let state = self.lock();
        let at = state.segments.partition_point(|segment| segment.last <= sequence);
        let Some(segment) = state.segments.get(at) else { return Ok(None) };
        let file = disk.open(&segment.numbers.file_name())?;
        Ok(Some((segment.clone(), file)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is whole at every step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
