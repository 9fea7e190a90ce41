//! Replay: streams the entries of the log from the database.

use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail, ensure};
use tokio::time::sleep;
use tokio_postgres::Row;
use tracing::warn;

use super::batch::{DELETE, PUT};
use super::session::Failure;
use super::{Shared, incarnations};
use crate::remote::breaker;
use crate::remote::queue::End;
use crate::{Entry, EventRef, History, PutRef};
use crate::{Forgotten, REPLAY_BYTES, REPLAY_ENTRIES, Receive};

/// Consecutive retries without progress after which a replay fails.
const MAX_RETRIES: usize = 5;

const ENTRIES: &str = "SELECT sequence, time, event_type, key, value, metadata::text, expires FROM kvs.transactions \
     WHERE sequence > $1 ORDER BY sequence";

/// See [`TransactionLog::replay`](crate::TransactionLog::replay).
pub async fn replay(shared: &Shared, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
    if shared.queue.begun() && after >= shared.watermark.durable() {
        return Ok(after);
    }
    let _reader = shared.readers.acquire().await?;
    let mut position = after;
    let mut pauses = breaker::backoff().take(MAX_RETRIES);
    loop {
        let before = position;
        let error = match read(shared, &mut position, receive).await {
            Ok(until) => return Ok(until.max(after)),
            Err(error) => error,
        };
        if !error.downcast_ref().is_some_and(Failure::is_silence) {
            return Err(error);
        }
        if position > before {
            pauses = breaker::backoff().take(MAX_RETRIES);
        }
        // Resumes after the entries received so far.
        let Some(pause) = pauses.next() else { return Err(error) };
        warn!("retrying to read the log after sequence {position}: {error:#}");
        sleep(pause).await;
    }
}

