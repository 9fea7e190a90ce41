//! Verification: reads every byte of a log, changes nothing, and goes on after what is wrong.

use std::io;
use std::path::Path;

use uuid::Uuid;

use super::found::Found;
use super::frame::Frame;
use super::incarnations;
use super::listing;
use super::recovery;
use super::scan::{Scan, Stop};
use super::segment::{Compacted, HEAD_BYTES, Numbers, SUFFIX};
use super::tail::{self, Tear};
use super::{Home, mark, offline};
use crate::{History, Incarnation};

/// What verification has to say.
pub enum Finding {
    /// A segment is as it should be. It covers the sequences from `first` to `last`; compaction can leave fewer entries.
    Sound {
        file: String,
        /// The version of its format.
        format: u32,
        entries: u64,
        first: u64,
        last: u64,
        bytes: u64,
        /// Those that begin in it, as far as they are recorded.
        incarnations: Vec<Incarnation>,
    },
    /// The log ends in an unfinished write, which the next start cuts off.
    Torn(String),
    Wrong(String),
}

/// Goes over the log of a data directory; `progress` hears of the bytes read.
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
            None if name.ends_with(SUFFIX) => (state.report)(Finding::Wrong(listing::not_a_segment(home, &name))),
            None => {}
        }
    }
    all.sort_by_key(|numbers| (numbers.first, std::cmp::Reverse(numbers.last)));
    for numbers in all {
        if numbers.last < state.number {
            // Compaction was stopped before it removed this one; the next start does.
            continue;
        }
        if numbers.first != state.number {
            let missing = Numbers { first: state.number, last: numbers.first.saturating_sub(1).max(state.number) };
            state.wrong(format!("{} is missing", home.path(&missing.file_name()).display()));
        }
        state.number = numbers.last + 1;
        match Found::open(home, numbers) {
            Ok(found) => {
                let size = found.size;
                state.segment(found)?;
                progress(size);
            }
            Err(error) => state.wrong(format!("{error:#}")),
        }
    }
    state.finish();
    Ok(())
}

struct State<'a> {
    home: &'a Home,
    report: &'a mut dyn FnMut(Finding),
    /// The sequence and the checksum of the frame before it that the next frame must have; None after damage.
    next: Option<(u64, u32)>,
    /// Of the last frame.
    epoch: u32,
    history: History,
    /// The incarnation that the next one continues, where it is known.
    parent: Option<Uuid>,
    number: u64,
    log: Option<Uuid>,
    /// Found in a segment that nothing has followed yet.
    tear: Option<(Found, Tear)>,
}

/// What is wrong with a segment, and at which byte.
type Wrong = (u64, String);

impl State<'_> {
    fn wrong(&mut self, what: String) {
        (self.report)(Finding::Wrong(what));
        // What comes next is compared with nothing, so that one damage is told once.
        self.next = None;
        self.parent = None;
    }

    fn segment(&mut self, found: Found) -> io::Result<()> {
        if found.numbers.first == 1 {
            self.parent = Some(found.log);
        }
        let checked = match found.compacted {
            _ if *self.log.get_or_insert(found.log) != found.log => {
                Err((0, "it belongs to another log than the segments before it".into()))
            }
            Some(compacted) => self.compacted(&found, &compacted)?,
            None => self.written(&found)?,
        };
        match checked {
            Ok((frames, tear)) => {
                frames.incarnations.iter().for_each(|incarnation| self.history.push(*incarnation));
                let last = incarnations::newest_given(&self.history, frames.last());
                let Frames { entries, first, end: bytes, incarnations, .. } = frames;
                let (file, format) = (found.name.clone(), found.version);
                (self.report)(Finding::Sound { file, format, entries, first, last, bytes, incarnations });
                if let Some(tear) = tear {
                    self.tear = Some((found, tear));
                }
            }
            Err((at, what)) => self.wrong(format!("{} at byte {at}: {what}", self.home.path(&found.name).display())),
        }
        Ok(())
    }

    fn compacted(&mut self, found: &Found, head: &Compacted) -> io::Result<Result<(Frames, Option<Tear>), Wrong>> {
        let frames = match self.read(found, head.end, Some((head.first, head.before)))? {
            Ok(frames) => frames,
            Err(wrong) => return Ok(Err(wrong)),
        };
        if self.next.is_some_and(|next| next != (frames.preceding().wrapping_add(1), head.before)) {
            return Ok(Err((HEAD_BYTES, "it does not follow the segment before it".into())));
        }
        // Those before its first may have been dropped.
        if let Err(what) = incarnations::check(&frames.incarnations, None) {
            return Ok(Err((HEAD_BYTES, what.into())));
        }
        self.parent = frames.incarnations.last().map(|incarnation| incarnation.id);
        self.epoch = self.epoch.max(head.ending.epoch);
        if let Stop::Bad(what) = frames.stop {
            return Ok(Err((frames.end, what.into())));
        }
        if frames.chain != Some(head.tip) || frames.last() > head.last {
            return Ok(Err((frames.end, "frames are missing at its end".into())));
        }
        let next = head.last.saturating_add(1);
        self.next = Some((next, head.after));
        Ok(Ok((Frames { next: Some(next), ..frames }, None)))
    }

    fn written(&mut self, found: &Found) -> io::Result<Result<(Frames, Option<Tear>), Wrong>> {
        // What comes after a tear is wrong whatever it follows, and that is told once.
        let follows = self.next.filter(|_| self.tear.is_none());
        let frames = match self.read(found, found.size, follows)? {
            Ok(frames) => frames,
            Err(wrong) => return Ok(Err(wrong)),
        };
        if frames.incarnations.len() > 1 {
            return Ok(Err((HEAD_BYTES, "several incarnations begin in one segment".into())));
        }
        if let Err(what) = incarnations::check(&frames.incarnations, self.parent) {
            return Ok(Err((HEAD_BYTES, what.into())));
        }
        self.parent = frames.incarnations.last().map(|incarnation| incarnation.id).or(self.parent);
        let tear = tail::tear(found, frames.end, &frames.stop)?;
        let begun = frames.end > HEAD_BYTES || tear.is_some();
        if begun && let Some((torn, Tear { at, what, .. })) = self.tear.take() {
            let file = self.home.path(&torn.name);
            self.wrong(format!("{} at byte {at}: {what}, and a later segment had been begun", file.display()));
        }
        if let Some(tear) = tear
            && let Some((offset, _)) = tail::later_frame(found, tear, frames.last(), frames.chain.unwrap_or(0))?
        {
            let what = format!("{}, yet it had been durable, as the frame at byte {offset} says", tear.what);
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
            let what = format!("{} at byte {at}: {what}: {} bytes of an unfinished write", file.display(), end - at);
            (self.report)(Finding::Torn(what));
        }
        let marked = mark::read(&*self.home.disk).ok().flatten();
        if self.log.is_none() && self.number == 1 && marked.is_some() {
            self.wrong(recovery::no_segments(self.home));
        }
        let marked = marked.filter(|(log, _)| Some(*log) == self.log);
        if let (Some((_, durable)), Some((next, _))) = (marked, self.next)
            && next <= durable
        {
            self.wrong(format!("the log ends with sequence {}, but {durable} had been durable", next - 1));
        }
    }
}

