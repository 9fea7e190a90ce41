//! Keys in order: a sorted list of numbers, each of which stands for a key that is kept elsewhere.
//!
//! It lies in chunks, so that a change moves little. Beside each number lie four bytes of its key, those behind what all
//! keys of the chunk begin with: they settle most comparisons, and the keys themselves, which are spread all over the memory, are
//! looked at a few times where a million would ask for 20 looks. A number takes 8 bytes when many came at once, and 12 when
//! each came alone. Must never know: where keys are kept.

use std::cmp::Ordering;
use std::mem;

/// Numbers in a chunk, at most. A chunk that would be larger is cut in two.
const MOST: usize = 512;
/// A chunk and its neighbour that are not more than this together are made one.
const FEW: usize = MOST / 2;
/// How many more a full chunk is made room for.
const ROOM: usize = 32;

/// None of the chunks is empty.
#[derive(Debug, Default)]
pub struct Order {
    chunks: Vec<Chunk>,
}

/// Where a number is, or would be.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    chunk: usize,
    index: usize,
}

#[derive(Debug)]
struct Chunk {
    /// As many bytes, or more, all its keys begin with alike.
    shared: usize,
    members: Vec<Member>,
}

#[derive(Clone, Copy, Debug)]
struct Member {
    /// Of its key, the bytes from `shared` on.
    hint: u32,
    number: u32,
}

