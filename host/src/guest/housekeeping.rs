//! Time of the next housekeeping (`tick`) of a shard.
//!
//! A round of it comes at least once a second. The guest is called in each, unless it has set its timer to a later time.
//!
//! Owns: the wish of the guest, and its bounds. Must never know: what is done then, or which request a shard handles.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::metrics::LimitExceeded;

/// Longest pause between rounds, whatever the guest wishes.
const LONGEST: Duration = Duration::from_secs(1);

/// When a guest wants its next `tick`.
#[derive(Clone, Copy)]
pub struct Next {
    /// Pause before it: zero for work that is left. None is about a second.
    pub after: Option<Duration>,
    /// Time before which it is not called, in milliseconds since 1970: that of its timer. 0 without one.
    pub timer: u64,
}

pub struct Housekeeping {
    /// Shortest pause between rounds: longer than a tick takes, so that requests have most of the time.
    shortest: Duration,
    exceeded: Arc<LimitExceeded>,
    plan: Mutex<Plan>,
    /// The next round is due earlier than it was.
    earlier: Notify,
}

struct Plan {
    /// When the last round began, and when the next is due.
    begun: Instant,
    due: Instant,
    timer: u64,
}

impl Housekeeping {
    pub fn new(shortest: Duration, exceeded: Arc<LimitExceeded>) -> Self {
        let begun = Instant::now();
        let plan = Plan { begun, due: begun + LONGEST, timer: 0 };
        Self { shortest, exceeded, plan: Mutex::new(plan), earlier: Notify::new() }
    }

    /// A round begins; wishes from now on are for the next one.
    pub fn begin(&self) {
        let mut plan = self.plan();
        plan.begun = Instant::now();
        plan.due = plan.begun + LONGEST;
    }

    /// Whether the guest is to be called in this round, at this time of its own. If not, its timer is kept.
    pub fn is_due(&self, now: u64) -> bool {
        let timer = self.plan().timer;
        if now < timer {
            self.expedite(Duration::from_millis(timer - now));
        }
        now >= timer
    }

    /// The guest wants this.
    pub fn wish(&self, next: Next) {
        self.plan().timer = next.timer;
        let Some(after) = next.after else { return };
        let since = self.expedite(after);
        if since < self.shortest {
            self.exceeded.ticks.add(1);
        }
    }

    /// The instance is another one, whose wishes are unknown: the guest is called in the next round, and that is `soon`.
    pub fn begin_again(&self, soon: bool) {
        self.plan().timer = 0;
        if soon {
            self.expedite(Duration::ZERO);
        }
    }

    /// Has the next round begin after this pause, or earlier. Returns how long after the last one began that would be.
    fn expedite(&self, after: Duration) -> Duration {
        let wanted = Instant::now() + after.min(LONGEST);
        let mut plan = self.plan();
        if wanted < plan.due {
            plan.due = wanted;
            self.earlier.notify_one();
        }
        wanted - plan.begun
    }

    /// Waits until the next round is due.
    pub async fn next(&self) {
        let earliest = Instant::now() + self.shortest;
        loop {
            let due = self.plan().due.max(earliest);
            tokio::select! {
                () = sleep_until(due) => return,
                () = self.earlier.notified() => {}
            }
        }
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        // Every change under this lock is whole.
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORTEST: Duration = Duration::from_millis(10);

    fn housekeeping() -> Housekeeping {
        Housekeeping::new(SHORTEST, Arc::default())
    }

    fn hint(after: Duration) -> Next {
        Next { after: Some(after), timer: 0 }
    }

    /// The pause after a round with these wishes.
    async fn pause(wishes: &[Duration]) -> Duration {
        let housekeeping = housekeeping();
        housekeeping.begin();
        wishes.iter().for_each(|wish| housekeeping.wish(hint(*wish)));
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
        let housekeeping = housekeeping();
        housekeeping.begin();
        let begun = Instant::now();
        let wish = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            housekeeping.wish(hint(Duration::ZERO));
        };
        tokio::join!(housekeeping.next(), wish);
        assert!(begun.elapsed() < Duration::from_millis(900));
    }

    #[tokio::test]
    async fn guest_is_not_called_before_its_timer() {
        let housekeeping = housekeeping();
        assert!(housekeeping.is_due(1_000), "it is not called without a timer");
        housekeeping.wish(Next { after: Some(Duration::from_secs(60)), timer: 61_000 });
        assert!(!housekeeping.is_due(1_000) && !housekeeping.is_due(60_999));
        assert!(housekeeping.is_due(61_000), "it is called too late");
        housekeeping.wish(Next { after: Some(Duration::MAX), timer: u64::MAX });
        assert!(!housekeeping.is_due(u64::MAX - 1));
        // In another instance it was not set.
        housekeeping.begin_again(false);
        assert!(housekeeping.is_due(0));
    }

    #[tokio::test]
    async fn round_that_is_not_due_is_followed_in_time() {
        let housekeeping = housekeeping();
        housekeeping.wish(Next { after: Some(Duration::from_secs(60)), timer: 61_000 });
        housekeeping.begin();
        assert!(!housekeeping.is_due(60_900));
        let begun = Instant::now();
        housekeeping.next().await;
        assert!((Duration::from_millis(90)..Duration::from_millis(450)).contains(&begun.elapsed()));
    }

    #[tokio::test]
    async fn postponed_ticks_are_counted() {
        let housekeeping = housekeeping();
        housekeeping.begin();
        housekeeping.wish(hint(Duration::ZERO));
        housekeeping.wish(Next { after: Some(Duration::ZERO), timer: 1 });
        housekeeping.wish(hint(Duration::from_secs(1)));
        housekeeping.wish(Next { after: None, timer: 0 });
        housekeeping.begin_again(true);
        assert_eq!(housekeeping.exceeded.ticks.get(), 2);
    }
}
