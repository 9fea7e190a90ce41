//! Verification: reads every byte of a log, changes nothing, and continues after corruption.

use std::path::Path;

use uuid::Uuid;

use super::found::Found;
use super::frame::Frame;
use super::incarnations;
use super::listing;
use super::recovery;
use super::scan::{Scan, ScanEnd};
use super::segment::{Compacted, HEAD_BYTES, Numbers, SUFFIX};
use super::tail::{self, Tear};
use super::{Home, mark, offline};
use crate::{History, Incarnation};

/// A finding of the verification.
pub enum Finding {
    /// An intact segment. It covers the sequences from `first` to `last`; compaction can leave fewer entries.
    Sound {
        file: String,
        /// Format version of the segment.
        format: u32,
        entries: u64,
        first: u64,
        last: u64,
        bytes: u64,
        /// The incarnations that begin in the segment, as far as they are recorded.
        incarnations: Vec<Incarnation>,
    },
    /// The log ends in a torn write, which the next start truncates.
    Torn(String),
    Corrupt(String),
}

/// Verifies the log of a data directory; `progress` is called with the bytes read.
pub fn verify(data: &Path, report: &mut dyn FnMut(Finding), progress: &mut dyn FnMut(u64)) -> anyhow::Result<()> {
    let (home, _lock) = offline::take(data)?;
    verify_in(&home, report, progress)
}

pub fn verify_in(home: &Home, report: &mut dyn FnMut(Finding), progress: &mut dyn FnMut(u64)) -> anyhow::Result<()> {
    let mut state = State {
        home,
        report,
        next: Some((1, 0)),
        epoch: 0,
        history: History::default(),
        parent: None,
        number: 1,
        log: None,
        tear: None,
    };
    let mut all = Vec::new();
    for name in home.disk.list()? {
        match Numbers::parse(&name) {
            Some(numbers) => all.push(numbers),
            None if name.ends_with(SUFFIX) => (state.report)(Finding::Corrupt(listing::not_a_segment(home, &name))),
            None => {}
        }
    }
    all.sort_by_key(|numbers| (numbers.first, std::cmp::Reverse(numbers.last)));
    for numbers in all {
        if numbers.last < state.number {
            // Compaction was interrupted before it removed this file; the next start removes it.
            continue;
        }
        if numbers.first != state.number {
            let missing = Numbers { first: state.number, last: numbers.first.saturating_sub(1).max(state.number) };
            state.corrupt(format!("{} is missing", home.path(&missing.file_name()).display()));
        }
        state.number = numbers.last + 1;
        match Found::open(home, numbers) {
            Ok(found) => {
                let size = found.size;
                state.segment(found)?;
                progress(size);
            }
            Err(error) => state.corrupt(format!("{error:#}")),
        }
    }
    state.finish();
    Ok(())
}

struct State<'a> {
    home: &'a Home,
    report: &'a mut dyn FnMut(Finding),
    /// Sequence and previous checksum that the next frame must have; None after corruption.
    next: Option<(u64, u32)>,
    /// Epoch of the last frame.
    epoch: u32,
    history: History,
    /// The incarnation that the next one continues, where it is known.
    parent: Option<Uuid>,
    number: u64,
    log: Option<Uuid>,
    /// Found in a segment that nothing has followed yet.
    tear: Option<(Found, Tear)>,
}

/// Byte offset and description of what is wrong with a segment.
type Defect = (u64, String);

