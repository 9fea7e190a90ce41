//! Handover of a log in files: the lock goes to the other process with its descriptors, and is never free in between.
//!
//! Owns: that exactly one of the two writes. Must never know: how descriptors get to another process.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::catalog::Marks;
use super::recovery::Known;
use super::{Before, FileLog, StandbyLog, position};
use crate::{HandOver, Handed, TransactionLog};

/// Why a log in files is not taken over without its lock.
pub const NO_LOCK: &str = "the log was handed over without its lock";

impl HandOver for FileLog {
    fn hand_over(&self) -> Result<Handed> {
        let hand_over = || {
            let lock = self.stop()?.context("the log is closed")?;
            let published =
                position::read(&*self.disk)?.context("the log has published no position: the disk was full")?;
            Ok(Handed { lock: Some(lock), position: published.to_string() })
        };
        // It is closed by then.
        hand_over().inspect_err(|error: &anyhow::Error| self.watermark.latch(format!("{error:#}")))
    }

    fn take_back(&self, handed: Handed) -> Result<()> {
        let lock = handed.lock.context(NO_LOCK)?;
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

    fn take_back(&self, handed: Handed) -> Result<()> {
        self.log().context("another process writes the log")?.take_back(handed)
    }
}
