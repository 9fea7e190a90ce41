//! What is counted of the guest: its calls, how it fared, and what it holds.

use std::sync::atomic::{AtomicU64, Ordering};
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
    /// Swaps that stayed, that were taken back, and that did not come to it.
    pub swaps: Counter,
    pub swaps_taken_back: Counter,
    pub swaps_refused: Counter,
}

/// What the instance of a shard holds, set by whoever has the turn.
#[derive(Default)]
pub struct Held {
    pub memory_bytes: AtomicU64,
    pub keys: AtomicU64,
    pub stored_bytes: AtomicU64,
}

impl Metrics {
    pub fn new() -> Self {
        Self {
            calls: Histogram::of_short_times(),
            traps: Counter::default(),
            rebuilds: Counter::default(),
            failed_rebuilds: Counter::default(),
            swaps: Counter::default(),
            swaps_taken_back: Counter::default(),
            swaps_refused: Counter::default(),
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
    }
}

/// When a count that took so long and is over now may be followed by another.
pub fn next_count(now: Instant, took: Duration) -> Instant {
    now + took * SELDOM
}