impl State<'_> {
    fn corrupt(&mut self, what: String) {
        (self.report)(Finding::Corrupt(what));
        // The next segment is compared with nothing, so that each defect is reported once.
        self.next = None;
        self.parent = None;
    }

    fn segment(&mut self, found: Found) -> anyhow::Result<()> {
        if found.numbers.first == 1 {
            self.parent = Some(found.log);
        }
        let checked = match found.compacted {
            _ if *self.log.get_or_insert(found.log) != found.log => {
                Err((0, "the segment belongs to another log than the ones before it".into()))
            }
            Some(compacted) => self.compacted(&found, &compacted)?,
            None => self.written(&found)?,
        };
        match checked {
            Ok((frames, tear)) => {
                frames.incarnations.iter().for_each(|incarnation| self.history.push(*incarnation));
                let last = self.history.newest_given(frames.last());
                let Frames { entries, first, end: bytes, incarnations, .. } = frames;
                let (file, format) = (found.name.clone(), found.version);
                (self.report)(Finding::Sound { file, format, entries, first, last, bytes, incarnations });
                if let Some(tear) = tear {
                    self.tear = Some((found, tear));
                }
            }
            Err((at, what)) => self.corrupt(format!("{} at byte {at}: {what}", self.home.path(&found.name).display())),
        }
        Ok(())
    }

    fn compacted(&mut self, found: &Found, head: &Compacted) -> anyhow::Result<Result<(Frames, Option<Tear>), Defect>> {
        let frames = match self.read(found, head.end, Some((head.first, head.before)))? {
            Ok(frames) => frames,
            Err(defect) => return Ok(Err(defect)),
        };
        if self.next.is_some_and(|next| next != (frames.preceding().wrapping_add(1), head.before)) {
            return Ok(Err((HEAD_BYTES, "the segment does not follow the one before it".into())));
        }
        // Compaction may have dropped earlier incarnations.
        if let Err(what) = incarnations::check(&frames.incarnations, None) {
            return Ok(Err((HEAD_BYTES, what.into())));
        }
        self.parent = frames.incarnations.last().map(|incarnation| incarnation.id);
        self.epoch = self.epoch.max(head.ending.epoch);
        if let ScanEnd::Invalid(what) = frames.scan_end {
            return Ok(Err((frames.end, what.into())));
        }
        if frames.chain != Some(head.tip) || frames.last() > head.last {
            return Ok(Err((frames.end, "frames are missing at the end of the segment".into())));
        }
        let next = head.last.saturating_add(1);
        self.next = Some((next, head.after));
        Ok(Ok((Frames { next: Some(next), ..frames }, None)))
    }

    fn written(&mut self, found: &Found) -> anyhow::Result<Result<(Frames, Option<Tear>), Defect>> {
        // Frames after a torn write are corrupt in any case, which is reported once.
        let follows = self.next.filter(|_| self.tear.is_none());
        let frames = match self.read(found, found.size, follows)? {
            Ok(frames) => frames,
            Err(defect) => return Ok(Err(defect)),
        };
        if frames.incarnations.len() > 1 {
            return Ok(Err((HEAD_BYTES, "several incarnations begin in one segment".into())));
        }
        if let Err(what) = incarnations::check(&frames.incarnations, self.parent) {
            return Ok(Err((HEAD_BYTES, what.into())));
        }
        self.parent = frames.incarnations.last().map(|incarnation| incarnation.id).or(self.parent);
        let tear = tail::tear(self.home, found, frames.end, &frames.scan_end)?;
        let begun = frames.end > HEAD_BYTES || tear.is_some();
        if begun && let Some((torn, Tear { at, what, .. })) = self.tear.take() {
            let file = self.home.path(&torn.name);
            self.corrupt(format!("{} at byte {at}: {what}, yet a later segment exists", file.display()));
        }
        if let Some(tear) = tear
            && let Some((offset, _)) =
                tail::later_frame(self.home, found, tear, frames.last(), frames.chain.unwrap_or(0))?
        {
            let what = format!("{}, but it had been durable according to the frame at byte {offset}", tear.what);
            return Ok(Err((tear.at, what)));
        }
        if frames.end > HEAD_BYTES {
            self.next = frames.next.zip(frames.chain);
        }
        Ok(Ok((frames, tear)))
    }

    fn finish(mut self) {
        if let Some((found, Tear { at, end, what })) = self.tear.take() {
            let file = self.home.path(&found.name);
            let what = format!("{} at byte {at}: {what}: a torn write of {} bytes", file.display(), end - at);
            (self.report)(Finding::Torn(what));
        }
        let marked = mark::read(&*self.home.disk).ok().flatten();
        if self.log.is_none() && self.number == 1 && marked.is_some() {
            self.corrupt(recovery::no_segments(self.home));
        }
        let marked = marked.filter(|(log, _)| Some(*log) == self.log);
        if let (Some((_, durable)), Some((next, _))) = (marked, self.next)
            && next <= durable
        {
            self.corrupt(format!("the log ends with sequence {}, but {durable} had been durable", next - 1));
        }
    }
}

