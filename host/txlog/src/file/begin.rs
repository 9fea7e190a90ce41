//! The beginning of a run that writes: what is on disk before anything is served.
//!
//! Owns: when an incarnation begins, and the order of steps that makes a crash harmless at each. What begins an
//! incarnation stays until the incarnation is durable: a crash before that leads to another one, never to none.

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::{Context, bail};
use kvs_runtime::Random;
use uuid::Uuid;

use super::catalog::Segment;
use super::disk::{File, is_full};
use super::found::Found;
use super::identity::{self, State};
use super::incarnations;
use super::preallocate::{self, PreallocatedSegment, Sizes};
use super::recovery::Recovered;
use super::segment::{HEAD_BYTES, VERSION};
#[cfg(test)]
use super::tests::mutants::{self, Mutant};
use super::writer::Writer;
use super::{Durability, Home, position};
use crate::{History, Incarnation};

/// A log that can be read, and written where it was begun.
pub struct Ready {
    pub log: Uuid,
    pub segments: Vec<Segment>,
    pub history: History,
    /// The sequence that the next one follows on, and what is left in the newest segment.
    pub last: u64,
    pub room: u64,
    pub spares: VecDeque<PreallocatedSegment>,
    /// The number of the next spare to be made, and its size.
    pub next: u64,
    pub next_size: u64,
}

impl Ready {
    /// Nobody is going to write it.
    pub fn to_be_read(recovered: Recovered) -> Self {
        let Recovered { log, segments, history, last, .. } = recovered;
        Self { log, segments, history, last, room: 0, spares: VecDeque::new(), next: 0, next_size: 0 }
    }
}

/// Makes a log ready to be written: in segments of the newest format, in a directory that is known again, and as a new
/// incarnation where sequences may have been given out that are not in it. `asked` is why one is asked for.
pub fn begin(
    home: &Home,
    sizes: Sizes,
    recovered: Recovered,
    durability: Durability,
    asked: Option<&'static str>,
) -> anyhow::Result<(Ready, Writer)> {
    let identity = identity::read(&*home.disk, recovered.log)?;
    let reason = asked.or_else(|| reason(&recovered, identity, durability));
    // Before the first frame of format 2: a log that has some and no identity is taken for a copy.
    if reason.is_none() || is_identity_first() {
        keep_identity(home, recovered.log, identity)?;
    }

    let Recovered { log, mut segments, mut last, mut chain, ending, mut history, marked, mut files, newest_size } =
        recovered;
    let epoch = ending.epoch.saturating_add(1);
    let current = leave_former_format(home, &mut segments, &mut files)?;
    let newest = files.back().map(|found| found.numbers).or(segments.last().map(|segment| segment.numbers));
    let next = newest.map_or(1, |numbers| numbers.last + 1);
    let mut ahead = Ahead { home, log, sizes, files, next, next_size: sizes.after(newest_size) };
    let mut current = match current {
        Some(current) => current,
        None => ahead.take(&mut segments, last, chain)?,
    };

    if let Some(reason) = reason {
        let parent = history.incarnations().last().map_or(log, |incarnation| incarnation.id);
        let incarnation = incarnation(&home.env.random, parent, last)?;
        let Some(mut frame) = incarnations::frame(&[incarnation]) else { bail!("an incarnation cannot be encoded") };
        // What came before stays as it is: the first frames of segments name all incarnations.
        while segments.last().is_none_or(|segment| segment.end > HEAD_BYTES)
            || HEAD_BYTES + frame.sealed_len() > current.size
        {
            current = ahead.take(&mut segments, last, chain)?;
        }
        chain = frame.seal(log, epoch, last, chain);
        current.file.write_at(frame.bytes(), HEAD_BYTES)?;
        if is_synced() {
            current.file.sync()?;
        }
        last = incarnation.first - 1;
        if let Some(segment) = segments.last_mut() {
            (segment.first, segment.last) = (incarnation.first, last);
            (segment.after, segment.tip) = (chain, chain);
            segment.end = HEAD_BYTES + frame.sealed_len();
            segment.incarnations.push(incarnation);
        }
        history.push(incarnation);
        keep_identity(home, log, identity)?;
        tracing::info!(
            "the log in {} continues as incarnation {} with sequence {} after {}: {reason}",
            home.path("").display(),
            incarnation.id,
            incarnation.first,
            incarnation.fork
        );
    }

    let end = segments.last().map_or(HEAD_BYTES, |segment| segment.end);
    let Current { file, size } = current;
    let closed = reason.is_none() && ending.is_closed();
    let number = segments.last().map_or(1, |segment| segment.numbers.last);
    let position = position::open(&*home.disk)?;
    let writer = Writer {
        number,
        file,
        size,
        end,
        chain,
        epoch,
        last,
        synced: last,
        closed,
        announced: false,
        marked,
        position,
    };
    // Everything recovered is durable.
    writer.publish(log, &home.env.clock)?;
    let Ahead { files, next, next_size, .. } = ahead;
    let spare = |found: Found| {
        let (number, file, size) = (found.numbers.first, found.file(home)?, found.size);
        Ok(PreallocatedSegment { number, file, size })
    };
    let spares = files.into_iter().map(spare).collect::<anyhow::Result<_>>()?;
    Ok((Ready { log, segments, history, last, room: size - end, spares, next, next_size }, writer))
}

