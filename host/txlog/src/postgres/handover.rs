//! Handover to another process, which is to continue the log without a wait for a lease.
//!
//! The primary takes the next epoch for that process, in the last transaction that it makes, and writes nothing under it. So
//! while that epoch is the newest, no third process has written: the next process may take the log over, and when it has
//! ended, the former primary may take it back, whether or not the next one has written.
//!
//! Owns: the epoch between the two. Must never know: how the position gets to the other process.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail, ensure};
use kvs_runtime::Task;
use tokio_postgres::Statement;

use super::epoch::{self, Epoch, Holder};
use super::session::{Failure, Kind, Session};
use super::{PostgresLog, Shared, writer};
use crate::remote::queue::End;
use crate::{HandOver, Handed};

/// Timeout of the attempts to take the log back from a database that does not answer: requests wait meanwhile.
const TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_DELAY: Duration = Duration::from_millis(50);

/// The end of a log, and the epoch under which it is continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub epoch: i64,
    pub last: u64,
}

impl Display for Position {
    fn fmt(&self, to: &mut Formatter<'_>) -> fmt::Result {
        write!(to, "epoch {}, sequence {}", self.epoch, self.last)
    }
}

impl FromStr for Position {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers = text.strip_prefix("epoch ").and_then(|rest| rest.split_once(", sequence "));
        let Some((epoch, last)) = numbers else { bail!("{text:?} is no position of a log in PostgreSQL") };
        Ok(Self { epoch: epoch.parse()?, last: last.parse()? })
    }
}

impl HandOver for PostgresLog {
    fn hand_over(&self) -> Result<Handed> {
        let shared = &self.shared;
        let epoch = shared.epoch().context("another process writes the log")?;
        ensure!(shared.breaker.is_closed(), "the database is unavailable");
        let mut running = self.running();
        let running = running.as_mut().context("the log is closed")?;
        let writer = running.writer.take().context("the log is handed over already")?;
        shared.queue.end(End::HandedOver);
        self.handle.block_on(writer.ended());
        if let Some(reason) = shared.watermark.failure() {
            bail!("{reason}");
        }
        match self.handle.block_on(hand_over(shared, epoch)) {
            Ok(position) => Ok(Handed { lock: None, position: position.to_string() }),
            Err(failure) => {
                let taken = self.handle.block_on(take_back(shared, epoch));
                // If it was committed, and the answer was lost, another process has the log now.
                running.writer = Some(taken.with_context(|| failure.to_string())?);
                Err(failure.into())
            }
        }
    }

    fn take_back(&self, handed: Handed) -> Result<()> {
        let Position { epoch, .. } = handed.position.parse()?;
        let mut running = self.running();
        let running = running.as_mut().context("the log is closed")?;
        running.writer = Some(self.handle.block_on(take_back(&self.shared, epoch))?);
        Ok(())
    }
}

async fn hand_over(shared: &Shared, epoch: i64) -> Result<Position, Failure> {
    // That of the writer.
    let kept = shared.idle().take();
    let session = match kept {
        Some(session) => session,
        None => shared.connect_to_write().await?,
    };
    let last = shared.queue.appended();
    Ok(Position { epoch: epoch::hand_over(&session, epoch, last).await?, last })
}

/// Takes the epoch after this one, if it still is the newest, and starts the writer. Otherwise, and when the database does not
/// answer, the log fails.
async fn take_back(shared: &Arc<Shared>, epoch: i64) -> Result<Task> {
    let clock = &shared.env.clock;
    let begun = clock.now();
    let (as_of, taken) = loop {
        let as_of = clock.now();
        match attempt(shared, epoch).await {
            Ok(Some(taken)) => break (as_of, taken),
            Err(Failure { reason, kind: Kind::Damaged }) => {
                shared.step_down();
                bail!("{reason}");
            }
            Err(failure) if clock.elapsed(begun) > TIMEOUT => {
                let error = Error::from(failure).context("it cannot be taken back");
                shared.fail(&error);
                return Err(error);
            }
            Ok(None) | Err(_) => clock.sleep(RETRY_DELAY).await,
        }
    };
    let (epoch, connection) = taken;
    shared.set_epoch(epoch.number);
    shared.set_history(epoch.history.clone());
    shared.queue.follow(epoch.last);
    shared.watermark.advance(epoch.last);
    // Until the first heartbeat says whether there is a standby.
    shared.lease.renew_with(as_of, false, true);
    shared.breaker.succeeded();
    shared.begin();
    Ok(shared.start("log writer", Arc::clone(shared).write(epoch, connection)))
}

/// None when the process that has ended was still heard of meanwhile.
async fn attempt(shared: &Shared, epoch: i64) -> Result<Option<(Epoch, (Session, Statement))>, Failure> {
    let session = shared.connect_to_write().await?;
    let append = writer::prepare(&session).await?;
    let look = Holder::new(true, &shared.env.clock).look(&session).await?;
    if look.epoch != epoch {
        return Err(Failure::damaged(format!("{} has taken it over", look.holder)));
    }
    let taken = epoch::take(&session, &look, shared.url.as_deref(), false).await?;
    Ok(taken.map(|epoch| (epoch, (session, append))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_is_read_back() {
        let position = Position { epoch: 7, last: 1 << 40 };
        assert_eq!(position.to_string().parse::<Position>().ok(), Some(position));
        for text in ["", "epoch 7", "epoch x, sequence 1", "segment 1, offset 2"] {
            assert!(text.parse::<Position>().is_err(), "{text}");
        }
    }
}
