//! Handover of a log in files: the lock goes to the other process with its descriptors, and is never free in between.
//!
//! Owns: that exactly one of the two writes. Must never know: how descriptors get to another process.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};

use super::catalog::Marks;
use super::recovery::Known;
use super::standby::is_passing;
use super::{Before, FileLog, Lock, Running, Shared, StandbyLog, position};
use crate::{HandOver, Handed, TransactionLog};

/// Why a log in files is not taken over without its lock.
pub const NO_LOCK: &str = "the log was handed over without its lock";

/// For as long a shortage is waited for when a log is opened again: requests wait meanwhile.
const SHORTAGE_TIMEOUT: Duration = Duration::from_secs(10);
const SHORTAGE_PAUSE: Duration = Duration::from_millis(50);

impl HandOver for FileLog {
    fn hand_over(&self) -> Result<Handed> {
        self.handed.store(true, Ordering::Relaxed);
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
        let clock = &self.options.env.clock;
        let begun = clock.now();
        let (shared, running) = loop {
            match self.run_again(&lock) {
                Err(error) if is_passing(&error) && clock.elapsed(begun) < SHORTAGE_TIMEOUT => {
                    clock.pause(SHORTAGE_PAUSE)
                }
                opened => break opened?,
            }
        };
        self.shared.store(shared);
        *self.running() = Some(running);
        self.handed.store(false, Ordering::Relaxed);
        self.compact_in_background()
    }
}

impl FileLog {
    fn run_again(&self, lock: &Lock) -> Result<(Arc<Shared>, Running)> {
        let known = Known { log: self.id(), durable: self.watermark.durable(), marks: Marks::new() };
        let before = Before { known: Some(known), watermark: Arc::clone(&self.watermark), ..Before::default() };
        Self::run(Arc::clone(&self.disk), self.options.clone(), Some(lock.duplicate()?), before)
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