impl Order {
    /// Puts in a number whose key is not there yet.
    pub fn insert<'k>(&mut self, number: u32, key: impl Fn(u32) -> &'k [u8]) {
        let Place { mut chunk, mut index } = self.place(key(number), &key);
        let is_last = chunk + 1 == self.chunks.len();
        let Some(full) = self.chunks.get_mut(chunk) else {
            return self.chunks.push(Chunk::new(vec![Member { hint: 0, number }], &key));
        };
        if full.members.len() == MOST {
            // In halves; but when keys come in order, the last one stays full and the next begins with this one.
            if is_last && index == MOST {
                let mut members = Vec::with_capacity(MOST);
                members.push(Member { hint: 0, number });
                return self.chunks.push(Chunk::new(members, &key));
            }
            let mut second = Vec::with_capacity(MOST);
            second.extend(full.members.drain(MOST / 2..));
            full.hint_all(&key);
            self.chunks.insert(chunk + 1, Chunk::new(second, &key));
            if index >= MOST / 2 {
                (chunk, index) = (chunk + 1, index - MOST / 2);
            }
        }
        self.chunks[chunk].insert(index, number, &key);
    }

    /// Puts in many numbers whose keys are not there yet, for far less than one by one.
    pub fn insert_all<'k>(&mut self, numbers: Vec<u32>, key: impl Fn(u32) -> &'k [u8]) {
        if numbers.len() < self.chunks.len() {
            return numbers.into_iter().for_each(|number| self.insert(number, &key));
        }
        let sorted = sorted(numbers, &key);
        let mut rest = &sorted[..];
        let mut chunks = mem::take(&mut self.chunks).into_iter().peekable();
        if chunks.peek().is_none() {
            return self.cut(sorted.into_iter().map(|number| Member { hint: 0, number }).collect(), &key);
        }
        while let Some(mut chunk) = chunks.next() {
            let next = chunks.peek().map(|next| key(next.members[0].number));
            let before = rest.iter().take_while(|number| next.is_none_or(|next| key(**number) < next)).count();
            let run = rest.split_off(..before).unwrap_or_default();
            chunk.merge(run, &key);
            if chunk.members.len() > MOST {
                self.cut(chunk.members, &key);
            } else {
                self.chunks.push(chunk);
            }
        }
    }

    /// Appends members in order as chunks of about the same size.
    fn cut<'k>(&mut self, members: Vec<Member>, key: impl Fn(u32) -> &'k [u8]) {
        let size = members.len().div_ceil(members.len().div_ceil(MOST).max(1)).max(1);
        self.chunks.extend(members.chunks(size).map(|piece| Chunk::new(piece.to_vec(), &key)));
    }

    /// Takes out the number of a key.
    pub fn remove<'k>(&mut self, wanted: &[u8], key: impl Fn(u32) -> &'k [u8]) {
        let Place { chunk, index } = self.place(wanted, &key);
        let Some(Chunk { members, .. }) = self.chunks.get_mut(chunk) else { return };
        if members.get(index).is_none_or(|member| key(member.number) != wanted) {
            return;
        }
        members.remove(index);
        if members.is_empty() {
            self.chunks.remove(chunk);
        } else if let Some(first) =
            [chunk.checked_sub(1), Some(chunk)].into_iter().flatten().find(|first| self.few(*first))
        {
            let second = self.chunks.remove(first + 1);
            self.chunks[first].members.extend(second.members);
            self.chunks[first].hint_all(&key);
        }
    }

    /// The numbers from a place on, in order.
    pub fn walk(&self, from: Place) -> impl Iterator<Item = u32> {
        let mut chunks = self.chunks.get(from.chunk..).unwrap_or_default().iter().map(|chunk| &chunk.members);
        let first = chunks.next().and_then(|members| members.get(from.index..)).unwrap_or_default();
        first.iter().chain(chunks.flatten()).map(|member| member.number)
    }

    /// The numbers before a place, in the opposite order.
    pub fn walk_back(&self, until: Place) -> impl Iterator<Item = u32> {
        let chunks = self.chunks.get(..until.chunk).unwrap_or_default().iter().map(|chunk| &chunk.members);
        let first = self.chunks.get(until.chunk).and_then(|chunk| chunk.members.get(..until.index)).unwrap_or_default();
        first.iter().rev().chain(chunks.rev().flat_map(|members| members.iter().rev())).map(|member| member.number)
    }

    /// How many numbers are before a place. Costs a look at each chunk.
    pub fn count_before(&self, place: Place) -> usize {
        let before = self.chunks.get(..place.chunk).unwrap_or_default();
        before.iter().map(|chunk| chunk.members.len()).sum::<usize>() + place.index
    }

    /// The place behind all numbers.
    pub fn end(&self) -> Place {
        Place { chunk: self.chunks.len(), index: 0 }
    }

    /// The first place whose key is not less.
    pub fn place<'k>(&self, wanted: &[u8], key: impl Fn(u32) -> &'k [u8]) -> Place {
        // The last chunk that begins with less has it, unless all in it is less: then it is that chunk's end.
        let first = |chunk: &Chunk| key(chunk.members[0].number);
        let after = self.chunks.partition_point(|chunk| first(chunk) < wanted);
        let chunk = after.saturating_sub(1);
        let index = self.chunks.get(chunk).map_or(0, |chunk| chunk.place(&chunk.members, wanted, &key));
        match self.chunks.get(chunk) {
            // An equal one begins the next chunk, when there is one.
            Some(Chunk { members, .. })
                if index == members.len() && self.chunks.get(after).is_some_and(|next| first(next) == wanted) =>
            {
                Place { chunk: after, index: 0 }
            }
            _ => Place { chunk, index },
        }
    }

    fn few(&self, first: usize) -> bool {
        let second = self.chunks.get(first + 1);
        second.is_some_and(|second| self.chunks[first].members.len() + second.members.len() <= FEW)
    }
}

