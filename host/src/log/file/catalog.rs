//! The segments that make up the log now, oldest first, and what each holds.
//!
//! Owns: the agreement between the writer, which adds to the end, compaction, which puts one file in the place of
//! several, and readers, which must see neither half done.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use super::Home;
use super::disk::{Disk, File};
use super::scan::{Scan, Stop};
use super::segment::{Compacted, HEAD_BYTES, Numbers};

/// How long compaction waits for readers to finish.
const READER_WAIT: Duration = Duration::from_secs(2);

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
    /// See [`Compacted::forgotten`].
    pub forgotten: u64,
}

impl Segment {
    /// A segment made ahead, at the moment the writer comes to it.
    pub fn empty(number: u64, last: u64, chain: u32) -> Self {
        let (before, after, tip) = (chain, chain, chain);
        let end = Some(HEAD_BYTES);
        Self { numbers: Numbers::one(number), first: last.wrapping_add(1), last, before, after, tip, end, forgotten: 0 }
    }

    pub fn compacted(numbers: Numbers, compacted: &Compacted) -> Self {
        let Compacted { first, last, before, after, tip, end, forgotten } = *compacted;
        Self { numbers, first, last, before, after, tip, end: Some(end), forgotten }
    }
}

impl Segment {
    /// Its frames, from the first.
    pub fn scan(&self, file: Arc<dyn File>, log: Uuid) -> io::Result<Scan> {
        let end = self.end.map_or_else(|| file.size(), Ok)?;
        Ok(Scan::new(file, log, HEAD_BYTES, end, Some(self.before)))
    }

    /// Whether a scan that came to its end saw the whole segment.
    pub fn ended(&self, home: &Home, scan: &Scan) -> anyhow::Result<()> {
        let damage = |what| Err(home.damage(&self.numbers.file_name(), scan.offset(), what));
        match scan.stop() {
            Stop::Bad(what) => damage(what),
            Stop::End if scan.chain() != Some(self.tip) => damage("frames are missing at its end"),
            Stop::End => Ok(()),
        }
    }
}

pub struct Catalog {
    state: Mutex<State>,
    /// A reader is done.
    left: Condvar,
}

struct State {
    segments: Vec<Segment>,
    /// How often compaction has put new segments in the place of old ones.
    swaps: u64,
    readers: usize,
}

/// Someone goes through the log from one segment to the next.
pub struct Reader<'a> {
    catalog: &'a Catalog,
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.catalog.lock().readers -= 1;
        self.catalog.left.notify_all();
    }
}

impl Catalog {
    pub fn new(segments: Vec<Segment>) -> Self {
        Self { state: Mutex::new(State { segments, swaps: 0, readers: 0 }), left: Condvar::new() }
    }

    /// Begins to read what comes after a sequence. The error is the newest sequence that is forgotten, when that is
    /// newer: who knows the log up to `after` cannot learn from it what has happened since.
    pub fn reader(&self, after: u64) -> Result<Reader<'_>, u64> {
        let mut state = self.lock();
        let forgotten = state.segments.iter().map(|segment| segment.forgotten).max().unwrap_or(0);
        if after > 0 && after < forgotten {
            return Err(forgotten);
        }
        state.readers += 1;
        Ok(Reader { catalog: self })
    }

    /// The segments that are not written any more. All that is in them is durable.
    pub fn sealed(&self) -> Vec<Segment> {
        let state = self.lock();
        state.segments.split_last().map_or(Vec::new(), |(_, sealed)| sealed.to_vec())
    }

    pub fn all(&self) -> Vec<Segment> {
        self.lock().segments.clone()
    }

    /// Bytes of frames, where known.
    pub fn bytes(&self) -> u64 {
        self.lock().segments.iter().map(|segment| segment.end.unwrap_or(0)).sum()
    }

    /// Notes where a segment was found to end.
    pub fn set_end(&self, numbers: Numbers, end: u64) {
        let mut state = self.lock();
        if let Some(segment) = state.segments.iter_mut().find(|segment| segment.numbers == numbers) {
            segment.end = Some(end);
        }
    }

    /// Puts a compacted segment in the place of those it stands for, which come back, with a rename that happens in the
    /// same moment: no reader may find the new file under an old segment's name.
    ///
    /// `alone` says that it must happen while nobody reads. None when somebody did for so long that nothing was done.
    pub fn replace(
        &self,
        segment: Segment,
        alone: bool,
        rename: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Option<Vec<Segment>>> {
        let mut state = self.lock();
        if alone {
            let waited = self.left.wait_timeout_while(state, READER_WAIT, |state| state.readers > 0);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.readers > 0 {
                return Ok(None);
            }
        }
        rename()?;
        let begin = state.segments.partition_point(|old| old.numbers.first < segment.numbers.first);
        let end = state.segments.partition_point(|old| old.numbers.last <= segment.numbers.last);
        state.swaps += 1;
        Ok(Some(state.segments.splice(begin..end, [segment]).collect()))
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
