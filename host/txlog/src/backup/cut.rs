//! The point in time up to which a log is restored or served, found by a pass over its entries.

use super::Until;
use crate::{Entry, History};

/// A pass over the entries after a sequence.
#[derive(Debug)]
pub struct Cut {
    since: u64,
    /// The last entry so far.
    last: u64,
    /// The first sequence that is missing, since compaction dropped its entry.
    gap: Option<u64>,
    /// The newest sequence before the point in time, if an entry is newer.
    pub at: Option<u64>,
}

impl Cut {
    pub fn new(since: u64) -> Self {
        Self { since, last: since, gap: None, at: None }
    }

    pub fn visit(&mut self, entry: &Entry<'_>, history: &History, until: Option<Until>) {
        let next = history.next(self.last);
        self.gap = self.gap.or((next != entry.sequence).then_some(next));
        if self.at.is_none() && matches!(until, Some(Until::Time(time)) if entry.time > time) {
            self.at = Some(history.newest_given(entry.sequence - 1));
        }
        self.last = entry.sequence;
    }

    /// Ends the pass at the newest sequence of the log.
    pub fn end(&mut self, newest: u64, history: &History, until: Option<Until>) {
        self.gap = self.gap.or(Some(history.next(self.last)).filter(|next| *next <= newest));
        if let Some(Until::Sequence(sequence)) = until {
            self.at = Some(sequence).filter(|sequence| (self.since..=newest).contains(sequence));
        }
    }

    /// Returns whether the state at a sequence is what the log held: nothing was dropped for an entry after it.
    pub fn holds(&self, sequence: u64, retained: u64) -> bool {
        sequence == self.since || sequence >= retained || self.gap.is_none_or(|gap| sequence < gap)
    }
}
