//! Compaction: puts one new file in the place of several segments, without what the store does not need any more.
//!
//! Owns: the order of steps that makes a crash harmless at each. The new file is written under a temporary name, synced,
//! renamed, the directory is synced, and only *then* are the old ones removed. A crash in between leaves old files whose
//! numbers the new one contains; recovery removes them. Segments go oldest first, and each step is durable before the
//! next begins: so a delete never goes before the put that it deletes.
//!
//! Memory: one frame being read, one being written, and what [`liveness`](super::liveness) needs.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::Shared;
use super::catalog::Segment;
use super::disk::{File, is_full};
use super::entry;
use super::frame::{Builder, Ending};
use super::incarnations;
use super::liveness::{self, Fate, Garbage, Pause, Share};
use super::segment::{Compacted, HEAD_BYTES, Head, Numbers, VERSION};
#[cfg(test)]
use super::tests::mutants;
use crate::Incarnation;

/// Frames of a compacted segment are about as large as what is read at once.
const FRAME_BYTES: usize = 1 << 20;

/// How much one run does.
pub struct Effort {
    /// What is older may go.
    pub now: u64,
    /// A file is rewritten when that saves at least this share of it, in percent.
    pub worth_percent: u64,
    /// Keys in the table; see [`liveness::KEYS`].
    pub keys: usize,
}

/// What a run found and did, in bytes of entries.
#[derive(Debug)]
pub struct Outcome {
    /// Of entries that the store needs.
    pub needed: u64,
    pub needed_entries: u64,
    /// See [`Garbage::expiring`].
    pub expiring: [u64; 40],
    /// How often the log was read to find what can go.
    pub passes: u64,
    /// In bytes of files.
    pub saved: u64,
}

/// One run over segments that are not written any more, oldest first and without a gap.
pub fn run(shared: &Shared, segments: &[Segment], effort: &Effort, pause: &mut Pause<'_>) -> anyhow::Result<Outcome> {
    let garbage = liveness::find(shared, segments, effort.keys, effort.now, pause)?;
    let sum = |of: fn(&Share) -> u64| garbage.shares.iter().map(of).sum::<u64>();
    let (entries, bytes, needed) = (sum(|share| share.entries), sum(|share| share.bytes), sum(Share::needed));
    let needed_entries = (entries * needed).checked_div(bytes).unwrap_or(0);
    let mut outcome = Outcome { needed, needed_entries, expiring: garbage.expiring, passes: garbage.passes, saved: 0 };

    let mut plan = Plan::new(shared, segments, &garbage, effort.worth_percent);
    // Where leaving alone what is hardly worth it would leave too much in all, nothing is left alone.
    if plan.left > needed + needed / 3 {
        plan = Plan::new(shared, segments, &garbage, 0);
    }
    for group in plan.groups {
        let shares = &garbage.shares[group.clone()];
        // Readers are in the way of forgetting, and of nothing else.
        let forget = !shared.catalog.is_read();
        let rewrite = Rewrite { shared, segments: &segments[group], garbage: &garbage, void: plan.void, forget };
        let saved = match rewrite.run(shares, pause)? {
            None => Rewrite { forget: false, ..rewrite }.run(shares, pause)?,
            saved => saved,
        };
        outcome.saved += saved.unwrap_or(0);
    }
    Ok(outcome)
}

/// What a run is to do.
struct Plan {
    /// Which segments become one.
    groups: Vec<Range<usize>>,
    /// Whether what is void may go.
    void: bool,
    /// Bytes of entries that will be there afterwards.
    left: u64,
}

impl Plan {
    /// A group is rewritten when that saves at least this share of it, in percent.
    fn new(shared: &Shared, segments: &[Segment], garbage: &Garbage, worth_percent: u64) -> Self {
        let with_void = |share: &Share| share.superseded + share.forgettable + share.void;
        let without = |share: &Share| share.superseded + share.forgettable;
        // What is void may go when everything that was superseded goes: only then no older put of its key stays.
        let groups = groups(shared, segments, garbage, worth_percent, with_void);
        let stays = |at: usize| garbage.shares[at].superseded > 0 && !groups.iter().any(|group| group.contains(&at));
        let void = !(0..segments.len()).any(stays);
        let groups = if void { groups } else { self::groups(shared, segments, garbage, worth_percent, without) };
        let goes = if void { with_void } else { without };
        let gone: u64 = groups.iter().flat_map(|group| &garbage.shares[group.clone()]).map(goes).sum();
        let left = garbage.shares.iter().map(|share| share.bytes).sum::<u64>() - gone;
        Self { groups, void, left }
    }
}

