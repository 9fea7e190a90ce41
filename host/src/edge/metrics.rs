//! Metrics of connections and requests.

use std::error::Error;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use h2::Reason;
use hyper::{Method, StatusCode};
use rustls::Error as TlsError;

use kvs_metrics::{Counter, Histogram, Measured, Page};

use super::proxy::ProxyHeaderError;

/// Methods with their own labels, in the order of their numbers; all others share one.
const METHODS: [&str; 10] = ["GET", "HEAD", "QUERY", "PUT", "POST", "DELETE", "PATCH", "OPTIONS", "CONNECT", "other"];
const STATUSES: usize = 600;

/// A limit that a client can exceed. The name is that of its flag, if it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    ConnectionsPerAddress,
    HandshakeTimeout,
    HeaderTimeout,
    IdleTimeout,
    HeaderBytes,
    TargetBytes,
    ValueBytes,
    BodyTimeout,
    Requests,
    RequestTimeout,
    Streams,
    Resets,
    InflightBytes,
    ControlFrames,
    Quota,
}

const LIMITS: [(Limit, &str); 15] = [
    (Limit::ConnectionsPerAddress, "max-connections-per-address"),
    (Limit::HandshakeTimeout, "handshake-timeout"),
    (Limit::HeaderTimeout, "header-timeout"),
    (Limit::IdleTimeout, "idle-timeout"),
    (Limit::HeaderBytes, "max-header-bytes"),
    (Limit::TargetBytes, "max-target-bytes"),
    (Limit::ValueBytes, "max-value-bytes"),
    (Limit::BodyTimeout, "min-body-rate"),
    (Limit::Requests, "max-requests"),
    (Limit::RequestTimeout, "request-timeout"),
    (Limit::Streams, "http2-max-streams"),
    (Limit::Resets, "http2-max-resets"),
    (Limit::InflightBytes, "max-inflight-bytes"),
    (Limit::ControlFrames, "http2-max-control-frames"),
    (Limit::Quota, "quota"),
];

/// Error of a connection that exceeded a limit.
#[derive(Debug, thiserror::Error)]
#[error("--{0}")]
pub struct LimitExceeded(pub Limit);

/// Reasons of failed TLS handshakes.
const TLS_ERRORS: [&str; 6] = ["not-tls", "client-certificate", "incompatible", "refused", "gone", "other"];

/// The metrics.
pub struct Metrics {
    /// By method and status.
    requests: Box<[[Counter; STATUSES]; METHODS.len()]>,
    durations: [Histogram; METHODS.len()],
    /// Requests in flight, which `--max-requests` limits.
    pub in_flight: AtomicUsize,
    /// Long polls that wait for a change.
    pub waiting: AtomicUsize,
    watches: AtomicUsize,
    pub received: Counter,
    pub sent: Counter,
    opened: Counter,
    closed: Counter,
    rejected: [Counter; LIMITS.len()],
    pub malformed: Counter,
    pub throttled: Counter,
    pub delayed: Counter,
    tls_errors: [Counter; TLS_ERRORS.len()],
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(LIMITS[*self as usize].1)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Box::new(std::array::from_fn(|_| std::array::from_fn(|_| Counter::default()))),
            durations: std::array::from_fn(|_| Histogram::of_times()),
            in_flight: AtomicUsize::default(),
            waiting: AtomicUsize::default(),
            watches: AtomicUsize::default(),
            received: Counter::default(),
            sent: Counter::default(),
            opened: Counter::default(),
            closed: Counter::default(),
            rejected: Default::default(),
            malformed: Counter::default(),
            throttled: Counter::default(),
            delayed: Counter::default(),
            tls_errors: Default::default(),
        }
    }
}

/// Returns the number of a method.
pub fn number(method: &Method) -> usize {
    METHODS.iter().position(|name| method.as_str() == *name).unwrap_or(METHODS.len() - 1)
}

impl Metrics {
    /// Notes the response to a request with the method of this number. A long poll took what its client wanted, which is no
    /// latency.
    pub fn answered(&self, method: usize, status: StatusCode, took: Duration, waited: bool) {
        if !waited {
            self.durations[method].observe_time(took);
        }
        if let Some(count) = self.requests[method].get(usize::from(status.as_u16())) {
            count.add(1);
        }
    }

    pub fn rejected(&self, limit: Limit) {
        self.rejected[limit as usize].add(1);
    }

