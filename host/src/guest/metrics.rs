//! What is counted of the guest: its calls, how it fared, and what it holds.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::shards::Shards;
use crate::contract::Statistics;
use crate::metrics::{Counter, Histogram, Measured, Page};

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
    memory_bytes: AtomicU64,
    keys: AtomicU64,
    stored_bytes: AtomicU64,
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

/// When a count that took so long may be followed by another.
pub fn next_count(took: Duration) -> Instant {
    Instant::now() + took * SELDOM
}

impl Measured for Shards {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let metrics = self.metrics();
        let serving = self.serving();
        let sum = |number: fn(&Held) -> &AtomicU64| {
            self.each().iter().map(|shard| number(shard.held()).load(Ordering::Relaxed)).sum()
        };
        let (name, version) = (serving.description.name.as_str(), serving.description.version.as_str());
        let digest = serving.guest.digest().to_string();
        let labels = [("name", name), ("version", version), ("sha256", digest.as_str())];
        page.info("guest", "The guest that serves", labels)?;
        let waiting: usize = self.each().iter().map(|shard| shard.waiting()).sum();
        page.gauge("requests_waiting", "Requests that wait for their turn at the guest", waiting as u64)?;
        page.histogram("guest_call_duration_seconds", "Time of a request in the guest", &metrics.calls)?;
        page.counter("guest_traps", "Calls in which the guest trapped", metrics.traps.get())?;
        let rebuilds = [("done", metrics.rebuilds.get()), ("failed", metrics.failed_rebuilds.get())];
        let rebuilds = rebuilds.iter().map(|(outcome, count)| ([("outcome", *outcome)], *count));
        page.counters("guest_rebuilds", "Attempts to build the guest again from the log", rebuilds)?;
        let swaps = [
            ("done", metrics.swaps.get()),
            ("taken-back", metrics.swaps_taken_back.get()),
            ("refused", metrics.swaps_refused.get()),
        ];
        let swaps = swaps.iter().map(|(outcome, count)| ([("outcome", *outcome)], *count));
        page.counters("guest_swaps", "Swaps of the guest, by how they ended", swaps)?;
        page.gauge("guest_memory_bytes", "Linear memory of the guest, in all shards", sum(|held| &held.memory_bytes))?;
        page.gauge("keys", "Keys, as the guest counts them now and again", sum(|held| &held.keys))?;
        let help = "Bytes of keys and values, as the guest counts them now and again";
        page.gauge("stored_bytes", help, sum(|held| &held.stored_bytes))
    }
}
