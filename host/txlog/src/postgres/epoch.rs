//! The epoch: who may write the log.
//!
//! Whoever takes it learns the history of the log, and begins an incarnation where entries may have been lost that were
//! acknowledged; both are one transaction, which is durable however little the others need be.
//!
//! Owns: when the epoch is to be had, and how it is taken. Must never know: what is written under it.

use std::time::{Duration, Instant};

use kvs_runtime::Clock;
use tracing::warn;
use uuid::Uuid;

use super::incarnations::{self, Identity, Place};
use super::session::{Failure, Session};
use crate::{History, Incarnation};

/// A writer without a read lease that was not seen for this long has lost its right. So has one whose connection is there.
const UNSEEN: Duration = Duration::from_secs(10);
/// One with a lease has, after so many times the lease, unless it was seen to renew it and has lost its connection.
const LEASES: u32 = 5;

/// Held by the connection of whoever writes.
pub const LOCK: i64 = 0x6b76_7301;
/// Shared by the connections of all that stand by.
pub const STANDBYS: i64 = 0x6b76_7302;

/// Between the name of the holder and its URL, in one column: versions that know of no URL show it as part of the name.
const SERVING: &str = " serving ";

/// The right to write, and what was there when it was taken.
pub struct Epoch {
    pub number: i64,
    pub last: u64,
    pub compacted: u64,
    pub history: History,
    /// The connection holds the advisory lock. It does not where that of the former writer is still there.
    pub is_locked: bool,
}

/// Whoever writes, as it is seen from here.
pub struct Holder {
    standby: bool,
    seen: String,
    since: Instant,
    /// It was seen to renew its lease.
    renews: bool,
    clock: Clock,
}

/// What was seen in one look.
pub struct Look {
    /// The epoch is to be had.
    pub is_free: bool,
    /// The holder is there: its connection is, or it was seen to write.
    pub is_alive: bool,
    /// Its number.
    epoch: i64,
    /// When the holder wrote last.
    seen: String,
    pub holder: String,
    /// URL at which the holder serves clients.
    pub primary: Option<String>,
    /// For how long the holder was not seen.
    pub unseen: Duration,
    /// The last entry of the log.
    pub newest: u64,
    /// The number of incarnations it has.
    pub incarnations: usize,
}

impl Holder {
    /// One that stands by takes nothing from a writer that has merely lost its connection, as all do when the database is
    /// started again: it goes by what it sees itself.
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
            (None, _) => (unseen, !is_locked || unseen >= UNSEEN),
            (Some(_), Some(lease)) if self.standby => {
                let wait = if is_locked || !self.renews { lease * LEASES } else { lease };
                (unseen, unseen >= wait)
            }
            (Some(_), None) if self.standby => (unseen, unseen >= UNSEEN),
            (Some(_), Some(lease)) if !is_locked => (unseen, unseen >= lease),
            // By the clock of the database, since this process has only just begun to look.
            (Some(_), lease) => {
                let unseen = Duration::try_from_secs_f64(ago).unwrap_or_default();
                (unseen, unseen >= UNSEEN || !is_locked && lease.is_none())
            }
        };
        let holder = holder.unwrap_or("another process".into());
        let (holder, primary) = match holder.split_once(SERVING) {
            Some((holder, url)) => (holder.to_owned(), Some(url.to_owned())),
            None => (holder, None),
        };
        if is_free && is_locked {
            warn!("{holder} has not been seen for {unseen:.0?}: it writes no more");
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
/// announced to those who stand by.
pub async fn take(session: &Session, look: &Look, url: Option<&str>) -> Result<Option<Epoch>, Failure> {
    let here = Place::of(session).await?;
    let durable = is_durable(session).await?;
    let is_locked: bool = session.one("SELECT pg_try_advisory_lock($1)", &[&LOCK]).await?.try_get(0)?;
    begin_durable(session).await?;
    // Until the end of the transaction nobody appends, so what is read here is what there is.
    let row = session.one("SELECT holder IS NOT NULL, last, epoch, seen::text FROM kvs.writer FOR UPDATE", &[]).await?;
    // A holder that was seen meanwhile has its lease.
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
        Some(what) => Some(format!("the {what} is another one than that of the last writer")),
        None if is_held && !(durable && identity.durable.unwrap_or(true)) => {
            Some("its writer ended without closing it, and commits need not survive a power cut".into())
        }
        None => None,
    };
    if let Some(cause) = cause {
        history.push(incarnations::begin(session, &history, log, last, &cause).await?);
    }
    let place = if moved.is_some() { here } else { here.or(identity.place) };
    Identity { log: Some(log), place, durable: Some(durable) }.write(session).await?;
    let holder = format!("process {}", std::process::id());
    let take = "UPDATE kvs.writer SET epoch = epoch + 1, taken = epoch + 1, seen = clock_timestamp(), lease = NULL, \
         holder = $1 || coalesce(' at ' || host(inet_client_addr()), '') || $2 RETURNING epoch, compacted";
    let serving = url.map(|url| format!("{SERVING}{url}")).unwrap_or_default();
    let row = session.one(take, &[&holder, &serving]).await?;
    let [number, compacted]: [i64; 2] = [row.try_get(0)?, row.try_get(1)?];
    session.run("COMMIT").await?;
    Ok(Some(Epoch { number, last, compacted: compacted.cast_unsigned(), history, is_locked }))
}

