//! The tail of the log: its end, and whether an invalid frame there is a torn write or corruption.
//!
//! The writer never writes a frame before the sync of the previous one returned. So if a frame is invalid and a later frame
//! states that its sequence had been durable, this is corruption, and the log is not opened. Otherwise the invalid frame is
//! the last that was written, it was never acknowledged, and it is truncated. A rule that looked at the invalid frame alone
//! would refuse to start after ordinary power cuts, or drop acknowledged writes.

use std::io;

use anyhow::Context;

use super::Home;
use super::catalog::{Mark, Segment};
use super::disk::{File, is_full};
use super::found::Found;
use super::frame::{self, Ending, Frame, Head as FrameHead};
use super::incarnations;
use super::preallocate::zero;
use super::scan::{Scan, ScanEnd, is_zero, written_end};
use super::segment::HEAD_BYTES;
#[cfg(test)]
use super::tests::mutants::{self, Mutant};
use crate::Incarnation;

/// Extension of copies of torn writes.
pub const COPY_SUFFIX: &str = ".torn";

/// Content of a segment, read to its end.
pub struct Content {
    pub segment: Segment,
    pub holds_frames: bool,
    /// The last frame, where there is one.
    pub ending: Ending,
    pub tear: Option<Tear>,
}

/// A torn write: the last valid frame ends at `at`, and other bytes follow.
#[derive(Clone, Copy)]
pub struct Tear {
    pub at: u64,
    /// Offset after its last nonzero byte.
    pub end: u64,
    pub what: &'static str,
}

/// Reads the frames of a segment, from the last of `marks` on where there are some, unless they are of a run that does not
/// sync. A compacted one was complete before it
/// got its name: of it only the incarnations in the first frame are read, and any invalid frame is corruption.
pub fn read(home: &Home, found: &Found, marks: Vec<Mark>) -> anyhow::Result<Content> {
    if let Some(compacted) = &found.compacted {
        let first = first_frame(home, found)?.map_or_else(Vec::new, |(_, incarnations)| incarnations);
        let segment = Segment::compacted(found.numbers, found.version, compacted, first);
        return Ok(Content { segment, holds_frames: true, ending: compacted.ending, tear: None });
    }
    let mut segment = Segment { version: found.version, ..Segment::empty(found.numbers.first, 0, 0, found.size) };
    let (mut first, mut newest) = (None, None);
    let (mut begin, mut chain) = (HEAD_BYTES, None);
    if let Some(mark) = marks.last().filter(|mark| mark.offset > HEAD_BYTES) {
        let Some((head, incarnations)) = first_frame(home, found)? else { return read(home, found, Vec::new()) };
        (first, segment.incarnations) = (Some(head), incarnations);
        (begin, chain) = (mark.offset, Some(mark.chain));
    }
    let mut scan = Scan::new(found.file(home)?, (found.version, found.log), (begin, found.size), chain);
    while scan.advance()? {
        for frame in scan.frames() {
            first.get_or_insert(frame.head);
            newest = Some(frame.head);
            segment.incarnations.extend(frame.incarnations());
            segment.deletes += frame.entries().flatten().filter(|entry| entry.put.is_none()).count() as u64;
        }
    }
    // A frame that was followed is not there: without marks the end is found, and the error names it. Or the frames were
    // published without a sync, so that those before the mark can be lost.
    if !marks.is_empty() && newest.is_none_or(|newest| newest.ending().is_not_synced()) {
        return read(home, found, Vec::new());
    }
    segment.marks = marks;
    #[cfg(test)]
    if mutants::is(Mutant::TakeoverSkips)
        && let (Some(mark), Some(newest)) = (segment.marks.last().copied(), newest)
    {
        segment.marks.push(Mark { offset: scan.offset(), chain: newest.checksum, ..mark });
    }
    if let (Some(first), Some(newest)) = (first, newest) {
        (segment.first, segment.before) = (first.first, first.previous);
        segment.last = newest.last();
        (segment.after, segment.tip) = (newest.checksum, newest.checksum);
    }
    segment.end = scan.offset();
    if let ScanEnd::Unsupported(why) = scan.end() {
        return Err(home.refused(&found.name, segment.end, &why));
    }
    let tear = tear(home, found, segment.end, &scan.end())?;
    let ending = newest.as_ref().map_or_else(Ending::default, FrameHead::ending);
    Ok(Content { segment, holds_frames: first.is_some(), ending, tear })
}

/// Returns the header of the first frame of a segment, and the incarnations that it records; None without frames.
pub fn first_frame(home: &Home, found: &Found) -> anyhow::Result<Option<(FrameHead, Vec<Incarnation>)>> {
    let end = found.compacted.as_ref().map_or(found.size, |compacted| compacted.end);
    if end < HEAD_BYTES + frame::HEAD_BYTES as u64 {
        return Ok(None);
    }
    let damage = |what| home.damage(&found.name, HEAD_BYTES, what);
    let mut bytes = [0; frame::HEAD_BYTES];
    let file = found.file(home)?;
    file.read_at(&mut bytes, HEAD_BYTES)?;
    if found.compacted.is_none() && is_zero(&bytes) {
        return Ok(None);
    }
    let head = FrameHead::decode(&bytes, found.log);
    let head = head.ok_or_else(|| damage("this is not the header of a frame of this log"))?;
    if head.kind == frame::ENTRIES {
        // The rest of the frame is checked when the segment is replayed.
        return Ok(Some((head, Vec::new())));
    }
    if head.total() > end - HEAD_BYTES {
        return Err(damage("a frame is longer than its segment"));
    }
    let mut body = vec![0; head.length as usize];
    file.read_at(&mut body, HEAD_BYTES + frame::HEAD_BYTES as u64)?;
    if !head.accepts(&body) {
        return Err(damage("the checksum of a frame is wrong"));
    }
    head.check(found.version, true, &body).map_err(|why| home.refused(&found.name, HEAD_BYTES, &why))?;
    let incarnations = Frame { head, offset: HEAD_BYTES, body: &body }.incarnations();
    incarnations::check(&incarnations, None).map_err(damage)?;
    Ok(Some((head, incarnations)))
}

