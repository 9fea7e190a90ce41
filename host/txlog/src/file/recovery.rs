//! Recovery: from the files in the directory to a log that can be read and written.
//!
//! Owns: what the segments say of each other. What a bad frame at the end means is the business of `tail`.
//! Older segments are not read here but for their heads: a replay checks every byte, and finds the damage
//! before the service begins.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::path::PathBuf;

use anyhow::bail;
use uuid::Uuid;

use super::catalog::{Marks, Segment, marks_in};
use super::found::Found;
use super::frame::Ending;
use super::listing::Listing;
use super::segment::{HEAD_BYTES, Numbers};
use super::{Home, mark, tail};
use crate::History;

/// A log that was put right, and can be read. It is written only after [`begin`](super::begin::begin).
pub struct Recovered {
    pub log: Uuid,
    pub segments: Vec<Segment>,
    /// The sequence and the checksum that the next frame follows on.
    pub last: u64,
    pub chain: u32,
    pub ending: Ending,
    pub history: History,
    /// What the watermark file says.
    pub marked: u64,
    /// The newest of `segments` where it can be written on, and those made ahead.
    pub files: VecDeque<Found>,
    /// The size of the newest file, 0 where there is none.
    pub newest_size: u64,
}

/// What is known of a log before it is recovered.
#[derive(Clone)]
pub struct Known {
    pub log: Uuid,
    /// The newest sequence that was durable.
    pub durable: u64,
    /// Places before the last frame that was followed. What is before them was read, and needs not be read again if it was
    /// synced.
    pub marks: Marks,
}

/// The end of the log is lost, and only this process knows: the next start would take it for a torn write.
#[derive(Debug, thiserror::Error)]
#[error("{what}, and this cannot be recorded in {}: {error}; make room on the disk while this server runs, and start no other there", file.display())]
pub struct Unrecorded {
    what: String,
    file: PathBuf,
    error: io::Error,
}

/// Reads the log of a directory. Nothing but this process may use the directory.
pub fn recover(home: &Home, known: Option<Known>) -> anyhow::Result<Recovered> {
    let listing = Listing::read(home)?;
    let known_log = known.as_ref().map(|known| known.log);
    let known_durable = known.as_ref().map_or(0, |known| known.durable);
    let marks = known.map_or_else(Marks::new, |known| known.marks);
    let read_from = marks.back().map_or(0, |(segment, _)| *segment);
    let open = |numbers: &Numbers| {
        let found = match numbers.last < read_from {
            // Of these only the headers are read.
            true => Found::open_shared(home, *numbers),
            false => Found::open(home, *numbers),
        };
        found.map(Found::closed)
    };
    let found: Vec<_> = listing.segments.iter().map(open).collect::<anyhow::Result<_>>()?;
    one_log(home, &found, known_log)?;
    listing.is_whole(home)?;
    clean_up(home, &found, &listing)?;
    let marked = marked(home, &found)?;
    let durable = known_durable.max(marked);
    let log = found.first().map_or_else(|| home.env.random.uuid(), |segment| Ok(segment.log))?;

    // From the newest segment backwards to the last that holds a frame; there may be a tear on the way.
    let (mut tear, mut newest) = (None, None);
    for (at, segment) in found.iter().enumerate().rev() {
        let content = tail::read(home, segment, marks_in(&marks, segment.numbers.first))?;
        if let Some(torn) = content.tear {
            if tear.is_some() {
                let what = format!("{}, and a later segment had been begun", torn.what);
                return Err(home.damage(&segment.name, torn.at, what));
            }
            tear = Some((at, torn));
        }
        if content.holds_frames {
            newest = Some((at, content));
            break;
        }
    }
    let (mut segments, ending) = match newest {
        Some((at, content)) => {
            let segments = join(home, &found[..=at], content.segment, &marks)?;
            (begins(home, segments)?, content.ending)
        }
        None => (Vec::new(), Ending::default()),
    };
    let (last, chain) = segments.last().map_or((0, 0), |segment| (segment.last, segment.after));
    if last < durable {
        let (name, end) = found.last().map_or(("", 0), |segment| (segment.name.as_str(), HEAD_BYTES));
        let (name, end) = tear.map_or((name, end), |(at, torn)| (&found[at].name, torn.at));
        let what = format!("the log ends with sequence {last}, but {durable} had been durable");
        if durable > marked {
            // The next start knows of this no more than the file does, and would cut off what is corrupt.
            mark::write_where_possible(&*home.disk, log, durable).map_err(|error| Unrecorded {
                what: what.clone(),
                file: home.path(mark::NAME),
                error,
            })?;
        }
        return Err(home.damage(name, end, what));
    }
    if let Some((at, torn)) = tear {
        tail::cut(home, &found[at], torn, last, chain)?;
    }

    // The writer continues where the last frame or the tear is. What is after that was made ahead.
    let held = segments.len();
    let writable = held - usize::from(held > 0 && found[held - 1].compacted.is_none());
    let newest = tear.map_or(writable, |(at, _)| at);
    let empty = |found: &Found| Segment {
        version: found.version,
        ..Segment::empty(found.numbers.first, last, chain, found.size)
    };
    segments.extend(found.iter().take(newest + 1).skip(held).map(empty));
    let newest_size = found.last().map_or(0, |found| found.size);
    let files: VecDeque<_> = found.into_iter().skip(newest).collect();

    // What was read may be in memory only: a process that was killed had written it and not synced. It is served from
    // now on, so it must be durable from now on. Older segments were synced before a newer one was begun.
    if let Some(found) = files.front() {
        found.file(home)?.sync()?;
    }
    home.disk.sync()?;
    let history = History::new(segments.iter().flat_map(|segment| segment.incarnations.clone()).collect());
    Ok(Recovered { log, segments, last, chain, ending, history, marked, files, newest_size })
}

