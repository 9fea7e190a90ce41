//! The epoch: who may write the log.
//!
//! Owns: when the epoch is to be had, and how it is taken. Must never know: what is written under it.

use std::time::{Duration, Instant};

use kvs_runtime::Clock;
use tracing::warn;

use super::session::{Failure, Session};

/// A writer that was not seen for this long has lost its right.
const LEASE: Duration = Duration::from_secs(10);

/// Held by the connection of whoever writes.
pub const LOCK: i64 = 0x6b76_7301;

/// The right to write, and what was there when it was taken.
pub struct Epoch {
    pub number: i64,
    pub last: u64,
    pub compacted: u64,
}

/// Whoever writes, as it is seen from here.
pub struct Holder {
    standby: bool,
    seen: String,
    since: Instant,
    clock: Clock,
}

/// What was seen in one look.
pub struct Look {
    /// The epoch is to be had.
    pub is_free: bool,
    pub holder: String,
    /// For how long the holder was not seen.
    pub unseen: Duration,
    /// The last entry of the log.
    pub newest: u64,
}

impl Holder {
    /// One that stands by takes nothing from a writer that has merely lost its connection, as all do when the database is
    /// started again: it goes by what it sees itself.
    pub fn new(standby: bool, clock: &Clock) -> Self {
        Self { standby, seen: String::new(), since: clock.now(), clock: clock.clone() }
    }

    pub async fn look(&mut self, session: &Session) -> Result<Look, Failure> {
        let look =
            "SELECT holder, seen::text, extract(epoch FROM clock_timestamp() - seen)::float8, last FROM kvs.writer";
        let row = session.one(look, &[]).await?;
        let (holder, seen, ago): (Option<String>, String, f64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        if self.seen != seen {
            (self.seen, self.since) = (seen, self.clock.now());
        }
        let unseen = if self.standby {
            self.clock.elapsed(self.since)
        } else {
            Duration::try_from_secs_f64(ago).unwrap_or_default()
        };
        let mut is_free = false;
        if holder.is_none() || !self.standby || unseen > LEASE {
            is_free = session.one("SELECT pg_try_advisory_lock($1)", &[&LOCK]).await?.try_get(0)?;
        }
        let holder = holder.unwrap_or("another process".into());
        if !is_free && unseen > LEASE {
            warn!("{holder} has not been seen for {unseen:.0?}: it writes no more");
            is_free = true;
        }
        Ok(Look { is_free, holder, unseen, newest: row.try_get::<_, i64>(3)?.cast_unsigned() })
    }
}

/// From here on nobody else writes.
pub async fn take(session: &Session) -> Result<Epoch, Failure> {
    let holder = format!("process {}", std::process::id());
    let take = "UPDATE kvs.writer SET epoch = epoch + 1, holder = $1 || coalesce(' at ' || host(inet_client_addr()), ''), \
         seen = clock_timestamp() RETURNING epoch, last, compacted";
    let row = session.one(take, &[&holder]).await?;
    let [number, last, compacted]: [i64; 3] = [row.try_get(0)?, row.try_get(1)?, row.try_get(2)?];
    Ok(Epoch { number, last: last.cast_unsigned(), compacted: compacted.cast_unsigned() })
}