/// Why sequences may have been given out that the log does not have; None when they cannot.
fn reason(recovered: &Recovered, identity: State, durability: Durability) -> Option<&'static str> {
    let Recovered { last, ending, .. } = recovered;
    if *last == 0 {
        return None;
    }
    match identity {
        State::Copied => Some("its files are copies of those that were written"),
        // A log of format 1 never had an identity: one that is upgraded in place cannot be distinguished from a copy.
        State::Missing if ending.epoch > 0 => Some("its identity file is missing, as if it was a copy"),
        _ if !ending.is_unclean() => None,
        _ if ending.is_not_synced() => Some("it was written with --durability os and not closed"),
        _ if durability == Durability::Os => Some("it was not closed, and may have been written with --durability os"),
        _ => None,
    }
}

fn keep_identity(home: &Home, log: Uuid, identity: State) -> anyhow::Result<()> {
    if identity == State::Same {
        return Ok(());
    }
    match identity::write(&*home.disk, log) {
        // A disk that was filled up must not keep the log from opening. The next start takes it for a copy once more.
        Err(error) if is_full(&error) => tracing::warn!("disk full: the identity file is not written: {error}"),
        written => written.context("cannot write the identity file of the log")?,
    }
    Ok(())
}

fn incarnation(random: &Random, parent: Uuid, fork: u64) -> anyhow::Result<Incarnation> {
    if fork > u64::MAX / 2 {
        bail!(
            "the log has no sequences left for another incarnation; export it, and import it into an empty directory"
        );
    }
    let incarnation = Incarnation::after(parent, fork, random.uuid()?, random.u64()?);
    #[cfg(test)]
    if mutants::is(Mutant::JumpSkipped) {
        return Ok(Incarnation { first: fork + 1, ..incarnation });
    }
    Ok(incarnation)
}

fn is_identity_first() -> bool {
    #[cfg(test)]
    if mutants::is(Mutant::IdentityFirst) {
        return true;
    }
    false
}

fn is_synced() -> bool {
    #[cfg(test)]
    if mutants::is(Mutant::IncarnationNotSynced) {
        return false;
    }
    true
}

/// The file of the newest segment.
struct Current {
    file: Arc<dyn File>,
    size: u64,
}

/// Takes the newest segment where it can be written on. One of a former format stands as full, and those of a former
/// format that were made ahead are removed, newest first, so that none is ever missing.
fn leave_former_format(
    home: &Home,
    segments: &mut Vec<Segment>,
    files: &mut VecDeque<Found>,
) -> anyhow::Result<Option<Current>> {
    let holds_frames = segments.last().is_some_and(|segment| segment.end > HEAD_BYTES);
    let mut current = None;
    if let Some(found) = files.pop_front() {
        if found.version == VERSION {
            current = Some(Current { file: found.file(home)?, size: found.size });
        } else if !holds_frames {
            segments.pop();
            files.push_front(found);
        }
    }
    if let Some(former) = files.iter().position(|found| found.version != VERSION) {
        for found in files.drain(former..).rev() {
            home.disk.remove(&found.name)?;
            home.disk.sync()?;
        }
    }
    Ok(current)
}

/// Segments that nothing was written to, and those that can be made.
struct Ahead<'a> {
    home: &'a Home,
    log: Uuid,
    sizes: Sizes,
    files: VecDeque<Found>,
    next: u64,
    next_size: u64,
}

impl Ahead<'_> {
    /// Continues in the next segment.
    fn take(&mut self, segments: &mut Vec<Segment>, last: u64, chain: u32) -> anyhow::Result<Current> {
        if let Some(found) = self.files.pop_front() {
            segments.push(Segment::empty(found.numbers.first, last, chain, found.size));
            return Ok(Current { file: found.file(self.home)?, size: found.size });
        }
        let (number, size) = (self.next, self.next_size);
        let file = preallocate::create(&*self.home.disk, self.log, number, size)
            .context("cannot make a segment of the log")?;
        segments.push(Segment::empty(number, last, chain, size));
        (self.next, self.next_size) = (number + 1, self.sizes.after(size));
        Ok(Current { file, size })
    }
}
