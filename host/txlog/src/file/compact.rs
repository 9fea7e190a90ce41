//! Compaction: replaces several segments by one new file, without superseded entries and droppable tombstones.
//!
//! Owns: the order of steps that makes a crash harmless at each. The new file is written under a temporary name, synced,
//! renamed, the directory is synced, and only *then* are the old files removed. A crash in between leaves old files whose
//! numbers the new one contains; recovery removes them. Segments are rewritten oldest first, and each step is durable
//! before the next begins: so a delete is never dropped before the put that it deletes.
//!
//! Memory: one frame being read, one being written, and the table of [`liveness`](super::liveness).

use std::ops::Range;

use super::Shared;
use super::catalog::Segment;
use super::entry;
use super::frame::Ending;
use super::incarnations;
use super::liveness::{self, Liveness, LivenessMap, SegmentStats, ThrottleHook};
use super::output::{Output, SyncFailed};
use super::packer::Packer;
use super::segment::{Compacted, HEAD_BYTES, Numbers, VERSION};
#[cfg(test)]
use super::tests::mutants;
use crate::Incarnation;

/// Parameters of one compaction run.
pub struct CompactionParams {
    /// Deletes and expiries up to this time, in milliseconds since 1970, make tombstones.
    pub now: u64,
    /// What is superseded or deleted after this time, in milliseconds since 1970, is retained; `u64::MAX` retains nothing.
    pub retain_from: u64,
    /// Minimum stats of a group of segments that a rewrite must save, in percent.
    pub min_yield_percent: u64,
    /// Size of the table of keys; see [`liveness::MAX_KEYS`].
    pub keys: usize,
}

/// Result of a run, in bytes of entries.
#[derive(Debug)]
pub struct Outcome {
    /// Bytes of live entries.
    pub live: u64,
    pub live_entries: u64,
    /// See [`LivenessMap::expiring`].
    pub expiring: [u64; 40],
    /// Number of passes over the log in the liveness analysis.
    pub passes: u64,
    /// Bytes of files saved.
    pub saved: u64,
}

/// Compacts sealed segments, given oldest first and without a gap.
pub fn run(
    shared: &Shared,
    segments: &[Segment],
    params: &CompactionParams,
    throttle: &mut ThrottleHook<'_>,
) -> anyhow::Result<Outcome> {
    let map = liveness::find(shared, segments, params.keys, (params.now, params.retain_from), throttle)?;
    let sum = |of: fn(&SegmentStats) -> u64| map.stats.iter().map(of).sum::<u64>();
    let entries = sum(|stats| stats.entries);
    let bytes = sum(|stats| stats.bytes);
    let live = sum(SegmentStats::live);
    let live_entries = (entries * live).checked_div(bytes).unwrap_or(0);
    let mut outcome = Outcome { live, live_entries, expiring: map.expiring, passes: map.passes, saved: 0 };

    let mut plan = Plan::new(shared, segments, &map, params.min_yield_percent);
    // If skipping low-yield segments would leave too much map overall, rewrite all of them.
    if plan.remaining > live + live / 3 {
        plan = Plan::new(shared, segments, &map, 0);
    }
    for group in plan.groups {
        let stats = &map.stats[group.clone()];
        // A reader prevents the dropping of tombstones, and of nothing else: it may have read the put already.
        let drop_tombstones = !shared.catalog.is_read();
        let rewrite = Rewrite {
            shared,
            segments: &segments[group],
            map: &map,
            all_tombstones: plan.all_tombstones,
            drop_tombstones,
        };
        let saved = match rewrite.run(stats, throttle)? {
            None => Rewrite { drop_tombstones: false, ..rewrite }.run(stats, throttle)?,
            saved => saved,
        };
        outcome.saved += saved.unwrap_or(0);
    }
    Ok(outcome)
}

