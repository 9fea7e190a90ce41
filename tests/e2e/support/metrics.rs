//! Metrics of a server, read like a scraper.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;

use super::server::{PATIENCE, Server};
use super::wire::Connection;

/// Values by name and labels, as in the text.
pub struct Metrics {
    pub text: String,
    pub values: BTreeMap<String, f64>,
}

impl Metrics {
    pub fn of(server: &Server) -> Self {
        Self::at(server.admin())
    }

    fn at(admin: SocketAddr) -> Self {
        let answer = Connection::open(admin).ask("GET", "/metrics", b"");
        let media_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        assert_eq!((answer.status, answer.header("content-type")), (200, Some(media_type)));
        let text = answer.text().to_owned();
        let values = text.lines().filter(|line| !line.starts_with('#')).map(|line| {
            let (name, value) = line.rsplit_once(' ').expect("a name and a value");
            (name.to_owned(), value.parse().expect("a number"))
        });
        let values = values.collect();
        Self { text, values }
    }

    #[track_caller]
    pub fn get(&self, name: &str) -> f64 {
        self.find(name).unwrap_or_else(|| panic!("{name} is missing in:\n{}", self.text))
    }

    /// Returns a value; `None` if its event has not happened yet.
    pub fn find(&self, name: &str) -> Option<f64> {
        self.values.get(name).copied()
    }

    /// Changes since then. Histograms by their counts.
    pub fn since(&self, before: &Self) -> BTreeMap<String, f64> {
        let of_histogram = |name: &str| name.contains("_bucket") || name.contains("_sum");
        let moved = self.values.iter().map(|(name, value)| (name, value - before.values.get(name).unwrap_or(&0.0)));
        moved.filter(|(name, by)| *by != 0.0 && !of_histogram(name)).map(|(name, by)| (name.clone(), by)).collect()
    }
}

/// Waits until this is true of the metrics, which change a moment after the events.
#[track_caller]
pub fn until(server: &Server, what: &str, is_so: impl Fn(&Metrics) -> bool) -> Metrics {
    let begun = Instant::now();
    loop {
        let metrics = Metrics::of(server);
        if is_so(&metrics) {
            return metrics;
        }
        assert!(begun.elapsed() < PATIENCE, "it never was so that {what}:\n{}", metrics.text);
    }
}

#[track_caller]
pub fn counts(server: &Server, name: &str, count: f64) {
    until(server, &format!("{name} is {count}"), |metrics| metrics.get(name) == count);
}
