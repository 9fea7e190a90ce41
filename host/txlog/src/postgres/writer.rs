//! The writer: the single task that writes the log, batch by batch.
//!
//! Owns: the epoch, and the outcome of the batch in flight. A batch is one statement, one round trip, one transaction: it
//! moves `last` in `kvs.writer` from the entry before it (which is further away where an incarnation begins) to its own last
//! entry, if the epoch is still this writer's, and inserts its rows only then. So it is idempotent, however often it is
//! repeated, and never committed without its predecessor. When a connection is lost, `epoch` and `last` show whether it was
//! committed; a statement that the server still executes holds the row, and a repeated statement waits for it.
//!
//! A row that was merely read can be on one machine only: a database that was restarted shows transactions that its
//! synchronous standbys do not have yet. So the writer concludes that a batch is durable only from a statement that writes,
//! which completes when the standbys have everything up to it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use tokio::time::timeout;
use tokio_postgres::Statement;
use tokio_postgres::types::ToSql;

use super::Shared;
use super::batch::Columns;
use super::epoch::{self, Epoch};
use super::session::{Failure, Kind, Session};
use crate::remote::queue::{Batch, End, WriterCommand};

/// Number of heartbeats per lease, with a standby.
const HEARTBEATS: u32 = 4;
/// Timeout of a shutdown while the database is unavailable.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// Appends a batch. $1 epoch, $2 the entry before, $3 the last, $4 the first, then the columns.
const APPEND: &str = "WITH writer AS (UPDATE kvs.writer SET last = $3, seen = clock_timestamp() WHERE epoch = $1 AND last = $2 \
     RETURNING true) INSERT INTO kvs.transactions (sequence, time, event_type, key, value, metadata, expires) \
     SELECT $4 + entry.number - 1, entry.time, entry.event_type, entry.key, entry.value, entry.metadata::json, entry.expires \
     FROM writer, unnest($5::bigint[], $6::smallint[], $7::bytea[], $8::bytea[], $9::text[], $10::bigint[]) WITH ORDINALITY \
     AS entry (time, event_type, key, value, metadata, expires, number)";

pub struct Writer {
    epoch: i64,
    /// Heartbeat statement: $1 epoch, $2 the lease in milliseconds, or null. Returns the newest entry, if the epoch is still
    /// this one, and whether there is a standby.
    heartbeat: String,
    connection: Option<Connection>,
    /// The newest known entry. After a failover it may not have been applied yet.
    last: u64,
    /// There is a standby, so the lease belongs in the row.
    has_standby: bool,
    /// Time at which the last heartbeat was sent. None when the next is due.
    last_heartbeat: Option<Instant>,
}

/// The connection of the writer.
struct Connection {
    session: Session,
    append: Statement,
    /// The session holds the advisory lock.
    is_locked: bool,
}

/// Outcome of a batch.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Durable,
    /// Another process has a newer epoch.
    Fenced,
}

impl Writer {
    pub fn new(epoch: &Epoch, (session, append): (Session, Statement)) -> Self {
        let heartbeat = format!(
            "UPDATE kvs.writer SET seen = clock_timestamp(), lease = $2 WHERE epoch = $1 RETURNING last, {}",
            epoch::is_held(epoch::STANDBYS)
        );
        Self {
            epoch: epoch.number,
            heartbeat,
            connection: Some(Connection { session, append, is_locked: epoch.is_locked }),
            last: epoch.last,
            has_standby: false,
            last_heartbeat: None,
        }
    }

    /// Writes until the log is closed, fails, or is taken over.
    pub async fn run(mut self, shared: Arc<Shared>) {
        loop {
            let pause = shared.lease.time / HEARTBEATS;
            let rest =
                self.last_heartbeat.map_or(Duration::ZERO, |sent| pause.saturating_sub(shared.env.clock.elapsed(sent)));
            // Heartbeats are due even under a constant load of writes. A failed call is retried at once.
            let (idle, is_due) =
                if shared.breaker.is_well() { (rest, rest.is_zero()) } else { (Duration::ZERO, false) };
            if is_due {
                if !self.claim(&shared).await {
                    return;
                }
                continue;
            }
            match shared.queue.take(idle).await {
                WriterCommand::Write(batch) => {
                    if !self.commit(&shared, &batch).await {
                        return;
                    }
                }
                WriterCommand::Idle => {
                    if !self.claim(&shared).await {
                        return;
                    }
                }
                WriterCommand::Closed if shared.queue.ended() == Some(End::HandedOver) => {
                    *shared.idle() = self.connection.map(|connection| connection.session);
                    return;
                }
                WriterCommand::Closed => {
                    // On failure the epoch expires.
                    let _ = timeout(SHUTDOWN_TIMEOUT, self.release(&shared)).await;
                    return;
                }
            }
        }
    }

    /// Renews the claim to the log while nothing is written. Returns false when the epoch is lost.
    async fn claim(&mut self, shared: &Shared) -> bool {
        let renewed = match self.heartbeat(shared).await {
            Ok(Some(last)) if last != self.last => Err(other_end(last, self.last)),
            renewed => renewed.map(|last| last.is_some()),
        };
        self.on_result(shared, renewed).await
    }