/// Plan of a run.
struct Plan {
    /// Ranges of segments that are rewritten into one each.
    groups: Vec<Range<usize>>,
    /// Whether tombstones that have older entries can be dropped too.
    all_tombstones: bool,
    /// Bytes of entries that remain after the run.
    remaining: u64,
}

impl Plan {
    /// Selects the groups of which a rewrite saves at least `min_yield_percent`.
    fn new(shared: &Shared, segments: &[Segment], map: &LivenessMap, min_yield_percent: u64) -> Self {
        let droppable = |stats: &SegmentStats| stats.superseded + stats.droppable_tombstones;
        let with_tombstones = |stats: &SegmentStats| stats.superseded + stats.droppable_tombstones + stats.tombstones;
        // All tombstones can be dropped if all superseded entries are: only then is no older put of their keys kept.
        let groups = groups(shared, segments, map, min_yield_percent, with_tombstones);
        let is_kept = |at: usize| map.stats[at].superseded > 0 && !groups.iter().any(|group| group.contains(&at));
        let all_tombstones = !(0..segments.len()).any(is_kept);
        let (groups, dropped) = if all_tombstones {
            (groups, with_tombstones as fn(&SegmentStats) -> u64)
        } else {
            (self::groups(shared, segments, map, min_yield_percent, droppable), droppable as _)
        };
        let dropped: u64 = groups.iter().flat_map(|group| &map.stats[group.clone()]).map(dropped).sum();
        let remaining = map.stats.iter().map(|stats| stats.bytes).sum::<u64>() - dropped;
        Self { groups, all_tombstones, remaining }
    }
}

/// Groups adjacent segments as long as the entries kept of them fit one segment.
fn groups(
    shared: &Shared,
    segments: &[Segment],
    map: &LivenessMap,
    min_yield_percent: u64,
    dropped: fn(&SegmentStats) -> u64,
) -> Vec<Range<usize>> {
    let mut groups: Vec<(Range<usize>, u64)> = Vec::new();
    for (at, stats) in map.stats.iter().enumerate() {
        let kept = stats.bytes - dropped(stats) + incarnations::frame_bytes(segments[at].incarnations.len());
        match groups.last_mut() {
            Some((group, sum)) if *sum + kept <= shared.segment_bytes - HEAD_BYTES => {
                group.end = at + 1;
                *sum += kept;
            }
            _ => groups.push((at..at + 1, kept)),
        }
    }
    let is_worthwhile = |(group, kept): &(Range<usize>, u64)| {
        let bytes: u64 = segments[group.clone()].iter().map(|segment| segment.size).sum();
        let saved = bytes.saturating_sub(*kept + HEAD_BYTES);
        let saves_entries = map.stats[group.clone()].iter().any(|stats| dropped(stats) > 0) || group.len() > 1;
        // Many small frames take more than one large one with the same entries.
        (saves_entries || saved * 4 >= bytes) && saved * 100 >= bytes * min_yield_percent
    };
    groups.into_iter().filter(is_worthwhile).map(|(group, _)| group).collect()
}

/// Rewrite of several segments into one file.
struct Rewrite<'a> {
    shared: &'a Shared,
    segments: &'a [Segment],
    map: &'a LivenessMap,
    /// Whether tombstones that have older entries are dropped too, where tombstones are dropped at all.
    all_tombstones: bool,
    drop_tombstones: bool,
}

