//! Statistics of a log: its live keys, the largest keys and prefixes, and its garbage, found by a replay.
//!
//! Memory is bounded: the table of live keys has a maximum size. When it is full, the upper half of the keys is left to
//! another pass over the log. The table is ordered by key, not by a hash as that of compaction: the keys of a prefix then
//! follow each other, over all passes, so that the sums of every prefix are exact with one prefix in memory.
//!
//! All passes count entries up to the same sequence, the newest that the first pass covered. While a server compacts the log, such
//! an entry can be dropped for a newer one, and a later pass does not find the key: [`Stats::is_exact`] is false then.
//!
//! Must never know: how the log is stored.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use crate::{Entry, EventRef, REPLAY_ENTRIES, TransactionLog};

/// Selection of the keys, and of the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// Only keys that begin so are counted.
    pub prefix: String,
    /// Keys are grouped by what they begin with, up to the first delimiter after the prefix. Not empty.
    pub delimiter: String,
    /// Number of the largest keys, and of the largest prefixes, at most.
    pub top: usize,
    /// Keys that expire at this time or before are not live, in milliseconds since 1970.
    pub now: u64,
}

/// A number of keys or entries, and the sum of their bytes: of keys, values and metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub count: u64,
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LargeKey {
    pub key: Box<str>,
    pub bytes: u64,
    pub sequence: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LargePrefix {
    /// Up to and including the delimiter.
    pub prefix: Box<str>,
    pub keys: Sum,
}

/// Statistics of the keys that a query selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// The state of the log up to this sequence is counted.
    pub sequence: u64,
    /// No compaction can have dropped an entry between two passes.
    pub is_exact: bool,
    pub passes: u64,
    /// Live keys, and those of them that will expire.
    pub live: Sum,
    pub expiring: Sum,
    /// All entries of the log.
    pub entries: Sum,
    /// Largest first.
    pub largest_keys: Vec<LargeKey>,
    pub largest_prefixes: Vec<LargePrefix>,
    /// Number of prefixes, and the sum of the keys that have one.
    pub prefixes: u64,
    pub prefixed: Sum,
}

impl Stats {
    /// Superseded, deleted and expired entries: all but those of live keys.
    pub fn garbage(&self) -> Sum {
        self.entries.without(self.live)
    }

    /// Keys of the prefixes that are not among the largest.
    pub fn other_prefixed(&self) -> Sum {
        self.largest_prefixes.iter().fold(self.prefixed, |others, large| others.without(large.keys))
    }

    /// Keys without the delimiter.
    pub fn unprefixed(&self) -> Sum {
        self.live.without(self.prefixed)
    }
}

impl Sum {
    fn add(&mut self, bytes: u64) {
        self.count += 1;
        self.bytes += bytes;
    }

    fn add_all(&mut self, other: Self) {
        self.count += other.count;
        self.bytes += other.bytes;
    }

    fn without(self, part: Self) -> Self {
        Self { count: self.count.saturating_sub(part.count), bytes: self.bytes.saturating_sub(part.bytes) }
    }
}

/// Called with the number of the pass and the newest sequence read, after each batch of entries or keys. It can block to throttle
/// the run; an error stops it.
pub type Progress<'p> = dyn FnMut(u64, u64) -> anyhow::Result<()> + 'p;

/// Size in the table of a key, besides its bytes: a slot of a tree that is two thirds full, and an allocation.
const KEY_BYTES: usize = 80;

/// Reads the log in as many passes as a table of this size requires.
pub fn measure(
    log: &dyn TransactionLog,
    query: &Query,
    table_bytes: usize,
    progress: &mut Progress<'_>,
) -> anyhow::Result<Stats> {
    let retained = log.retained();
    let mut totals = Totals::new(query);
    let mut as_of = None;
    let mut low = Box::<str>::from(query.prefix.as_str());
    let mut passes = 0;
    loop {
        passes += 1;
        let mut pass = Pass { table: BTreeMap::new(), bytes: 0, limit: table_bytes, low, high: None };
        let until = log.replay(0, &mut |entries| {
            let counted = entries.iter().filter(|entry| as_of.is_none_or(|as_of| entry.sequence <= as_of));
            for entry in counted.filter(|entry| entry.event.key().starts_with(&*query.prefix)) {
                if as_of.is_none() {
                    totals.entries.add(size(entry));
                }
                pass.visit(entry, query.now);
            }
            progress(passes, entries.last().map_or(0, |entry| entry.sequence))
        })?;
        let sequence = *as_of.get_or_insert(until);
        for (number, (key, slot)) in pass.table.into_iter().enumerate() {
            totals.visit(key, &slot);
            if number % REPLAY_ENTRIES == 0 {
                progress(passes, sequence)?;
            }
        }
        let Some(high) = pass.high else {
            // The first pass is consistent by itself. A compaction drops nothing that is newer than what is retained since.
            let now = log.retained();
            let is_exact = passes == 1 || now == retained || now <= sequence;
            return Ok(totals.end(sequence, is_exact, passes));
        };
        low = high;
    }
}

/// Bytes of the key, the value and the metadata.
fn size(entry: &Entry<'_>) -> u64 {
    let key = entry.event.key().len();
    let rest = match &entry.event {
        EventRef::Delete(_) => 0,
        EventRef::Put(put) => {
            put.value.len() + put.metadata.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
        }
    };
    (key + rest) as u64
}

