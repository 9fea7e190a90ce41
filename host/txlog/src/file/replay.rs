//! Replay: the entries of the log, straight from the buffer they were read into.

use std::ops::Range;

use super::catalog::Segment;
use super::disk::File;
use super::entry::Raw;
use super::{Home, Shared};
use crate::{Forgotten, REPLAY_BYTES, REPLAY_ENTRIES, Receive};

use std::sync::Arc;

use uuid::Uuid;

/// See [`TransactionLog::replay`](crate::TransactionLog::replay).
pub fn replay(shared: &Shared, after: u64, receive: &mut Receive<'_>) -> anyhow::Result<u64> {
    let Shared { home, catalog, watermark, .. } = shared;
    let _reader = catalog.reader(after).map_err(|newest| Forgotten { after, newest })?;
    let (mut position, mut swaps, mut until) = (after, catalog.swaps(), watermark.durable().max(after));
    loop {
        while position < until {
            let Some((segment, file)) = catalog.open_after(position, &*home.disk)? else { break };
            let span = Span { after: position, until };
            read(home, shared.log, &segment, file, span, receive)?;
            position = segment.last.min(until);
        }
        // Compaction may meanwhile have dropped an entry for the sake of one that is newer than `until`. Where it did,
        // go on to what is durable now, or the receiver would miss both.
        let now = catalog.swaps();
        if now == swaps {
            return Ok(until);
        }
        (swaps, until) = (now, watermark.durable().max(until));
    }
}

/// The sequences to hand over.
#[derive(Clone, Copy)]
pub struct Span {
    pub after: u64,
    pub until: u64,
}

/// Hands over the entries of one segment.
pub fn read(
    home: &Home,
    log: Uuid,
    segment: &Segment,
    file: Arc<dyn File>,
    span: Span,
    receive: &mut Receive<'_>,
) -> anyhow::Result<()> {
    let name = segment.numbers.file_name();
    let mut scan = segment.scan_after(span.after, file, log);
    while scan.advance()? {
        let mut batch = Batch::default();
        for frame in scan.frames() {
            for entry in frame.entries() {
                let damaged = || home.damage(&name, frame.offset, "a frame contains an invalid entry");
                let entry = entry.ok_or_else(damaged)?;
                if entry.sequence <= span.after {
                    continue;
                }
                if entry.sequence > span.until {
                    return batch.hand_over(receive);
                }
                if !batch.has_room_for(&entry) {
                    batch.hand_over(receive)?;
                }
                batch.push(entry).ok_or_else(damaged)?;
            }
        }
        batch.hand_over(receive)?;
    }
    segment.ended(home, &scan)
}

/// Entries gathered for one call of the receiver, all from one buffer.
#[derive(Default)]
pub(crate) struct Batch<'a> {
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