impl Chunk {
    /// Of members in order, whose hints are not set yet.
    fn new<'k>(members: Vec<Member>, key: impl Fn(u32) -> &'k [u8]) -> Self {
        let mut chunk = Self { shared: 0, members };
        chunk.hint_all(key);
        chunk
    }

    fn hint_all<'k>(&mut self, key: impl Fn(u32) -> &'k [u8]) {
        let [first, .., last] = &self.members[..] else {
            self.shared = self.members.first().map_or(0, |only| key(only.number).len());
            return;
        };
        // What the two ends begin with, all between them do.
        self.shared = alike(key(first.number), key(last.number));
        for member in &mut self.members {
            member.hint = hint(key(member.number), self.shared);
        }
    }

    fn insert<'k>(&mut self, index: usize, number: u32, key: impl Fn(u32) -> &'k [u8]) {
        let new = key(number);
        let fits = alike(new, key(self.members[0].number)) >= self.shared;
        if self.members.len() == self.members.capacity() {
            self.members.reserve_exact(ROOM);
        }
        self.members.insert(index, Member { hint: hint(new, self.shared), number });
        if !fits {
            self.hint_all(key);
        }
    }

    /// Puts in numbers in order, none of which belongs into another chunk.
    fn merge<'k>(&mut self, run: &[u32], key: impl Fn(u32) -> &'k [u8]) {
        let first = key(self.members[0].number);
        let fits = |number: Option<&u32>| number.is_none_or(|number| alike(key(*number), first) >= self.shared);
        // What is between two that begin so begins so.
        let fit = fits(run.first()) && fits(run.last());
        // From behind, so that all members move once: those up to `end` have not moved, and from `free` on all is done.
        let (mut end, mut free) = (self.members.len(), self.members.len() + run.len());
        self.members.reserve_exact(run.len());
        self.members.resize(free, Member { hint: 0, number: 0 });
        for number in run.iter().rev() {
            let new = key(*number);
            let index = self.place(&self.members[..end], new, &key);
            self.members.copy_within(index..end, free - (end - index));
            free -= end - index + 1;
            self.members[free] = Member { hint: hint(new, self.shared), number: *number };
            end = index;
        }
        if !fit {
            self.hint_all(key);
        }
    }

    /// The index of the first member, among some from the beginning on, whose key is not less.
    fn place<'k>(&self, among: &[Member], wanted: &[u8], key: impl Fn(u32) -> &'k [u8]) -> usize {
        let Some(first) = among.first() else { return 0 };
        let shared = &key(first.number)[..self.shared];
        match shared.cmp(&wanted[..self.shared.min(wanted.len())]) {
            Ordering::Less => among.len(),
            Ordering::Greater => 0,
            Ordering::Equal => {
                let hint = hint(wanted, self.shared);
                among.partition_point(|member| match member.hint.cmp(&hint) {
                    Ordering::Equal => key(member.number) < wanted,
                    other => other == Ordering::Less,
                })
            }
        }
    }
}

/// How many bytes two keys begin with alike.
fn alike(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}

/// Four bytes of a key as a number that is never greater than that of a greater key which begins alike.
fn hint(key: &[u8], from: usize) -> u32 {
    u32::from_be_bytes(bytes(key, from))
}

/// Some bytes of a key, and zeros behind its end.
fn bytes<const N: usize>(key: &[u8], from: usize) -> [u8; N] {
    let rest = key.get(from..).unwrap_or_default();
    rest.first_chunk().copied().unwrap_or_else(|| {
        let mut bytes = [0; N];
        bytes[..rest.len()].copy_from_slice(rest);
        bytes
    })
}

