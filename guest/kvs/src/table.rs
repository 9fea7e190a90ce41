//! Keys found at once: a hash table of numbers, each of which stands for a key that is kept elsewhere.
//!
//! It is many small tables, so that no call has to move all of a large one when it grows. Must never know: what the
//! numbers stand for.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use hashbrown::HashTable;

/// At 10 million keys one of them moves 40,000 numbers, a few milliseconds' work.
const PARTS: usize = 256;

#[derive(Debug)]
pub struct Table {
    /// Seeded at random: nobody outside can choose keys that collide.
    hasher: RandomState,
    parts: Vec<HashTable<u32>>,
}

impl Default for Table {
    fn default() -> Self {
        Self { hasher: RandomState::new(), parts: vec![HashTable::new(); PARTS] }
    }
}

impl Table {
    /// The number for which `is_key` holds, among those that could be the key's.
    pub fn find(&self, key: &[u8], is_key: impl Fn(u32) -> bool) -> Option<u32> {
        let hash = self.hasher.hash_one(key);
        self.parts[part(hash)].find(hash, |number| is_key(*number)).copied()
    }

    /// Puts in a number whose key is not there yet.
    pub fn insert<'k>(&mut self, number: u32, key: impl Fn(u32) -> &'k [u8]) {
        let hash = self.hasher.hash_one(key(number));
        self.parts[part(hash)].insert_unique(hash, number, |number| self.hasher.hash_one(key(*number)));
    }

    /// Takes out the number for which `is_key` holds.
    pub fn remove(&mut self, key: &[u8], is_key: impl Fn(u32) -> bool) -> Option<u32> {
        let hash = self.hasher.hash_one(key);
        let found = self.parts[part(hash)].find_entry(hash, |number| is_key(*number)).ok()?;
        Some(found.remove().0)
    }
}

/// By bits that the parts themselves do not look at.
fn part(hash: u64) -> usize {
    (hash >> 32) as usize % PARTS
}
