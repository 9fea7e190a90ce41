//! Metrics that a guest defines: counters and gauges, by name and labels.
//!
//! Owns: which names and labels are allowed, and how many there can be. Must never know: what they mean, or which calls
//! change them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvs_metrics::{Family, OwnedLabels, Page};
use tracing::warn;

use super::metrics::LimitExceeded;

/// Prefix of their names, which no metric of the host has.
const PREFIX: &str = "guest_custom_";
const NAME_BYTES: usize = 64;
const LABELS: usize = 8;
const LABEL_VALUE_BYTES: usize = 128;
/// Endings that OpenMetrics gives a meaning.
const ENDINGS: [&str; 6] = ["_total", "_created", "_bucket", "_count", "_sum", "_info"];
/// The label of the gauges of several shards.
const SHARD: &str = "shard";

/// The metrics of one guest, of all its instances.
pub struct CustomMetrics {
    /// How many combinations of a name and labels there can be.
    most: usize,
    exceeded: Arc<LimitExceeded>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    families: BTreeMap<String, Family>,
    /// Combinations of a name and labels.
    count: usize,
    /// The first one that was refused, with the reason, and the first that was dropped.
    refused: Option<String>,
    dropped: Option<String>,
}

/// Why a change has no effect.
enum Ineffective {
    Refused(&'static str),
    Dropped,
}

impl CustomMetrics {
    pub fn new(most: usize, exceeded: Arc<LimitExceeded>) -> Self {
        Self { most, exceeded, state: Mutex::default() }
    }

    /// Begins again, as the metrics of a guest do when it begins to serve.
    pub fn clear(&self) {
        *self.state() = State::default();
    }

    /// What the guest does beyond a limit is counted here.
    pub fn exceeded(&self) -> &Arc<LimitExceeded> {
        &self.exceeded
    }

    /// Adds to a counter.
    pub fn add(&self, name: &str, labels: OwnedLabels, by: u64) {
        self.change(name, labels, None, |State { families, count, .. }, labels, most| {
            match family(families, name, *count < most, || Family::Counter(BTreeMap::new()))? {
                Family::Counter(series) => {
                    let value = value_of(series, labels, count, most)?;
                    *value = value.saturating_add(by);
                    Ok(())
                }
                Family::Gauge(_) => Err(Ineffective::Refused("it is a gauge")),
            }
        });
    }

    /// Sets a gauge, of one of several shards where there are.
    pub fn set(&self, name: &str, labels: OwnedLabels, shard: Option<usize>, to: f64) {
        self.change(name, labels, shard, |State { families, count, .. }, labels, most| {
            if !to.is_finite() {
                return Err(Ineffective::Refused("its value is not finite"));
            }
            match family(families, name, *count < most, || Family::Gauge(BTreeMap::new()))? {
                Family::Gauge(series) => {
                    *value_of(series, labels, count, most)? = to;
                    Ok(())
                }
                Family::Counter(_) => Err(Ineffective::Refused("it is a counter")),
            }
        });
    }

    fn change(
        &self,
        name: &str,
        mut labels: OwnedLabels,
        shard: Option<usize>,
        change: impl FnOnce(&mut State, OwnedLabels, usize) -> Result<(), Ineffective>,
    ) {
        // In any order, they are the same.
        labels.sort_unstable();
        let checked = check(name, &labels);
        labels.extend(shard.map(|shard| (SHARD.to_owned(), shard.to_string())));
        let mut state = self.state();
        let changed = checked.map_err(Ineffective::Refused).and_then(|()| change(&mut state, labels, self.most));
        match changed {
            Ok(()) => {}
            Err(Ineffective::Refused(reason)) => {
                self.exceeded.invalid_metrics.add(1);
                if state.refused.is_none() {
                    let name: String = name.chars().take(NAME_BYTES).collect();
                    warn!("the guest's metric {name:?} is refused, as others may be: {reason}");
                    state.refused = Some(format!("the metric {name:?} is refused: {reason}"));
                }
            }
            Err(Ineffective::Dropped) => {
                self.exceeded.metrics.add(1);
                if state.dropped.is_none() {
                    let most = self.most;
                    warn!("metrics of the guest beyond {most} (--guest-max-metrics) are dropped, the first is {name}");
                    state.dropped =
                        Some(format!("the metric {name} is dropped: there are {most} (--guest-max-metrics)"));
                }
            }
        }
    }

