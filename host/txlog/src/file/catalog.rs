//! The segments that make up the log now, oldest first, and what each holds.
//!
//! Owns: the agreement between the writer, which adds to the end, compaction, which puts one file in the place of
//! several, and readers, which must see neither half done.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::Home;
use super::disk::{Disk, File};
use super::frame::Ending;
use super::scan::{Scan, ScanEnd};
use super::segment::{Compacted, HEAD_BYTES, Numbers, VERSION};
use crate::Incarnation;

/// How far apart the marks in a segment are.
pub const MARK_BYTES: u64 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub numbers: Numbers,
    /// The format of its file.
    pub version: u32,
    /// The sequences it covers; none while `last` is below `first`.
    pub first: u64,
    pub last: u64,
    /// The checksum of the last frame before it, and what the next segment must find as that: the checksum of its own
    /// last frame, or in a compacted segment of the last that it stands for.
    pub before: u32,
    pub after: u32,
    /// The checksum of its own last frame; `before` when it has none.
    pub tip: u32,
    /// Where its frames end. Of an older segment this is found by reading it, and is the end of the file until then.
    pub end: u64,
    /// Bytes of its file: after its frames there may be room that the next frame did not fit in.
    pub size: u64,
    /// See [`Compacted::horizon`].
    pub horizon: u64,
    /// See [`Compacted::retained`]; 0 in a segment that is not compacted.
    pub retained: u64,
    /// What a compacted segment says of the last frame that it stands for. Of others it is found by reading them.
    pub ending: Option<Ending>,
    /// The incarnations that begin in it, oldest first.
    pub incarnations: Vec<Incarnation>,
    /// The deletes in it that this process wrote or came upon, until it is compacted.
    pub deletes: u64,
    /// Places to begin reading at, in a segment that this process wrote or followed: who catches up need not read it all.
    pub marks: Vec<Mark>,
}

/// A border between two frames: the newest sequence before it, its offset, and the checksum of the frame before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    pub sequence: u64,
    pub offset: u64,
    pub chain: u32,
}

/// Marks with the numbers of their segments, oldest first.
pub type Marks = VecDeque<(u64, Mark)>;

/// Returns the marks in one segment.
pub fn marks_in(marks: &Marks, segment: u64) -> Vec<Mark> {
    marks.iter().filter(|(number, _)| *number == segment).map(|(_, mark)| *mark).collect()
}

impl Segment {
    /// A segment made ahead, at the moment the writer comes to it.
    pub fn empty(number: u64, last: u64, chain: u32, size: u64) -> Self {
        Self {
            numbers: Numbers::one(number),
            version: VERSION,
            first: last.wrapping_add(1),
            last,
            before: chain,
            after: chain,
            tip: chain,
            end: HEAD_BYTES,
            size,
            horizon: 0,
            retained: 0,
            ending: None,
            incarnations: Vec::new(),
            deletes: 0,
            marks: Vec::new(),
        }
    }

    /// A segment that compaction made, and the incarnations in its first frame.
    pub fn compacted(numbers: Numbers, version: u32, compacted: &Compacted, incarnations: Vec<Incarnation>) -> Self {
        let Compacted { first, last, before, after, tip, ending, end, horizon, retained } = *compacted;
        let retained = if retained == 0 { u64::MAX } else { retained };
        let ending = Some(ending);
        let (size, deletes, marks) = (end, 0, Vec::new());
        Self {
            numbers,
            version,
            first,
            last,
            before,
            after,
            tip,
            end,
            size,
            horizon,
            retained,
            ending,
            incarnations,
            deletes,
            marks,
        }
    }

    /// The last sequence before it: an incarnation that begins with it leaves a jump.
    pub fn preceding(&self) -> u64 {
        let begun = self.incarnations.first().filter(|incarnation| incarnation.first == self.first);
        begun.map_or(self.first.wrapping_sub(1), |incarnation| incarnation.fork)
    }
}

impl Segment {
    /// Its frames, from the first.
    pub fn scan(&self, file: Arc<dyn File>, log: Uuid) -> Scan {
        self.scan_after(0, file, log)
    }

    /// Its frames, from one that is not far before the first entry after `sequence`.
    pub fn scan_after(&self, sequence: u64, file: Arc<dyn File>, log: Uuid) -> Scan {
        let passed = self.marks.partition_point(|mark| mark.sequence <= sequence);
        let begin = self.marks[..passed].last();
        let (offset, chain) = begin.map_or((HEAD_BYTES, self.before), |mark| (mark.offset, mark.chain));
        Scan::new(file, (self.version, log), (offset, self.end), Some(chain))
    }

    /// Whether a scan that came to its end saw the whole segment.
    pub fn ended(&self, home: &Home, scan: &Scan) -> anyhow::Result<()> {
        let damage = |what| Err(home.damage(&self.numbers.file_name(), scan.offset(), what));
        match scan.end() {
            ScanEnd::Invalid(what) => damage(what),
            ScanEnd::Unsupported(why) => Err(home.refused(&self.numbers.file_name(), scan.offset(), &why)),
            ScanEnd::Clean if scan.chain() != Some(self.tip) => damage("frames are missing at the end of the segment"),
            ScanEnd::Clean => Ok(()),
        }
    }
}

