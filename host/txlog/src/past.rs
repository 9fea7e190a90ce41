//! A log up to a point in time, read-only: to look at a state before it is restored.
//!
//! Must never know: how the log is stored.

use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use uuid::Uuid;

use crate::backup::{Cut, Until};
use crate::{AppendError, Condition, Event, History, Receive, TransactionLog, Watermark};

/// The entries of a log up to a sequence.
pub struct PastLog {
    log: Arc<dyn TransactionLog>,
    last: u64,
    watermark: Watermark,
    history: Arc<History>,
}

impl PastLog {
    /// Finds the point in time; without one it is the end of the log. Reads the log once.
    pub fn open(log: Arc<dyn TransactionLog>, until: Option<Until>) -> Result<Self> {
        let newest = log.watermark().durable();
        let last = match until {
            None => newest,
            Some(until) => find(&*log, newest, until)?,
        };
        let history = Arc::new(log.history().until(last));
        Ok(Self { log, last, watermark: Watermark::new(last), history })
    }
}

fn find(log: &dyn TransactionLog, newest: u64, until: Until) -> Result<u64> {
    let history = log.history();
    let (mut cut, mut time, retained) = (Cut::new(0), None, log.retained());
    log.replay(0, &mut |entries| {
        for entry in entries {
            cut.visit(entry, &history, Some(until));
            time = if entry.sequence <= retained { Some(entry.time) } else { time };
        }
        Ok(())
    })?;
    cut.end(newest, &history, Some(until));
    let last = match (cut.at, until) {
        (Some(last), _) => last,
        (None, Until::Sequence(sequence)) => bail!("sequence {sequence} is not in the log, which ends with {newest}"),
        (None, Until::Time(_)) => newest,
    };
    ensure!(history.contains(last), "sequence {last} is in no incarnation of the log");
    if !cut.holds(last, retained) {
        let time = time.map(|time| format!(", which is --until {time}ms,")).unwrap_or_default();
        bail!(
            "the state at sequence {last} is not retained: entries from before it were compacted since; it can be had from \
             sequence {retained}{time} on"
        );
    }
    Ok(last)
}

impl TransactionLog for PastLog {
    fn append(&self, _: u64, _: &[Event]) -> Result<u64, AppendError> {
        Err(AppendError::ReadOnly)
    }

    fn appended(&self) -> u64 {
        self.last
    }

    fn watermark(&self) -> &Watermark {
        &self.watermark
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
        self.log.replay(after, &mut |entries| {
            let count = entries.partition_point(|entry| entry.sequence <= self.last);
            if count == 0 { Ok(()) } else { receive(&entries[..count]) }
        })?;
        Ok(self.last)
    }

    fn id(&self) -> Uuid {
        self.log.id()
    }

    fn retained(&self) -> u64 {
        self.log.retained()
    }

    fn history(&self) -> Arc<History> {
        Arc::clone(&self.history)
    }

    fn condition(&self) -> Condition {
        match self.log.condition() {
            Condition::Well => Condition::But(format!("read-only, up to sequence {}", self.last)),
            other => other,
        }
    }

    fn close(&self) -> Result<()> {
        self.log.close()
    }
}
