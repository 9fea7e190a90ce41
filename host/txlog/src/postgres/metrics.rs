//! Metrics of the log in PostgreSQL.

use std::fmt;

use super::{PostgresLog, Shared};
use crate::TransactionLog;
use crate::remote::breaker::BreakerState;
use kvs_metrics::{Counter, Histogram, Measured, Page};

pub struct Metrics {
    pub append: Histogram,
    pub write: Histogram,
    pub batch: Histogram,
    pub written: Counter,
    pub connections: Counter,
    pub lookups: Counter,
    pub compacted: Counter,
}

impl Metrics {
    pub fn new() -> Self {
        Self {
            append: Histogram::of_times(),
            write: Histogram::of_times(),
            batch: Histogram::of_counts(),
            written: Counter::default(),
            connections: Counter::default(),
            lookups: Counter::default(),
            compacted: Counter::default(),
        }
    }
}

impl Measured for PostgresLog {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let Shared { metrics, breaker, queue, .. } = &*self.shared;
        let help = "Time from the first append of a batch until the batch is durable";
        page.histogram("txlog_commit_duration_seconds", help, &metrics.append)?;
        page.histogram("txlog_write_duration_seconds", "Time the database took to commit a batch", &metrics.write)?;
        page.histogram("txlog_batch_entries", "Entries of a batch, which became durable together", &metrics.batch)?;
        page.counter("txlog_written_bytes", "Bytes of batches written", metrics.written.get())?;
        let (durable, newest) = (self.watermark().durable(), self.appended());
        page.gauge("txlog_sequence", "The newest durable sequence", durable)?;
        let history = self.history();
        let unsynced = history.entries(durable, newest);
        page.gauge("txlog_unsynced_entries", "Entries appended but not durable yet", unsynced)?;
        let behind = history.entries(newest, self.shared.news.borrow().newest);
        page.gauge("txlog_role", "Role: 0 for primary, 1 for standby", u64::from(!queue.begun()))?;
        page.gauge(
            "txlog_replication_lag_entries",
            "Entries of the primary that this standby has not applied yet",
            behind,
        )?;
        let help = "1 while reads are served: the read lease is valid, or there is no standby";
        page.gauge("txlog_read_lease", help, u64::from(self.reads_refused().is_none()))?;
        let breaker_is = |position| u64::from(breaker.current() == position);
        let help = "State of the circuit breaker: closed (database available), half-open (attempting a call), open (unavailable)";
        page.gauges(
            "txlog_breaker",
            help,
            [("closed", BreakerState::Closed), ("half-open", BreakerState::HalfOpen), ("open", BreakerState::Open)]
                .map(|(name, position)| ([("state", name)], breaker_is(position))),
        )?;
        page.counter("txlog_breaker_opened", "Times that the circuit breaker opened", breaker.opened.get())?;
        page.counter("txlog_failures", "Database calls that failed and were retried", breaker.failures.get())?;
        page.counter("txlog_connections", "Reconnects to the database", metrics.connections.get())?;
        let help = "Batches whose outcome was unknown, or that another process preceded, and was checked";
        page.counter("txlog_lookups", help, metrics.lookups.get())?;
        page.counter("txlog_compacted_entries", "Entries that compaction dropped", metrics.compacted.get())
    }
}
