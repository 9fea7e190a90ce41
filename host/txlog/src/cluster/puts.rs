//! Putting of frames one after the other, where no other process does: into a log that is restored, and into a snapshot.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use kvs_runtime::Env;

use super::engine::{Engine, FULL, Put, REFUSED};

/// Number of attempts to put a frame, a second apart: an engine elects a leader in less.
const ATTEMPTS: u32 = 30;
const RETRY_DELAY: Duration = Duration::from_secs(1);

pub struct Puts<'p> {
    pub engine: &'p dyn Engine,
    pub env: &'p Env,
    /// Position of the last frame.
    pub position: u64,
}

impl Puts<'_> {
    /// Puts a frame after those so far, where it is not there yet after a lost answer.
    pub async fn put(&mut self, frame: Bytes) -> Result<()> {
        let position = self.position + 1;
        let mut reason = String::new();
        for _ in 0..ATTEMPTS {
            let outcome = match self.engine.put(self.position, frame.clone()).await {
                Put::Durable => Ok(()),
                Put::Full => bail!(FULL),
                Put::Refused => Err(REFUSED.to_owned()),
                Put::Unknown(reason) => Err(reason),
            };
            let is_there = match outcome {
                Ok(()) => true,
                Err(failed) => {
                    reason = failed;
                    match self.engine.read(position, Duration::ZERO).await.unwrap_or_default().first() {
                        Some(found) if *found != frame => bail!("another process writes to it"),
                        found => found.is_some(),
                    }
                }
            };
            if is_there {
                self.position = position;
                return Ok(());
            }
            self.env.clock.sleep(RETRY_DELAY).await;
        }
        Err(anyhow!(reason)).with_context(|| format!("cannot put frame {position}"))
    }
}