/// Neighbours go together as long as what stays of them fits one segment.
fn groups(
    shared: &Shared,
    segments: &[Segment],
    garbage: &Garbage,
    worth_percent: u64,
    goes: fn(&Share) -> u64,
) -> Vec<Range<usize>> {
    let mut groups: Vec<(Range<usize>, u64)> = Vec::new();
    for (at, share) in garbage.shares.iter().enumerate() {
        let stays = share.bytes - goes(share) + incarnations::frame_bytes(segments[at].incarnations.len());
        match groups.last_mut() {
            Some((group, sum)) if *sum + stays <= shared.segment_bytes - HEAD_BYTES => {
                group.end = at + 1;
                *sum += stays;
            }
            _ => groups.push((at..at + 1, stays)),
        }
    }
    let worth = |(group, stays): &(Range<usize>, u64)| {
        let bytes: u64 = segments[group.clone()].iter().map(|segment| segment.size).sum();
        let saved = bytes.saturating_sub(*stays + HEAD_BYTES);
        let some = garbage.shares[group.clone()].iter().any(|share| goes(share) > 0) || group.len() > 1;
        // Many small frames take more than one large one with the same entries.
        (some || saved * 4 >= bytes) && saved * 100 >= bytes * worth_percent
    };
    groups.into_iter().filter(worth).map(|(group, _)| group).collect()
}

/// Several segments on their way into one file.
struct Rewrite<'a> {
    shared: &'a Shared,
    segments: &'a [Segment],
    garbage: &'a Garbage,
    /// Whether what is void may go, and what is forgettable.
    void: bool,
    forget: bool,
}

impl Rewrite<'_> {
    /// Returns the bytes saved; None when a reader was in the way and nothing was done.
    fn run(&self, shares: &[Share], pause: &mut Pause<'_>) -> anyhow::Result<Option<u64>> {
        let Self { shared, segments, .. } = self;
        let ([oldest, ..], [.., newest]) = (segments, segments) else { return Ok(None) };
        let disk = &*shared.home.disk;
        let numbers = Numbers { first: oldest.numbers.first, last: newest.numbers.last };
        let name = numbers.file_name();
        let temporary = format!("{name}.tmp");
        let mut forgotten = segments.iter().map(|segment| segment.forgotten).max().unwrap_or(0);
        let inherited = forgotten;

        let incarnations = self.incarnations();
        // The jump of one that is dropped counts as covered: none of its sequences is ever given out.
        let first =
            if incarnations.first() == oldest.incarnations.first() { oldest.first } else { oldest.preceding() + 1 };
        let written = disk.create(&temporary).map_err(anyhow::Error::from).and_then(|file| {
            let mut output = Output::new(shared, file, oldest.before, newest.last);
            output.epoch = shares.first().map_or(0, |share| share.ending.epoch);
            output.frame = incarnations::frame(&incarnations);
            output.flush()?;
            for (segment, share) in segments.iter().zip(shares) {
                let mut at = share.begin;
                let mut failed = Ok(());
                liveness::walk(shared, segment, pause, &mut |entry| {
                    let fate = self.garbage.fate(at);
                    at += 1;
                    let goes = match fate {
                        Fate::Needed => false,
                        Fate::Superseded => true,
                        Fate::Void => self.void && self.forget,
                        Fate::Forgettable => self.forget,
                    };
                    if !goes {
                        if failed.is_ok() {
                            output.epoch = share.ending.epoch;
                            failed = output.push(entry.sequence, entry.encoded);
                        }
                    } else if fate != Fate::Superseded {
                        forgotten = forgotten.max(entry.sequence);
                    }
                })?;
                failed?;
                pause(0)?;
            }
            output.flush()?;
            let compacted = Compacted {
                first,
                last: newest.last,
                before: oldest.before,
                after: newest.after,
                tip: output.chain,
                ending: shares.last().map_or_else(Ending::default, |share| share.ending),
                end: output.end,
                forgotten,
            };
            let head =
                Head { version: VERSION, log: shared.log, numbers, size: output.end, compacted: Some(compacted) };
            output.file.write_at(&head.encode(), 0)?;
            output.sync()?;
            let old_bytes: u64 = segments.iter().map(|segment| segment.size).sum();
            Ok((compacted, old_bytes.saturating_sub(output.end)))
        });
        let (compacted, saved) = written.inspect_err(|_| drop(disk.remove(&temporary)))?;

        let segment = Segment::compacted(numbers, VERSION, &compacted, incarnations);
        let rename = || disk.rename(&temporary, &name);
        let Some(old) = shared.catalog.replace(segment, forgotten > inherited, rename)? else {
            disk.remove(&temporary)?;
            return Ok(None);
        };
        disk.sync().map_err(SyncFailed)?;
        for old in old.iter().filter(|old| old.numbers != numbers) {
            disk.remove(&old.numbers.file_name())?;
        }
        disk.sync().map_err(SyncFailed)?;
        shared.catalog.removed();
        Ok(Some(saved))
    }

    /// The incarnations that begin in the segments, without those whose jumps lie below the compaction horizon: whoever
    /// resumes in such a jump is below the horizon too, and is told to begin anew. The horizon is on disk already. The
    /// newest of the log stays, for the next continues it.
    fn incarnations(&self) -> Vec<Incarnation> {
        let horizon = self.shared.catalog.forgotten();
        let newest = self.shared.history.incarnations().last();
        let all = self.segments.iter().flat_map(|segment| &segment.incarnations);
        let stays = |one: &&Incarnation| {
            #[cfg(test)]
            if mutants::is(mutants::Mutant::NewestIncarnationDropped) {
                return one.first > horizon && Some(*one) != newest;
            }
            one.first > horizon || Some(*one) == newest
        };
        all.filter(stays).copied().collect()
    }
}

