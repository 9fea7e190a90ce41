//! Logs of a test: one in memory, which refuses appends on demand, and a view of a log in batches of another size.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use kvs_txlog::change::Change;
use kvs_txlog::{AppendError, Entry, Event, REPLAY_ENTRIES, Receive, TransactionLog, Watermark};

/// A log in memory, in which entries are durable at once.
pub struct MemoryLog {
    state: Mutex<State>,
    watermark: Watermark,
}

#[derive(Default)]
struct State {
    entries: Vec<Arc<Change>>,
    /// Result of appends, in place of appending.
    refusal: Option<AppendError>,
    refused: u64,
}

impl MemoryLog {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), watermark: Watermark::new(0) })
    }

    /// Refuses appends from now on.
    pub fn refuse(&self, with: AppendError) {
        let mut state = self.state();
        (state.refusal, state.refused) = (Some(with), 0);
    }

    /// Accepts appends again. Returns how many were refused.
    pub fn accept(&self) -> u64 {
        let mut state = self.state();
        state.refusal = None;
        state.refused
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TransactionLog for MemoryLog {
    fn append(&self, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        let mut state = self.state();
        if let Some(refusal) = state.refusal.filter(|_| !events.is_empty()) {
            state.refused += 1;
            return Err(refusal);
        }
        let first = self.appended() + 1;
        let new = (first..).zip(events);
        state.entries.extend(new.map(|(sequence, event)| Arc::new(Change::new(sequence, time, event.clone()))));
        self.watermark.advance(state.entries.len() as u64);
        Ok(first)
    }

    fn appended(&self) -> u64 {
        self.watermark.durable()
    }

    fn watermark(&self) -> &Watermark {
        &self.watermark
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
        let entries = self.state().entries.get(usize::try_from(after)?..).unwrap_or_default().to_vec();
        for changes in entries.chunks(REPLAY_ENTRIES) {
            let metadata: Vec<_> = changes.iter().map(|change| change.metadata()).collect();
            let batch: Vec<_> =
                changes.iter().zip(&metadata).map(|(change, metadata)| change.entry(metadata)).collect();
            receive(&batch)?;
        }
        Ok(after + entries.len() as u64)
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}

/// A log up to some sequence, in batches of at most this many entries. It takes no appends.
pub struct View {
    pub log: Arc<dyn TransactionLog>,
    pub until: u64,
    pub batch: usize,
}

impl TransactionLog for View {
    fn append(&self, _: u64, _: &[Event]) -> Result<u64, AppendError> {
        Err(AppendError::ReadOnly)
    }

    fn appended(&self) -> u64 {
        self.log.appended().min(self.until)
    }

    fn watermark(&self) -> &Watermark {
        self.log.watermark()
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
        let until = self.log.replay(after, &mut |batch: &[Entry<'_>]| {
            let visible = batch.partition_point(|entry| entry.sequence <= self.until);
            batch[..visible].chunks(self.batch).try_for_each(&mut *receive)
        })?;
        Ok(until.min(self.until))
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}