/// Removes what a process that was stopped has left.
pub fn clean_up(home: &Home, found: &[Found], listing: &Listing) -> anyhow::Result<()> {
    // Begun and not finished; nothing rests on them.
    listing.temporary.iter().try_for_each(|name| home.disk.remove(name))?;
    if let Some(one) = listing.strangers.first() {
        let count = listing.strangers.len();
        tracing::warn!(
            "{} holds files that are not the log's, {one} for one ({count} in all)",
            home.path("").display()
        );
    }
    remove_replaced(home, found, &listing.replaced)
}

/// Checks that all segments are of one log: of this one, where it is known.
pub fn one_log(home: &Home, found: &[Found], log: Option<Uuid>) -> anyhow::Result<()> {
    if log.is_some_and(|log| found.first().is_some_and(|segment| segment.log != log)) {
        bail!("{} holds another log than the one that was followed; bring back the right one", home.path("").display());
    }
    match found.windows(2).find(|pair| pair[0].log != pair[1].log) {
        Some([other, segment]) => bail!(
            "{} belongs to another log than {}; bring back the right one",
            home.path(&segment.name).display(),
            other.name
        ),
        _ => Ok(()),
    }
}

/// Removes the segments in whose place compaction had put one file when it was stopped: once that file was read to its
/// end, and its name is durable.
fn remove_replaced(home: &Home, kept: &[Found], replaced: &[Numbers]) -> anyhow::Result<()> {
    for new in kept.iter().filter(|new| replaced.iter().any(|old| new.numbers.contains(*old))) {
        let Some(compacted) = &new.compacted else {
            return Err(home.damage(&new.name, 0, "it stands for other segments and is not compacted"));
        };
        let segment = Segment::compacted(new.numbers, new.version, compacted, Vec::new());
        let mut scan = segment.scan(new.file(home)?, new.log);
        while scan.advance()? {}
        segment.ended(home, &scan)?;
    }
    if !replaced.is_empty() {
        home.disk.sync()?;
    }
    replaced.iter().try_for_each(|old| Ok(home.disk.remove(&old.file_name())?))
}

/// How far the watermark file says that this log had been durable.
fn marked(home: &Home, found: &[Found]) -> anyhow::Result<u64> {
    let mark = match mark::read(&*home.disk) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        mark => mark?,
    };
    let path = home.path(mark::NAME);
    match (mark, found.first()) {
        (Some((log, durable)), Some(segment)) if log == segment.log => return Ok(durable),
        (Some(_), Some(_)) => tracing::warn!("{} belongs to another log and is ignored", path.display()),
        (Some(_), None) => bail!(no_segments(home)),
        (None, _) => tracing::warn!("{} is damaged and is ignored; the log does not need it", path.display()),
    }
    Ok(0)
}

pub fn no_segments(home: &Home) -> String {
    let path = home.path(mark::NAME);
    format!(
        "the log has no segments, and {} says that it had some; bring them back, or remove that file to start with an empty log",
        path.display()
    )
}

/// The catalogue of segments that hold what the newest of them rests on: each must follow the one before it, and says
/// where that one ended. `found` need not begin with the oldest, and ends with the newest. `marks` are those of the others.
pub fn join(home: &Home, found: &[Found], newest: Segment, marks: &Marks) -> anyhow::Result<Vec<Segment>> {
    let mut segments = vec![newest];
    for older in found.iter().rev().skip(1) {
        let Some(next) = segments.last() else { break };
        let (last, before) = (next.preceding(), next.before);
        let blank = Segment {
            version: older.version,
            end: older.size,
            marks: marks_in(marks, older.numbers.first),
            ..Segment::empty(older.numbers.first, last, before, older.size)
        };
        let does_not_follow = || home.damage(&next.numbers.file_name(), HEAD_BYTES, follows(&older.name));
        let frame = tail::first_frame(home, older)?;
        let segment = match (&older.compacted, frame) {
            (Some(compacted), frame) => {
                if compacted.last != last || compacted.after != before {
                    return Err(does_not_follow());
                }
                let incarnations = frame.map_or_else(Vec::new, |(_, incarnations)| incarnations);
                Segment::compacted(older.numbers, older.version, compacted, incarnations)
            }
            (None, Some((frame, incarnations))) if frame.first <= last.wrapping_add(1) => {
                Segment { first: frame.first, before: frame.previous, incarnations, ..blank }
            }
            (None, Some(_)) => return Err(does_not_follow()),
            (None, None) => blank,
        };
        segments.push(segment);
    }
    segments.reverse();
    Ok(segments)
}

/// Checks that the oldest segment is the beginning of the log.
fn begins(home: &Home, segments: Vec<Segment>) -> anyhow::Result<Vec<Segment>> {
    match segments.first() {
        Some(oldest) if (oldest.preceding(), oldest.before) != (0, 0) => {
            Err(home.damage(&oldest.numbers.file_name(), HEAD_BYTES, "the log does not begin with it"))
        }
        _ => Ok(segments),
    }
}

fn follows(name: &str) -> String {
    format!("it does not follow {name}")
}
