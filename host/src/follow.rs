//! Following a log that another process writes, until this one does.
//!
//! Owns: the order in which news reaches the store, the log's own reckoning and those who watch. Must never know: how it is
//! found out, or which request a shard handles.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use kvs_runtime::Clock;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::warn;

use crate::admin::ReadOnly;
use crate::guest::Shards;
use kvs_txlog::change_feed::ChangeFeed;
use kvs_txlog::{Condition, Forgotten, Handed, News, Standby};

/// The pause before the log is read again when that failed.
const PAUSE: Duration = Duration::from_secs(1);
/// Time for which new entries may fail to be applied before this server is not ready: most failures pass.
const PATIENCE: Duration = Duration::from_secs(5);

/// A log that is followed, and up to when everything of it was taken in.
pub struct Followed {
    log: Arc<dyn Standby>,
    /// None since this process is primary.
    as_of: watch::Sender<Option<Instant>>,
    /// Since when new entries cannot be applied, and why.
    failure: Mutex<Option<(Instant, String)>>,
    clock: Clock,
}

impl Followed {
    /// Takes what was built for everything that was known of the log then.
    pub fn new(log: Arc<dyn Standby>, clock: Clock) -> Self {
        let as_of = log.news().borrow().as_of;
        Self { log, as_of: watch::Sender::new(Some(as_of)), failure: Mutex::default(), clock }
    }

    /// The time up to which everything was taken in. None since this process is primary.
    pub fn as_of(&self) -> Option<Instant> {
        *self.as_of.borrow()
    }

    /// URL of the primary, where it has announced one.
    pub fn primary(&self) -> Option<String> {
        self.log.news().borrow().primary.clone()
    }

    /// Condition of a server that applies what another one writes. One that cannot is no replica, and after a takeover it takes no
    /// writes.
    pub fn condition(&self) -> Condition {
        let failure = self.failure().clone().map(|(since, reason)| (self.clock.elapsed(since), reason));
        match failure.filter(|(time, _)| *time >= PATIENCE) {
            Some((time, reason)) => {
                Condition::Unfit(format!("cannot apply new entries of the log for {time:.0?}: {reason}"))
            }
            None => Condition::Well,
        }
    }

    /// Records whether entries could be applied. The time is that of the first of several failures.
    fn note(&self, applied: &Result<()>) {
        let mut failure = self.failure();
        let since = failure.take().map_or_else(|| self.clock.now(), |(since, _)| since);
        *failure = applied.as_ref().err().map(|error| (since, format!("{error:#}")));
    }

    fn failure(&self) -> MutexGuard<'_, Option<(Instant, String)>> {
        // Every change under this lock is whole.
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over from a primary that has closed the log for this process.
    pub fn receive(&self, handed: Handed) {
        self.log.receive(handed);
    }

    /// Waits until at most this many entries of the log are missing.
    pub async fn caught_up(&self, few: u64) {
        let news = self.log.news();
        let lag = || self.log.history().entries(self.log.appended(), news.borrow().newest);
        // Not when news arrives: its entries are missing then, and under load these are never few. The sender is in `self`.
        let _ = self.as_of.subscribe().wait_for(|_| lag() <= few).await;
    }

    /// Ends when this process is primary.
    pub async fn promoted(&self) {
        // The sender is in `self`.
        let _ = self.as_of.subscribe().wait_for(Option::is_none).await;
    }
}

/// Takes in what the other process writes, and all that it has written when the log becomes this process's.
pub async fn run(
    followed: Arc<Followed>,
    changes: Arc<ChangeFeed>,
    shards: Arc<Shards>,
    read_only: Arc<ReadOnly>,
) -> Result<()> {
    let log = &*followed.log;
    let mut news = log.news();
    loop {
        let News { newest, holder, as_of, .. } = news.borrow_and_update().clone();
        while log.appended() < newest {
            let applied = take_in(log, &changes, &shards).await;
            followed.note(&applied);
            if let Err(error) = applied {
                warn!("cannot apply new entries of the log: {error:#}");
                sleep(PAUSE).await;
            }
        }
        if holder.is_none() {
            read_only.resume()?;
            log.begin()?;
            shards.promoted();
            followed.as_of.send_replace(None);
            return Ok(());
        }
        followed.as_of.send_replace(Some(as_of));
        news.changed().await?;
    }
}

/// The store first, so that a client that received a change can read it there; then the log, so that a watch that begins now
/// reads there what the others receive last.
async fn take_in(log: &dyn Standby, changes: &ChangeFeed, shards: &Shards) -> Result<()> {
    match changes.read(log.appended(), |_| true).await {
        Ok(past) => {
            shards.take_in(&past.changes, past.until).await?;
            log.follow(past.until);
            changes.publish(past);
        }
        // Compaction has left out what only a replay from the start makes up for.
        Err(error) => {
            let Forgotten { newest, .. } = error.downcast()?;
            warn!("rebuilding the store: the log was compacted up to sequence {newest} while it was followed");
            shards.rebuild().await?;
            log.follow(newest);
            changes.dismiss();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt;
    use kvs_runtime::Env;
    use kvs_txlog::file::{DEFAULT_SEGMENT_BYTES, Durability, FileLog, Options, StandbyLog};
    use kvs_txlog::{Event, TransactionLog};
    use tempfile::TempDir;

    use super::*;

    #[tokio::test]
    async fn standby_is_caught_up_once_news_is_applied() {
        let data = TempDir::new().unwrap();
        let options = Options {
            data: data.path().to_owned(),
            segment_bytes: DEFAULT_SEGMENT_BYTES,
            group_bytes: 1 << 20,
            durability: Durability::Os,
            retain: Duration::ZERO,
            advertise: None,
            env: Env::real(),
        };
        let primary = FileLog::open(options.clone()).unwrap();
        let standby = Arc::new(StandbyLog::open(options, |_| ()).unwrap());
        let followed = Followed::new(standby.clone(), Clock::system());
        assert!(followed.caught_up(0).now_or_never().is_some());
        let newest = primary.append(0, &[Event::Delete("a".to_owned())]).unwrap();
        standby.news().wait_for(|news| news.newest == newest).await.unwrap();
        let mut caught_up = pin!(followed.caught_up(0));
        assert!(caught_up.as_mut().now_or_never().is_none());
        standby.follow(newest);
        followed.as_of.send_replace(Some(Instant::now()));
        assert!(caught_up.now_or_never().is_some(), "it waits for other news");
    }
}
