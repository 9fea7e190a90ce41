//! Keys found at once: a hash table of numbers, each of which stands for a key that is kept elsewhere.
//!
//! It is many small tables, so that no call has to move all of a large one when it grows, and beside each number lies the
//! hash of its key, so that growing does not look at keys, which are spread all over the memory. Must never know: what
//! the numbers stand for.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

/// At 10 million keys one of them moves 40,000 numbers, a few milliseconds' work.
const PARTS: usize = 256;

#[derive(Debug)]
pub struct Table {
    /// Seeded at random: nobody outside can choose keys that collide.
    hasher: RandomState,
    parts: Vec<HashTable<Member>>,
}

#[derive(Clone, Debug)]
struct Member {
    /// As much of it as a part looks at.
    hash: u32,
    number: u32,
}

impl Default for Table {
    fn default() -> Self {
        Self { hasher: RandomState::new(), parts: vec![HashTable::new(); PARTS] }
    }
}

impl Table {
    /// The number for which `is_key` holds, among those that could be the key's.
    pub fn find(&self, key: &[u8], is_key: impl Fn(u32) -> bool) -> Option<u32> {
        let (part, hash) = self.place(key);
        self.parts[part]
            .find(spread(hash), |member| member.hash == hash && is_key(member.number))
            .map(|found| found.number)
    }

    /// As `find`; puts in a number for the key when there is none.
    pub fn find_or_insert(&mut self, key: &[u8], number: u32, is_key: impl Fn(u32) -> bool) -> Option<u32> {
        let (part, hash) = self.place(key);
        let is_same = |member: &Member| member.hash == hash && is_key(member.number);
        match self.parts[part].entry(spread(hash), is_same, |member| spread(member.hash)) {
            Entry::Occupied(found) => Some(found.get().number),
            Entry::Vacant(vacant) => {
                vacant.insert(Member { hash, number });
                None
            }
        }
    }

    /// Takes out the number for which `is_key` holds.
    pub fn remove(&mut self, key: &[u8], is_key: impl Fn(u32) -> bool) -> Option<u32> {
        let (part, hash) = self.place(key);
        let is_same = |member: &Member| member.hash == hash && is_key(member.number);
        let found = self.parts[part].find_entry(spread(hash), is_same).ok()?;
        Some(found.remove().0.number)
    }

    /// The part that a key is in, by one half of its hash, and the other half.
    fn place(&self, key: &[u8]) -> (usize, u32) {
        let hash = self.hasher.hash_one(key);
        ((hash >> 32) as usize % PARTS, hash as u32)
    }
}

/// As wide as tables take hashes, which look at the first bits and, on 64-bit machines, at the last ones too.
fn spread(hash: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(hash)
}
