//! The epoch, a fencing token: the process that took the newest one is primary.
//!
//! The process that takes it reads the history of the log, and begins an incarnation if acknowledged entries may have been
//! lost; both are one transaction, which is durable even where others need not be.
//!
//! The read lease of the primary (`remote::lease`) is renewed by statements that are committed under its epoch, and the
//! transaction that takes the epoch checks again that there was none for the whole lease. It does not depend on the advisory
//! lock, which shows whether the connection of the primary exists: then the timeout is five times as long, since a primary
//! with slow statements still writes.
//!
//! The length of the lease is in the row `kvs.writer`, which the primary changes in steps: it obeys a lease before it is
//! written there, and until after it is removed. A primary that has not noticed its standby yet has none there, and gets the
//! longest timeout.
//!
//! Owns: when the epoch is available, and how it is taken. Must never know: what is written under it.

use std::time::{Duration, Instant};

use kvs_runtime::Clock;
use tracing::warn;
use uuid::Uuid;

use super::incarnations::{self, Identity, Place};
use super::session::{Failure, Session};
use crate::{History, Incarnation};

/// Timeout of a primary without a read lease, and of one that still has a connection.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of a primary with a read lease, as a multiple of the lease, unless it renewed the lease before and has lost its
/// connection.
const TIMEOUT_LEASES: u32 = 5;

/// Advisory lock held by the connection of the primary.
pub const LOCK: i64 = 0x6b76_7301;
/// Advisory lock shared by the connections of all standbys.
pub const STANDBYS: i64 = 0x6b76_7302;

/// Separates the name of the holder from its URL in one column: versions without URLs show it as part of the name.
const SERVING: &str = " serving ";

/// An epoch held by this process, and the state of the log when it was taken.
pub struct Epoch {
    pub number: i64,
    pub last: u64,
    pub compacted: u64,
    pub history: History,
    /// UUID of the log.
    pub log: Uuid,
    /// The connection holds the advisory lock. It does not while that of the former primary still exists.
    pub is_locked: bool,
}

/// Monitor of the primary's heartbeats.
pub struct Holder {
    standby: bool,
    seen: String,
    since: Instant,
    /// The primary renewed its lease while it was monitored.
    renews: bool,
    clock: Clock,
}

/// Status of the primary and the log at one poll.
pub struct Look {
    /// The epoch is available: the primary's claim has expired.
    pub is_free: bool,
    /// The primary is alive: it has a connection, or it sent a heartbeat while it was monitored.
    pub is_alive: bool,
    /// Number of the epoch.
    pub epoch: i64,
    /// Time of the last heartbeat.
    seen: String,
    pub holder: String,
    /// URL at which the holder serves clients.
    pub primary: Option<String>,
    /// Time since the last heartbeat.
    pub unseen: Duration,
    /// The last entry of the log.
    pub newest: u64,
    /// Number of incarnations of the log.
    pub incarnations: usize,
}

impl Holder {
    /// Creates a monitor. A standby does not take over from a primary that has merely lost its connection, as all do when
    /// the database restarts: it measures the time since the last heartbeat itself.
    pub fn new(standby: bool, clock: &Clock) -> Self {
        Self { standby, seen: String::new(), since: clock.now(), renews: false, clock: clock.clone() }
    }