    /// Writes one batch, with retries for as long as it takes. Returns false when it never will be written.
    async fn commit(&mut self, shared: &Shared, batch: &Batch<Columns>) -> bool {
        let clock = &shared.env.clock;
        let mut closing = None;
        loop {
            let begun = clock.now();
            shared.breaker.on_attempt();
            let attempt = self.attempt(shared, batch).await;
            let durable = matches!(attempt, Ok(Outcome::Durable));
            if durable {
                self.last = batch.last();
                shared.lease.renew(begun);
                shared.watermark.advance(batch.last());
                let metrics = &shared.metrics;
                metrics.append.observe_time(clock.elapsed(batch.begun));
                let took = clock.elapsed(begun);
                metrics.write.observe_time(took);
                metrics.batch.observe(batch.len);
                metrics.written.add(batch.bytes);
                shared.queue.written(batch, took);
            }
            if !self.on_result(shared, attempt.map(|outcome| outcome == Outcome::Durable)).await {
                return false;
            }
            if durable {
                return true;
            }
            if shared.queue.ended().is_some()
                && clock.elapsed(*closing.get_or_insert_with(|| clock.now())) > SHUTDOWN_TIMEOUT
            {
                let reason = shared.breaker.reason().unwrap_or_default();
                shared.fail(&anyhow!("the outcome of entries from sequence {} on is unknown: {reason}", batch.first));
                return false;
            }
        }
    }

    /// Handles the result of a call: backs off after a failure. `Ok(false)` means that the epoch is lost. Returns false when
    /// the writer must end.
    async fn on_result(&mut self, shared: &Shared, called: Result<bool, Failure>) -> bool {
        match called {
            Ok(true) => shared.breaker.succeeded(),
            Ok(false) => {
                shared.step_down();
                return false;
            }
            Err(failure) => {
                // A repeated failure may be due to this session.
                if failure.is_silence() || !shared.breaker.is_well() {
                    self.connection = None;
                }
                match failure.kind {
                    Kind::Full => shared.queue.set_full(true),
                    Kind::Silent | Kind::Refused => {}
                    Kind::Damaged => {
                        shared.fail(&anyhow!("{failure}"));
                        return false;
                    }
                }
                shared.env.clock.sleep(shared.breaker.failed(&failure.reason)).await;
            }
        }
        true
    }

    /// Makes one attempt to write a batch.
    async fn attempt(&mut self, shared: &Shared, batch: &Batch<Columns>) -> Result<Outcome, Failure> {
        let [before, first, last] = [batch.before, batch.first, batch.last()].map(u64::cast_signed);
        let epoch = self.epoch;
        let Connection { session, append, .. } = self.connection(shared).await?;
        let with: [&(dyn ToSql + Sync); 10] = [
            &epoch,
            &before,
            &last,
            &first,
            &batch.content.times,
            &batch.content.types,
            &batch.content.keys,
            &batch.content.values,
            &batch.content.metadata,
            &batch.content.expires,
        ];
        if session.execute(&*append, &with).await? > 0 {
            return Ok(Outcome::Durable);
        }
        shared.metrics.lookups.add(1);
        match self.heartbeat(shared).await? {
            None => Ok(Outcome::Fenced),
            Some(newest) if newest == batch.last() => Ok(Outcome::Durable),
            Some(newest) => Err(other_end(newest, batch.before)),
        }
    }

    /// Sends a heartbeat, and returns the newest entry of the log. None when another process has a newer epoch.
    async fn heartbeat(&mut self, shared: &Shared) -> Result<Option<u64>, Failure> {
        shared.breaker.on_attempt();
        let (epoch, has_standby) = (self.epoch, self.has_standby);
        let lease = has_standby.then(|| i64::try_from(shared.lease.time.as_millis()).unwrap_or(i64::MAX));
        let heartbeat = self.heartbeat.clone();
        let Connection { session, is_locked, .. } = self.connection(shared).await?;
        shared.conditions.check(session).await?;
        if !*is_locked {
            let locked = session.one("SELECT pg_try_advisory_lock($1)", &[&epoch::LOCK]).await?;
            *is_locked = locked.try_get(0)?;
        }
        let sent = shared.env.clock.now();
        if let Some(row) = session.at_most_one(&*heartbeat, &[&epoch, &lease]).await? {
            self.has_standby = row.try_get(1)?;
            shared.lease.renew_with(sent, has_standby, self.has_standby);
            // If a standby came or went, the next heartbeat updates the row at once.
            self.last_heartbeat = (self.has_standby == has_standby).then_some(sent);
            return Ok(Some(row.try_get::<_, i64>(0)?.cast_unsigned()));
        }
        let newest: i64 = session.one("SELECT epoch FROM kvs.writer", &[]).await?.try_get(0)?;
        if newest < epoch {
            let reason = format!(
                "its epoch is {newest}, but this process took {epoch}: the database was rolled back, by a restore or a failover"
            );
            return Err(Failure::damaged(reason));
        }
        Ok(None)
    }

    /// Returns the connection, and reconnects if there is none.
    async fn connection(&mut self, shared: &Shared) -> Result<&mut Connection, Failure> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                shared.metrics.connections.add(1);
                let session = shared.connect_to_write().await?;
                let append = prepare(&session).await?;
                // The lock went with the previous connection, once the server notices: a heartbeat takes it again.
                Connection { session, append, is_locked: false }
            }
        };
        Ok(self.connection.insert(connection))
    }

    /// Releases the epoch for other processes.
    async fn release(&mut self, shared: &Shared) -> Result<(), Failure> {
        let epoch = self.epoch;
        let Connection { session, .. } = self.connection(shared).await?;
        epoch::leave(session, epoch).await
    }
}

/// Returns the error for a log that does not end with the last entry of this process.
fn other_end(newest: u64, written: u64) -> Failure {
    Failure::damaged(format!(
        "its newest entry is {newest}, but this process wrote up to {written}: the database was rolled back, or other programs write to it"
    ))
}

/// Prepares the statement that appends, which fails if the tables have an unexpected shape.
pub async fn prepare(session: &Session) -> Result<Statement, Failure> {
    session.prepare(APPEND).await
}
