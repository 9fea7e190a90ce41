//! Time of the next housekeeping (`tick`), which is one for all shards.
//!
//! Owns: the earliest wish of any guest, and the bounds of all. Must never know: what is done then, or which request a shard
//! handles.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// Longest pause, whatever the guests wish.
const LONGEST: Duration = Duration::from_secs(1);
/// Shortest pause: longer than a tick takes, so that requests have most of the time.
const SHORTEST: Duration = Duration::from_millis(10);

pub struct Housekeeping {
    due: Mutex<Instant>,
    /// It is due earlier than it was.
    earlier: Notify,
}

impl Default for Housekeeping {
    fn default() -> Self {
        Self { due: Mutex::new(Instant::now() + LONGEST), earlier: Notify::new() }
    }
}

impl Housekeeping {
    /// A round begins; wishes from now on are for the next one.
    pub fn begin(&self) {
        *self.due() = Instant::now() + LONGEST;
    }

    /// The next round is wanted after this time, or earlier.
    pub fn wish(&self, after: Duration) {
        let wanted = Instant::now() + after.min(LONGEST);
        let mut due = self.due();
        if wanted < *due {
            *due = wanted;
            self.earlier.notify_one();
        }
    }

    /// Waits until the next round is due.
    pub async fn next(&self) {
        let earliest = Instant::now() + SHORTEST;
        loop {
            let due = (*self.due()).max(earliest);
            tokio::select! {
                () = sleep_until(due) => return,
                () = self.earlier.notified() => {}
            }
        }
    }

    fn due(&self) -> MutexGuard<'_, Instant> {
        // Every change under this lock is whole.
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pause after a round with these wishes.
    async fn pause(wishes: &[Duration]) -> Duration {
        let housekeeping = Housekeeping::default();
        housekeeping.begin();
        wishes.iter().for_each(|wish| housekeeping.wish(*wish));
        let begun = Instant::now();
        housekeeping.next().await;
        begun.elapsed()
    }

    #[tokio::test]
    async fn earliest_wish_counts_within_the_bounds() {
        let (in_time, late) = (Duration::from_millis(100), Duration::from_secs(3_600));
        assert!(pause(&[]).await >= Duration::from_millis(900));
        assert!(pause(&[Duration::MAX]).await >= Duration::from_millis(900));
        assert!((SHORTEST..in_time).contains(&pause(&[Duration::ZERO]).await));
        let between = pause(&[late, in_time, Duration::from_millis(500)]).await;
        assert!((Duration::from_millis(90)..Duration::from_millis(450)).contains(&between), "{between:?}");
    }

    #[tokio::test]
    async fn wish_shortens_a_pause_that_has_begun() {
        let housekeeping = Housekeeping::default();
        housekeeping.begin();
        let begun = Instant::now();
        let wish = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            housekeeping.wish(Duration::ZERO);
        };
        tokio::join!(housekeeping.next(), wish);
        assert!(begun.elapsed() < Duration::from_millis(900));
    }
}
