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
    // Entries of another primary must not be served here, and its compaction is not known.
    ensure!(shared.epoch.get().is_none_or(|own| *own == epoch), "another process is primary");
    let newest = writer.try_get::<_, i64>(2)?.cast_unsigned();
    // A delete that was dropped after an earlier part was handed over, in another snapshot, is missing too.
    ensure!(*position == 0 || newest <= *position, Forgotten { after: *position, newest });
    shared.retained.store(writer.try_get::<_, i64>(3)?.cast_unsigned(), Ordering::Release);
    // Of the same snapshot: a receiver can check that no entry is missing.
    let history = incarnations::history(&session).await?;
    shared.set_history(history.clone());
    // The server counts the time of the whole statement, which the receiver and the number of entries decide. The wait for
    // each row is bounded here, and that for a lock by the server, which would wait on without a client.
    session
        .run(&format!("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = {}", session.milliseconds()))
        .await?;
    let mut rows = session.rows(ENTRIES, &[position.cast_signed()]).await?;
    let (mut batch, mut bytes) = (Vec::new(), 0);
    loop {
        let row = rows.next().await?;
        let ended = row.is_none();
        if let Some(row) = row {
            let sequence: i64 = row.try_get(0)?;
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
    drop(rows);
    if !shared.queue.begun() {
        session.run("COMMIT").await?;
        *shared.idle() = Some(session);
    }
    Ok(until.cast_unsigned())
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