/// Returns the torn write after the last valid frame, unless only zeros follow.
pub fn tear(home: &Home, found: &Found, at: u64, stop: &ScanEnd) -> anyhow::Result<Option<Tear>> {
    let what = match stop {
        ScanEnd::Invalid(what) => what,
        // The first sectors of a frame can be lost while later ones are not.
        ScanEnd::Clean | ScanEnd::Unsupported(_) => "something follows the end of the log",
    };
    Ok(written_end(&*found.file(home)?, at, found.size)?.map(|end| Tear { at, end, what }))
}

/// Truncates a torn write, so that no later scan can read it as a frame. `last` and `chain` are the sequence and the
/// checksum before it.
pub fn cut(home: &Home, found: &Found, tear: Tear, last: u64, chain: u32) -> anyhow::Result<()> {
    let Tear { at, end, what } = tear;
    if let Some((offset, later)) = later_frame(home, found, tear, last, chain)? {
        let what = format!(
            "{what}, but it had been durable according to the frame at byte {offset} (up to {})",
            later.durable
        );
        return Err(home.damage(&found.name, at, what));
    }
    let copy = copy(home, found, tear).context("cannot save a copy of a torn write of the log")?;
    let file = found.file(home)?;
    zero(&*file, at, end)?;
    file.sync()?;
    tracing::warn!(
        "truncated a torn write of {} bytes at byte {at} of {} ({what}); it was never acknowledged; {copy}",
        end - at,
        home.path(&found.name).display()
    );
    Ok(())
}

/// Returns a frame after the tear which proves that the torn frame had been durable. `last` and `chain` are the sequence
/// and the checksum before the tear. Either its durable sequence states so; or it has the next sequence and yet follows
/// another frame, which then held no entries and closed the log. Frames written without a sync in between, with
/// `--durability os`, prove nothing.
pub fn later_frame(
    home: &Home,
    found: &Found,
    tear: Tear,
    last: u64,
    chain: u32,
) -> anyhow::Result<Option<(u64, FrameHead)>> {
    const STEP: usize = 1 << 20;
    let file = found.file(home)?;
    let mut buffer = vec![0; ((found.size - tear.at).min(STEP as u64) as usize) + frame::HEAD_BYTES];
    let mut at = tear.at + frame::ALIGNMENT as u64;
    while at < tear.end {
        let window = &mut buffer[..(found.size - at).min((STEP + frame::HEAD_BYTES) as u64) as usize];
        file.read_at(window, at)?;
        let places = (0..window.len().min(STEP)).step_by(frame::ALIGNMENT);
        let heads = places.filter_map(|place| Some((place, FrameHead::decode(&window[place..], found.log)?)));
        let follows_close = |head: &FrameHead| head.first == last + 1 && head.count > 0 && head.previous != chain;
        let proves = |head: &FrameHead| head.durable > last || follows_close(head);
        if let Some((place, head)) = heads.into_iter().find(|(_, head)| proves(head)) {
            return Ok(Some((at + place as u64, head)));
        }
        at += STEP as u64;
    }
    Ok(None)
}

/// Copies the torn bytes for inspection, and returns where they are, for the log line.
fn copy(home: &Home, found: &Found, tear: Tear) -> anyhow::Result<String> {
    let file = found.file(home)?;
    let names = home.disk.list()?;
    let candidates = (1..).map(|count| format!("{}.{}.{count}{COPY_SUFFIX}", found.name, tear.at));
    let Some(name) = candidates.into_iter().find(|name| !names.contains(name)) else { return Ok(String::new()) };
    let temporary = format!("{name}.tmp");
    let copied = home.disk.create(&temporary).and_then(|copy| {
        copy_range(&*file, &*copy, tear)?;
        copy.sync()?;
        home.disk.rename(&temporary, &name)?;
        home.disk.sync()
    });
    match copied {
        Ok(()) => Ok(format!("original bytes saved to {}", home.path(&name).display())),
        // A full disk must not prevent the log from opening.
        Err(error) if is_full(&error) => {
            let _ = home.disk.remove(&temporary);
            Ok("the disk is full, the original bytes were not saved".into())
        }
        Err(error) => Err(error.into()),
    }
}

fn copy_range(from: &dyn File, to: &dyn File, tear: Tear) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = tear.at;
    while at < tear.end {
        let chunk = &mut buffer[..(tear.end - at).min(1 << 20) as usize];
        from.read_at(chunk, at)?;
        to.write_at(chunk, at - tear.at)?;
        at += chunk.len() as u64;
    }
    Ok(())
}
