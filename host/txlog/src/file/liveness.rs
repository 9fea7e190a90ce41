//! Finds the entries that the store does not need any more.
//!
//! Owns: what may be dropped, and when. An entry is
//!
//! - **superseded** when a newer one of its key is in a sealed segment, and hence durable. It may go at any time: the
//!   newer one stays, or goes under the rules below.
//! - **void** when it is the newest of its key and says that the key is gone: a delete, or a put that has expired. It may
//!   go only when no older put of its key is left, because that would rise from the dead.
//! - **forgettable** when it is void and the log holds nothing older of its key.
//!
//! Memory is bounded without trusting luck: a table of the newest entry of each key holds [`KEYS`] of them, keys being
//! known by a keyed hash of 128 bits. When more turn up, the upper half of the hashes is left to another pass. So it
//! costs one reading of the log for each [`KEYS`] live keys, 40 MB, and two bits for each entry of the log.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use siphasher::sip128::{Hasher128, SipHasher13};
use std::hash::Hasher;

use super::Shared;
use super::catalog::Segment;
use super::entry::Raw;
use super::frame::Ending;

/// Keys that one pass can tell apart.
pub const KEYS: usize = 800_000;

/// How long a delete stays although nothing needs it, for the sake of a reader who comes back to catch up.
pub const GRACE_MS: u64 = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Needed = 0,
    Superseded = 1,
    Void = 2,
    Forgettable = 3,
}

/// The fate of every entry of some segments, and what that means for each segment.
pub struct Garbage {
    /// Two bits for each entry, in the order of the log.
    fates: Vec<u64>,
    pub shares: Vec<Share>,
    /// Bytes of needed entries that will expire within 2^n seconds and not within half of that.
    pub expiring: [u64; 40],
    /// How often the log was read.
    pub passes: u64,
}

/// Of one segment, in bytes of entries.
#[derive(Clone, Copy, Default, Debug)]
pub struct Share {
    /// Entries in all segments before it.
    pub begin: u64,
    pub entries: u64,
    pub bytes: u64,
    pub superseded: u64,
    pub void: u64,
    pub forgettable: u64,
    /// The last frame in it or before it.
    pub ending: Ending,
}

impl Share {
    pub fn needed(&self) -> u64 {
        self.bytes - self.superseded - self.void - self.forgettable
    }
}

/// The newest entry of a key so far.
struct Newest {
    entry: u64,
    segment: u32,
    bytes: u32,
    gone: bool,
    /// Something older of this key is in the log.
    older: bool,
}

/// Called with the bytes that were just read or written. It may take its time; an error stops the work.
pub type Pause<'p> = dyn FnMut(u64) -> anyhow::Result<()> + 'p;

/// Goes over some segments as often as it needs to. What has expired or was deleted at `now` is gone.
pub fn find(
    shared: &Shared,
    segments: &[Segment],
    keys: usize,
    now: u64,
    pause: &mut Pause<'_>,
) -> anyhow::Result<Garbage> {
    let shares = vec![Share::default(); segments.len()];
    let mut garbage = Garbage { fates: Vec::new(), shares, expiring: [0; 40], passes: 0 };
    // The key of the hash is secret, so nobody can make two keys meet.
    let hasher = SipHasher13::new_with_key(shared.home.env.random.uuid()?.as_bytes());
    let (mut low, mut first) = (0, true);
    let mut ending = Ending::default();
    loop {
        garbage.passes += 1;
        let mut pass = Pass { newest: HashMap::new(), keys, low, high: u64::MAX, now };
        let mut at = 0;
        for (number, segment) in segments.iter().enumerate() {
            let begin = at;
            let mut bytes = 0;
            let walked = walk(shared, segment, pause, &mut |entry| {
                if first {
                    garbage.fates.resize(at as usize / 32 + 1, 0);
                    bytes += entry.encoded.len() as u64;
                    garbage.expect_expiry(&entry, now);
                }
                pass.meet(&mut garbage, hash(&hasher, entry.key), at, number as u32, &entry);
                at += 1;
            })?;
            if first {
                shared.catalog.set_end(segment.numbers, walked.end);
                ending = segment.ending.or(walked.ending).unwrap_or(ending);
                let share = &mut garbage.shares[number];
                (share.begin, share.entries, share.bytes, share.ending) = (begin, at - begin, bytes, ending);
            }
        }
        for slot in pass.newest.values().filter(|slot| slot.gone) {
            garbage.set(slot, if slot.older { Fate::Void } else { Fate::Forgettable });
        }
        match pass.high.checked_add(1) {
            Some(next) => (low, first) = (next, false),
            None => return Ok(garbage),
        }
    }
}

