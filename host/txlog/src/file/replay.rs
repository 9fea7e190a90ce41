//! Replay: the entries of the log, straight from the buffer they were read into.

use super::catalog::Segment;
use super::disk::File;
use super::gathered::Batch;
use super::{Home, Shared};
use crate::{Forgotten, Receive};

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