pub struct Catalog {
    /// The writer takes this at every commit, so it is never held while the disk works.
    segments: Mutex<Vec<Segment>>,
    /// Held while a file is opened or gets its name, so that each name means one file to a reader. Taken first.
    names: Mutex<Names>,
    /// Bytes of the files that a compacted one has replaced and that are not removed yet.
    replaced: AtomicU64,
}

struct Names {
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
        self.catalog.names().readers -= 1;
    }
}

impl Catalog {
    pub fn new(segments: Vec<Segment>) -> Self {
        Self {
            segments: Mutex::new(segments),
            names: Mutex::new(Names { swaps: 0, readers: 0 }),
            replaced: AtomicU64::new(0),
        }
    }

    /// Begins to read what comes after a sequence. The error is the compaction horizon, when that is
    /// newer than `after`: the reader would miss deletes.
    pub fn reader(&self, after: u64) -> Result<Reader<'_>, u64> {
        let mut names = self.names();
        let horizon = self.horizon();
        if after > 0 && after < horizon {
            return Err(horizon);
        }
        names.readers += 1;
        Ok(Reader { catalog: self })
    }

    /// The compaction horizon: a reader that has the log up to an older sequence would miss entries.
    pub fn horizon(&self) -> u64 {
        self.segments().iter().map(|segment| segment.horizon).max().unwrap_or(0)
    }

    /// The oldest sequence from which on every state of the log can be restored; `u64::MAX` if unknown.
    pub fn retained(&self) -> u64 {
        self.segments().iter().map(|segment| segment.retained).max().unwrap_or(0)
    }

    /// Whether somebody reads now.
    pub fn is_read(&self) -> bool {
        self.names().readers > 0
    }

    /// The segments that are not written any more. All that is in them is durable.
    pub fn sealed(&self) -> Vec<Segment> {
        self.segments().split_last().map_or(Vec::new(), |(_, sealed)| sealed.to_vec())
    }

    pub fn all(&self) -> Vec<Segment> {
        self.segments().clone()
    }

    /// Bytes of the log on disk: the files of its segments, of the newest what is written, and what was replaced and is there
    /// still.
    pub fn bytes(&self) -> u64 {
        let segments = self.segments();
        let replaced = self.replaced.load(Ordering::Relaxed);
        segments.split_last().map_or(replaced, |(newest, sealed)| {
            replaced + newest.end + sealed.iter().map(|segment| segment.size).sum::<u64>()
        })
    }

    /// Notes where a segment was found to end.
    pub fn set_end(&self, numbers: Numbers, end: u64) {
        if let Some(segment) = self.segments().iter_mut().find(|segment| segment.numbers == numbers) {
            segment.end = end;
        }
    }

    /// Puts a compacted segment in the place of those it stands for, which come back, with a rename that to readers
    /// happens in the same moment: none may find the new file under an old segment's name.
    ///
    /// `alone` says that it must happen while nobody reads. None when somebody does, and nothing was done.
    pub fn replace(
        &self,
        segment: Segment,
        alone: bool,
        rename: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Option<Vec<Segment>>> {
        let mut names = self.names();
        if alone && names.readers > 0 {
            return Ok(None);
        }
        rename()?;
        let mut segments = self.segments();
        let begin = segments.partition_point(|old| old.numbers.first < segment.numbers.first);
        let end = segments.partition_point(|old| old.numbers.last <= segment.numbers.last);
        names.swaps += 1;
        let numbers = segment.numbers;
        let old: Vec<_> = segments.splice(begin..end, [segment]).collect();
        // One of the same name is gone with the rename.
        let there = old.iter().filter(|old| old.numbers != numbers);
        self.replaced.store(there.map(|old| old.size).sum(), Ordering::Relaxed);
        Ok(Some(old))
    }

    /// The files that were replaced are removed.
    pub fn removed(&self) {
        self.replaced.store(0, Ordering::Relaxed);
    }

    /// The newest segment was written to.
    pub fn extend(&self, end: u64, last: u64, chain: u32, deletes: u32) {
        if let Some(segment) = self.segments().last_mut() {
            let marked = segment.marks.last().map_or(HEAD_BYTES, |mark| mark.offset);
            if segment.end - marked >= MARK_BYTES {
                segment.marks.push(Mark { sequence: segment.last, offset: segment.end, chain: segment.tip });
            }
            (segment.end, segment.last, segment.after, segment.tip) = (end, last, chain, chain);
            segment.deletes += u64::from(deletes);
        }
    }

    pub fn push(&self, segment: Segment) {
        self.segments().push(segment);
    }

    pub fn swaps(&self) -> u64 {
        self.names().swaps
    }

    /// The segment with the first entry after a sequence, opened. It is opened under a lock, so that it cannot be
    /// removed in between; once open it can be read to its end even when it was.
    pub fn open_after(&self, sequence: u64, disk: &dyn Disk) -> io::Result<Option<(Segment, Arc<dyn File>)>> {
        let _names = self.names();
        let segments = self.segments();
        let at = segments.partition_point(|segment| segment.last <= sequence);
        let Some(segment) = segments.get(at).cloned() else { return Ok(None) };
        drop(segments);
        let file = disk.open(&segment.numbers.file_name())?;
        Ok(Some((segment, file)))
    }

    // Every change under these locks is whole at every step.

    fn segments(&self) -> MutexGuard<'_, Vec<Segment>> {
        self.segments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
