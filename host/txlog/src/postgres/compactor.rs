//! Compaction: deletes superseded rows and droppable tombstones, a few at a time.
//!
//! A put is superseded by a newer entry of its key. A tombstone (a delete or an expired put) is dropped when no older entry
//! of its key is left, not counting those dropped in the same step. The newest dropped tombstone is the compaction horizon,
//! since a reader that resumes before it would miss it. The space is reused after a vacuum of the database.
//!
//! Finding other entries of a key requires an index, which exists only during a run: maintained with every append it took a
//! third of the cost of an append, and built at once it costs little. A failed run leaves it to the next one.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use tracing::{info, warn};

use super::Shared;
use super::session::Session;

/// Interval of the check whether a run is due.
const POLL_INTERVAL: Duration = Duration::from_secs(10);
/// Minimum number of entries since the last run.
const MIN_ENTRIES: u64 = 100_000;
/// Number of rows per step.
const ROWS: i64 = 2_000;
/// Idle time after each step, as a multiple of its duration.
const IDLE_RATIO: u32 = 3;
/// Grace period of tombstones: clocks differ, and a reader may be catching up.
const TOMBSTONE_GRACE: Duration = Duration::from_secs(3600);

/// Timeout of what reads all rows: the creation of the index, and the search for the first retained row.
const SCAN_TIMEOUT: Duration = Duration::from_secs(3600);

/// Drops the index. None of these statements blocks appends.
const DROP_INDEX: &str = "DROP INDEX CONCURRENTLY IF EXISTS kvs.transactions_key";
/// Creates the index, over hashes: the length of keys is not limited, that of index entries is.
const CREATE_INDEX: [&str; 3] = [
    // Left by an interrupted run.
    DROP_INDEX,
    "CREATE INDEX CONCURRENTLY transactions_key ON kvs.transactions (substr(sha256(key), 1, 16), sequence)",
    // Without statistics the planner would not use it.
    "ANALYZE kvs.transactions",
];

/// One step: $1 epoch, $2 the sequence to begin after, $3 the newest sequence, $4 the number of rows, $5 the time up to which
/// deletes and expiries make tombstones. Returns the last sequence, the number of rows read, and of rows dropped.
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

/// Compaction task: compacts when enough entries have come, until this process is not primary any more.
pub async fn run(shared: Arc<Shared>, epoch: i64, mut compacted: u64) {
    let mut kept = 0;
    loop {
        shared.env.clock.sleep(POLL_INTERVAL).await;
        if shared.queue.ended().is_some() || shared.epoch() != Some(epoch) {
            return;
        }
        let newest = shared.watermark.durable();
        let since = shared.history().entries(compacted, newest);
        if since < MIN_ENTRIES.max(kept) || !shared.breaker.is_well() {
            continue;
        }
        let params = CompactionParams { idle_ratio: IDLE_RATIO, grace: TOMBSTONE_GRACE, retain: shared.retain };
        match compact(&shared, epoch, newest, params).await {
            Ok(left) => (compacted, kept) = (newest, left),
            // The log is unchanged, only larger than necessary.
            Err(error) => {
                warn!("compaction of the log failed, retrying after {MIN_ENTRIES} more entries: {error:#}");
                // The cause can be permanent, such as a missing privilege: it is not logged every ten seconds.
                (compacted, kept) = (newest, 0);
            }
        }
    }
}

/// Parameters of a compaction run.
pub struct CompactionParams {
    /// Idle time after each step, as a multiple of its duration.
    pub idle_ratio: u32,
    /// Minimum age of a tombstone to be dropped.
    pub grace: Duration,
    /// How long entries are kept after they were superseded or deleted.
    pub retain: Duration,
}

/// Returns the newest sequence before the retained part of the log, which begins with the first entry that is newer than the
/// time of retention: that part supersedes nothing.
async fn retain(session: &Session, newest: u64, now: u64, retain: Duration) -> Result<u64> {
    if retain.is_zero() {
        return Ok(newest);
    }
    let from = now.saturating_sub(u64::try_from(retain.as_millis())?).cast_signed();
    let first = "SELECT coalesce(min(sequence) - 1, $2) FROM kvs.transactions WHERE time > $1";
    let before: i64 = session.one(first, &[&from, &newest.cast_signed()]).await?.try_get(0)?;
    Ok(newest.min(before.cast_unsigned()))
}

/// Compacts the log up to `newest`, and returns the number of remaining entries.
pub async fn compact(shared: &Shared, epoch: i64, newest: u64, params: CompactionParams) -> Result<u64> {
    let patient = Session::connect(&shared.target, SCAN_TIMEOUT, &shared.conditions.settings()).await?;
    let clock = &shared.env.clock;
    let end = "SELECT time FROM kvs.transactions ORDER BY sequence DESC LIMIT 1";
    if let Some(row) = patient.at_most_one(end, &[]).await? {
        clock.not_before(row.try_get::<_, i64>(0)?.try_into()?);
    }
    let newest = retain(&patient, newest, clock.steady_ms(), params.retain).await?;
    for statement in CREATE_INDEX {
        patient.run(statement).await?;
    }
    let session = shared.connect_to_write().await?;
    let step = session.prepare(STEP).await?;
    // Before the first step: states up to here cannot be restored from then on.
    let begins = "UPDATE kvs.writer SET compacted = greatest(compacted, $2) WHERE epoch = $1";
    session.execute(begins, &[&epoch, &newest.cast_signed()]).await?;
    let now = Duration::from_millis(clock.steady_ms());
    let over = i64::try_from(now.saturating_sub(params.grace).as_millis())?;
    let (begun, mut position, mut kept, mut dropped) = (clock.now(), Some(0_i64), 0, 0);
    while let Some(after) = position {
        ensure!(shared.queue.ended().is_none(), "this process is not primary any more");
        let step_begun = clock.now();
        let row = session.one(&step, &[&epoch, &after, &newest.cast_signed(), &ROWS, &over]).await?;
        position = row.try_get(0)?;
        let [seen, gone]: [i64; 2] = [row.try_get(1)?, row.try_get(2)?];
        kept += (seen - gone).cast_unsigned();
        dropped += gone.cast_unsigned();
        shared.metrics.compacted.add(gone.cast_unsigned());
        clock.sleep(clock.elapsed(step_begun) * params.idle_ratio).await;
    }
    patient.run(DROP_INDEX).await?;
    if dropped > 0 {
        info!("compacted the log: dropped {dropped} of {} entries in {:.1?}", dropped + kept, clock.elapsed(begun));
    }
    Ok(kept)
}
