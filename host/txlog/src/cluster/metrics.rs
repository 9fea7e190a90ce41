//! Metrics of a replicated log.

use std::fmt;

use super::{ClusterLog, Shared};
use crate::TransactionLog;
use crate::remote::breaker::BreakerState;
use kvs_metrics::{Counter, Histogram, Measured, Page};

pub struct Metrics {
    pub append: Histogram,
    pub write: Histogram,
    pub batch: Histogram,
    pub written: Counter,
    pub lookups: Counter,
    pub rereads: Counter,
    pub claims: Counter,
    pub compactions: Counter,
    pub copy_failures: Counter,
}

impl Metrics {
    pub fn new() -> Self {
        Self {
            append: Histogram::of_times(),
            write: Histogram::of_times(),
            batch: Histogram::of_counts(),
            written: Counter::default(),
            lookups: Counter::default(),
            rereads: Counter::default(),
            claims: Counter::default(),
            compactions: Counter::default(),
            copy_failures: Counter::default(),
        }
    }
}

impl Measured for ClusterLog {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let Shared { metrics, breaker, queue, .. } = &*self.shared;
        let help = "Time from the first append of a batch until the batch is durable";
        page.histogram("txlog_commit_duration_seconds", help, &metrics.append)?;
        page.histogram(
            "txlog_write_duration_seconds",
            "Time from sending a frame until it is durable",
            &metrics.write,
        )?;
        page.histogram("txlog_batch_entries", "Entries of a batch, which became durable together", &metrics.batch)?;
        page.counter("txlog_written_bytes", "Bytes of batches written", metrics.written.get())?;
        let (durable, newest) = (self.watermark().durable(), self.appended());
        page.gauge("txlog_sequence", "The newest durable sequence", durable)?;
        page.gauge("txlog_unsynced_entries", "Entries appended but not durable yet", newest.saturating_sub(durable))?;
        let behind = self.shared.restored().history.entries(newest, self.shared.news.borrow().newest);
        page.gauge("txlog_role", "Role: 0 for primary, 1 for standby", u64::from(!queue.begun()))?;
        page.gauge(
            "txlog_replication_lag_entries",
            "Entries of the primary that this standby has not applied yet",
            behind,
        )?;
        let help = "1 while reads are served: the read lease is valid";
        page.gauge("txlog_read_lease", help, u64::from(self.reads_refused().is_none()))?;
        let breaker_is = |position| u64::from(breaker.current() == position);
        let help = "State of the circuit breaker: closed (engine available), half-open (attempting a call), open (unavailable)";
        page.gauges(
            "txlog_breaker",
            help,
            [("closed", BreakerState::Closed), ("half-open", BreakerState::HalfOpen), ("open", BreakerState::Open)]
                .map(|(name, position)| ([("state", name)], breaker_is(position))),
        )?;
        page.counter("txlog_breaker_opened", "Times that the circuit breaker opened", breaker.opened.get())?;
        page.counter("txlog_failures", "Calls of the engine that failed and were retried", breaker.failures.get())?;
        let help = "Frames whose outcome was unknown, or that were refused, and were checked";
        page.counter("txlog_lookups", help, metrics.lookups.get())?;
        page.counter("txlog_claims", "Times that this process claimed the log", metrics.claims.get())?;
        page.gauge("txlog_bytes", "Bytes of the log in use", self.shared.bytes())?;
        page.counter("txlog_compactions", "Compactions of the log", metrics.compactions.get())?;
        let help = "Reads repeated because a replica lacked a frame or returned a damaged one";
        page.counter("txlog_rereads", help, metrics.rereads.get())?;
        let copied = self.shared.copy().map_or(0, |copy| copy.sizes().0 + copy.sizes().1);
        page.gauge("txlog_copy_bytes", "Bytes of the local copy of the log", copied)?;
        let help = "Errors that stopped the local copy of the log for a while";
        page.counter("txlog_copy_failures", help, metrics.copy_failures.get())?;
        let is_damaged = self.shared.damage().or_else(|| self.shared.replica_damage()).is_some();
        let help = "1 while frames of the log are damaged or missing in the engine, or in one replica of it";
        page.gauge("txlog_damaged", help, u64::from(is_damaged))
    }
}