/// Begins an incarnation under an epoch, after its last entry. The connection must not be used after an error.
pub async fn fork(session: &Session, epoch: i64, last: u64) -> Result<(Incarnation, History), Failure> {
    begin_durable(session).await?;
    let unchanged = "SELECT epoch = $1 AND last = $2 FROM kvs.writer FOR UPDATE";
    if !session.one(unchanged, &[&epoch, &last.cast_signed()]).await?.try_get(0)? {
        return Err(Failure::damaged("another process has written it meanwhile".into()));
    }
    let mut history = incarnations::history(session).await?;
    let Some(log) = Identity::read(session).await?.log else {
        return Err(Failure::damaged("the row of kvs.identity has lost the UUID of the log".into()));
    };
    let incarnation = incarnations::begin(session, &history, log, last, "it was asked for").await?;
    session.run("COMMIT").await?;
    history.push(incarnation);
    Ok((incarnation, history))
}

/// Begins a transaction that survives a power cut where all others need not, unless `fsync` is off.
async fn begin_durable(session: &Session) -> Result<(), Failure> {
    session.run("BEGIN").await?;
    let durably =
        "SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'";
    session.run(durably).await
}

/// Whether another connection holds this lock, as an expression.
pub fn is_held(lock: i64) -> String {
    format!(
        "EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid <> pg_backend_pid() AND \
         classid = 0 AND objid = {lock} AND objsubid = 1 AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
    )
}

/// Tells the writer that this connection is of one that stands by, once it can be told what is durable.
pub async fn stand_by(session: &Session) -> Result<(), Failure> {
    confirm(session).await?;
    session.run(&format!("SELECT pg_advisory_lock_shared({STANDBYS})")).await
}

/// Waits until the database's synchronous standbys have everything that can be read on this connection. One that was
/// restarted shows more than that.
async fn confirm(session: &Session) -> Result<(), Failure> {
    session.run("UPDATE kvs.identity SET log = log").await
}

/// Makes everything durable that was committed, and leaves the log to others.
pub async fn leave(session: &Session, epoch: i64) -> Result<(), Failure> {
    begin_durable(session).await?;
    session.execute("UPDATE kvs.writer SET holder = NULL WHERE epoch = $1", &[&epoch]).await?;
    session.run("COMMIT").await
}

/// Whether commits of this connection survive a power cut.
async fn is_durable(session: &Session) -> Result<bool, Failure> {
    let settings = "SELECT current_setting('fsync') <> 'off' AND current_setting('synchronous_commit') <> 'off'";
    Ok(session.one(settings, &[]).await?.try_get(0)?)
}