impl Rewrite<'_> {
    /// Returns the bytes saved; None when a reader prevented the rewrite and nothing was changed.
    fn run(&self, stats: &[SegmentStats], throttle: &mut ThrottleHook<'_>) -> anyhow::Result<Option<u64>> {
        let Self { shared, segments, .. } = self;
        let ([oldest, ..], [.., newest]) = (segments, segments) else { return Ok(None) };
        let disk = &*shared.home.disk;
        let numbers = Numbers { first: oldest.numbers.first, last: newest.numbers.last };
        let name = numbers.file_name();
        let temporary = format!("{name}.tmp");
        let mut horizon = segments.iter().map(|segment| segment.horizon).max().unwrap_or(0);
        // Not the same as a newer horizon: that of these segments, of an earlier run or of a restored log, can be newer
        // than all tombstones that are dropped now.
        let mut dropped_tombstone = false;
        // Never less than before, whatever is retained now. Where an older binary dropped entries, up to the end of this run.
        let earlier = segments.iter().map(|segment| segment.retained.min(self.map.last));
        let retained = earlier.fold(self.map.retained.max(1), u64::max);

        let incarnations = self.incarnations();
        // The jump of a dropped incarnation counts as covered: its sequences are never given out.
        let first =
            if incarnations.first() == oldest.incarnations.first() { oldest.first } else { oldest.preceding() + 1 };
        let written = disk.create(&temporary).map_err(anyhow::Error::from).and_then(|file| {
            let mut output = Output::new(file, Packer::new(shared.log, newest.last, oldest.before));
            output.packer.epoch = stats.first().map_or(0, |stats| stats.ending.epoch);
            if let Some(frame) = incarnations::frame(&incarnations) {
                output.put(frame)?;
            }
            for (segment, stats) in segments.iter().zip(stats) {
                let mut at = stats.begin;
                let mut failed = Ok(());
                liveness::walk(shared, segment, throttle, &mut |entry| {
                    let liveness = self.map.liveness(at);
                    at += 1;
                    let is_dropped = match liveness {
                        Liveness::Live => false,
                        Liveness::Superseded => true,
                        Liveness::Tombstone => self.all_tombstones && self.drop_tombstones,
                        Liveness::DroppableTombstone => self.drop_tombstones,
                    };
                    if !is_dropped {
                        if failed.is_ok() {
                            // Of the newest segment that an entry was copied from, so that epochs never decrease.
                            output.packer.epoch = stats.ending.epoch;
                            let encoded = entry.encoded;
                            let copy = |body: &mut Vec<u8>, offset: u32| entry::copy(body, offset, encoded);
                            failed = output.push(entry.sequence, encoded.len(), copy);
                        }
                    } else if liveness != Liveness::Superseded {
                        horizon = horizon.max(entry.sequence);
                        dropped_tombstone = true;
                    }
                })?;
                failed?;
                throttle(0)?;
            }
            output.flush()?;
            let compacted = Compacted {
                first,
                last: newest.last,
                before: oldest.before,
                after: newest.after,
                tip: output.packer.chain,
                ending: stats.last().map_or_else(Ending::default, |stats| stats.ending),
                end: output.end,
                horizon,
                retained,
            };
            output.finish(shared.log, numbers, compacted)?;
            let old_bytes: u64 = segments.iter().map(|segment| segment.size).sum();
            Ok((compacted, old_bytes.saturating_sub(output.end)))
        });
        let (compacted, saved) = written.inspect_err(|_| drop(disk.remove(&temporary)))?;

        let segment = Segment::compacted(numbers, VERSION, &compacted, incarnations);
        let rename = || disk.rename(&temporary, &name);
        let Some(old) = shared.catalog.replace(segment, dropped_tombstone, rename)? else {
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

    /// Returns the incarnations that begin in the segments, without those whose jumps lie below the compaction horizon: a
    /// reader that resumes in such a jump is below the horizon too and must replay from the start. The horizon is on disk
    /// already. The newest incarnation of the log is kept, since the next one continues it.
    fn incarnations(&self) -> Vec<Incarnation> {
        let horizon = self.shared.catalog.horizon();
        let newest = self.shared.history.incarnations().last();
        let all = self.segments.iter().flat_map(|segment| &segment.incarnations);
        let is_kept = |one: &&Incarnation| {
            #[cfg(test)]
            if mutants::is(mutants::Mutant::NewestIncarnationDropped) {
                return one.first > horizon && Some(*one) != newest;
            }
            one.first > horizon || Some(*one) == newest
        };
        all.filter(is_kept).copied().collect()
    }
}
