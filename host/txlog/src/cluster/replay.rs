//! Replay: the entries of the log, read from the engine.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::Shared;
use super::frame::{Kind, decoded};
use super::reader::{Failure, Read};
use crate::file::Batch;
use crate::{Forgotten, Receive};

/// Maximum time without a frame that must be there: an engine elects a leader in less.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// See [`TransactionLog::replay`](crate::TransactionLog::replay).
pub async fn replay(shared: &Shared, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
    let newest = shared.restored().horizon;
    ensure!(after == 0 || newest <= after, Forgotten { after, newest });
    let until = if shared.queue.begun() { shared.watermark.durable() } else { shared.news.borrow().newest };
    let mut tip = shared.index.before(after);
    let mut progress = shared.env.clock.now();
    while tip.sequence < until.max(after) && after < until {
        let reason = match shared.read(&mut tip, RETRY_DELAY).await {
            Ok(frames) if !frames.is_empty() => {
                progress = shared.env.clock.now();
                hand_over(shared, &frames, (after, until), receive)?;
                continue;
            }
            Ok(_) => format!("frame {} is missing", tip.position + 1),
            Err(Failure::Silent(reason)) => reason,
            Err(failure) => return Err(failure.into()),
        };
        ensure!(shared.env.clock.elapsed(progress) < PATIENCE, "cannot read the log after sequence {after}: {reason}");
        shared.env.clock.sleep(RETRY_DELAY).await;
    }
    Ok(until.max(after))
}

/// Hands over those entries of frames that are in a span of sequences, in batches as large as those of other logs.
fn hand_over(shared: &Shared, frames: &[Read], (after, until): (u64, u64), receive: &mut Receive<'_>) -> Result<()> {
    let invalid = || Failure::Damaged("a frame contains an invalid entry".into());
    let mut batch = Batch::default();
    for Read { bytes, before, .. } in frames.iter().filter(|frame| frame.kind != Kind::Void) {
        shared.index.note(*before);
        let frame = decoded(shared.log, bytes).ok_or_else(invalid)?;
        for entry in frame.entries() {
            let entry = entry.ok_or_else(invalid)?;
            if entry.sequence <= after || entry.sequence > until {
                continue;
            }
            if !batch.has_room_for(&entry) {
                batch.hand_over(receive)?;
            }
            batch.push(entry).ok_or_else(invalid)?;
        }
    }
    batch.hand_over(receive)
}
