//! Restore of a backup into a directory without a log.
//!
//! Owns: the order of steps that makes a crash harmless at each. All segments are complete under temporary names before the
//! first is renamed, newest first: a log without its beginning is never opened.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use kvs_runtime::{Clock, Env};

use super::disk::{Directory, Disk};
use super::frame::{Ending, INCARNATION};
use super::listing::Listing;
use super::lock::Lock;
use super::output::Output;
use super::packer::Packer;
use super::segment::{Compacted, HEAD_BYTES, Numbers};
use super::{DEFAULT_SEGMENT_BYTES, Home, entry, identity, incarnations, mark};
use crate::{Entry, History, Incarnation, Restoration};

/// Checks that a data directory has no log.
pub fn check_empty(data: &Path) -> anyhow::Result<()> {
    let log = data.join("log");
    if !log.is_dir() {
        return Ok(());
    }
    let home = Home { disk: Arc::new(Directory::new(log)), data: data.into(), env: Env::real() };
    let (names, listing) = (home.disk.list()?, Listing::read(&home)?);
    listing.is_restored(&home)?;
    let is_empty = listing.segments.is_empty() && !names.iter().any(|name| name == mark::NAME);
    ensure!(
        is_empty,
        "there is a log in {} already: a backup is restored into an empty directory; give another with --data-dir",
        data.display()
    );
    Ok(())
}

/// Writes a restored log, and the beginning of its new incarnation.
pub fn restore(data: &Path, restoration: &Restoration<'_>) -> anyhow::Result<()> {
    let _lock = Lock::take(data, None, &Clock::system())?;
    check_empty(data)?;
    restore_on(&Directory::new(data.join("log")), restoration)
}

pub(super) fn restore_on(disk: &dyn Disk, restoration: &Restoration<'_>) -> anyhow::Result<()> {
    let mut segments = Segments::new(disk, restoration);
    if let Err(error) = segments.write() {
        segments.names.iter().for_each(|name| drop(disk.remove(&temporary(name))));
        return Err(error).context("cannot write the restored log");
    }
    for name in segments.names.iter().rev() {
        disk.rename(&temporary(name), name)?;
    }
    disk.sync()?;
    identity::write(disk, restoration.log)?;
    Ok(())
}

fn temporary(name: &str) -> String {
    format!("{name}.tmp")
}

/// The segments of a restored log. They have the form of compacted ones, which may lack entries.
struct Segments<'a> {
    disk: &'a dyn Disk,
    restoration: &'a Restoration<'a>,
    /// Incarnations that begin after the entries so far.
    incarnations: History,
    names: Vec<String>,
    current: Option<Segment>,
    /// The newest sequence so far, and the newest one whose entry is missing: it may have been a delete.
    last: u64,
    horizon: u64,
    /// Checksum of the last frame.
    tip: u32,
}

struct Segment {
    numbers: Numbers,
    first: u64,
    before: u32,
    output: Output,
}

impl<'a> Segments<'a> {
    fn new(disk: &'a dyn Disk, restoration: &'a Restoration<'a>) -> Self {
        let incarnations = restoration.history.clone();
        Self { disk, restoration, incarnations, names: Vec::new(), current: None, last: 0, horizon: 0, tip: 0 }
    }

    fn write(&mut self) -> anyhow::Result<()> {
        let Restoration { ref history, last, incarnation, replay, .. } = *self.restoration;
        replay(&mut |entries| entries.iter().try_for_each(|entry| self.push(entry)))?;
        if self.last < last {
            self.reach(last, 0)?;
        }
        self.skip_to(history.next(last));
        self.close(last)?;
        // In a segment of its own: what comes before stays as it was.
        self.begin(&[incarnation], incarnation.first)?;
        self.close(incarnation.first - 1)
    }

    /// Notes that the next entry has this sequence.
    fn skip_to(&mut self, sequence: u64) {
        self.horizon = self.restoration.history.missing(self.last, sequence).unwrap_or(self.horizon);
    }

    fn push(&mut self, entry: &Entry<'_>) -> anyhow::Result<()> {
        self.skip_to(entry.sequence);
        let bytes = entry::size_ref(&entry.event);
        self.reach(entry.sequence, bytes as u64)?;
        let Some(segment) = &mut self.current else { bail!("no segment was begun") };
        let encode = |body: &mut Vec<u8>, offset: u32| entry::encode_ref(body, offset, entry.time, &entry.event);
        segment.output.push(entry.sequence, bytes, encode)?;
        self.last = entry.sequence;
        Ok(())
    }

    /// Continues with the segment for a sequence, with room for these bytes. None spans the jump of an incarnation.
    fn reach(&mut self, sequence: u64, bytes: u64) -> anyhow::Result<()> {
        let begun = self.incarnations.until(sequence).incarnations().to_vec();
        if self.current.is_none() && begun.first().is_none_or(|first| first.fork > 0) {
            self.begin(&[], 1)?;
        }
        let is_full = |segment: &Segment| {
            let written = segment.output.end + segment.output.packer.pending();
            written > HEAD_BYTES && written + bytes > DEFAULT_SEGMENT_BYTES
        };
        if let Some(first) = begun.first() {
            self.close(first.fork)?;
            self.begin(&begun, first.first)?;
        } else if self.current.as_ref().is_some_and(is_full) {
            self.close(sequence - 1)?;
            self.begin(&[], sequence)?;
        }
        Ok(())
    }

    /// Begins a segment whose first sequence is `first`, with the incarnations that begin in it.
    fn begin(&mut self, begun: &[Incarnation], first: u64) -> anyhow::Result<()> {
        let numbers = Numbers::one(self.names.len() as u64 + 1);
        let name = numbers.file_name();
        self.names.push(name.clone());
        let file = self.disk.create(&temporary(&name))?;
        let mut packer = Packer::new(self.restoration.log, self.last, self.tip);
        packer.epoch = 1;
        let mut output = Output::new(file, packer);
        if let Some(frame) = incarnations::frame(begun) {
            output.put(frame)?;
        }
        let later = self.incarnations.incarnations().iter().skip(begun.len()).copied().collect();
        self.incarnations = History::new(later);
        self.current = Some(Segment { numbers, first, before: self.tip, output });
        Ok(())
    }

    /// Completes the segment, which covers the sequences up to `last`.
    fn close(&mut self, last: u64) -> anyhow::Result<()> {
        let Some(Segment { numbers, first, before, mut output }) = self.current.take() else { return Ok(()) };
        output.flush()?;
        self.tip = output.packer.chain;
        let (tip, end, horizon) = (self.tip, output.end, self.horizon);
        let retained = if horizon > 0 { self.restoration.last } else { 1 };
        let ending = Ending { kind: INCARNATION, flags: 0, epoch: 1 };
        let compacted = Compacted { first, last, before, after: tip, tip, ending, end, horizon, retained };
        output.finish(self.restoration.log, numbers, compacted)?;
        Ok(())
    }
}
