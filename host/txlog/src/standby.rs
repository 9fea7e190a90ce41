//! The interface of a standby: a log that follows another process, the primary, and takes over from it.
//!
//! Owns: the guarantees to a standby. Must never know: how the primary is detected, or how entries are applied.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::TransactionLog;

/// A log whose primary is another process, until the takeover. Until then it is read-only, and its end is the newest applied
/// entry.
///
/// Its server waits for [`News`], reads the new entries with [`TransactionLog::replay`], applies them, and acknowledges them
/// with [`Standby::follow`]; after the last of them, when there is no holder, it calls [`Standby::begin`].
pub trait Standby: TransactionLog {
    /// Returns a receiver of the state of the log, which changes as long as another process is primary.
    fn news(&self) -> watch::Receiver<News>;

    /// Acknowledges that the entries up to this sequence were applied.
    fn follow(&self, sequence: u64);

    /// Accepts appends from now on: all entries were applied, and this process is primary.
    fn begin(&self) -> Result<()>;
}

/// Maximum time to wait for the end of the log. Beyond it the log counts as unavailable.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);

/// State of the log as a standby knows it.
#[derive(Clone, Debug)]
pub struct News {
    /// The newest durable sequence.
    pub newest: u64,
    /// The primary. None when that is this process, or will be as soon as it has applied everything.
    pub holder: Option<String>,
    /// URL at which the holder serves clients, if it has announced one.
    pub primary: Option<String>,
    /// A time at which nothing newer than `newest` was durable.
    pub as_of: Instant,
}

/// Returns the newest sequence of a log that is followed, as of after this call; None after a timeout.
pub(crate) async fn end_of_log(mut news: watch::Receiver<News>) -> Option<u64> {
    let end = async {
        // The next poll may have begun before this call; the one after it has not.
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
