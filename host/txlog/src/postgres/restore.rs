//! Restore of a backup into a database without a log, in one transaction.

use std::sync::PoisonError;

use anyhow::{Context, Result, ensure};

use super::batch::Columns;
use super::incarnations::{self, Identity};
use super::opening::Existing;
use super::{PostgresLog, Running, Url, epoch, schema};
use crate::change::Change;
use crate::remote::queue::{Content, End};
use crate::{Restoration, TransactionLog};

/// Adds entries: $1 their sequences, then the columns.
const INSERT: &str = "INSERT INTO kvs.transactions (sequence, time, event_type, key, value, metadata, expires) \
     SELECT sequence, time, event_type, key, value, metadata::json, expires \
     FROM unnest($1::bigint[], $2::bigint[], $3::smallint[], $4::bytea[], $5::bytea[], $6::text[], $7::bigint[]) \
     AS entry (sequence, time, event_type, key, value, metadata, expires)";
/// Sets the end of the log: $1 epoch, $2 the last sequence, $3 the compaction horizon.
const END: &str = "UPDATE kvs.writer SET last = $2, compacted = $2, forgotten = $3 WHERE epoch = $1 AND last = 0";

impl PostgresLog {
    /// Writes a restored log, and the beginning of its new incarnation.
    pub fn restore(url: &Url, restoration: &Restoration<'_>) -> Result<()> {
        let log = Self::at_rest(url, Existing::Refused)?;
        let restored = log.fill(restoration);
        // Releases the epoch in any case.
        log.close()?;
        restored.with_context(|| format!("cannot restore into the {}", log.shared.target.name()))
    }

    fn fill(&self, restoration: &Restoration<'_>) -> Result<()> {
        let Restoration { log, ref history, last, incarnation, replay } = *restoration;
        ensure!(self.appended() == 0 && self.history().incarnations().is_empty(), schema::NOT_EMPTY);
        let Self { handle, shared, .. } = self;
        let number = shared.epoch().context("another process writes it")?;
        let session = handle.block_on(async {
            let session = shared.connect_to_write().await?;
            epoch::begin_durable(&session).await?;
            Ok::<_, anyhow::Error>(session)
        })?;
        let insert = handle.block_on(session.prepare(INSERT))?;
        let (mut end, mut horizon) = (0, 0);
        replay(&mut |entries| {
            let mut batch = Columns::default();
            let mut sequences = Vec::new();
            for entry in entries {
                horizon = history.missing(end, entry.sequence).unwrap_or(horizon);
                end = entry.sequence;
                sequences.push(entry.sequence.cast_signed());
                batch.push(entry.time, &Change::of(entry).event);
            }
            let Columns { times, types, keys, values, metadata, expires } = &batch;
            handle.block_on(session.execute(&insert, &[&sequences, times, types, keys, values, metadata, expires]))?;
            Ok(())
        })?;
        horizon = history.missing(end, history.next(last)).unwrap_or(horizon);
        // The writer would take the new end of the log for that of another process. It gives up the claim, not the epoch.
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Running { runtime, writer } = running.context("the log is closed")?;
        shared.queue.end(End::Closed);
        if let Some(writer) = writer {
            runtime.block_on(writer.ended());
        }
        runtime.block_on(async {
            for incarnation in history.incarnations() {
                incarnations::record(&session, incarnation, "it was in the backup").await?;
            }
            incarnations::record(&session, &incarnation, "the log was restored from a backup").await?;
            let identity = Identity::read(&session).await?;
            Identity { log: Some(log), ..identity }.write(&session).await?;
            let [last, horizon] = [last, horizon].map(u64::cast_signed);
            let ended = session.execute(END, &[&number, &last, &horizon]).await?;
            ensure!(ended == 1, "another process has written to it in the meantime");
            session.run("COMMIT").await?;
            Ok(())
        })
    }
}
