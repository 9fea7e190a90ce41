//! Following a log that another process writes, until this one does.
//!
//! Owns: the order in which news reaches the store, the log's own reckoning and those who watch. Must never know: how it is
//! found out, or whose turn it is in a shard.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::time::sleep;
use tracing::warn;

use crate::guest::Shards;
use kvs_txlog::change_feed::ChangeFeed;
use kvs_txlog::{Forgotten, News, Standby};

/// The pause before the log is read again when that failed.
const PAUSE: Duration = Duration::from_secs(1);

/// Takes in what the other process writes, and all that it has written when the log becomes this process's.
pub async fn run(log: Arc<dyn Standby>, changes: Arc<ChangeFeed>, shards: Arc<Shards>) -> Result<()> {
    let mut news = log.news();
    loop {
        let News { newest, holder, .. } = news.borrow_and_update().clone();
        while log.appended() < newest {
            if let Err(error) = take_in(&*log, &changes, &shards).await {
                warn!("what is new in the log cannot be taken in: {error:#}");
                sleep(PAUSE).await;
            }
        }
        if holder.is_none() {
            log.begin()?;
            shards.promoted();
            return Ok(());
        }
        news.changed().await?;
    }
}

/// The store first, so that whoever was told of a change finds it there; then the log, so that whoever begins to watch reads
/// there what the others are told at last.
async fn take_in(log: &dyn Standby, changes: &ChangeFeed, shards: &Shards) -> Result<()> {
    match changes.read(log.appended(), |_| true).await {
        Ok(past) => {
            shards.take_in(&past.changes, past.until).await?;
            log.follow(past.until);
            changes.tell(past);
        }
        // Compaction has left out what only a replay from the start makes up for.
        Err(error) => {
            let Forgotten { newest, .. } = error.downcast()?;
            warn!("the store is built once more: up to sequence {newest} the log was compacted under it");
            shards.rebuild().await?;
            log.follow(newest);
            changes.dismiss();
        }
    }
    Ok(())
}
