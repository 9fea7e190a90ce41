//! Handover: a log that one process closes and another continues, with the same lock, which is never free in between.
//!
//! Owns: that exactly one of the two writes. Must never know: how descriptors get to another process, or why.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::catalog::Marks;
use super::recovery::Known;
use super::{Before, FileLog, Lock, StandbyLog, position};
use crate::TransactionLog;

/// A log that was closed, and is still locked.
pub struct Handed {
    pub lock: Lock,
    /// The end of the log: what the next process must find.
    pub position: String,
}

/// A log that can be handed over.
pub trait HandOver: TransactionLog {
    /// Closes the log, and keeps the lock. Nothing may be appended from before this call on.
    fn hand_over(&self) -> Result<Handed>;

    /// Opens the log again. The process that it was handed to must have ended.
    fn take_back(&self, lock: Lock) -> Result<()>;
}

impl HandOver for FileLog {
    fn hand_over(&self) -> Result<Handed> {
        let lock = self.stop()?.context("the log is closed")?;
        let published = position::read(&*self.disk)?.context("the log has published no position: the disk was full")?;
        Ok(Handed { lock, position: published.to_string() })
    }

    fn take_back(&self, lock: Lock) -> Result<()> {
        lock.announce(&self.options.data, self.options.advertise.as_deref())?;
        let known = Known { log: self.id(), durable: self.watermark.durable(), marks: Marks::new() };
        let before = Before { known: Some(known), watermark: Arc::clone(&self.watermark), ..Before::default() };
        let (shared, running) = Self::run(Arc::clone(&self.disk), self.options.clone(), Some(lock), before)?;
        self.shared.store(shared);
        *self.running() = Some(running);
        self.compact_in_background()
    }
}

impl HandOver for StandbyLog {
    fn hand_over(&self) -> Result<Handed> {
        self.log().filter(|_| self.begun()).context("another process writes the log")?.hand_over()
    }

    fn take_back(&self, lock: Lock) -> Result<()> {
        self.log().context("another process writes the log")?.take_back(lock)
    }
}
