//! The text format of Prometheus, version 0.0.4, for scrapers that do not know OpenMetrics.

use std::collections::HashMap;
use std::fmt::Write;

/// Media type, without and with its parameters.
pub const NAME: &str = "text/plain";
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Converts an exposition in the OpenMetrics format: samples are the same, but a family has the name of its samples, and
/// there are fewer types.
pub fn from_open_metrics(text: &str) -> String {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let types: HashMap<_, _> = types.collect();
    let suffix = |family: &str| match types.get(family) {
        Some(&"counter") => "_total",
        Some(&"info") => "_info",
        _ => "",
    };
    let mut converted = String::with_capacity(text.len());
    for line in text.lines() {
        // Writing to a string cannot fail.
        let _ = if let Some((family, help)) = line.strip_prefix("# HELP ").and_then(|line| line.split_once(' ')) {
            writeln!(converted, "# HELP {family}{} {help}", suffix(family))
        } else if let Some((family, kind)) = line.strip_prefix("# TYPE ").and_then(|line| line.split_once(' ')) {
            let kind = match kind {
                "info" => "gauge",
                "unknown" => "untyped",
                same => same,
            };
            writeln!(converted, "# TYPE {family}{} {kind}", suffix(family))
        } else if line.starts_with('#') {
            Ok(())
        } else {
            writeln!(converted, "{line}")
        };
    }
    converted
}