    /// How many combinations of a name and labels there are.
    pub fn count(&self) -> usize {
        self.state().count
    }

    /// The first change that had no effect, and why.
    pub fn fault(&self) -> Option<String> {
        let state = self.state();
        state.refused.clone().or_else(|| state.dropped.clone())
    }

    /// Writes all of them.
    pub fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let state = self.state();
        for (name, family) in &state.families {
            page.family(&format!("{PREFIX}{name}"), "Metric that the guest defines", family)?;
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The metrics of a name, which are added where there is room.
fn family<'s>(
    families: &'s mut BTreeMap<String, Family>,
    name: &str,
    has_room: bool,
    new: impl FnOnce() -> Family,
) -> Result<&'s mut Family, Ineffective> {
    if !families.contains_key(name) && has_room {
        families.insert(name.to_owned(), new());
    }
    families.get_mut(name).ok_or(Ineffective::Dropped)
}

/// The value of a combination, which is added where there is room.
fn value_of<'s, V: Default>(
    series: &'s mut BTreeMap<OwnedLabels, V>,
    labels: OwnedLabels,
    count: &mut usize,
    most: usize,
) -> Result<&'s mut V, Ineffective> {
    match series.entry(labels) {
        Entry::Occupied(value) => Ok(value.into_mut()),
        Entry::Vacant(_) if *count >= most => Err(Ineffective::Dropped),
        Entry::Vacant(place) => {
            *count += 1;
            Ok(place.insert(V::default()))
        }
    }
}

/// Checks a name and labels, which are in order.
fn check(name: &str, labels: &[(String, String)]) -> Result<(), &'static str> {
    check_name(name)?;
    if labels.len() > LABELS {
        return Err("it has more than eight labels");
    }
    for (label, value) in labels {
        check_name(label)?;
        if label == SHARD {
            return Err("the label `shard` is the host's");
        }
        if value.len() > LABEL_VALUE_BYTES {
            return Err("the value of a label is longer than 128 bytes");
        }
    }
    let is_twice = labels.windows(2).any(|pair| pair[0].0 == pair[1].0);
    if is_twice { Err("it has a label twice") } else { Ok(()) }
}

