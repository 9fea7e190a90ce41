//! Standing by: following a log that another process writes, and writing it when that one is gone.
//!
//! Owns: what a standby is promised. Must never know: how it is found out who writes, or who applies the entries.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::TransactionLog;

/// A log that another process writes, until this one does. Until then it is read-only, and its end is what was followed.
///
/// Whoever serves from it waits for [`News`], reads the new entries with [`TransactionLog::replay`], applies them, and says so
/// with [`Standby::follow`]; after the last of them, when there is no holder, [`Standby::begin`].
pub trait Standby: TransactionLog {
    /// What there is to follow; changes for as long as another process writes.
    fn news(&self) -> watch::Receiver<News>;

    /// The entries up to this sequence were applied.
    fn follow(&self, sequence: u64);

    /// All entries were applied, and the log is this process's: from now on it takes appends.
    fn begin(&self) -> Result<()>;
}

/// Longest wait for a look at the end of the log. A log that takes longer for it is out of reach.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);

/// What a standby knows of the log.
#[derive(Clone, Debug)]
pub struct News {
    /// The newest durable sequence.
    pub newest: u64,
    /// Who writes. None when that is this process, or will be as soon as it has applied everything.
    pub holder: Option<String>,
    /// URL at which the holder serves clients, where it has announced one.
    pub primary: Option<String>,
    /// When nothing newer than `newest` was durable.
    pub as_of: Instant,
}

/// The newest sequence of a log that is followed, by a look that began after this was asked. None when none comes in time.
pub(crate) async fn end_of_log(mut news: watch::Receiver<News>) -> Option<u64> {
    let end = async {
        // The next look may have begun before this was asked; the one after it has not.
        for _ in 0..2 {
            if news.borrow_and_update().holder.is_none() {
                break;
            }
            news.changed().await.ok()?;
        }
        Some(news.borrow().newest)
    };
    timeout(LOOK_TIMEOUT, end).await.ok().flatten()
}
