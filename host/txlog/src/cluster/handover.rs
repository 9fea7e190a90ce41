//! Handover to another process, which is to continue the log without a wait for a lease.
//!
//! The primary stops once all its frames are durable, and gives the next process the end of the log and the id with which to
//! claim it. While nobody else has claimed the log since, the next process may claim it, and when that has ended, the former
//! primary may claim it again, whether or not the next one has written. A standby that claims it in between is the primary,
//! as after any other silence.
//!
//! Owns: who may claim the log without a wait. Must never know: how the position gets to the other process.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context, Error, Result, bail, ensure};
use kvs_runtime::Task;
use uuid::Uuid;

use super::follower::Follower;
use super::frame::Tip;
use super::reader::Failure;
use super::{ClusterLog, Shared};
use crate::remote::queue::End;
use crate::{HandOver, Handed};

/// Timeout of the attempts to claim the log again: requests wait meanwhile. The engine elects a leader in less.
const TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_DELAY: Duration = Duration::from_millis(50);

/// The end of a log, and the id with which it is claimed next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub position: u64,
    pub epoch: u32,
    pub id: Uuid,
}

impl Display for Position {
    fn fmt(&self, to: &mut Formatter<'_>) -> fmt::Result {
        write!(to, "frame {} epoch {} id {}", self.position, self.epoch, self.id)
    }
}

impl FromStr for Position {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let words: Vec<_> = text.split(' ').collect();
        let ["frame", position, "epoch", epoch, "id", id] = words[..] else {
            bail!("{text:?} is no position of a log in NATS");
        };
        Ok(Self { position: position.parse()?, epoch: epoch.parse()?, id: id.parse()? })
    }
}

impl HandOver for ClusterLog {
    fn hand_over(&self) -> Result<Handed> {
        let shared = &self.shared;
        ensure!(shared.queue.begun(), "another process writes the log");
        ensure!(shared.breaker.is_closed(), "the engine of the log is unavailable");
        let id = shared.env.random.uuid()?;
        let mut running = self.running();
        let running = running.as_mut().context("the log is closed")?;
        let writer = running.task.take().context("the log is handed over already")?;
        shared.queue.end(End::HandedOver);
        self.handle.block_on(writer.ended());
        if let Some(reason) = shared.watermark.failure() {
            bail!("{reason}");
        }
        let Tip { position, epoch, .. } = shared.left()?;
        Ok(Handed { lock: None, position: Position { position, epoch, id }.to_string() })
    }

    fn take_back(&self, handed: Handed) -> Result<()> {
        let mut running = self.running();
        let running = running.as_mut().context("the log is closed")?;
        running.task = Some(self.handle.block_on(take_back(&self.shared, handed.position.parse()?))?);
        Ok(())
    }
}

impl Shared {
    /// Notes where the writer has ended.
    pub fn leave(&self, tip: Tip) {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = Some(tip);
    }

    fn left(&self) -> Result<Tip> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).context("the writer has not ended")
    }
}

/// Claims the log, unless a third process has, and starts the writer. Otherwise, and when the engine does not answer, the log
/// fails.
async fn take_back(shared: &Arc<Shared>, handed: Position) -> Result<Task> {
    let clock = &shared.env.clock;
    let begun = clock.now();
    let mut follower = Follower::of_handed_over(shared, shared.left()?, handed);
    let writer = loop {
        let step = follower.step(shared).await;
        if follower.is_superseded() {
            shared.step_down();
            bail!("{} has claimed it", follower.name());
        }
        let reason = match step {
            Ok(Some(writer)) => break writer,
            Ok(None) => "it cannot be claimed".to_owned(),
            Err(Failure::Silent(reason)) => {
                clock.sleep(RETRY_DELAY).await;
                reason
            }
            Err(failure @ (Failure::Gone(_) | Failure::Damaged(_) | Failure::Dropped(_))) => {
                let error = failure.into();
                shared.fail(&error);
                return Err(error);
            }
        };
        if clock.elapsed(begun) > TIMEOUT {
            let error = Error::msg(reason);
            shared.fail(&error);
            return Err(error);
        }
    };
    shared.follow(follower.sequence());
    shared.breaker.succeeded();
    shared.begin();
    let writing = Arc::clone(shared);
    Ok(shared.start("log writer", async move { writer.run(&writing).await }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_is_read_back() {
        let position = Position { position: 1 << 40, epoch: 7, id: Uuid::from_u128(9) };
        assert_eq!(position.to_string().parse::<Position>().ok(), Some(position));
        for text in ["", "frame 7", "frame 1 epoch 2 id 3", "epoch 1, sequence 2"] {
            assert!(text.parse::<Position>().is_err(), "{text}");
        }
    }
}
