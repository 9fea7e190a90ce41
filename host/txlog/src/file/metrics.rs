//! Metrics of the file log.

use std::fmt;

use super::{FileLog, Shared, StandbyLog};
use crate::TransactionLog;
use kvs_metrics::{Counter, Histogram, Measured, Page};

pub struct Metrics {
    pub append: Histogram,
    pub write: Histogram,
    pub sync: Histogram,
    pub batch: Histogram,
    pub written: Counter,
    pub compactions: Counter,
    pub reclaimed: Counter,
}

impl Metrics {
    pub fn new() -> Self {
        Self {
            append: Histogram::of_times(),
            write: Histogram::of_times(),
            sync: Histogram::of_times(),
            batch: Histogram::of_counts(),
            written: Counter::default(),
            compactions: Counter::default(),
            reclaimed: Counter::default(),
        }
    }
}

impl Measured for FileLog {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let shared = self.shared();
        let Shared { metrics, catalog, compactor, .. } = &**shared;
        let help = "Time from the first append of a batch until the batch is durable";
        page.histogram("txlog_commit_duration_seconds", help, &metrics.append)?;
        page.histogram("txlog_write_duration_seconds", "Time to write a batch", &metrics.write)?;
        page.histogram("txlog_fsync_duration_seconds", "Time to sync a batch", &metrics.sync)?;
        page.histogram("txlog_batch_entries", "Entries of a batch, which became durable together", &metrics.batch)?;
        page.counter("txlog_written_bytes", "Bytes of batches written", metrics.written.get())?;
        let (durable, newest) = (self.watermark().durable(), self.appended());
        page.gauge("txlog_sequence", "The newest durable sequence", durable)?;
        page.gauge("txlog_unsynced_entries", "Entries appended but not durable yet", newest.saturating_sub(durable))?;
        let segments = catalog.all();
        page.gauge("txlog_segments", "Segment files of the log", segments.len() as u64)?;
        page.gauge("txlog_bytes", "Bytes of the log in use", segments.iter().map(|segment| segment.end).sum())?;
        let help = "Estimated garbage in sealed segments, in bytes: what the next compaction can drop";
        page.gauge("txlog_garbage_bytes", help, compactor.garbage(&shared))?;
        page.counter("txlog_compactions", "Compactions of the log", metrics.compactions.get())?;
        page.counter("txlog_reclaimed_bytes", "Bytes freed by compaction", metrics.reclaimed.get())
    }
}

impl Measured for StandbyLog {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        match self.log() {
            Some(log) => log.measure(page)?,
            None => page.gauge("txlog_sequence", "The newest durable sequence", self.watermark().durable())?,
        }
        page.gauge("txlog_role", "Role: 0 for primary, 1 for standby", u64::from(!self.begun()))?;
        let behind = if self.begun() { 0 } else { self.history().entries(self.appended(), self.newest()) };
        page.gauge(
            "txlog_replication_lag_entries",
            "Entries of the primary that this standby has not applied yet",
            behind,
        )
    }
}
