//! What the edge counts: connections and their bytes, requests by what was asked and answered, and what was refused.

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

/// Methods that are told apart, in the order of their numbers; all others are one.
const METHODS: [&str; 9] = ["GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS", "CONNECT", "other"];
const STATUSES: usize = 600;

/// A limit that a client came up against. Its flag, where it has one of its own, has the same name.
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
}

const LIMITS: [(Limit, &str); 14] = [
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
];

/// A connection was ended because of a limit.
#[derive(Debug, thiserror::Error)]
#[error("--{0}")]
pub struct Beyond(pub Limit);

/// Why a TLS handshake failed.
const TLS_ERRORS: [&str; 6] = ["not-tls", "client-certificate", "incompatible", "refused", "gone", "other"];

pub struct Metrics {
    /// By method and status.
    requests: Box<[[Counter; STATUSES]; METHODS.len()]>,
    durations: [Histogram; METHODS.len()],
    /// Requests under way; a limit is held against it.
    pub under_way: AtomicUsize,
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
            under_way: AtomicUsize::default(),
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

/// The number of a method.
pub fn number(method: &Method) -> usize {
    METHODS.iter().position(|name| method.as_str() == *name).unwrap_or(METHODS.len() - 1)
}

impl Metrics {
    /// A request to the method of this number was answered.
    pub fn answered(&self, method: usize, status: StatusCode, took: Duration) {
        self.durations[method].observe_time(took);
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

    /// A connection did not end well.
    pub fn connection_failed(&self, error: &anyhow::Error) {
        if let Some(Beyond(limit)) = error.downcast_ref() {
            return self.rejected(*limit);
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

    /// A connection is open until this is dropped.
    pub fn open(self: &Arc<Self>) -> Open {
        self.opened.add(1);
        Open(Arc::clone(self))
    }
}

pub struct Open(Arc<Metrics>);

impl Drop for Open {
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
        page.counters("http_requests", "Requests that were answered", requests)?;
        let durations = METHODS.iter().zip(&self.durations).map(|(method, times)| ([("method", *method)], times));
        let help = "Time from the head of a request to the head of its response";
        page.histograms("http_request_duration_seconds", help, durations)?;
        let under_way = self.under_way.load(Ordering::Relaxed) as u64;
        page.gauge("http_requests_in_flight", "Requests under way, those included that wait for the guest", under_way)?;
        page.counter("http_requests_throttled", "Requests answered 429", self.throttled.get())?;
        page.counter(
            "http_requests_delayed",
            "Requests that waited for their turn (--rate-queue)",
            self.delayed.get(),
        )?;
        let rejected = LIMITS.iter().map(|(limit, name)| ([("limit", *name)], self.rejected[*limit as usize].get()));
        page.counters("limit_exceeded", "Requests and connections refused because of a limit", rejected)?;
        let help = "Connections closed because what came was no HTTP";
        page.counter("http_parse_errors", help, self.malformed.get())?;
        page.counter("connections_opened", "Connections that were accepted", self.opened.get())?;
        // In this order: what was opened in between must not make it less than nothing.
        let closed = self.closed.get();
        page.gauge("connections", "Connections open", self.opened.get().saturating_sub(closed))?;
        page.counter("network_receive_bytes", "Bytes from clients, TLS and heads included", self.received.get())?;
        page.counter("network_transmit_bytes", "Bytes to clients, TLS and heads included", self.sent.get())?;
        let failed =
            TLS_ERRORS.iter().zip(&self.tls_errors).map(|(reason, count)| ([("reason", *reason)], count.get()));
        page.counters("tls_errors", "TLS handshakes that failed", failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_stand_in_the_order_of_their_numbers() {
        for (number, (limit, _)) in LIMITS.iter().enumerate() {
            assert_eq!(*limit as usize, number, "{limit:?}");
        }
    }
}
