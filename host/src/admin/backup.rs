//! `/backup` on the admin listener: a backup of the log, while the server works.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http_body_util::Either;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use kvs_metrics::{Counter, Measured, Page};
use kvs_runtime::{Clock, Env};
use kvs_txlog::{TransactionLog, backup};
use tracing::info;

use super::scan::{Out, Scans};
use super::{AdminBody, not_allowed, text};

/// Number of entries of the backup, at most, for a display of its progress.
pub const ENTRIES_HEADER: &str = "kvs-backup-entries";

/// Responds to requests for `/backup`.
pub struct Backups {
    log: Arc<dyn TransactionLog>,
    scans: Scans,
    metrics: Arc<BackupMetrics>,
    clock: Clock,
}

impl Backups {
    pub fn new(log: Arc<dyn TransactionLog>, timeout: Duration, env: &Env) -> Self {
        let scans = Scans::new("backup", timeout, env);
        Self { log, scans, metrics: Arc::default(), clock: env.clock.clone() }
    }

    /// Returns how long a client may take for each piece.
    pub fn timeout(&self) -> Duration {
        self.scans.timeout
    }

    pub fn metrics(&self) -> Arc<BackupMetrics> {
        Arc::clone(&self.metrics)
    }

    pub async fn respond(&self, request: Request<Incoming>) -> Response<AdminBody> {
        if request.method() != Method::GET {
            return not_allowed("GET").map(Either::Left);
        }
        let since = match request.uri().query().unwrap_or_default() {
            "" => Some(0),
            query => query.strip_prefix("since=").and_then(|sequence| sequence.parse().ok()),
        };
        let Some(since) = since else {
            let reason = "unknown query; there is ?since=SEQUENCE\n";
            return text(StatusCode::BAD_REQUEST, reason).map(Either::Left);
        };
        let entries = self.log.history().entries(since, self.log.watermark().durable());
        let (log, metrics, clock) = (Arc::clone(&self.log), Arc::clone(&self.metrics), self.clock.clone());
        let work = move |out: &mut Out| {
            let trailer = backup::write(&*log, since, out).inspect_err(|_| metrics.failures.add(1))?;
            metrics.succeeded(clock.unix_ms() / 1000, out.sent);
            info!("backup: {} entries after sequence {since} up to {}", trailer.count, trailer.sequence);
            Ok(())
        };
        let mut response = self.scans.respond("application/octet-stream", work).await;
        if response.status().is_success() {
            response.headers_mut().insert(ENTRIES_HEADER, entries.into());
        }
        response
    }
}

/// The backups that clients took.
#[derive(Default)]
pub struct BackupMetrics {
    time: AtomicU64,
    bytes: AtomicU64,
    failures: Counter,
}

impl BackupMetrics {
    fn succeeded(&self, time: u64, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
        self.time.store(time, Ordering::Relaxed);
    }
}

impl Measured for BackupMetrics {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let help = "Time of the last complete backup, in seconds since 1970; 0 for none since the start";
        page.gauge("backup_last_success_timestamp_seconds", help, self.time.load(Ordering::Relaxed))?;
        page.gauge("backup_last_bytes", "Size of the last complete backup", self.bytes.load(Ordering::Relaxed))?;
        page.counter("backup_failures", "Backups that were not completed", self.failures.get())
    }
}
