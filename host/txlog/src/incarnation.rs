//! Incarnations: the points at which a log was continued from a copy of itself, or without a lost tail.
//!
//! Sequences are entity tags and watch positions, and clients keep them for longer than a log may last: a restored backup
//! goes on without entries that clients have seen. So it goes on under sequences far beyond any that can have been given
//! out, and what lies between is a gap in the history that no entry is ever in. A tag is never given twice, and a position
//! from the lost future is recognised.

use uuid::Uuid;

/// The distance from the fork to the first sequence after it: more than any lost future holds.
pub const JUMP: u64 = 1 << 40;
/// Bound of the random part of the distance, by which two restores of one backup differ.
const RANDOM: u64 = 1 << 44;

/// The beginning of an incarnation, a record in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incarnation {
    pub id: Uuid,
    /// The incarnation before it; that of the log's beginning is the UUID of the log.
    pub parent: Uuid,
    /// The newest sequence that it has in common with its parent.
    pub fork: u64,
    /// The sequence of its first entry.
    pub first: u64,
}

impl Incarnation {
    /// Continues `parent` after `fork`. `random` is any number.
    pub fn after(parent: Uuid, fork: u64, id: Uuid, random: u64) -> Self {
        Self { id, parent, fork, first: fork + JUMP + random % RANDOM }
    }
}

/// The incarnations of a log, oldest first, as far as compaction has kept them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History(Vec<Incarnation>);

impl History {
    pub fn new(incarnations: Vec<Incarnation>) -> Self {
        Self(incarnations)
    }

    pub fn incarnations(&self) -> &[Incarnation] {
        &self.0
    }

    pub fn push(&mut self, incarnation: Incarnation) {
        self.0.push(incarnation);
    }

    /// Whether a sequence can have been given out in this history, rather than in a future that it does not have.
    pub fn contains(&self, sequence: u64) -> bool {
        !self.0.iter().any(|incarnation| incarnation.fork < sequence && sequence < incarnation.first)
    }

    /// The number of entries after one sequence, up to another, of which none is in a gap.
    pub fn entries(&self, after: u64, until: u64) -> u64 {
        let gaps = self.0.iter().map(|gap| (gap.first - 1).min(until).saturating_sub(gap.fork.max(after)));
        until.saturating_sub(after).saturating_sub(gaps.sum())
    }

    /// The sequence that follows another where no entry is missing.
    pub fn next(&self, sequence: u64) -> u64 {
        self.0.iter().fold(sequence + 1, |next, incarnation| {
            if incarnation.fork < next && next < incarnation.first { incarnation.first } else { next }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> History {
        let record = |fork, first| Incarnation { id: Uuid::nil(), parent: Uuid::nil(), fork, first };
        // The third was begun before the second had an entry.
        History::new(vec![record(10, 100), record(150, 1_000), record(999, 5_000)])
    }

    #[test]
    fn lost_future_is_not_in_the_history() {
        let history = history();
        for (sequence, contained) in [(0, true), (10, true), (11, false), (99, false), (100, true), (150, true)] {
            assert_eq!(history.contains(sequence), contained, "{sequence}");
        }
        for (sequence, contained) in [(151, false), (999, false), (1_000, false), (4_999, false), (5_000, true)] {
            assert_eq!(history.contains(sequence), contained, "{sequence}");
        }
    }

    #[test]
    fn next_sequence_is_across_the_jump() {
        let history = history();
        for (sequence, next) in [(0, 1), (9, 10), (10, 100), (100, 101), (149, 150), (150, 5_000), (5_000, 5_001)] {
            assert_eq!(history.next(sequence), next, "{sequence}");
        }
        assert_eq!(History::default().next(7), 8);
    }

    #[test]
    fn gaps_hold_no_entries() {
        let history = history();
        for (after, until, count) in [(0, 10, 10), (10, 100, 1), (9, 101, 3), (150, 5_000, 1), (0, 5_001, 63)] {
            assert_eq!(history.entries(after, until), count, "{after} {until}");
        }
        assert_eq!(history.entries(7, 7), 0);
        assert_eq!(history.entries(8, 7), 0);
        assert_eq!(History::default().entries(3, 7), 4);
    }

    #[test]
    fn incarnation_begins_far_beyond_its_fork() {
        for random in [0, 1, u64::MAX] {
            let incarnation = Incarnation::after(Uuid::nil(), 7, Uuid::nil(), random);
            let distance = incarnation.first - incarnation.fork;
            assert!((JUMP..JUMP + RANDOM).contains(&distance), "{distance}");
        }
    }
}
