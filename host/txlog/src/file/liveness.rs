//! Liveness analysis: which entries of the log are live, superseded, or tombstones.
//!
//! Owns: which entries compaction may drop, and when. An entry is
//!
//! - **superseded** when a newer entry of its key is in a sealed segment, and hence durable. It may be dropped at any time:
//!   the newer entry is kept, or dropped under the rules below.
//! - a **tombstone** when it is the newest entry of its key and the key does not exist any more: a delete, or a put that
//!   has expired. It may be dropped only when no older put of its key is left, because a replay would restore that put.
//! - a **droppable tombstone** when the log holds no older entry of its key.
//! - **live** otherwise.
//!
//! Entries from the retained part of the log on, which begins with the first entry that is newer than a point in time,
//! supersede nothing and are no tombstones: what they replace is kept, so that every state since then can be restored.
//!
//! Memory is bounded: the table of the newest entry of each key holds [`MAX_KEYS`] keys, which are identified by a keyed
//! hash of 128 bits. When the table is full, the upper half of the hashes is left to another pass. So the analysis takes
//! one pass over the log for each [`MAX_KEYS`] live keys, 40 MB, and two bits for each entry of the log.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use siphasher::sip128::{Hasher128, SipHasher13};
use std::hash::Hasher;

use super::Shared;
use super::catalog::Segment;
use super::entry::Raw;
use super::frame::Ending;

/// Size of the table of keys in one pass.
pub const MAX_KEYS: usize = 800_000;

/// Grace period of tombstones, so that a reader that reconnects shortly after a delete can still catch up.
pub const TOMBSTONE_GRACE_MS: u64 = 10_000;

/// Liveness of an entry; see the head of this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    Live = 0,
    Superseded = 1,
    Tombstone = 2,
    DroppableTombstone = 3,
}

/// The liveness of every entry of some segments, and its sums for each segment.
pub struct LivenessMap {
    /// Two bits for each entry, in the order of the log.
    bits: Vec<u64>,
    pub stats: Vec<SegmentStats>,
    /// Bytes of live entries that will expire within 2^n seconds and not within half of that.
    pub expiring: [u64; 40],
    /// Number of passes over the log.
    pub passes: u64,
    /// The newest sequence, and the newest one before the retained part of the log.
    pub last: u64,
    pub retained: u64,
}

/// Liveness of the entries of one segment, in bytes.
#[derive(Clone, Copy, Default, Debug)]
pub struct SegmentStats {
    /// Number of entries in the segments before this one.
    pub begin: u64,
    pub entries: u64,
    pub bytes: u64,
    pub superseded: u64,
    pub tombstones: u64,
    pub droppable_tombstones: u64,
    /// The last frame in this segment, or before it where it has none.
    pub ending: Ending,
}

impl SegmentStats {
    pub fn live(&self) -> u64 {
        self.bytes - self.superseded - self.tombstones - self.droppable_tombstones
    }
}

/// The newest entry of a key so far.
struct Newest {
    entry: u64,
    segment: u32,
    bytes: u32,
    is_tombstone: bool,
    /// The log holds an older entry of this key.
    has_older: bool,
}

/// Called with the number of bytes that were just read or written. It can block to throttle the run; an error stops it.
pub type ThrottleHook<'p> = dyn FnMut(u64) -> anyhow::Result<()> + 'p;

/// Reads the segments in as many passes as the table requires. Deletes and expiries up to `now` make tombstones, and entries
/// after `retain_from` are retained.
pub fn find(
    shared: &Shared,
    segments: &[Segment],
    keys: usize,
    (now, retain_from): (u64, u64),
    throttle: &mut ThrottleHook<'_>,
) -> anyhow::Result<LivenessMap> {
    let stats = vec![SegmentStats::default(); segments.len()];
    let mut map = LivenessMap { bits: Vec::new(), stats, expiring: [0; 40], passes: 0, last: 0, retained: 0 };
    // The hash is keyed with a secret, so that a client cannot construct two keys with the same hash.
    let hasher = SipHasher13::new_with_key(shared.home.env.random.uuid()?.as_bytes());
    let (mut low, mut first) = (0, true);
    let mut ending = Ending::default();
    loop {
        map.passes += 1;
        let mut pass = Pass { newest: HashMap::new(), keys, low, high: u64::MAX, now, retain_from, is_retained: false };
        let mut at = 0;
        for (number, segment) in segments.iter().enumerate() {
            let begin = at;
            let mut bytes = 0;
            let walked = walk(shared, segment, throttle, &mut |entry| {
                if first {
                    map.bits.resize(at as usize / 32 + 1, 0);
                    bytes += entry.encoded.len() as u64;
                    map.expect_expiry(&entry, now);
                }
                pass.visit(&mut map, hash(&hasher, entry.key), at, number as u32, &entry);
                map.last = entry.sequence;
                if !pass.is_retained {
                    map.retained = entry.sequence;
                }
                at += 1;
            })?;
            if first {
                shared.catalog.set_end(segment.numbers, walked.end);
                ending = segment.ending.or(walked.ending).unwrap_or(ending);
                let stats = &mut map.stats[number];
                (stats.begin, stats.entries, stats.bytes, stats.ending) = (begin, at - begin, bytes, ending);
            }
        }
        for slot in pass.newest.values().filter(|slot| slot.is_tombstone) {
            map.set(slot, if slot.has_older { Liveness::Tombstone } else { Liveness::DroppableTombstone });
        }
        match pass.high.checked_add(1) {
            Some(next) => (low, first) = (next, false),
            None => return Ok(map),
        }
    }
}

