//! The interface of a standby: a log that follows another process, the primary, and takes over from it.
//!
//! Owns: the guarantees to a standby. Must never know: how the primary is detected, or how entries are applied.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::{Handed, TransactionLog};

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

    /// Takes the log over from a primary that has closed it for this process. The log fails if it does not end there.
    fn receive(&self, handed: Handed);

    /// Accepts appends from now on: all entries were applied, and this process is primary.
    fn begin(&self) -> Result<()>;
}

/// Maximum time to wait for the end of the log. Beyond it the log counts as unavailable. A standby of a replicated log finds
/// the end out every half second, and has to read up to it.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

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

/// Returns the newest sequence of a log that is followed, as of this time or later; None after a timeout.
pub(crate) async fn end_of_log(mut news: watch::Receiver<News>, asked: Instant) -> Option<u64> {
    let is_known = |news: &News| news.holder.is_none() || news.as_of >= asked;
    let news = timeout(LOOK_TIMEOUT, news.wait_for(is_known)).await.ok()?.ok()?;
    Some(news.newest)
}

#[cfg(test)]
mod tests {
    use tokio::join;
    use tokio::runtime::Builder;
    use tokio::task::yield_now;

    use super::*;

    #[test]
    fn end_of_log_is_as_of_the_call() {
        let asked = Instant::now();
        let news = |newest, as_of| News { newest, holder: Some("another".into()), primary: None, as_of };
        let sender = watch::Sender::new(news(1, asked - Duration::from_secs(2)));
        let receiver = sender.subscribe();
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
        let end = runtime.block_on(async {
            let publish = async {
                for newest in [1, 1, 2] {
                    // A poll that began before, or that could not find out where the log ends.
                    sender.send_replace(news(newest, asked - Duration::from_secs(1)));
                    // Twice, as the two take turns in being first.
                    yield_now().await;
                    yield_now().await;
                }
                sender.send_replace(news(3, asked));
            };
            join!(end_of_log(receiver, asked), publish).0
        });
        assert_eq!(end, Some(3));
    }
}
