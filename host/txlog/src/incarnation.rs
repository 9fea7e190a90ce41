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

    /// Creates the incarnation that continues `parent` after `fork`, where its copies have come to `newest`.
    pub fn beyond(newest: u64, parent: Uuid, fork: u64, id: Uuid, random: u64) -> Self {
        Self { fork, ..Self::after(parent, newest.max(fork), id, random) }
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

    /// Returns the incarnation that a sequence belongs to, in a log with this UUID. Compaction may have dropped its record, but
    /// the next one names it.
    pub fn at(&self, log: Uuid, sequence: u64) -> Uuid {
        let next = self.0.iter().find(|incarnation| incarnation.first > sequence);
        next.map_or_else(|| self.0.last().map_or(log, |newest| newest.id), |next| next.parent)
    }

    /// Returns the history as it was when the log had come to a sequence.
    pub fn until(&self, sequence: u64) -> Self {
        Self(self.0.iter().filter(|incarnation| incarnation.first <= sequence).copied().collect())
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

    /// Returns the newest sequence that was given out where the log has come to `last`: that can be the one before the first of
    /// an incarnation, which lies in its jump.
    pub fn newest_given(&self, last: u64) -> u64 {
        self.0.iter().rev().fold(last, |newest, incarnation| {
            if incarnation.fork < newest && newest < incarnation.first { incarnation.fork } else { newest }
        })
    }

    /// Returns the newest sequence between one that is there and another, if any are missing.
    pub fn missing(&self, after: u64, before: u64) -> Option<u64> {
        (self.next(after) < before).then(|| self.newest_given(before - 1))
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
    fn incarnation_of_a_sequence_is_found_without_its_record() {
        let record = |id, parent, fork, first| Incarnation {
            id: Uuid::from_u128(id),
            parent: Uuid::from_u128(parent),
            fork,
            first,
        };
        let log = Uuid::from_u128(1);
        let whole = History::new(vec![record(2, 1, 10, 100), record(3, 2, 150, 1_000)]);
        for (sequence, id) in [(0, 1), (10, 1), (100, 2), (150, 2), (1_000, 3), (9_999, 3)] {
            assert_eq!(whole.at(log, sequence), Uuid::from_u128(id), "{sequence}");
        }
        assert_eq!(History::new(vec![record(3, 2, 150, 1_000)]).at(log, 120), Uuid::from_u128(2));
        assert_eq!(History::default().at(log, 7), log);
        assert_eq!(whole.until(999).incarnations(), &whole.incarnations()[..1]);
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
    fn newest_given_sequence_is_never_in_a_jump() {
        let history = history();
        for (last, newest) in [(0, 0), (10, 10), (99, 10), (100, 100), (999, 150), (4_999, 150), (5_000, 5_000)] {
            assert_eq!(history.newest_given(last), newest, "{last}");
        }
        for (after, before, newest) in
            [(9, 10, None), (10, 100, None), (9, 100, Some(10)), (10, 103, Some(102)), (149, 5_000, Some(150))]
        {
            assert_eq!(history.missing(after, before), newest, "{after} {before}");
        }
    }

    #[test]
    fn incarnation_begins_far_beyond_its_fork() {
        for random in [0, 1, u64::MAX] {
            let incarnation = Incarnation::after(Uuid::nil(), 7, Uuid::nil(), random);
            let distance = incarnation.first - incarnation.fork;
            assert!((JUMP..JUMP + RANDOM).contains(&distance), "{distance}");
            let beyond = Incarnation::beyond(1 << 50, Uuid::nil(), 7, Uuid::nil(), random);
            assert_eq!((beyond.fork, beyond.first - (1 << 50)), (7, distance));
        }
    }
}
