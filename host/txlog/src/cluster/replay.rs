//! Replay: the entries of the log, read from the engine. From the start, those of a snapshot come first, or the local copy.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::Shared;
use super::frame::{Kind, Snapshot, Tip, decoded};
use super::reader::{Failure, Read};
use super::snapshot::Scan;
use crate::file::Batch;
use crate::{Forgotten, Receive};

/// Maximum time without a frame that must be there: an engine elects a leader in less.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// See [`TransactionLog::replay`](crate::TransactionLog::replay).
pub async fn replay(shared: &Shared, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
    let newest = shared.restored().horizon;
    ensure!(after == 0 || newest <= after, Forgotten { after, newest });
    let mut until = if shared.queue.begun() { shared.watermark.durable() } else { shared.news.borrow().newest };
    if after >= until {
        return Ok(after);
    }
    let mut snapshot = shared.snapshot().filter(|_| after == 0);
    let copy = shared.copy().filter(|_| after == 0);
    let mut scan = match (after, &copy) {
        (0, Some(copy)) => Scan::from_copy(shared, copy),
        (0, None) => Scan::from_snapshot(shared, snapshot.as_ref()),
        _ => Scan::after(shared, resume(shared, after)?),
    };
    // A standby may not have come to the end of the snapshot, but the entries before it are not all there any more.
    until = until.max(snapshot.as_ref().map_or(0, Snapshot::newest));
    let mut has_begun = false;
    let mut progress = shared.env.clock.now();
    while scan.tip().is_none_or(|tip| tip.sequence < until) {
        let reason = match scan.next(RETRY_DELAY).await {
            Ok((is_log, frames)) if !frames.is_empty() => {
                progress = shared.env.clock.now();
                has_begun = true;
                if is_log {
                    frames
                        .iter()
                        .filter(|frame| frame.kind != Kind::Void)
                        .for_each(|frame| shared.index.note(frame.before));
                }
                hand_over(shared, &frames, (after, until), receive)?;
                continue;
            }
            Ok(_) => format!("frame {} is missing", scan.tip().map_or(0, |tip| tip.position + 1)),
            Err(Failure::Silent(reason)) => reason,
            Err(Failure::Dropped(_)) => {
                // A later snapshot has replaced what was to be read. This replay or the next one begins with it.
                let newest = shared.find_snapshot().await?;
                if after > 0 || has_begun || newest == snapshot {
                    let newest = newest.map_or(0, |snapshot| snapshot.newest()).max(after);
                    return Err(Forgotten { after, newest }.into());
                }
                scan = Scan::from_snapshot(shared, newest.as_ref());
                until = until.max(newest.as_ref().map_or(0, Snapshot::newest));
                snapshot = newest;
                continue;
            }
            Err(failure) => return Err(failure.into()),
        };
        ensure!(shared.env.clock.elapsed(progress) < PATIENCE, "cannot read the log after sequence {after}: {reason}");
        shared.env.clock.sleep(RETRY_DELAY).await;
    }
    Ok(until)
}

/// Returns an end of the log that has no entry after this sequence, and from which on no frame was dropped.
fn resume(shared: &Shared, after: u64) -> Result<Tip, Forgotten> {
    let snapshot = shared.snapshot();
    let newest = snapshot.as_ref().map_or(0, Snapshot::newest);
    let known = snapshot.filter(|_| newest <= after).map(|snapshot| snapshot.tip);
    let tip = known.into_iter().chain([shared.index.before(after)]).max_by_key(|tip| tip.position);
    tip.filter(|tip| tip.position + 1 >= shared.first()).ok_or(Forgotten { after, newest })
}

/// Hands over those entries of frames that are in a span of sequences, in batches as large as those of other logs.
fn hand_over(shared: &Shared, frames: &[Read], (after, until): (u64, u64), receive: &mut Receive<'_>) -> Result<()> {
    let invalid = || Failure::Damaged("a frame contains an invalid entry".into());
    let mut batch = Batch::default();
    for Read { bytes, .. } in frames.iter().filter(|frame| frame.kind != Kind::Void) {
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