    pub async fn look(&mut self, session: &Session) -> Result<Look, Failure> {
        let look = format!(
            "SELECT holder, seen::text, extract(epoch FROM clock_timestamp() - seen)::float8, last, \
             (SELECT count(*) FROM kvs.incarnations), epoch, lease, {} FROM kvs.writer",
            is_held(LOCK)
        );
        let row = session.one(&look, &[]).await?;
        let (holder, seen, ago): (Option<String>, String, f64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let (lease, is_locked): (Option<i64>, bool) = (row.try_get(6)?, row.try_get(7)?);
        let lease = lease.map(|lease| Duration::from_millis(lease.cast_unsigned()));
        if self.seen != seen {
            self.renews = lease.is_some() && !self.seen.is_empty();
            (self.seen, self.since) = (seen.clone(), self.clock.now());
        }
        let unseen = self.clock.elapsed(self.since);
        let (unseen, is_free) = match (&holder, lease) {
            (None, _) => (unseen, !is_locked || unseen >= HEARTBEAT_TIMEOUT),
            (Some(_), Some(lease)) if self.standby => {
                let wait = if is_locked || !self.renews { lease * TIMEOUT_LEASES } else { lease };
                (unseen, unseen >= wait)
            }
            (Some(_), None) if self.standby => (unseen, unseen >= HEARTBEAT_TIMEOUT),
            (Some(_), Some(lease)) if !is_locked => (unseen, unseen >= lease),
            // By the clock of the database, since this process has just started to monitor.
            (Some(_), lease) => {
                let unseen = Duration::try_from_secs_f64(ago).unwrap_or_default();
                (unseen, unseen >= HEARTBEAT_TIMEOUT || !is_locked && lease.is_none())
            }
        };
        let holder = holder.unwrap_or("another process".into());
        let (holder, primary) = match holder.split_once(SERVING) {
            Some((holder, url)) => (holder.to_owned(), Some(url.to_owned())),
            None => (holder, None),
        };
        if is_free && is_locked {
            warn!("lease of {holder} expired ({unseen:.0?} without a heartbeat), taking over");
        }
        let is_alive = is_locked || self.renews;
        let [newest, incarnations, epoch]: [i64; 3] = [row.try_get(3)?, row.try_get(4)?, row.try_get(5)?];
        let incarnations = usize::try_from(incarnations).unwrap_or_default();
        let newest = newest.cast_unsigned();
        Ok(Look { is_free, is_alive, epoch, seen, holder, primary, unseen, newest, incarnations })
    }
}

#[expect(clippy::disallowed_methods, reason = "no simulation has a database")]
/// From here on nobody else writes. None when somebody else took the epoch after this look, who must not lose it at once to one
/// that has not seen it yet, and when the holder was there after all. The connection must not be used after an error. `url` is
/// announced to standbys. An epoch that was handed over to this process is taken without another number.
pub async fn take(
    session: &Session,
    look: &Look,
    url: Option<&str>,
    is_handed: bool,
) -> Result<Option<Epoch>, Failure> {
    let here = Place::of(session).await?;
    let durable = is_durable(session).await?;
    let is_locked: bool = session.one("SELECT pg_try_advisory_lock($1)", &[&LOCK]).await?.try_get(0)?;
    begin_durable(session).await?;
    // No append can commit until the end of the transaction, so this is the end of the log.
    let row = session.one("SELECT holder IS NOT NULL, last, epoch, seen::text FROM kvs.writer FOR UPDATE", &[]).await?;
    // A primary that sent a heartbeat in the meantime has its lease.
    if row.try_get::<_, i64>(2)? != look.epoch || row.try_get::<_, &str>(3)? != look.seen {
        session.run("ROLLBACK").await?;
        if is_locked {
            session.one("SELECT pg_advisory_unlock($1)", &[&LOCK]).await?;
        }
        return Ok(None);
    }
    let is_held: bool = row.try_get(0)?;
    let last = row.try_get::<_, i64>(1)?.cast_unsigned();
    let identity = Identity::read(session).await?;
    let mut history = incarnations::history(session).await?;
    let log = identity.log.unwrap_or_else(Uuid::new_v4);
    let moved = identity.place.differs(&here);
    let cause = match moved {
        Some(what) => Some(format!("the {what} differs from that of the last primary")),
        None if is_held && !is_handed && !(durable && identity.durable.unwrap_or(true)) => {
            Some("its primary did not close it, and commits need not survive a power cut".into())
        }
        None => None,
    };
    if let Some(cause) = cause {
        history.push(incarnations::begin(session, &history, log, last, &cause).await?);
    }
    let place = if moved.is_some() { here } else { here.or(identity.place) };
    Identity { log: Some(log), place, durable: Some(durable) }.write(session).await?;
    let holder = format!("process {}", std::process::id());
    let take = "UPDATE kvs.writer SET epoch = epoch + $3, taken = epoch + $3, seen = clock_timestamp(), lease = NULL, \
         holder = $1 || coalesce(' at ' || host(inet_client_addr()), '') || $2 RETURNING epoch, compacted";
    let serving = url.map(|url| format!("{SERVING}{url}")).unwrap_or_default();
    let row = session.one(take, &[&holder, &serving, &i64::from(!is_handed)]).await?;
    let [number, compacted]: [i64; 2] = [row.try_get(0)?, row.try_get(1)?];
    session.run("COMMIT").await?;
    Ok(Some(Epoch { number, last, compacted: compacted.cast_unsigned(), history, log, is_locked }))
}

/// Makes every commit durable, and takes the next epoch for another process, which is to continue after this last entry. The
/// connection must not be used after an error.
pub async fn hand_over(session: &Session, epoch: i64, last: u64) -> Result<i64, Failure> {
    begin_durable(session).await?;
    let next = "UPDATE kvs.writer SET epoch = epoch + 1, taken = epoch + 1, seen = clock_timestamp() \
         WHERE epoch = $1 AND last = $2 RETURNING epoch";
    let Some(row) = session.at_most_one(next, &[&epoch, &last.cast_signed()]).await? else {
        return Err(Failure::damaged("another process has written to it".into()));
    };
    session.run("COMMIT").await?;
    Ok(row.try_get(0)?)
}

/// Begins an incarnation under an epoch, after the last entry. The connection must not be used after an error.
pub async fn fork(session: &Session, epoch: i64, last: u64) -> Result<(Incarnation, History), Failure> {
    begin_durable(session).await?;
    let unchanged = "SELECT epoch = $1 AND last = $2 FROM kvs.writer FOR UPDATE";
    if !session.one(unchanged, &[&epoch, &last.cast_signed()]).await?.try_get(0)? {
        return Err(Failure::damaged("another process has written to it in the meantime".into()));
    }
    let mut history = incarnations::history(session).await?;
    let Some(log) = Identity::read(session).await?.log else {
        return Err(Failure::damaged("the row of kvs.identity has lost the UUID of the log".into()));
    };
    let incarnation = incarnations::begin(session, &history, log, last, "`kvs txlog fork` requested it").await?;
    session.run("COMMIT").await?;
    history.push(incarnation);
    Ok((incarnation, history))
}

/// Begins a transaction that survives a power cut even where others need not, unless `fsync` is off.
pub async fn begin_durable(session: &Session) -> Result<(), Failure> {
    session.run("BEGIN").await?;
    let durably =
        "SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'";
    session.run(durably).await
}

/// Returns the SQL expression for whether another connection holds this lock.
pub fn is_held(lock: i64) -> String {
    format!(
        "EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid <> pg_backend_pid() AND \
         classid = 0 AND objid = {lock} AND objsubid = 1 AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
    )
}

/// Announces a standby to the primary by a lock, once the connection shows only durable entries.
pub async fn stand_by(session: &Session) -> Result<(), Failure> {
    confirm(session).await?;
    session.run(&format!("SELECT pg_advisory_lock_shared({STANDBYS})")).await
}

/// Waits until the synchronous standbys of the database have everything that this connection can read. A database that was
/// restarted shows more than that.
async fn confirm(session: &Session) -> Result<(), Failure> {
    session.run("UPDATE kvs.identity SET log = log").await
}

/// Makes every commit durable, and releases the epoch for other processes.
pub async fn leave(session: &Session, epoch: i64) -> Result<(), Failure> {
    begin_durable(session).await?;
    session.execute("UPDATE kvs.writer SET holder = NULL WHERE epoch = $1", &[&epoch]).await?;
    session.run("COMMIT").await
}

/// Returns whether commits of this connection survive a power cut.
async fn is_durable(session: &Session) -> Result<bool, Failure> {
    let settings = "SELECT current_setting('fsync') <> 'off' AND current_setting('synchronous_commit') <> 'off'";
    Ok(session.one(settings, &[]).await?.try_get(0)?)
}