    pub fn handshake_failed(&self, error: &io::Error) {
        let reason = match error.get_ref().and_then(|error| error.downcast_ref()) {
            Some(TlsError::InvalidMessage(_)) => "not-tls",
            Some(TlsError::InvalidCertificate(_) | TlsError::InvalidCertRevocationList(_)) => "client-certificate",
            Some(TlsError::NoCertificatesPresented) => "client-certificate",
            Some(TlsError::PeerIncompatible(_)) => "incompatible",
            Some(TlsError::AlertReceived(_)) => "refused",
            Some(_) => "other",
            None => "gone",
        };
        if let Some(number) = TLS_ERRORS.iter().position(|other| *other == reason) {
            self.tls_errors[number].add(1);
        }
    }

    /// Notes the error of a connection.
    pub fn connection_failed(&self, error: &anyhow::Error) {
        if let Some(LimitExceeded(limit)) = error.downcast_ref() {
            return self.rejected(*limit);
        }
        if let Some(ProxyHeaderError::Malformed(_)) = error.downcast_ref() {
            return self.malformed.add(1);
        }
        let Some(error) = error.downcast_ref::<hyper::Error>() else { return };
        let http2 = error.source().and_then(|error| error.downcast_ref::<h2::Error>());
        if error.is_parse_too_large() {
            self.rejected(Limit::HeaderBytes);
        } else if http2.is_some_and(|error| error.reason() == Some(Reason::ENHANCE_YOUR_CALM)) {
            self.rejected(Limit::Resets);
        } else if error.is_parse() || http2.is_some_and(h2::Error::is_library) {
            self.malformed.add(1);
        }
    }

    /// Counts a connection as open until the returned guard is dropped.
    pub fn open(self: &Arc<Self>) -> OpenGuard {
        self.opened.add(1);
        OpenGuard(Arc::clone(self))
    }
}

/// Guard of an open watch.
pub struct WatchGuard(Arc<Metrics>);

impl WatchGuard {
    /// Counts a watch as open until this is dropped.
    pub fn new(metrics: &Arc<Metrics>) -> Self {
        metrics.watches.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(metrics))
    }
}

impl Drop for WatchGuard {
    fn drop(&mut self) {
        self.0.watches.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Guard of an open connection.
pub struct OpenGuard(Arc<Metrics>);

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.closed.add(1);
    }
}

impl Measured for Metrics {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let statuses: Vec<String> = (0..STATUSES).map(|status| status.to_string()).collect();
        let requests = METHODS.iter().zip(&*self.requests).flat_map(|(method, counts)| {
            let counts = counts.iter().zip(&statuses).filter(|(count, _)| count.get() > 0);
            counts.map(|(count, status)| ([("method", *method), ("status", status.as_str())], count.get()))
        });
        page.counters("http_requests", "Requests with a response", requests)?;
        let durations = METHODS.iter().zip(&self.durations).map(|(method, times)| ([("method", *method)], times));
        let help = "Time from the head of a request to the head of its response, without long polls";
        page.histograms("http_request_duration_seconds", help, durations)?;
        let in_flight = self.in_flight.load(Ordering::Relaxed) as u64;
        page.gauge(
            "http_requests_in_flight",
            "Requests in flight, including those that wait for the guest",
            in_flight,
        )?;
        let waiting = self.waiting.load(Ordering::Relaxed) as u64;
        page.gauge("http_requests_waiting_for_change", "Long polls that wait for a change", waiting)?;
        page.gauge("watches", "Open watches", self.watches.load(Ordering::Relaxed) as u64)?;
        page.counter("http_requests_throttled", "Requests rejected with 429 (rate limit)", self.throttled.get())?;
        page.counter("http_requests_delayed", "Requests delayed by the rate limit (--rate-queue)", self.delayed.get())?;
        let rejected = LIMITS.iter().map(|(limit, name)| ([("limit", *name)], self.rejected[*limit as usize].get()));
        page.counters("limit_exceeded", "Requests and connections rejected because of a limit", rejected)?;
        let help = "Connections closed because of malformed HTTP";
        page.counter("http_parse_errors", help, self.malformed.get())?;
        page.counter("connections_opened", "Accepted connections", self.opened.get())?;
        // In this order, so that a connection opened in between does not make it negative.
        let closed = self.closed.get();
        page.gauge("connections", "Open connections", self.opened.get().saturating_sub(closed))?;
        page.counter(
            "network_receive_bytes",
            "Bytes received from clients, including TLS and headers",
            self.received.get(),
        )?;
        page.counter("network_transmit_bytes", "Bytes sent to clients, including TLS and headers", self.sent.get())?;
        let failed =
            TLS_ERRORS.iter().zip(&self.tls_errors).map(|(reason, count)| ([("reason", *reason)], count.get()));
        page.counters("tls_errors", "Failed TLS handshakes", failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_listed_in_order() {
        for (number, (limit, _)) in LIMITS.iter().enumerate() {
            assert_eq!(*limit as usize, number, "{limit:?}");
        }
    }
}
