//! Metrics of the guest, in `/metrics` of the host as `kvs_guest_custom_…`. In a native test they have no effect.

use crate::bindings::kvs::store::metrics;

/// Adds to a counter.
pub fn add(name: &str, labels: &[(&str, &str)], by: u64) {
    if cfg!(target_arch = "wasm32") {
        metrics::add(name, &owned(labels), by);
    }
}

/// Sets a gauge.
pub fn set(name: &str, labels: &[(&str, &str)], value: f64) {
    if cfg!(target_arch = "wasm32") {
        metrics::set(name, &owned(labels), value);
    }
}

fn owned(labels: &[(&str, &str)]) -> Vec<(String, String)> {
    labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}