/// One pass over the log, for the keys whose hashes are in a range.
struct Pass {
    newest: HashMap<(u64, u64), Newest>,
    keys: usize,
    low: u64,
    /// Halved when the table is full. Conclusions about keys above it remain valid.
    high: u64,
    now: u64,
    retain_from: u64,
    /// The pass has come to the retained part of the log.
    is_retained: bool,
}

impl Pass {
    fn visit(&mut self, map: &mut LivenessMap, hash: (u64, u64), at: u64, segment: u32, entry: &Raw<'_>) {
        self.is_retained |= entry.time > self.retain_from;
        if self.newest.len() >= self.keys && !self.newest.contains_key(&hash) {
            while self.newest.len() >= self.keys && self.high > self.low {
                self.high = self.low + (self.high - self.low) / 2;
                self.newest.retain(|hash, _| hash.0 <= self.high);
            }
        }
        if hash.0 < self.low || hash.0 > self.high {
            return;
        }
        let is_past = match &entry.put {
            Some(put) => put.expires.is_some_and(|expires| expires <= self.now),
            // A delete within its grace period counts as live.
            None => entry.time <= self.now,
        };
        let is_tombstone = is_past && !self.is_retained;
        let slot = Newest { entry: at, segment, bytes: entry.encoded.len() as u32, is_tombstone, has_older: false };
        match self.newest.entry(hash) {
            Entry::Occupied(mut found) => {
                let older = found.insert(Newest { has_older: true, ..slot });
                if self.is_retained {
                    map.expect_garbage(older.bytes.into(), entry.time.saturating_sub(self.retain_from));
                } else {
                    map.set(&older, Liveness::Superseded);
                }
            }
            // A delete of a key without entries takes no place in the table.
            Entry::Vacant(_) if entry.put.is_none() => {
                if is_tombstone {
                    map.set(&slot, Liveness::DroppableTombstone);
                }
            }
            Entry::Vacant(free) => drop(free.insert(slot)),
        }
    }
}

impl LivenessMap {
    fn expect_expiry(&mut self, entry: &Raw<'_>, now: u64) {
        if let Some(expires) = entry.put.and_then(|put| put.expires).filter(|expires| *expires > now) {
            self.expect_garbage(entry.encoded.len() as u64, expires - now);
        }
    }

    /// Notes bytes that can be dropped after this many milliseconds.
    fn expect_garbage(&mut self, bytes: u64, after_ms: u64) {
        let power = after_ms.div_ceil(1000).checked_next_power_of_two().map_or(39, u64::trailing_zeros);
        self.expiring[power.min(39) as usize] += bytes;
    }

    pub fn liveness(&self, entry: u64) -> Liveness {
        match self.bits[(entry / 32) as usize] >> (entry % 32 * 2) & 3 {
            0 => Liveness::Live,
            1 => Liveness::Superseded,
            2 => Liveness::Tombstone,
            _ => Liveness::DroppableTombstone,
        }
    }

    /// Idempotent: a later pass can reach the same conclusion again.
    fn set(&mut self, slot: &Newest, liveness: Liveness) {
        if self.liveness(slot.entry) == liveness {
            return;
        }
        self.bits[(slot.entry / 32) as usize] |= (liveness as u64) << (slot.entry % 32 * 2);
        let stats = &mut self.stats[slot.segment as usize];
        let bytes = match liveness {
            Liveness::Live => return,
            Liveness::Superseded => &mut stats.superseded,
            Liveness::Tombstone => &mut stats.tombstones,
            Liveness::DroppableTombstone => &mut stats.droppable_tombstones,
        };
        *bytes += u64::from(slot.bytes);
    }
}

fn hash(hasher: &SipHasher13, key: &str) -> (u64, u64) {
    let mut hasher = *hasher;
    hasher.write(key.as_bytes());
    let hash = hasher.finish128();
    (hash.h1, hash.h2)
}

/// The end of the frames of a segment, and the last frame.
pub struct Walked {
    pub end: u64,
    ending: Option<Ending>,
}

/// Calls `each` with every entry of a sealed segment.
pub fn walk(
    shared: &Shared,
    segment: &Segment,
    throttle: &mut ThrottleHook<'_>,
    each: &mut dyn FnMut(Raw<'_>),
) -> anyhow::Result<Walked> {
    let Shared { home, log, .. } = shared;
    let name = segment.numbers.file_name();
    let mut scan = segment.scan(home.disk.open(&name)?, *log);
    let mut from = scan.offset();
    let mut ending = None;
    while scan.advance()? {
        for frame in scan.frames() {
            ending = Some(frame.head.ending());
            for entry in frame.entries() {
                each(entry.ok_or_else(|| home.damage(&name, frame.offset, "a frame contains an invalid entry"))?);
            }
        }
        throttle(scan.offset() - from)?;
        from = scan.offset();
    }
    segment.ended(home, &scan)?;
    Ok(Walked { end: scan.offset(), ending })
}
