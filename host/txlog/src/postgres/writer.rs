//! The writer: the one task that writes the log, batch by batch.
//!
//! Owns: the epoch, and what is known of the batch under way. A batch is one statement, one round trip, one transaction:
//! it moves `last` in `kvs.writer` from the entry before it, which is further away where an incarnation begins, to its own last
//! one, if the epoch is still this writer's, and only then are its rows there. So it is never there twice, whoever asked for it how often, and never without the one
//! before it. When a connection is lost, `epoch` and `last` tell whether it was committed; a statement that the server is
//! still at holds the row, and whoever looks again by repeating it waits for that.
//!
//! What is merely read can be on one machine only: a database that was restarted shows transactions that its synchronous
//! standbys do not have yet. So whoever concludes that a batch is durable does so from a statement that writes: it is
//! answered when the standbys have everything up to it.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use tokio::time::timeout;
use tokio_postgres::Statement;
use tokio_postgres::types::ToSql;

use super::Shared;
use super::batch::Batch;
use super::epoch::{self, Epoch};
use super::queue::{Company, Work};
use super::session::{Failure, Kind, Session};

/// How long the end waits for a database that is away.
const FAREWELL: Duration = Duration::from_secs(10);

/// How long a batch waits for company. Less cannot be had from a timer, and commits that fast are better not waited for.
const PATIENCE: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_millis(5);

/// $1 epoch, $2 the entry before, $3 the last, $4 the first, then the columns.
const APPEND: &str = "WITH writer AS (UPDATE kvs.writer SET last = $3, seen = clock_timestamp() WHERE epoch = $1 AND last = $2 \
     RETURNING true) INSERT INTO kvs.transactions (sequence, time, event_type, key, value, metadata, expires) \
     SELECT $4 + entry.number - 1, entry.time, entry.event_type, entry.key, entry.value, entry.metadata::json, entry.expires \
     FROM writer, unnest($5::bigint[], $6::smallint[], $7::bytea[], $8::bytea[], $9::text[], $10::bigint[]) WITH ORDINALITY \
     AS entry (time, event_type, key, value, metadata, expires, number)";

pub struct Writer {
    epoch: i64,
    /// $1 epoch, $2 the lease in milliseconds, or null. Gives the newest entry, when the epoch is still this one, and whether
    /// another process stands by.
    beat: String,
    held: Option<Held>,
    /// The newest entry, as far as it is known. A log that was taken over may not have been taken in up to here.
    last: u64,
    /// The lease is to be in the row.
    has_standby: bool,
    /// When the last heartbeat was sent. None when the next is due.
    beaten: Option<Instant>,
    company: Company,
}

/// The connection of the writer.
struct Held {
    session: Session,
    append: Statement,
    /// It holds the advisory lock.
    is_locked: bool,
}

/// What became of a batch.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Durable,
    /// Somebody else has a newer epoch.
    Lost,
}

impl Writer {
    pub fn new(epoch: &Epoch, (session, append): (Session, Statement)) -> Self {
        let beat = format!(
            "UPDATE kvs.writer SET seen = clock_timestamp(), lease = $2 WHERE epoch = $1 RETURNING last, {}",
            epoch::is_held(epoch::STANDBYS)
        );
        Self {
            epoch: epoch.number,
            beat,
            held: Some(Held { session, append, is_locked: epoch.is_locked }),
            last: epoch.last,
            has_standby: false,
            beaten: None,
            company: Company::default(),
        }
    }

    /// Writes until the log is closed, fails, or is somebody else's.
    pub async fn run(mut self, shared: Arc<Shared>) {
        loop {
            let pause = shared.lease.pause();
            let rest =
                self.beaten.map_or(Duration::ZERO, |beaten| pause.saturating_sub(shared.env.clock.elapsed(beaten)));
            // Also where there is always something to write. A call that failed is made again at once.
            let (idle, is_due) =
                if shared.breaker.is_well() { (rest, rest.is_zero()) } else { (Duration::ZERO, false) };
            if is_due {
                if !self.claim(&shared).await {
                    return;
                }
                continue;
            }
            match shared.queue.take(idle, self.company).await {
                Work::Write(batch) => {
                    if !self.commit(&shared, &batch).await {
                        return;
                    }
                }
                Work::Idle => {
                    if !self.claim(&shared).await {
                        return;
                    }
                }
                Work::Closed => {
                    // Its absence is found out soon, said or not.
                    let _ = timeout(FAREWELL, self.leave(&shared)).await;
                    return;
                }
            }
        }
    }

    /// Renews the claim to the log while nothing is being written. False when it is lost.
    async fn claim(&mut self, shared: &Shared) -> bool {
        let beat = match self.beat(shared).await {
            Ok(Some(last)) if last != self.last => Err(other_end(last, self.last)),
            beat => beat.map(|last| last.is_some()),
        };
        self.heard(shared, beat).await
    }

