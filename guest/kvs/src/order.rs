//! Keys in order: a sorted list of numbers, each of which stands for a key that is kept elsewhere.
//!
//! It lies in chunks, so that a change moves little and a million take 6 bytes each. Finding a place costs about 20
//! comparisons at a million, and walking on from there one step each. Must never know: what the numbers stand for.

use std::cmp::Ordering;

/// Numbers in a chunk, at most. A chunk that would be larger is cut in two.
const MOST: usize = 512;
/// A chunk and its neighbour that are not more than this together are made one.
const FEW: usize = MOST / 2;

/// None of the chunks is empty.
#[derive(Debug, Default)]
pub struct Order {
    chunks: Vec<Vec<u32>>,
}

/// Where a number is, or would be.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    chunk: usize,
    index: usize,
}

impl Order {
    /// Puts a number where `compare`, which tells how a number there relates to it, says it belongs.
    pub fn insert(&mut self, number: u32, compare: impl FnMut(u32) -> Ordering) {
        let Place { mut chunk, mut index } = self.place(compare);
        let is_last = chunk + 1 == self.chunks.len();
        let Some(numbers) = self.chunks.get_mut(chunk) else {
            return self.chunks.push(vec![number]);
        };
        if numbers.len() == MOST {
            // In halves; but when keys come in order, the last one stays full and the next begins empty.
            let half = if is_last && index == MOST { MOST } else { MOST / 2 };
            let mut second = Vec::with_capacity(MOST);
            second.extend(numbers.drain(half..));
            self.chunks.insert(chunk + 1, second);
            if index >= half {
                (chunk, index) = (chunk + 1, index - half);
            }
        }
        self.chunks[chunk].insert(index, number);
    }

    /// Takes out the number that `compare` says is equal.
    pub fn remove(&mut self, mut compare: impl FnMut(u32) -> Ordering) {
        let Place { chunk, index } = self.place(&mut compare);
        let Some(numbers) = self.chunks.get_mut(chunk) else { return };
        if numbers.get(index).is_none_or(|number| compare(*number) != Ordering::Equal) {
            return;
        }
        numbers.remove(index);
        if numbers.is_empty() {
            self.chunks.remove(chunk);
        } else if let Some(first) =
            [chunk.checked_sub(1), Some(chunk)].into_iter().flatten().find(|first| self.few(*first))
        {
            let second = self.chunks.remove(first + 1);
            self.chunks[first].extend(second);
        }
    }

    /// The numbers from a place on, in order.
    pub fn walk(&self, from: Place) -> impl Iterator<Item = u32> {
        let mut chunks = self.chunks.get(from.chunk..).unwrap_or_default().iter();
        let first = chunks.next().and_then(|numbers| numbers.get(from.index..)).unwrap_or_default();
        first.iter().chain(chunks.flatten()).copied()
    }

    /// The first place whose number is not less.
    pub fn place(&self, mut compare: impl FnMut(u32) -> Ordering) -> Place {
        // The last chunk that begins with less has it, unless all in it is less: then it is that chunk's end.
        let after = self.chunks.partition_point(|numbers| compare(numbers[0]) == Ordering::Less);
        let chunk = after.saturating_sub(1);
        let index = self
            .chunks
            .get(chunk)
            .map_or(0, |numbers| numbers.partition_point(|number| compare(*number) == Ordering::Less));
        match self.chunks.get(chunk) {
            // An equal one begins the next chunk, when there is one.
            Some(numbers)
                if index == numbers.len()
                    && self.chunks.get(after).is_some_and(|next| compare(next[0]) == Ordering::Equal) =>
            {
                Place { chunk: after, index: 0 }
            }
            _ => Place { chunk, index },
        }
    }

    fn few(&self, first: usize) -> bool {
        let second = self.chunks.get(first + 1);
        second.is_some_and(|second| self.chunks[first].len() + second.len() <= FEW)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn check(order: &Order, expected: &BTreeSet<u32>) {
        assert!(order.walk(order.place(|_| Ordering::Greater)).eq(expected.iter().copied()));
        assert!(order.chunks.iter().all(|numbers| (1..=MOST).contains(&numbers.len())));
        // No two neighbours are few, but right after an insertion cut one in two.
        let few = (0..order.chunks.len()).filter(|first| order.few(*first)).count();
        assert_eq!(few, 0);
    }

    proptest! {
        /// Numbers that stand for themselves.
        #[test]
        fn it_is_a_sorted_set(changes in prop::collection::vec((any::<bool>(), 0..3_000_u32, 1..1_500_u32), 0..30)) {
            let (mut order, mut set) = (Order::default(), BTreeSet::new());
            for (insert, first, count) in changes {
                for number in first..first + count {
                    if insert && set.insert(number) {
                        order.insert(number, |other| other.cmp(&number));
                    } else if !insert {
                        set.remove(&number);
                        order.remove(|other| other.cmp(&number));
                    }
                }
                check(&order, &set);
                prop_assert!(order.walk(order.place(|other| other.cmp(&first))).eq(set.range(first..).copied()));
            }
        }
    }

    /// Numbers below 2^32 in an order that looks like none.
    fn scattered(count: u32) -> impl Iterator<Item = u32> {
        (0..count).map(|n| n.wrapping_mul(2_654_435_761))
    }

    #[test]
    fn finding_a_place_takes_steps_in_the_logarithm_of_what_is_there() {
        for (count, steps) in [(1_000, 16), (1_000_000, 26)] {
            let mut order = Order::default();
            scattered(count).for_each(|number| order.insert(number, |other| other.cmp(&number)));
            for number in scattered(count).step_by(997) {
                let mut compared = 0;
                let place = order.place(|other| {
                    compared += 1;
                    other.cmp(&number)
                });
                let found = order.walk(place).next();
                assert_eq!(found, Some(number));
                assert!(compared <= steps, "{compared} steps in {count}");
            }
        }
    }

    #[test]
    fn memory_is_a_few_bytes_a_number_however_they_come() {
        let spread: Vec<u32> = scattered(300_000).collect();
        for numbers in [(0..300_000).collect(), (0..300_000).rev().collect(), spread] {
            let mut order = Order::default();
            for number in &numbers {
                order.insert(*number, |other| other.cmp(number));
            }
            let held = |order: &Order| order.chunks.iter().map(|numbers| 4 * numbers.capacity() + 32).sum::<usize>();
            assert!(held(&order) < 9 * numbers.len(), "{} bytes", held(&order));
            // Nearly all of them gone again, and the memory with them.
            for number in numbers.iter().filter(|number| *number % 100 != 0) {
                order.remove(|other| other.cmp(number));
            }
            assert!(held(&order) < 40 * numbers.len() / 100, "{} bytes", held(&order));
        }
    }
}
