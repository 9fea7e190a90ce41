//! Verification: reads every byte of a log, changes nothing, and goes on after what is wrong.

use std::io;
use std::path::Path;

use super::found::Found;
use super::frame::Frame;
use super::recovery;
use super::scan::{Scan, Stop};
use super::segment::{Compacted, HEAD_BYTES, Numbers, SUFFIX};
use super::tail::{self, Tear};
use super::{Home, mark, offline};

/// What verification has to say.
pub enum Finding {
    /// A segment is as it should be. It covers the sequences from `first` to `last`; compaction can leave fewer entries.
    Sound {
        file: String,
        entries: u64,
        first: u64,
        last: u64,
        bytes: u64,
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
    let mut state = State { home, report, next: Some((1, 0)), number: 1, log: None, tear: None };
    let mut all = Vec::new();
    for name in home.disk.list()? {
        match Numbers::parse(&name) {
            Some(numbers) => all.push((numbers, name)),
            None if name.ends_with(SUFFIX) => (state.report)(Finding::Wrong(recovery::not_a_segment(home, &name))),
            None => {}
        }
    }
    all.sort_by_key(|(numbers, _)| (numbers.first, std::cmp::Reverse(numbers.last)));
    for (numbers, name) in all {
        if numbers.last < state.number {
            // Compaction was stopped before it removed this one; the next start does.
            continue;
        }
        if numbers.first != state.number {
            let missing = Numbers { first: state.number, last: numbers.first.saturating_sub(1).max(state.number) };
            state.wrong(format!("{} is missing", home.path(&missing.file_name()).display()));
        }
        state.number = numbers.last + 1;
        match Found::open(home, name, numbers) {
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
    number: u64,
    log: Option<uuid::Uuid>,
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
    }

    fn segment(&mut self, found: Found) -> io::Result<()> {
        let checked = match found.compacted {
            _ if *self.log.get_or_insert(found.log) != found.log => {
                Err((0, "it belongs to another log than the segments before it".into()))
            }
            Some(compacted) => self.compacted(&found, &compacted)?,
            None => self.written(&found)?,
        };
        match checked {
            Ok((frames, tear)) => {
                let (file, entries, first, last) = (found.name.clone(), frames.entries, frames.first, frames.last());
                (self.report)(Finding::Sound { file, entries, first, last, bytes: frames.end });
                if let Some(tear) = tear {
                    self.tear = Some((found, tear));
                }
            }
            Err((at, what)) => self.wrong(format!("{} at byte {at}: {what}", self.home.path(&found.name).display())),
        }
        Ok(())
    }

    fn compacted(&mut self, found: &Found, head: &Compacted) -> io::Result<Result<(Frames, Option<Tear>), Wrong>> {
        let begins = (head.first, head.before);
        if self.next.is_some_and(|next| next != begins) {
            return Ok(Err((HEAD_BYTES, "it does not follow the segment before it".into())));
        }
        let frames = match read(found, head.end, Some(begins))? {
            Ok(frames) => frames,
            Err(wrong) => return Ok(Err(wrong)),
        };
        if let Stop::Bad(what) = frames.stop {
            return Ok(Err((frames.end, what.into())));
        }
        if frames.chain != Some(head.tip) || frames.last() > head.last {
            return Ok(Err((frames.end, "frames are missing at its end".into())));
        }
        let next = head.last.saturating_add(1);
        self.next = Some((next, head.after));
        Ok(Ok((Frames { first: head.first, next: Some(next), ..frames }, None)))
    }

    fn written(&mut self, found: &Found) -> io::Result<Result<(Frames, Option<Tear>), Wrong>> {
        // What comes after a tear is wrong whatever it follows, and that is told once.
        let follows = self.next.filter(|_| self.tear.is_none());
        let frames = match read(found, found.size, follows)? {
            Ok(frames) => frames,
            Err(wrong) => return Ok(Err(wrong)),
        };
        let tear = tail::tear(found, frames.end, frames.stop)?;
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
}

/// Reads frames up to `limit` or the first that is not one. `begins` is what the first frame must have.
fn read(found: &Found, limit: u64, begins: Option<(u64, u32)>) -> io::Result<Result<Frames, Wrong>> {
    let mut scan = Scan::new(found.file.clone(), found.log, HEAD_BYTES, limit, begins.map(|(_, before)| before));
    let (mut entries, mut next, mut first) = (0, begins.map(|(first, _)| first), None);
    while scan.advance()? {
        for frame in scan.frames() {
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
    Ok(Ok(Frames { entries, first: first.or(next).unwrap_or(1), next, chain, end, stop }))
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