/// The new file.
struct Output<'a> {
    shared: &'a Shared,
    file: Arc<dyn File>,
    frame: Option<Builder>,
    buffer: Vec<u8>,
    end: u64,
    chain: u32,
    durable: u64,
    /// That of the newest segment that something was copied from, so that epochs never go back along the log.
    epoch: u32,
}

impl<'a> Output<'a> {
    fn new(shared: &'a Shared, file: Arc<dyn File>, chain: u32, durable: u64) -> Self {
        Self { shared, file, frame: None, buffer: Vec::new(), end: HEAD_BYTES, chain, durable, epoch: 0 }
    }

    fn push(&mut self, sequence: u64, encoded: &[u8]) -> anyhow::Result<()> {
        let offset = |frame: &Builder| u32::try_from(sequence - frame.first).ok();
        let fits = |frame: &Builder| frame.len() + encoded.len() <= FRAME_BYTES && offset(frame).is_some();
        if self.frame.as_ref().is_some_and(|frame| !fits(frame)) {
            self.flush()?;
        }
        let buffer = &mut self.buffer;
        let frame = self.frame.get_or_insert_with(|| Builder::new(sequence, std::mem::take(buffer)));
        let offset = (sequence - frame.first) as u32;
        entry::copy(frame.body(), offset, encoded);
        frame.count += 1;
        Ok(())
    }

    /// Synced one by one: a commit that comes meanwhile waits for the disk behind one frame, not behind a whole segment.
    fn flush(&mut self) -> anyhow::Result<()> {
        let Some(mut frame) = self.frame.take() else { return Ok(()) };
        self.chain = frame.seal(self.shared.log, self.epoch, self.durable, self.chain);
        self.file.write_at(frame.bytes(), self.end)?;
        self.end += frame.bytes().len() as u64;
        self.buffer = frame.into_buffer();
        self.sync()
    }

    /// A file without a name is given up when there was no room for it; nothing was promised of it.
    fn sync(&self) -> anyhow::Result<()> {
        self.file.sync().map_err(|error| if is_full(&error) { error.into() } else { SyncFailed(error).into() })
    }
}

/// Nothing on this disk is certain any more: the log must fail with it.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct SyncFailed(io::Error);