/// The frames of a segment, every one of them right.
struct Frames {
    entries: u64,
    first: u64,
    incarnations: Vec<Incarnation>,
    /// The sequence and the checksum that follow.
    next: Option<u64>,
    chain: Option<u32>,
    end: u64,
    stop: Stop,
}

impl Frames {
    fn last(&self) -> u64 {
        self.next.map_or(0, |next| next - 1)
    }

    /// The last sequence before them.
    fn preceding(&self) -> u64 {
        let begun = self.incarnations.first().filter(|incarnation| incarnation.first == self.first);
        begun.map_or(self.first.wrapping_sub(1), |incarnation| incarnation.fork)
    }
}

impl State<'_> {
    /// Reads frames up to `limit` or the first that is not one. `begins` is what the first frame must have.
    fn read(&mut self, found: &Found, limit: u64, begins: Option<(u64, u32)>) -> io::Result<Result<Frames, Wrong>> {
        let before = begins.map(|(_, before)| before);
        let mut scan = Scan::new(found.file.clone(), (found.version, found.log), (HEAD_BYTES, limit), before);
        let mut next = begins.map(|(first, _)| first);
        let mut first = found.compacted.as_ref().map(|compacted| compacted.first);
        let mut entries = 0;
        let mut incarnations = Vec::new();
        while scan.advance()? {
            for frame in scan.frames() {
                if frame.head.epoch < self.epoch {
                    return Ok(Err((frame.offset, "a frame is of an epoch before that of an older one".into())));
                }
                self.epoch = frame.head.epoch;
                let begun = frame.incarnations();
                if let Some(incarnation) = begun.first() {
                    if frame.head.first != incarnation.first {
                        return Ok(Err((frame.offset, "a frame has another sequence than its incarnation".into())));
                    }
                    // One that compaction wrote covers what it says in its head.
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
        let (chain, end, stop) = (scan.chain(), scan.offset(), scan.stop());
        if let Stop::Refused(why) = stop {
            return Ok(Err((end, why)));
        }
        let first = first.or(next).unwrap_or(1);
        Ok(Ok(Frames { entries, first, incarnations, next, chain, end, stop }))
    }
}

/// Goes over the entries of a frame whose checksums are right, and returns the sequence after them. Compaction leaves
/// gaps; nothing else does.
fn check(frame: &Frame<'_>, gaps: bool, mut next: u64) -> Result<u64, &'static str> {
    let follows = |sequence, next| sequence == next || (gaps && sequence > next);
    if !follows(frame.head.first, next) {
        return Err("a frame has sequences that are out of order");
    }
    for entry in frame.entries() {
        let entry = entry.filter(|entry| entry.metadata(&mut Vec::new()).is_some());
        let entry = entry.ok_or("a frame holds what is not an entry")?;
        if !follows(entry.sequence, next) {
            return Err("an entry has a sequence that is out of order");
        }
        next = entry.sequence.checked_add(1).ok_or("an entry has the last sequence there is")?;
    }
    Ok(next)
}
