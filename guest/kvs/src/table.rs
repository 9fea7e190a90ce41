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
pub struct Table<S = RandomState> {
    /// Seeded at random: nobody outside can choose keys that collide.
    hasher: S,
    parts: Vec<HashTable<Member>>,
}

#[derive(Clone, Debug)]
struct Member {
    /// As much of it as a part looks at.
    hash: u32,
    number: u32,
}

impl<S: Default> Default for Table<S> {
    fn default() -> Self {
        Self { hasher: S::default(), parts: vec![HashTable::new(); PARTS] }
    }
}

impl<S: BuildHasher> Table<S> {
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

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasherDefault, Hasher};

    use super::*;

    /// Hashes everything to the same.
    #[derive(Default)]
    struct Alike;

    impl Hasher for Alike {
        fn finish(&self) -> u64 {
            7
        }

        fn write(&mut self, _: &[u8]) {}
    }

    #[test]
    fn keys_with_equal_hashes_are_distinct() {
        let mut table = Table::<BuildHasherDefault<Alike>>::default();
        for number in 0..9 {
            assert_eq!(table.find_or_insert(b"key", number, |there| there == number), None);
        }
        for number in 0..9 {
            assert_eq!(table.find(b"key", |there| there == number), Some(number));
        }
        for number in 0..9 {
            assert_eq!(table.remove(b"key", |there| there == number), Some(number));
            assert_eq!(table.find(b"key", |there| there == number), None);
        }
    }
}
