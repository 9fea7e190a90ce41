//! Compaction: rows that no store needs any more are deleted, a few at a time.
//!
//! A put goes when its key is written again, a delete or an expired put when nothing older of its key is left, which what
//! goes in the same step is not. The newest dropped delete is noted, since whoever has read an older entry of that key
//! would miss it. The space is reused when the database has vacuumed.
//!
//! To find what else is of a key takes an index, which is there for as long as this takes: kept up with every append it took
//! a third of what an append costs the database, and made at once it costs little. A run that fails leaves it to the next.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use tracing::{info, warn};

use super::Shared;
use super::session::Session;

/// How often it looks whether a run is due.
const LOOK: Duration = Duration::from_secs(10);
/// Entries that must have come since the last run.
const WORTH: u64 = 100_000;
/// Rows that one step looks at.
const ROWS: i64 = 2_000;
/// The database rests this many times longer than a step takes.
const REST: u32 = 3;
/// A delete or an expired put is kept for so long: clocks differ, and somebody may be reading.
const GRACE: Duration = Duration::from_secs(3600);

/// How long the database may take for the index.
const INDEXING: Duration = Duration::from_secs(3600);

/// None of these keeps anybody from appending. Keys are of any length, the entries of an index are not.
const UNINDEX: &str = "DROP INDEX CONCURRENTLY IF EXISTS kvs.transactions_key";
const INDEX: [&str; 3] = [
    // Of one who did not come to an end.
    UNINDEX,
    "CREATE INDEX CONCURRENTLY transactions_key ON kvs.transactions (substr(sha256(key), 1, 16), sequence)",
    // It is not used by who does not know what it holds.
    "ANALYZE kvs.transactions",
];

/// $1 epoch, $2 where to begin, $3 the newest there is, $4 how many rows to look at, $5 the time before which what is over is dropped. Gives where
/// it ended, how many rows it looked at, and how many of them it dropped.
const STEP: &str = "WITH step AS (SELECT sequence, event_type, key, time, expires FROM kvs.transactions \
     WHERE sequence > $2 AND sequence <= $3 ORDER BY sequence LIMIT $4), \
     fate AS (SELECT sequence, EXISTS (SELECT FROM kvs.transactions newer WHERE newer.key = step.key \
     AND substr(sha256(newer.key), 1, 16) = substr(sha256(step.key), 1, 16) \
     AND newer.sequence > step.sequence AND newer.sequence <= $3) AS superseded, \
     (event_type = 1 AND time < $5 OR expires BETWEEN 0 AND $5) AND NOT EXISTS (SELECT FROM kvs.transactions older \
     WHERE older.key = step.key AND substr(sha256(older.key), 1, 16) = substr(sha256(step.key), 1, 16) \
     AND older.sequence <= $2) AS over FROM step), \
     gone AS (DELETE FROM kvs.transactions entry USING fate WHERE entry.sequence = fate.sequence AND (superseded OR over) \
     AND EXISTS (SELECT FROM kvs.writer WHERE epoch = $1) RETURNING entry.sequence, NOT superseded AS missed), \
     noted AS (UPDATE kvs.writer SET forgotten = greatest(forgotten, (SELECT max(sequence) FROM gone WHERE missed)) \
     WHERE EXISTS (SELECT FROM gone WHERE missed)) \
     SELECT (SELECT max(sequence) FROM step), (SELECT count(*) FROM step), (SELECT count(*) FROM gone)";

/// Compacts whenever it is worth it, for as long as the log is this process's.
pub async fn run(shared: Arc<Shared>, epoch: i64, mut compacted: u64) {
    let mut kept = 0;
    loop {
        shared.env.clock.sleep(LOOK).await;
        if shared.queue.ended().is_some() {
            return;
        }
        let newest = shared.watermark.durable();
        let since = shared.history().entries(compacted, newest);
        if since < WORTH.max(kept) || !shared.breaker.is_well() {
            continue;
        }
        match compact(&shared, epoch, newest, Effort { rest: REST, grace: GRACE }).await {
            Ok(left) => (compacted, kept) = (newest, left),
            // The log is as it was, only larger than need be.
            Err(error) => {
                warn!("the log could not be compacted: {error:#}");
                // Why may not go away by itself: that the table is somebody else's is not to be told every ten seconds.
                (compacted, kept) = (newest, 0);
            }
        }
    }
}

/// How hard it is tried.
pub struct Effort {
    /// After each step the database rests this many times as long as that took.
    pub rest: u32,
    /// How old a delete has to be, or what has expired, to be dropped.
    pub grace: Duration,
}

/// Goes once through the log up to `newest`, and gives how many entries it left.
pub async fn compact(shared: &Shared, epoch: i64, newest: u64, effort: Effort) -> Result<u64> {
    let indexing = Session::connect(&shared.target, INDEXING, &shared.conditions.settings()).await?;
    for statement in INDEX {
        indexing.run(statement).await?;
    }
    let session = shared.connect_to_write().await?;
    let step = session.prepare(STEP).await?;
    let clock = &shared.env.clock;
    let now = Duration::from_millis(clock.unix_ms());
    let over = i64::try_from(now.saturating_sub(effort.grace).as_millis())?;
    let (begun, mut position, mut kept, mut dropped) = (clock.now(), Some(0_i64), 0, 0);
    while let Some(after) = position {
        ensure!(shared.queue.ended().is_none(), "this process writes it no more");
        let step_begun = clock.now();
        let row = session.one(&step, &[&epoch, &after, &newest.cast_signed(), &ROWS, &over]).await?;
        position = row.try_get(0)?;
        let [seen, gone]: [i64; 2] = [row.try_get(1)?, row.try_get(2)?];
        kept += (seen - gone).cast_unsigned();
        dropped += gone.cast_unsigned();
        shared.metrics.compacted.add(gone.cast_unsigned());
        clock.sleep(clock.elapsed(step_begun) * effort.rest).await;
    }
    let done = "UPDATE kvs.writer SET compacted = $2 WHERE epoch = $1";
    session.execute(done, &[&epoch, &newest.cast_signed()]).await?;
    indexing.run(UNINDEX).await?;
    if dropped > 0 {
        info!("compacted the log: {dropped} of {} entries less, in {:.1?}", dropped + kept, clock.elapsed(begun));
    }
    Ok(kept)
}