/// One reading of the log, which decides on the keys whose hashes are in a range.
struct Pass {
    newest: HashMap<(u64, u64), Newest>,
    keys: usize,
    low: u64,
    /// Comes down when the table is full. What was concluded of keys above it stays true.
    high: u64,
    now: u64,
}

impl Pass {
    fn meet(&mut self, garbage: &mut Garbage, hash: (u64, u64), at: u64, segment: u32, entry: &Raw<'_>) {
        if self.newest.len() >= self.keys && !self.newest.contains_key(&hash) {
            while self.newest.len() >= self.keys && self.high > self.low {
                self.high = self.low + (self.high - self.low) / 2;
                self.newest.retain(|hash, _| hash.0 <= self.high);
            }
        }
        if hash.0 < self.low || hash.0 > self.high {
            return;
        }
        let gone = match &entry.put {
            Some(put) => put.expires.is_some_and(|expires| expires <= self.now),
            // One that is too young to go counts as needed.
            None => entry.time <= self.now,
        };
        let slot = Newest { entry: at, segment, bytes: entry.encoded.len() as u32, gone, older: false };
        match self.newest.entry(hash) {
            Entry::Occupied(mut found) => {
                let older = found.insert(Newest { older: true, ..slot });
                garbage.set(&older, Fate::Superseded);
            }
            // A delete with nothing to delete need not be remembered.
            Entry::Vacant(_) if entry.put.is_none() => {
                if gone {
                    garbage.set(&slot, Fate::Forgettable);
                }
            }
            Entry::Vacant(free) => drop(free.insert(slot)),
        }
    }
}

impl Garbage {
    fn expect_expiry(&mut self, entry: &Raw<'_>, now: u64) {
        if let Some(expires) = entry.put.and_then(|put| put.expires).filter(|expires| *expires > now) {
            let power = (expires - now).div_ceil(1000).checked_next_power_of_two().map_or(39, u64::trailing_zeros);
            self.expiring[power.min(39) as usize] += entry.encoded.len() as u64;
        }
    }

    pub fn fate(&self, entry: u64) -> Fate {
        match self.fates[(entry / 32) as usize] >> (entry % 32 * 2) & 3 {
            0 => Fate::Needed,
            1 => Fate::Superseded,
            2 => Fate::Void,
            _ => Fate::Forgettable,
        }
    }

    /// A later pass may come to the same conclusion once more.
    fn set(&mut self, slot: &Newest, fate: Fate) {
        if self.fate(slot.entry) == fate {
            return;
        }
        self.fates[(slot.entry / 32) as usize] |= (fate as u64) << (slot.entry % 32 * 2);
        let share = &mut self.shares[slot.segment as usize];
        let bytes = match fate {
            Fate::Needed => return,
            Fate::Superseded => &mut share.superseded,
            Fate::Void => &mut share.void,
            Fate::Forgettable => &mut share.forgettable,
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

/// Where the frames of a segment end, and the last of them.
pub struct Walked {
    pub end: u64,
    ending: Option<Ending>,
}

/// Goes over the entries of a sealed segment.
pub fn walk(
    shared: &Shared,
    segment: &Segment,
    pause: &mut Pause<'_>,
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
                each(entry.ok_or_else(|| home.damage(&name, frame.offset, "a frame holds what is not an entry"))?);
            }
        }
        pause(scan.offset() - from)?;
        from = scan.offset();
    }
    segment.ended(home, &scan)?;
    Ok(Walked { end: scan.offset(), ending })
}