/// The live entry of a key so far.
struct Slot {
    bytes: u64,
    sequence: u64,
    expires: bool,
}

/// One pass over the log, for a range of keys.
struct Pass {
    table: BTreeMap<Box<str>, Slot>,
    /// Size of the table.
    bytes: usize,
    limit: usize,
    low: Box<str>,
    /// The key that the next pass begins with, if there is one. Lowered when the table is full.
    high: Option<Box<str>>,
}

impl Pass {
    fn visit(&mut self, entry: &Entry<'_>, now: u64) {
        let key = entry.event.key();
        if key < &*self.low || self.high.as_deref().is_some_and(|high| key >= high) {
            return;
        }
        let expires = match &entry.event {
            EventRef::Put(put) if put.expires.is_none_or(|expires| expires > now) => put.expires.is_some(),
            _ => {
                if self.table.remove(key).is_some() {
                    self.bytes -= cost(key);
                }
                return;
            }
        };
        let slot = Slot { bytes: size(entry), sequence: entry.sequence, expires };
        match self.table.get_mut(key) {
            Some(found) => *found = slot,
            None => {
                self.table.insert(key.into(), slot);
                self.bytes += cost(key);
                if self.bytes > self.limit {
                    self.halve();
                }
            }
        }
    }

    /// Leaves the upper half of the keys to the next pass.
    fn halve(&mut self) {
        // One key stays, whatever its size, so that every pass is a step forward.
        let half = self.table.len() / 2;
        let Some(high) = self.table.keys().nth(half).filter(|_| half > 0).cloned() else { return };
        drop(self.table.split_off(&*high));
        self.bytes = self.table.keys().map(|key| cost(key)).sum();
        self.high = Some(high);
    }
}

fn cost(key: &str) -> usize {
    key.len() + KEY_BYTES
}

/// Sums over the live keys, which come in order.
struct Totals<'q> {
    query: &'q Query,
    live: Sum,
    expiring: Sum,
    entries: Sum,
    /// With the sequence.
    keys: Largest,
    /// With the number of keys.
    largest_prefixes: Largest,
    prefixes: u64,
    prefixed: Sum,
    /// The prefix of the last key that had one. Its next key can be in the next pass.
    current: Option<LargePrefix>,
}

impl<'q> Totals<'q> {
    fn new(query: &'q Query) -> Self {
        let largest = || Largest { limit: query.top, heap: BinaryHeap::new() };
        Self {
            query,
            live: Sum::default(),
            expiring: Sum::default(),
            entries: Sum::default(),
            keys: largest(),
            largest_prefixes: largest(),
            prefixes: 0,
            prefixed: Sum::default(),
            current: None,
        }
    }

    fn visit(&mut self, key: Box<str>, slot: &Slot) {
        self.live.add(slot.bytes);
        if slot.expires {
            self.expiring.add(slot.bytes);
        }
        let Query { prefix, delimiter, .. } = self.query;
        if let Some(at) = key[prefix.len()..].find(&**delimiter) {
            let group = &key[..prefix.len() + at + delimiter.len()];
            if self.current.as_ref().is_none_or(|current| &*current.prefix != group) {
                self.end_prefix();
                self.current = Some(LargePrefix { prefix: group.into(), keys: Sum::default() });
            }
            self.current.iter_mut().for_each(|current| current.keys.add(slot.bytes));
        }
        self.keys.push(slot.bytes, key, slot.sequence);
    }

    fn end_prefix(&mut self) {
        if let Some(LargePrefix { prefix, keys }) = self.current.take() {
            self.prefixes += 1;
            self.prefixed.add_all(keys);
            self.largest_prefixes.push(keys.bytes, prefix, keys.count);
        }
    }

    fn end(mut self, sequence: u64, is_exact: bool, passes: u64) -> Stats {
        self.end_prefix();
        let Self { live, expiring, entries, keys, largest_prefixes, prefixes, prefixed, .. } = self;
        let key = |(bytes, key, sequence)| LargeKey { key, bytes, sequence };
        let prefix = |(bytes, prefix, count)| LargePrefix { prefix, keys: Sum { count, bytes } };
        Stats {
            sequence,
            is_exact,
            passes,
            live,
            expiring,
            entries,
            largest_keys: keys.sorted().map(key).collect(),
            largest_prefixes: largest_prefixes.sorted().map(prefix).collect(),
            prefixes,
            prefixed,
        }
    }
}

/// Bytes, name, and a number that belongs to it; the last one in this order is the smallest, of equal ones the last.
type Ranked = Reverse<(u64, Reverse<Box<str>>, u64)>;

/// The largest names by bytes; of equal ones the first. Each has another number with it.
struct Largest {
    limit: usize,
    heap: BinaryHeap<Ranked>,
}

impl Largest {
    fn push(&mut self, bytes: u64, name: Box<str>, number: u64) {
        self.heap.push(Reverse((bytes, Reverse(name), number)));
        if self.heap.len() > self.limit {
            self.heap.pop();
        }
    }

    /// Largest first.
    fn sorted(self) -> impl Iterator<Item = (u64, Box<str>, u64)> {
        self.heap.into_sorted_vec().into_iter().map(|Reverse((bytes, Reverse(name), number))| (bytes, name, number))
    }
}

#[cfg(test)]
mod tests;
