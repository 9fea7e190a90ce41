//! The interface of a handover: one process closes a log and another continues it, and no third one gets in between.
//!
//! Must never know: how this is reported to the other process, or why the log is handed over.

use anyhow::Result;

use crate::TransactionLog;
use crate::file::Lock;

/// A log that was closed for another process, which receives this: [`Standby::receive`](crate::Standby::receive).
pub struct Handed {
    /// The lock of a log in files, which is never free. Other logs fence processes off by an epoch.
    pub lock: Option<Lock>,
    /// The end of the log: what the next process must find.
    pub position: String,
}

/// A log that can be handed over.
pub trait HandOver: TransactionLog {
    /// Closes the log for another process. Nothing may be appended from before this call on, and everything must be durable.
    /// After an error the log is still open, unless its watermark has failed.
    fn hand_over(&self) -> Result<Handed>;

    /// Opens the log again. The process that it was handed to must have ended. What that has appended is in the log.
    fn take_back(&self, handed: Handed) -> Result<()>;
}