/// In the order of their keys. Each key is looked at a few times, where it is not for its first bytes.
fn sorted<'k>(numbers: Vec<u32>, key: impl Fn(u32) -> &'k [u8]) -> Vec<u32> {
    let Some(first) = numbers.first().map(|first| key(*first)) else { return numbers };
    let shared = numbers.iter().map(|number| alike(key(*number), first)).min().unwrap_or_default();
    let hinted = numbers.into_iter().map(|number| (u64::from_be_bytes(bytes(key(number), shared)), number));
    let mut hinted: Vec<_> = hinted.collect();
    hinted.sort_unstable_by(|one, other| one.0.cmp(&other.0).then_with(|| key(one.1).cmp(key(other.1))));
    hinted.into_iter().map(|(_, number)| number).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Keys of many kinds, that begin alike for none, some or many bytes, and their order is not that of their numbers.
    fn keys() -> Vec<Vec<u8>> {
        let scattered = |n: u32| n.wrapping_mul(2_654_435_761);
        let key = |n: u32| match n % 4 {
            0 => format!("{:x}", scattered(n)),
            1 => format!("user:{:08}", n / 4),
            2 => format!("{}{:04}", "/a/long/way/down".repeat(1 + n as usize % 3), scattered(n) % 10_000 + n),
            _ => "\0".repeat(n as usize % 7) + &n.to_string(),
        };
        (0..4_500).map(|n| key(n).into_bytes()).collect()
    }

    fn check(order: &Order, expected: &BTreeSet<&[u8]>, keys: &[Vec<u8>]) {
        let key = |number: u32| &keys[number as usize][..];
        assert!(order.walk(order.place(b"", key)).map(key).eq(expected.iter().copied()));
        for chunk in &order.chunks {
            assert!((1..=MOST).contains(&chunk.members.len()));
            let shared = &key(chunk.members[0].number)[..chunk.shared];
            assert!(chunk.members.iter().all(|member| key(member.number).starts_with(shared)));
        }
        // No two neighbours are few, but right after an insertion cut one in two.
        let few = (0..order.chunks.len()).filter(|first| order.few(*first)).count();
        assert_eq!(few, 0);
    }

    proptest! {
        #[test]
        fn it_is_a_sorted_set(changes in prop::collection::vec((0..3, 0..3_000_u32, 1..1_500_u32), 0..30)) {
            let keys = keys();
            let key = |number: u32| &keys[number as usize][..];
            let (mut order, mut set) = (Order::default(), BTreeSet::new());
            for (change, first, count) in changes {
                if change == 2 {
                    order.insert_all((first..first + count).filter(|number| set.insert(key(*number))).collect(), key);
                    check(&order, &set, &keys);
                    continue;
                }
                let insert = change == 1;
                for number in first..first + count {
                    if insert && set.insert(key(number)) {
                        order.insert(number, key);
                    } else if !insert {
                        set.remove(key(number));
                        order.remove(key(number), key);
                    }
                }
                check(&order, &set, &keys);
                prop_assert!(order.walk(order.place(key(first), key)).map(key).eq(set.range(key(first)..).copied()));
            }
        }
    }

    /// As many keys, in an order that looks like none.
    fn scattered(count: u64) -> Vec<Vec<u8>> {
        (0..count).map(|n| format!("key-{:016x}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).into_bytes()).collect()
    }

    #[test]
    fn finding_a_place_takes_few_looks_at_keys() {
        for (count, most) in [(1_000, 8), (1_000_000, 20)] {
            let keys = scattered(count);
            let key = |number: u32| &keys[number as usize][..];
            let mut order = Order::default();
            (0..count as u32).for_each(|number| order.insert(number, key));
            for number in (0..count as u32).step_by(997) {
                let looked = std::cell::Cell::new(0);
                let place = order.place(key(number), |number| {
                    looked.set(looked.get() + 1);
                    key(number)
                });
                assert_eq!(order.walk(place).next(), Some(number));
                assert!(looked.get() <= most, "{} looks at {count}", looked.get());
            }
        }
    }

    #[test]
    fn memory_is_a_few_bytes_a_number_however_they_come() {
        let keys = scattered(300_000);
        let key = |number: u32| &keys[number as usize][..];
        let in_order = {
            let mut numbers: Vec<u32> = (0..300_000).collect();
            numbers.sort_by_key(|number| key(*number));
            numbers
        };
        for numbers in [in_order.clone(), in_order.into_iter().rev().collect(), (0..300_000).collect()] {
            let mut order = Order::default();
            for number in &numbers {
                order.insert(*number, key);
            }
            let bytes = |chunk: &Chunk| 8 * chunk.members.capacity() + size_of::<Chunk>();
            let held = |order: &Order| order.chunks.iter().map(bytes).sum::<usize>();
            assert!(held(&order) < 17 * numbers.len(), "{} bytes", held(&order));
            let mut at_once = Order::default();
            numbers.chunks(70_000).for_each(|some| at_once.insert_all(some.to_vec(), key));
            assert!(held(&at_once) < 9 * numbers.len(), "{} bytes at once", held(&at_once));
            // Nearly all of them gone again, and the memory with them.
            for number in numbers.iter().filter(|number| *number % 100 != 0) {
                order.remove(key(*number), key);
            }
            assert!(held(&order) < 80 * numbers.len() / 100, "{} bytes", held(&order));
        }
    }
}
