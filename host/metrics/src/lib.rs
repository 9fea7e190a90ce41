//! Numbers that are counted while requests are served, and the text that tells them to Prometheus.
//!
//! To count costs an atomic add or two and takes no lock: who counts holds the counter itself, in a field or an array. What
//! they are called is said only when somebody asks.
//!
//! Owns: how numbers are kept and written down. Must never know: what they mean.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// The text's media type, as OpenMetrics has it.
pub const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What every name here begins with.
const PREFIX: &str = "kvs";

/// Grows only.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How many were how large. What is measured is a whole number; a unit of the text has `scale` of them.
pub struct Histogram {
    bounds: &'static [u64],
    scale: f64,
    /// One for each bound, and one for what lies beyond.
    counts: Box<[Counter]>,
    sum: Counter,
}

/// Bounds of times, in nanoseconds: of what takes a microsecond, and of what waits for a disk or a network.
const SHORT: &[u64] =
    &[1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000];
const LONG: &[u64] = &[
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    5_000_000_000,
];
const SECOND: f64 = 1e9;
/// Bounds of counts.
const MANY: &[u64] = &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096];

impl Histogram {
    /// Of times of some microseconds.
    pub fn of_short_times() -> Self {
        Self::new(SHORT, SECOND)
    }

    /// Of times from a tenth of a millisecond to some seconds.
    pub fn of_times() -> Self {
        Self::new(LONG, SECOND)
    }

    pub fn of_counts() -> Self {
        Self::new(MANY, 1.0)
    }

    fn new(bounds: &'static [u64], scale: f64) -> Self {
        let counts = (0..=bounds.len()).map(|_| Counter::default()).collect();
        Self { bounds, scale, counts, sum: Counter::default() }
    }

    pub fn observe(&self, value: u64) {
        let bucket = self.bounds.iter().position(|bound| value <= *bound).unwrap_or(self.bounds.len());
        self.counts[bucket].add(1);
        self.sum.add(value);
    }

    pub fn observe_time(&self, time: Duration) {
        self.observe(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    fn is_empty(&self) -> bool {
        self.counts.iter().all(|count| count.get() == 0)
    }

    fn write(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = self.bounds.iter().map(|bound| *bound as f64 / self.scale).chain([f64::INFINITY]);
        let buckets: Vec<_> = bounds.zip(self.counts.iter().map(Counter::get)).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(self.sum.get() as f64 / self.scale, count, &buckets, None)
    }
}

/// A part of the house that tells numbers of itself.
pub trait Measured: Send + Sync + 'static {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result;
}

/// Where a part writes its numbers. Names come without what all begin with, and counters without the `total` they end in.
pub struct Page<'p>(DescriptorEncoder<'p>);

/// The names and values of labels.
pub type Labels<'l, const N: usize> = [(&'static str, &'l str); N];

impl Page<'_> {
    pub fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.0
            .encode_descriptor(name, help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    pub fn counters<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'l, N>, u64)>,
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in values {
            encoder.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }

    pub fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.0.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
    }

    pub fn gauges<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'l, N>, u64)>,
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in values {
            encoder.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    pub fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) -> fmt::Result {
        histogram.write(self.0.encode_descriptor(name, help, None, MetricType::Histogram)?)
    }

    /// Those that nothing was observed of are left out.
    pub fn histograms<'h, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        histograms: impl IntoIterator<Item = (Labels<'h, N>, &'h Histogram)>,
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (labels, histogram) in histograms.into_iter().filter(|(_, histogram)| !histogram.is_empty()) {
            histogram.write(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }

    /// What is told by its labels alone; `info` is added to its name.
    pub fn info<const N: usize>(&mut self, name: &str, help: &str, labels: Labels<'_, N>) -> fmt::Result {
        self.0.encode_descriptor(name, help, None, MetricType::Info)?.encode_info(&labels)
    }
}

/// All parts that tell numbers.
pub struct Metrics(RwLock<Registry>);

impl Default for Metrics {
    fn default() -> Self {
        Self(RwLock::new(Registry::with_prefix(PREFIX)))
    }
}

impl Metrics {
    /// From now on this part is asked too.
    pub fn add(&self, part: Arc<dyn Measured>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).register_collector(Box::new(Part(part)));
    }

    pub fn text(&self) -> String {
        let mut page = String::new();
        // Nothing that writes to a string fails.
        let _ = text::encode(&mut page, &self.0.read().unwrap_or_else(PoisonError::into_inner));
        page
    }
}

struct Part(Arc<dyn Measured>);

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Part")
    }
}

impl Collector for Part {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0.measure(&mut Page(encoder))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rain(Histogram);

    impl Measured for Rain {
        fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
            page.histogram("rain_seconds", "How long it rained", &self.0)?;
            page.counters("drops", "Drops", [([("where", "\"here\"\\\n")], 7)])
        }
    }

    #[test]
    fn what_is_observed_is_in_the_bucket_that_holds_it() {
        let rain = Arc::new(Rain(Histogram::of_short_times()));
        for nanoseconds in [0, 1_000, 1_001, 1_000_000_000, 1_000_000_001, u64::MAX / 4] {
            rain.0.observe(nanoseconds);
        }
        let metrics = Metrics::default();
        metrics.add(rain);
        let text = metrics.text();
        for line in [
            "# TYPE kvs_rain_seconds histogram",
            "kvs_rain_seconds_bucket{le=\"0.000001\"} 2",
            "kvs_rain_seconds_bucket{le=\"0.0000025\"} 3",
            "kvs_rain_seconds_bucket{le=\"0.1\"} 3",
            "kvs_rain_seconds_bucket{le=\"1.0\"} 4",
            "kvs_rain_seconds_bucket{le=\"+Inf\"} 6",
            "kvs_rain_seconds_count 6",
            "kvs_drops_total{where=\"\\\"here\\\"\\\\\\n\"} 7",
            "# EOF",
        ] {
            assert!(text.lines().any(|told| told == line), "{line} is missing in:\n{text}");
        }
    }
}
