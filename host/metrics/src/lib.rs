//! Metrics: counters and histograms, and their exposition to Prometheus in the OpenMetrics text format.
//!
//! Recording takes one or two atomic additions and no lock, nor an allocation: a component holds its counters in its own
//! fields. Names and help are given only at a scrape.
//!
//! Owns: the representation and the exposition of metrics. Must never know: their meaning.

pub mod text_format;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// The OpenMetrics format.
pub mod open_metrics {
    /// Media type, without and with its parameters.
    pub const NAME: &str = "application/openmetrics-text";
    pub const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
}

/// Prefix of all names.
const PREFIX: &str = "kvs";

/// A monotonic counter.
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

/// A histogram of integers. An exposed unit consists of `scale` recorded ones.
pub struct Histogram {
    bounds: &'static [u64],
    scale: f64,
    /// One for each bound, and one for larger values.
    counts: Box<[Counter]>,
    sum: Counter,
}

/// Bounds of times, in nanoseconds: of operations of some microseconds, and of those that wait for a disk or a network.
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
    /// Creates a histogram of times of some microseconds.
    pub fn of_short_times() -> Self {
        Self::new(SHORT, SECOND)
    }

    /// Creates a histogram of times from a tenth of a millisecond to some seconds.
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

/// A source of metrics.
pub trait Measured: Send + Sync + 'static {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result;
}

/// Writer of one exposition. Names are given without the common prefix, those of counters also without the suffix `total`.
pub struct Page<'p>(DescriptorEncoder<'p>);

/// The names and values of labels.
pub type Labels<'l, const N: usize> = [(&'static str, &'l str); N];

/// Labels whose names are known only at run time.
pub type OwnedLabels = Vec<(String, String)>;

/// Metrics of one name that are known only at run time, by their labels.
pub enum Family {
    Counter(BTreeMap<OwnedLabels, u64>),
    Gauge(BTreeMap<OwnedLabels, f64>),
}

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

    /// Writes the histograms that have observations.
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

    pub fn family(&mut self, name: &str, help: &str, family: &Family) -> fmt::Result {
        match family {
            Family::Counter(series) => {
                let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
                for (labels, value) in series {
                    encoder.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(value, None)?;
                }
            }
            Family::Gauge(series) => {
                let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
                for (labels, value) in series {
                    encoder.encode_family(labels)?.encode_gauge(value)?;
                }
            }
        }
        Ok(())
    }

    /// Writes an info metric, whose labels are its value; the suffix `info` is added to its name.
    pub fn info<const N: usize>(&mut self, name: &str, help: &str, labels: Labels<'_, N>) -> fmt::Result {
        self.0.encode_descriptor(name, help, None, MetricType::Info)?.encode_info(&labels)
    }
}

/// All sources of metrics.
pub struct Metrics(RwLock<Registry>);

impl Default for Metrics {
    fn default() -> Self {
        Self(RwLock::new(Registry::with_prefix(PREFIX)))
    }
}

impl Metrics {
    /// Registers a source.
    pub fn add(&self, source: Arc<dyn Measured>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).register_collector(Box::new(SourceAdapter(source)));
    }

    /// Returns the exposition in the OpenMetrics format.
    pub fn text(&self) -> String {
        let mut page = String::new();
        // Writing to a string cannot fail.
        let _ = text::encode(&mut page, &self.0.read().unwrap_or_else(PoisonError::into_inner));
        page
    }
}

struct SourceAdapter(Arc<dyn Measured>);

impl fmt::Debug for SourceAdapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SourceAdapter")
    }
}

impl Collector for SourceAdapter {
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
            page.histogram("rain_seconds", "Duration of the rain", &self.0)?;
            page.counters("drops", "Drops", [([("where", "\"here\"\\\n")], 7)])
        }
    }

    #[test]
    fn observation_is_counted_in_its_bucket() {
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
            assert!(text.lines().any(|written| written == line), "{line} is missing in:\n{text}");
        }
    }
}