/// Summary of the valid frames of a segment.
struct Frames {
    entries: u64,
    first: u64,
    incarnations: Vec<Incarnation>,
    /// The next sequence, and the checksum of the last frame.
    next: Option<u64>,
    chain: Option<u32>,
    end: u64,
    scan_end: ScanEnd,
}

impl Frames {
    fn last(&self) -> u64 {
        self.next.map_or(0, |next| next - 1)
    }

    /// Returns the last sequence before the frames.
    fn preceding(&self) -> u64 {
        let begun = self.incarnations.first().filter(|incarnation| incarnation.first == self.first);
        begun.map_or(self.first.wrapping_sub(1), |incarnation| incarnation.fork)
    }
}

impl State<'_> {
    /// Reads frames up to `limit` or the first invalid one. `begins` is the sequence and the previous checksum that the
    /// first frame must have.
    fn read(
        &mut self,
        found: &Found,
        limit: u64,
        begins: Option<(u64, u32)>,
    ) -> anyhow::Result<Result<Frames, Defect>> {
        let before = begins.map(|(_, before)| before);
        let mut scan = Scan::new(found.file(self.home)?, (found.version, found.log), (HEAD_BYTES, limit), before);
        let mut next = begins.map(|(first, _)| first);
        let mut first = found.compacted.as_ref().map(|compacted| compacted.first);
        let mut entries = 0;
        let mut incarnations = Vec::new();
        while scan.advance()? {
            for frame in scan.frames() {
                if frame.head.epoch < self.epoch {
                    return Ok(Err((
                        frame.offset,
                        "the epoch of a frame is lower than that of an earlier frame".into(),
                    )));
                }
                self.epoch = frame.head.epoch;
                let begun = frame.incarnations();
                if let Some(incarnation) = begun.first() {
                    if frame.head.first != incarnation.first {
                        return Ok(Err((
                            frame.offset,
                            "the sequence of a frame differs from that of its incarnation".into(),
                        )));
                    }
                    // A compacted segment covers the sequences that its header states.
                    if found.compacted.is_none() {
                        if next.is_some_and(|next| next != incarnation.fork.saturating_add(1)) {
                            let what = "an incarnation does not continue the sequence before it";
                            return Ok(Err((frame.offset, what.into())));
                        }
                        next = Some(incarnation.first);
                        first = next;
                    }
                    incarnations = begun;
                    continue;
                }
                let expected = next.unwrap_or(frame.head.first);
                match check(&frame, found.compacted.is_some(), expected) {
                    Ok(after) => next = Some(after),
                    Err(what) => return Ok(Err((frame.offset, what.into()))),
                }
                first.get_or_insert(frame.head.first);
                entries += u64::from(frame.head.count);
            }
        }
        let (chain, end, scan_end) = (scan.chain(), scan.offset(), scan.end());
        if let ScanEnd::Unsupported(why) = scan_end {
            return Ok(Err((end, why)));
        }
        let first = first.or(next).unwrap_or(1);
        Ok(Ok(Frames { entries, first, incarnations, next, chain, end, scan_end }))
    }
}

/// Checks the entries of a frame whose checksums match, and returns the sequence after them. Only compaction leaves gaps.
fn check(frame: &Frame<'_>, gaps: bool, mut next: u64) -> Result<u64, &'static str> {
    let follows = |sequence, next| sequence == next || (gaps && sequence > next);
    if !follows(frame.head.first, next) {
        return Err("the sequences of a frame are out of order");
    }
    for entry in frame.entries() {
        let entry = entry.filter(|entry| entry.metadata(&mut Vec::new()).is_some());
        let entry = entry.ok_or("a frame contains an invalid entry")?;
        if !follows(entry.sequence, next) {
            return Err("the sequence of an entry is out of order");
        }
        next = entry.sequence.checked_add(1).ok_or("an entry has the maximum sequence")?;
    }
    Ok(next)
}