    /// Writes one batch, however long that takes. False when it never will be written.
    async fn commit(&mut self, shared: &Shared, batch: &Batch) -> bool {
        let clock = &shared.env.clock;
        let mut closing = None;
        loop {
            let begun = clock.now();
            shared.breaker.try_again();
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
                self.company = company(batch.appends, took);
                metrics.batch.observe(batch.len());
                metrics.written.add(batch.bytes);
                shared.queue.written(batch);
            }
            if !self.heard(shared, attempt.map(|outcome| outcome == Outcome::Durable)).await {
                return false;
            }
            if durable {
                return true;
            }
            if shared.queue.ended().is_some() && clock.elapsed(*closing.get_or_insert_with(|| clock.now())) > FAREWELL {
                let reason = shared.breaker.reason().unwrap_or_default();
                shared.fail(&anyhow!("entries from {} on were not known to be written: {reason}", batch.first));
                return false;
            }
        }
    }

    /// What a call means for the log: waits before the next when it failed. `Ok(false)` is that the epoch was lost, and so
    /// is the end.
    async fn heard(&mut self, shared: &Shared, called: Result<bool, Failure>) -> bool {
        match called {
            Ok(true) => shared.breaker.succeeded(),
            Ok(false) => {
                shared.step_down();
                return false;
            }
            Err(failure) => {
                // What fails twice may do so for a reason that only this session has.
                if failure.is_silence() || !shared.breaker.is_well() {
                    self.held = None;
                }
                match failure.kind {
                    Kind::Full => shared.queue.set_full(),
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

    /// Tries once to have a batch written.
    async fn attempt(&mut self, shared: &Shared, batch: &Batch) -> Result<Outcome, Failure> {
        let [before, first, last] = [batch.before, batch.first, batch.last()].map(u64::cast_signed);
        let epoch = self.epoch;
        let Held { session, append, .. } = self.held(shared).await?;
        let with: [&(dyn ToSql + Sync); 10] = [
            &epoch,
            &before,
            &last,
            &first,
            &batch.times,
            &batch.types,
            &batch.keys,
            &batch.values,
            &batch.metadata,
            &batch.expires,
        ];
        if session.execute(&*append, &with).await? > 0 {
            return Ok(Outcome::Durable);
        }
        shared.metrics.lookups.add(1);
        match self.beat(shared).await? {
            None => Ok(Outcome::Lost),
            Some(newest) if newest == batch.last() => Ok(Outcome::Durable),
            Some(newest) => Err(other_end(newest, batch.before)),
        }
    }

    /// Says that it is there, and gives the newest entry of the log. None when somebody else has a newer epoch.
    async fn beat(&mut self, shared: &Shared) -> Result<Option<u64>, Failure> {
        shared.breaker.try_again();
        let (epoch, has_standby) = (self.epoch, self.has_standby);
        let lease = has_standby.then(|| i64::try_from(shared.lease.time.as_millis()).unwrap_or(i64::MAX));
        let beat = self.beat.clone();
        let Held { session, is_locked, .. } = self.held(shared).await?;
        shared.conditions.check(session).await?;
        if !*is_locked {
            let locked = session.one("SELECT pg_try_advisory_lock($1)", &[&epoch::LOCK]).await?;
            *is_locked = locked.try_get(0)?;
        }
        let sent = shared.env.clock.now();
        if let Some(row) = session.at_most_one(&*beat, &[&epoch, &lease]).await? {
            self.has_standby = row.try_get(1)?;
            shared.lease.renew_with(sent, has_standby, self.has_standby);
            // A standby that came or went changes what is in the row.
            self.beaten = (self.has_standby == has_standby).then_some(sent);
            return Ok(Some(row.try_get::<_, i64>(0)?.cast_unsigned()));
        }
        let newest: i64 = session.one("SELECT epoch FROM kvs.writer", &[]).await?.try_get(0)?;
        if newest < epoch {
            let reason = format!("its epoch is {newest}, where {epoch} was taken: the database was set back");
            return Err(Failure::damaged(reason));
        }
        Ok(None)
    }

    /// The connection, made anew when there is none.
    async fn held(&mut self, shared: &Shared) -> Result<&mut Held, Failure> {
        let held = match self.held.take() {
            Some(held) => held,
            None => {
                shared.metrics.connections.add(1);
                let session = shared.connect_to_write().await?;
                let append = prepare(&session).await?;
                // The lock is lost with the connection before, unless the server has not noticed yet: a heartbeat takes it.
                Held { session, append, is_locked: false }
            }
        };
        Ok(self.held.insert(held))
    }

    /// Lets others write.
    async fn leave(&mut self, shared: &Shared) -> Result<(), Failure> {
        let epoch = self.epoch;
        let Held { session, .. } = self.held(shared).await?;
        epoch::leave(session, epoch).await
    }
}

/// The log ends elsewhere than where this process wrote last.
fn other_end(newest: u64, written: u64) -> Failure {
    Failure::damaged(format!(
        "its newest entry is {newest}, where {written} was written last: the database was set back, or others write to it"
    ))
}

/// What the batch after one of so many appends waits for. Who was answered asks again soon. Were the first not to wait, it
/// would be committed alone, and all others after it: twice the commits.
fn company(appends: u64, took: Duration) -> Company {
    let patience = took / 2;
    if patience < *PATIENCE.start() {
        Company::default()
    } else {
        Company { appends, patience: patience.min(*PATIENCE.end()) }
    }
}

/// The statement that appends. An error tells that the tables are not what they should be.
pub async fn prepare(session: &Session) -> Result<Statement, Failure> {
    session.prepare(APPEND).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_waits_half_as_long_as_the_one_before_took_where_that_is_worth_it_and_not_for_long() {
        let after = |milliseconds| company(64, Duration::from_millis(milliseconds));
        assert_eq!((after(0), after(1)), (Company::default(), Company::default()));
        let waits = |milliseconds| Company { appends: 64, patience: Duration::from_millis(milliseconds) };
        assert_eq!((after(2), after(6), after(1_000)), (waits(1), waits(3), waits(5)));
    }
}