/// Hands over the durable entries after `position`, and advances it. A database that was restarted shows entries that its
/// synchronous standbys may not have yet, which are left out. All is read in one snapshot: compaction has dropped nothing
/// in it because of an entry that is not in it.
async fn read(shared: &Shared, position: &mut u64, receive: &mut Receive<'_>) -> Result<u64> {
    let idle = shared.idle().take();
    let session = match idle {
        Some(session) => session,
        None => shared.connect().await?,
    };
    session.run("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let writer = session.one("SELECT epoch, last, forgotten, compacted FROM kvs.writer", &[]).await?;
    let (epoch, last): (i64, i64) = (writer.try_get(0)?, writer.try_get(1)?);
    let until = if shared.queue.begun() { shared.watermark.durable() } else { shared.news.borrow().newest };
    let until = last.min(until.cast_signed());
    // Entries of another primary must not be served here, and what it drops is not known, unless that is the process that this
    // one has handed the log over to, and it has dropped nothing yet.
    let compacted = writer.try_get::<_, i64>(3)?.cast_unsigned();
    let is_handed_over = shared.queue.ended() == Some(End::HandedOver) && compacted <= until.cast_unsigned();
    let is_own = |own: i64| own == epoch || is_handed_over && own + 1 == epoch;
    if !shared.epoch().is_none_or(is_own) {
        ensure!(shared.queue.ended() != Some(End::ReadOnly), "another process is primary");
        // Or this one again: it has taken the log back meanwhile.
        return Err(Failure::unusable("another process is primary".to_owned()).into());
    }
    let newest = writer.try_get::<_, i64>(2)?.cast_unsigned();
    // A delete that was dropped after an earlier part was handed over, in another snapshot, is missing too.
    ensure!(*position == 0 || newest <= *position, Forgotten { after: *position, newest });
    shared.retained.store(compacted, Ordering::Release);
    // Of the same snapshot: a receiver can check that no entry is missing.
    let history = incarnations::history(&session).await?;
    shared.set_history(history.clone());
    // The server counts the time of the whole statement, which the receiver and the number of entries decide. The wait for
    // each row is bounded here, and that for a lock by the server, which would wait on without a client.
    session
        .run(&format!("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = {}", session.milliseconds()))
        .await?;
    let mut presence = Presence { seen: *position, compacted };
    let mut rows = session.rows(ENTRIES, &[position.cast_signed()]).await?;
    let (mut batch, mut bytes) = (Vec::new(), 0);
    loop {
        let row = rows.next().await?;
        let ended = row.is_none();
        if let Some(row) = row {
            let sequence: i64 = row.try_get(0)?;
            if sequence <= last {
                presence.next(&history, sequence.cast_unsigned())?;
            }
            // Rows after the last entry were written by another program, and are reported below.
            if sequence <= until || sequence > last {
                bytes += row.raw_size_bytes();
                batch.push(row);
            }
        }
        if ended || batch.len() >= REPLAY_ENTRIES || bytes >= REPLAY_BYTES {
            hand_over(&batch, last, &history, position, receive)?;
            batch.clear();
            bytes = 0;
        }
        if ended {
            break;
        }
    }
    presence.end(&history, last.cast_unsigned(), newest)?;
    drop(rows);
    if !shared.queue.begun() {
        session.run("COMMIT").await?;
        *shared.idle() = Some(session);
    }
    Ok(until.cast_unsigned())
}

/// Detects missing rows, such as those of a table that was truncated. Compaction has noted how far it has come, and the
/// newest entry that it dropped for good: no other row may be missing. In the snapshot of a table that was just rewritten, as
/// by `ALTER TABLE`, all are missing: the next attempt shows them.
struct Presence {
    /// The newest row so far.
    seen: u64,
    /// The newest sequence before which compaction can have dropped rows.
    compacted: u64,
}

impl Presence {
    /// Notes the next row.
    fn next(&mut self, history: &History, sequence: u64) -> Result<(), Failure> {
        let missing = history.missing(self.seen.max(self.compacted), sequence);
        self.seen = sequence;
        missing.map_or(Ok(()), |missing| Err(absent(missing)))
    }

    /// Checks that the row of the last entry was among them, unless compaction has dropped it for good, as it has nothing
    /// that is newer than `forgotten`.
    fn end(self, history: &History, last: u64, forgotten: u64) -> Result<(), Failure> {
        let missing = history.missing(self.seen, history.next(last)).filter(|missing| *missing > forgotten);
        missing.map_or(Ok(()), |missing| Err(absent(missing)))
    }
}

fn absent(sequence: u64) -> Failure {
    Failure::unusable(format!(
        "kvs.transactions lacks the row of sequence {sequence}, which was committed and not compacted: rows were deleted, or the \
         table was truncated; restore the database, or a backup into an empty one"
    ))
}

fn hand_over(
    rows: &[Row],
    newest: i64,
    history: &History,
    position: &mut u64,
    receive: &mut Receive<'_>,
) -> Result<()> {
    let metadata = rows.iter().map(metadata).collect::<Result<Vec<_>>>()?;
    let pairs: Vec<Vec<(&str, &str)>> =
        metadata.iter().map(|pairs| pairs.iter().map(|(name, value)| (&**name, &**value)).collect()).collect();
    let entries = rows.iter().zip(&pairs).map(|(row, pairs)| entry(row, pairs)).collect::<Result<Vec<_>>>()?;
    let Some(last) = entries.last() else { return Ok(()) };
    ensure!(
        entries[0].sequence > *position && last.sequence <= newest.cast_unsigned(),
        "kvs.transactions contains sequence {}, but the last one in kvs.writer is {newest}: other programs write to it",
        last.sequence
    );
    if let Some(lost) = entries.iter().find(|entry| !history.contains(entry.sequence)) {
        bail!(
            "kvs.transactions contains sequence {}, which is in no incarnation of the log: other programs write to it, or rows \
             were restored from another copy",
            lost.sequence
        );
    }
    receive(&entries)?;
    *position = last.sequence;
    Ok(())
}

fn metadata(row: &Row) -> Result<Vec<(String, String)>> {
    match row.try_get::<_, Option<&str>>(5)? {
        None => Ok(Vec::new()),
        Some(text) => serde_json::from_str(text)
            .with_context(|| corrupted_row(row, "its metadata is not a list of pairs of strings")),
    }
}

fn entry<'r>(row: &'r Row, metadata: &'r [(&'r str, &'r str)]) -> Result<Entry<'r>> {
    let sequence = row.try_get::<_, i64>(0)?.cast_unsigned();
    let key = std::str::from_utf8(row.try_get(3)?).with_context(|| corrupted_row(row, "its key is not UTF-8"))?;
    let value: Option<&[u8]> = row.try_get(4)?;
    let event = match (row.try_get::<_, i16>(2)?, value) {
        (DELETE, _) => EventRef::Delete(key),
        (PUT, Some(value)) => {
            let expires = row.try_get::<_, Option<i64>>(6)?.map(i64::cast_unsigned);
            EventRef::Put(PutRef { key, value, metadata, expires })
        }
        _ => bail!(corrupted_row(row, "it is neither a put nor a delete")),
    };
    Ok(Entry { sequence, time: row.try_get::<_, i64>(1)?.cast_unsigned(), event })
}

fn corrupted_row(row: &Row, what: &str) -> String {
    let sequence = row.try_get::<_, i64>(0).unwrap_or_default();
    format!("the row of kvs.transactions with sequence {sequence} is corrupted: {what}")
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::Incarnation;

    /// The row that is missing of those up to `last`.
    fn missing(after: u64, rows: &[u64], (compacted, forgotten, last): (u64, u64, u64)) -> Option<String> {
        let record = Incarnation { id: Uuid::nil(), parent: Uuid::nil(), fork: 20, first: 1_000 };
        let history = History::new(vec![record]);
        let mut presence = Presence { seen: after, compacted };
        let read = rows.iter().try_for_each(|row| presence.next(&history, *row));
        let failure = read.and_then(|()| presence.end(&history, last, forgotten)).err()?;
        assert!(failure.is_silence(), "another attempt may succeed");
        failure.reason.split_once("sequence ")?.1.split_once(',').map(|(sequence, _)| sequence.to_owned())
    }

    #[test]
    fn row_that_compaction_did_not_drop_is_missed() {
        let lost = |sequence: u64| Some(sequence.to_string());
        // A table that was truncated, at rest and before more was written, and one that compaction has emptied.
        assert_eq!(missing(0, &[], (0, 0, 17)), lost(17));
        assert_eq!(missing(0, &[], (17, 9, 17)), lost(17));
        assert_eq!(missing(0, &[16, 17], (4, 0, 17)), lost(15));
        assert_eq!(missing(0, &[], (17, 17, 17)), None);
        assert_eq!(missing(0, &[], (0, 0, 0)), None);
        // Rows in between, and the last.
        assert_eq!(missing(0, &[1, 2, 4], (0, 0, 4)), lost(3));
        assert_eq!(missing(0, &[2, 9, 10, 11], (8, 5, 11)), None);
        assert_eq!(missing(0, &[2, 9, 11], (8, 5, 11)), lost(10));
        assert_eq!(missing(8, &[9], (4, 4, 10)), lost(10));
        // Dropped for good, and nothing after it.
        assert_eq!(missing(0, &[2, 7], (8, 8, 8)), None);
        assert_eq!(missing(0, &[2, 7], (8, 7, 8)), lost(8));
        // Across a jump.
        assert_eq!(missing(18, &[19, 20, 1_000, 1_001], (0, 0, 1_001)), None);
        assert_eq!(missing(18, &[19, 1_000], (0, 0, 1_000)), lost(20));
        assert_eq!(missing(0, &[], (20, 20, 20)), None);
        assert_eq!(missing(20, &[], (0, 0, 20)), None);
    }
}
