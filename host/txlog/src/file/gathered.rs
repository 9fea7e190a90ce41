//! Entries gathered for the receiver of a replay.

use std::ops::Range;

use super::entry::Raw;
use crate::{REPLAY_BYTES, REPLAY_ENTRIES, Receive};

/// Entries gathered for one call of the receiver, all from one buffer.
#[derive(Default)]
pub struct Batch<'a> {
    entries: Vec<(Raw<'a>, Range<usize>)>,
    /// The metadata of all entries, one after the other.
    pairs: Vec<(&'a str, &'a str)>,
    bytes: usize,
}

impl<'a> Batch<'a> {
    pub fn has_room_for(&self, entry: &Raw<'_>) -> bool {
        self.entries.is_empty() || (self.entries.len() < REPLAY_ENTRIES && self.bytes + entry.bytes() <= REPLAY_BYTES)
    }

    /// None is damage.
    pub fn push(&mut self, entry: Raw<'a>) -> Option<()> {
        let pairs = entry.metadata(&mut self.pairs)?;
        self.bytes += entry.bytes();
        self.entries.push((entry, pairs));
        Some(())
    }

    pub fn hand_over(&mut self, receive: &mut Receive<'_>) -> anyhow::Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let entries: Vec<_> =
            self.entries.iter().map(|(entry, pairs)| entry.entry(&self.pairs[pairs.clone()])).collect();
        receive(&entries)?;
        drop(entries);
        self.entries.clear();
        self.pairs.clear();
        self.bytes = 0;
        Ok(())
    }
}