fn check_name(name: &str) -> Result<(), &'static str> {
    let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if !name.starts_with(|first: char| first.is_ascii_lowercase()) || !name.bytes().all(is_allowed) {
        return Err("a name has lower-case letters, digits and underscores, and begins with a letter");
    }
    if name.len() > NAME_BYTES {
        return Err("a name is longer than 64 bytes");
    }
    if ENDINGS.iter().any(|ending| name.ends_with(ending)) {
        return Err("a name ends in what has a meaning in OpenMetrics, such as `_total`, which the host adds itself");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kvs_metrics::{Measured, Metrics};

    use super::*;

    struct Shown(CustomMetrics);

    impl Measured for Shown {
        fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
            self.0.measure(page)
        }
    }

    /// Makes these changes, and returns the samples and the numbers of those that were refused and dropped.
    fn after(most: usize, changes: impl FnOnce(&CustomMetrics)) -> (Vec<String>, u64, u64) {
        let (exceeded, metrics) = (Arc::<LimitExceeded>::default(), Metrics::default());
        let custom = CustomMetrics::new(most, Arc::clone(&exceeded));
        changes(&custom);
        metrics.add(Arc::new(Shown(custom)));
        let samples = metrics.text().lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
        (samples, exceeded.invalid_metrics.get(), exceeded.metrics.get())
    }

    fn labels(labels: &[(&str, &str)]) -> OwnedLabels {
        labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn counters_and_gauges_are_kept_by_name_and_labels() {
        let (samples, ..) = after(10, |metrics| {
            metrics.add("grants", labels(&[]), 2);
            metrics.add("grants", labels(&[]), 3);
            metrics.add("requests", labels(&[("b", "2"), ("a", "\"1\"\n")]), 1);
            metrics.add("requests", labels(&[("a", "\"1\"\n"), ("b", "2")]), u64::MAX);
            metrics.set("waiting", labels(&[]), None, 1.5);
            metrics.set("waiting", labels(&[]), None, -2.0);
            metrics.set("open", labels(&[("kind", "x")]), Some(3), 7.0);
        });
        let expected = [
            "kvs_guest_custom_grants_total 5",
            "kvs_guest_custom_open{kind=\"x\",shard=\"3\"} 7.0",
            "kvs_guest_custom_requests_total{a=\"\\\"1\\\"\\n\",b=\"2\"} 18446744073709551615",
            "kvs_guest_custom_waiting -2.0",
        ];
        assert_eq!(samples, expected);
    }

    #[test]
    fn invalid_names_labels_and_values_are_refused() {
        let many: Vec<_> = (0..9).map(|n| (format!("a{n}"), String::new())).collect();
        let names = ["", "A", "1a", "_a", "a-b", "a b", "größe", "a_total", "a_count", "a_created", &"a".repeat(65)];
        let (samples, refused, dropped) = after(100, |metrics| {
            for name in names {
                metrics.add(name, labels(&[]), 1);
                metrics.set("gauge", labels(&[(name, "")]), None, 1.0);
            }
            metrics.add("many", many.clone(), 1);
            metrics.add("twice", labels(&[("a", "1"), ("a", "2")]), 1);
            metrics.add("shard", labels(&[("shard", "1")]), 1);
            metrics.add("long", labels(&[("a", &"x".repeat(129))]), 1);
            metrics.set("endless", labels(&[]), None, f64::INFINITY);
            metrics.set("nothing", labels(&[]), None, f64::NAN);
        });
        assert_eq!((samples, refused, dropped), (Vec::new(), 2 * names.len() as u64 + 6, 0));
    }

    #[test]
    fn name_is_a_counter_or_a_gauge() {
        let (samples, refused, _) = after(10, |metrics| {
            metrics.add("a", labels(&[]), 1);
            metrics.set("a", labels(&[]), None, 2.0);
            metrics.set("b", labels(&[]), None, 2.0);
            metrics.add("b", labels(&[]), 1);
        });
        assert_eq!(samples, ["kvs_guest_custom_a_total 1", "kvs_guest_custom_b 2.0"]);
        assert_eq!(refused, 2);
    }

    #[test]
    fn cleared_metrics_begin_again() {
        let (samples, ..) = after(2, |metrics| {
            metrics.add("a", labels(&[]), 5);
            metrics.set("b", labels(&[]), None, 1.0);
            metrics.clear();
            metrics.set("a", labels(&[]), None, 2.0);
            metrics.add("c", labels(&[]), 3);
        });
        assert_eq!(samples, ["kvs_guest_custom_a 2.0", "kvs_guest_custom_c_total 3"]);
    }

    #[test]
    fn metrics_over_the_limit_are_dropped() {
        let (samples, refused, dropped) = after(3, |metrics| {
            for n in 0..100 {
                metrics.add("a", labels(&[("n", &n.to_string())]), 1);
                metrics.set(&format!("b{n}"), labels(&[]), None, 1.0);
                // What is there can still be changed.
                metrics.add("a", labels(&[("n", "0")]), 1);
            }
        });
        assert_eq!((samples.len(), refused, dropped), (3, 0, 197));
        assert!(samples.contains(&"kvs_guest_custom_a_total{n=\"0\"} 101".to_owned()), "{samples:?}");
    }
}
