//! What is counted of the guest: its calls, how it fared, and what it holds.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::contract::Statistics;
use kvs_metrics::{Counter, Histogram};

/// A guest may need long to count what it holds. It is asked so seldom that this costs a thousandth of its time.
const SELDOM: u32 = 1_000;

pub struct Metrics {
    pub calls: Histogram,
    pub traps: Counter,
    pub rebuilds: Counter,
    pub failed_rebuilds: Counter,
    /// By their [`Cause`].
    pub promotions: [Counter; 5],
    /// How long no call was made for one.
    pub promotion_pauses: Histogram,
    /// Spares that were built, and that failed.
    pub spares_built: Counter,
    pub spares_failed: Counter,
    /// Swaps that were completed, rolled back, and refused.
    pub swaps: Counter,
    pub swaps_rolled_back: Counter,
    pub swaps_refused: Counter,
    /// Replicas that counted other keys or bytes than the instance before them.
    pub differing: Counter,
}

/// What the guest did beyond a limit that costs it no more than that, by the limit.
#[derive(Default)]
pub struct LimitExceeded {
    /// Writes and messages that were cut, and lines that were dropped.
    pub log_bytes: Counter,
    pub log_lines: Counter,
    /// Changes of metrics that would have been one too many, and of metrics that are not allowed.
    pub metrics: Counter,
    pub invalid_metrics: Counter,
    /// Calls of `tick` that were made later than the guest asked for.
    pub ticks: Counter,
}

impl LimitExceeded {
    /// The counts, by the name of the flag where there is one.
    pub fn counts(&self) -> [(&'static str, u64); 5] {
        [
            ("guest-log-bytes", self.log_bytes.get()),
            ("guest-log-lines", self.log_lines.get()),
            ("guest-max-metrics", self.metrics.get()),
            ("invalid-metric", self.invalid_metrics.get()),
            ("guest-min-tick-interval", self.ticks.get()),
        ]
    }
}

/// Why a replica was promoted.
#[derive(Clone, Copy, Debug)]
pub enum Cause {
    Swap,
    Rollback,
    /// A trap, after which a spare was there.
    Spare,
    /// A trap, after which the log was replayed.
    Rebuild,
    /// The log became this process's.
    Takeover,
}

impl Cause {
    pub const ALL: [Self; 5] = [Self::Swap, Self::Rollback, Self::Spare, Self::Rebuild, Self::Takeover];

    /// The value of the label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Swap => "swap",
            Self::Rollback => "rollback",
            Self::Spare => "spare",
            Self::Rebuild => "rebuild",
            Self::Takeover => "takeover",
        }
    }
}

/// What the instance of a shard holds, set under its turn.
#[derive(Default)]
pub struct Held {
    pub memory_bytes: AtomicU64,
    pub keys: AtomicU64,
    pub stored_bytes: AtomicU64,
    /// Whether nothing has changed since keys and bytes were counted.
    is_exact: AtomicBool,
}

impl Metrics {
    pub fn new() -> Self {
        Self {
            calls: Histogram::of_short_times(),
            traps: Counter::default(),
            rebuilds: Counter::default(),
            failed_rebuilds: Counter::default(),
            promotions: Default::default(),
            promotion_pauses: Histogram::of_times(),
            spares_built: Counter::default(),
            spares_failed: Counter::default(),
            swaps: Counter::default(),
            swaps_rolled_back: Counter::default(),
            swaps_refused: Counter::default(),
            differing: Counter::default(),
        }
    }
}

impl Held {
    pub fn memory(&self, bytes: usize) {
        self.memory_bytes.store(bytes as u64, Ordering::Relaxed);
    }

    pub fn holds(&self, counted: &Statistics) {
        self.keys.store(counted.keys, Ordering::Relaxed);
        self.stored_bytes.store(counted.bytes, Ordering::Relaxed);
        self.is_exact.store(true, Ordering::Relaxed);
    }

    /// What it holds is another than it was.
    pub fn changed(&self) {
        self.is_exact.store(false, Ordering::Relaxed);
    }

    /// Keys and bytes, when they were counted after the last change.
    pub fn exactly(&self) -> Option<(u64, u64)> {
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        self.is_exact.load(Ordering::Relaxed).then(|| (read(&self.keys), read(&self.stored_bytes)))
    }
}

/// When a count that took so long and is over now may be followed by another.
pub fn next_count(now: Instant, took: Duration) -> Instant {
    now + took * SELDOM
}
