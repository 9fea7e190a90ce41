//! Standing by: following a log that another process writes, and writing it when that one is gone.
//!
//! Owns: what a standby is promised. Must never know: how it is found out who writes, or who applies the entries.

use std::time::Instant;

use anyhow::Result;
use tokio::sync::watch;

use crate::TransactionLog;

/// A log that another process writes, until this one does. Until then it is read-only, and its end is what was followed.
///
/// Whoever serves from it waits for [`News`], reads the new entries with [`TransactionLog::replay`], applies them, and says so
/// with [`Standby::follow`]; after the last of them, when there is no holder, [`Standby::begin`].
pub trait Standby: TransactionLog {
    /// What there is to follow; changes for as long as another process writes.
    fn news(&self) -> watch::Receiver<News>;

    /// The entries up to this sequence were applied.
    fn follow(&self, sequence: u64);

    /// All entries were applied, and the log is this process's: from now on it takes appends.
    fn begin(&self) -> Result<()>;
}

/// What a standby knows of the log.
#[derive(Clone, Debug)]
pub struct News {
    /// The newest durable sequence.
    pub newest: u64,
    /// Who writes. None when that is this process, or will be as soon as it has applied everything.
    pub holder: Option<String>,
    /// URL at which the holder serves clients, where it has announced one.
    pub primary: Option<String>,
    /// When nothing newer than `newest` was durable.
    pub as_of: Instant,
}
