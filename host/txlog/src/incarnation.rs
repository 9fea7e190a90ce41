//! Incarnations: the points at which a log was continued from a copy of itself, or without a lost tail.
//!
//! Sequences are entity tags and watch positions, which clients keep for longer than a log may last: a restored backup lacks
//! entries that clients have seen. So the log continues under sequences far beyond any that can have been given out, and the
//! gap between them never has entries. A tag is never reused, and a position from the lost future is recognised.

use uuid::Uuid;

/// Minimum distance from the fork to the first sequence after it: more entries than any lost future has.
pub const JUMP: u64 = 1 << 40;
/// Bound of the random part of the distance, which distinguishes two restores of one backup.
const RANDOM: u64 = 1 << 44;

/// The beginning of an incarnation, a record in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incarnation {
    pub id: Uuid,
    /// The incarnation before it; that of the log's beginning is the UUID of the log.
    pub parent: Uuid,
    /// The newest sequence shared with its parent.
    pub fork: u64,
    /// Sequence of its first entry.
    pub first: u64,
}

impl Incarnation {
    /// Creates the incarnation that continues `parent` after `fork`, at a distance that depends on `random`.
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

    /// Returns whether a sequence belongs to this history, rather than to a lost future.
    pub fn contains(&self, sequence: u64) -> bool {
        !self.0.iter().any(|incarnation| incarnation.fork < sequence && sequence < incarnation.first)
    }

    /// Returns the number of entries after one sequence, up to and including another, without those in gaps.
    pub fn entries(&self, after: u64, until: u64) -> u64 {
        let gaps = self.0.iter().map(|gap| (gap.first - 1).min(until).saturating_sub(gap.fork.max(after)));
        until.saturating_sub(after).saturating_sub(gaps.sum())
    }

    /// Returns the sequence that follows without a gap, which is across the jump at a fork.
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
        // The third began before the second had an entry.
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
