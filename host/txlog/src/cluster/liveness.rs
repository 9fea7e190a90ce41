//! Liveness: which entries of a prefix of the log are the newest of their keys, and of keys that exist.
//!
//! Memory is bounded: the table of the newest entry of each key holds a number of keys, which are identified by a keyed hash of
//! 128 bits. When it is full, the upper half of the hashes is left to another pass. Besides, each entry takes one bit.

use std::collections::HashMap;
use std::hash::Hasher;
use std::mem;

use siphasher::sip128::{Hasher128, SipHasher13};
use uuid::Uuid;

use crate::file::entry::Raw;

/// Entries that are not needed, by their number in the order of the log.
#[derive(Default)]
pub struct Dropped(Vec<u64>);

impl Dropped {
    pub fn contains(&self, entry: u64) -> bool {
        self.0.get((entry / 64) as usize).is_some_and(|bits| bits >> (entry % 64) & 1 == 1)
    }

    fn insert(&mut self, entry: u64) {
        let index = (entry / 64) as usize;
        if self.0.len() <= index {
            self.0.resize(index + 1, 0);
        }
        self.0[index] |= 1 << (entry % 64);
    }
}

/// The analysis of a prefix, which is read as often as it says.
pub struct Analysis {
    hasher: SipHasher13,
    /// Maximum number of keys of a pass.
    keys: usize,
    /// Time up to which an expiry counts, in milliseconds since 1970.
    now: u64,
    dropped: Dropped,
    /// The newest entry of each key whose hash is in the range of the pass.
    newest: HashMap<(u64, u64), u64>,
    low: u64,
    /// Halved when the table is full. Conclusions about keys above it remain valid.
    high: u64,
    /// Number of entries of this pass.
    entries: u64,
}

impl Analysis {
    /// Begins the first pass. The hash is keyed with a secret, so that no client can make two keys with the same one.
    pub fn new(secret: Uuid, keys: usize, now: u64) -> Self {
        let hasher = SipHasher13::new_with_key(secret.as_bytes());
        let newest = HashMap::new();
        Self { hasher, keys, now, dropped: Dropped::default(), newest, low: 0, high: u64::MAX, entries: 0 }
    }

    /// Takes the next entry of the prefix.
    pub fn visit(&mut self, entry: &Raw<'_>) {
        let number = self.entries;
        self.entries += 1;
        let mut hasher = self.hasher;
        hasher.write(entry.key.as_bytes());
        let hash = hasher.finish128();
        let hash = (hash.h1, hash.h2);
        let exists = entry.put.is_some_and(|put| put.expires.is_none_or(|expires| expires > self.now));
        if exists && self.newest.len() >= self.keys && !self.newest.contains_key(&hash) {
            while self.newest.len() >= self.keys && self.high > self.low {
                self.high = self.low + (self.high - self.low) / 2;
                self.newest.retain(|hash, _| hash.0 <= self.high);
            }
        }
        if hash.0 < self.low || hash.0 > self.high {
            return;
        }
        let older = if exists { self.newest.insert(hash, number) } else { self.newest.remove(&hash) };
        older.into_iter().for_each(|older| self.dropped.insert(older));
        if !exists {
            self.dropped.insert(number);
        }
    }

    /// Ends a pass. Returns what was found if it was the last one.
    pub fn end_pass(&mut self) -> Option<Dropped> {
        let Some(next) = self.high.checked_add(1) else { return Some(mem::take(&mut self.dropped)) };
        self.newest.clear();
        (self.low, self.high, self.entries) = (next, u64::MAX, 0);
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::file::entry::{decode, encode};
    use crate::{Event, Put};

    /// Returns the numbers of the entries that are kept, and of passes.
    fn kept(events: &[Event], keys: usize, now: u64) -> (Vec<u64>, u32) {
        let mut body = Vec::new();
        (0..).zip(events).for_each(|(offset, event)| encode(&mut body, offset, 0, event));
        let (mut analysis, mut passes) = (Analysis::new(Uuid::from_u128(7), keys, now), 0);
        loop {
            passes += 1;
            let mut rest = &*body;
            while !rest.is_empty() {
                analysis.visit(&decode(&mut rest, 1).expect("it was encoded"));
            }
            if let Some(dropped) = analysis.end_pass() {
                return ((0..events.len() as u64).filter(|entry| !dropped.contains(*entry)).collect(), passes);
            }
        }
    }

    fn put(key: &str, expires: Option<u64>) -> Event {
        Event::Put(Put { key: key.into(), value: Vec::new(), metadata: Vec::new(), expires })
    }

    #[test]
    fn newest_puts_of_existing_keys_are_kept() {
        let delete = |key: &str| Event::Delete(key.into());
        let events = [
            put("a", None),
            put("b", None),
            put("a", None),
            delete("b"),
            delete("never"),
            put("c", Some(5)),
            put("d", Some(9)),
            put("e", None),
            put("e", Some(5)),
            delete("f"),
            put("f", None),
        ];
        assert_eq!(kept(&events, 100, 5), (vec![2, 6, 10], 1));
    }

    #[test]
    fn passes_with_a_small_table_find_the_same() {
        let mut dice = fastrand::Rng::with_seed(7);
        let events: Vec<_> = (0..2_000)
            .map(|_| match (dice.u32(0..300).to_string(), dice.u32(0..4)) {
                (key, 0) => Event::Delete(key),
                (key, _) => put(&key, None),
            })
            .collect();
        let mut newest = HashMap::new();
        for (number, event) in (0..).zip(&events) {
            newest.insert(event.key(), (number, event));
        }
        let exists = |event: &Event| matches!(event, Event::Put(_));
        let mut expected: Vec<u64> =
            newest.values().filter(|(_, event)| exists(event)).map(|(number, _)| *number).collect();
        expected.sort_unstable();
        let (found, passes) = kept(&events, 20, 0);
        assert_eq!(found, expected);
        assert!(passes > 5, "{passes}");
        assert_eq!(kept(&events, 1_000, 0), (expected, 1));
    }
}
