//! Limit of log lines about requests, in lines per second. Those over the limit are counted, and reported at most once a minute.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvs_metrics::Counter;
use kvs_runtime::{Env, Task};
use tokio::time::{MissedTickBehavior, interval};
use tracing::info;

const SECOND: Duration = Duration::from_secs(1);
/// Minimum number of seconds between two reports of lines over the limit.
const REPORT_SECONDS: u32 = 60;

/// The limit.
pub struct LineRate {
    rate: usize,
    /// Lines of the current second, which the task of [`LineRate::start`] resets.
    logged: Mutex<usize>,
    pub left_out: Counter,
}

impl LineRate {
    pub fn new(rate: usize) -> Arc<Self> {
        Arc::new(Self { rate, logged: Mutex::default(), left_out: Counter::default() })
    }

    /// Returns whether a line may be logged, or counts it as left out.
    pub fn has_room(&self) -> bool {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let has_room = *logged < self.rate;
        if has_room {
            *logged += 1;
        } else {
            self.left_out.add(1);
        }
        has_room
    }

    /// Starts the task of this name that begins each second, and reports the lines over the limit.
    pub fn start(self: &Arc<Self>, name: &'static str, env: &Env) -> Task {
        let lines = Arc::clone(self);
        env.tasks.restart(name, &env.clock, move || Arc::clone(&lines).run(name))
    }

    async fn run(self: Arc<Self>, name: &'static str) -> anyhow::Result<Infallible> {
        let mut interval = interval(SECOND);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut reported, mut seconds) = (self.left_out.get(), REPORT_SECONDS);
        loop {
            interval.tick().await;
            *self.logged.lock().unwrap_or_else(PoisonError::into_inner) = 0;
            seconds = seconds.saturating_add(1);
            let left_out = self.left_out.get();
            if left_out > reported && seconds >= REPORT_SECONDS {
                info!(left_out = left_out - reported, "{name} rate exceeded, requests were not logged");
                (reported, seconds) = (left_out, 0);
            }
        }
    }
}
