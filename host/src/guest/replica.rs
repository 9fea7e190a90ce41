//! An instance that takes in the log: at the start, after a trap, and beside a guest that serves, to take its place.
//!
//! Owns: how far it is in the log. Must never know: whether it will ever serve.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tracing::info;

use super::engine::Guest;
use super::instance::Instance;
use crate::log::TransactionLog;

/// How often a long replay tells how far it is.
const PROGRESS: Duration = Duration::from_secs(1);

pub struct Replica {
    pub instance: Box<Instance>,
    log: Arc<dyn TransactionLog>,
    /// It has the log up to here.
    sequence: u64,
    entries: u64,
}

/// How an instance came by its state.
#[derive(Clone, Copy, Debug)]
pub struct Replayed {
    pub entries: u64,
    /// Keys the guest holds after it.
    pub keys: u64,
    pub took: Duration,
}

/// Hears of the entries taken in so far, and of the sequence of the newest.
pub type Progress<'p> = dyn FnMut(u64, u64) + 'p;

impl Replica {
    /// A new instance of the guest, which has nothing of the log yet. What goes wrong here is the guest's doing.
    pub fn new(guest: &Guest, log: &Arc<dyn TransactionLog>) -> Result<Self> {
        let instance = Box::new(guest.instantiate(Arc::clone(log))?);
        Ok(Self { instance, log: Arc::clone(log), sequence: 0, entries: 0 })
    }

    /// A new instance with everything in the log that is durable now.
    pub fn build(guest: &Guest, log: &Arc<dyn TransactionLog>) -> Result<(Self, Replayed)> {
        let started = Instant::now();
        let mut replica = Self::new(guest, log)?;
        replica.catch_up(&mut |_, _| {})?;
        let replayed = replica.replayed(started)?;
        Ok((replica, replayed))
    }

    /// An instance that has served, and has everything up to `sequence`.
    pub fn served(instance: Box<Instance>, log: Arc<dyn TransactionLog>, sequence: u64) -> Self {
        Self { instance, log, sequence, entries: 0 }
    }

    /// Takes in what has become durable since, and returns how many entries that were. An error that is
    /// [`Trapped`](super::instance::Trapped) is the guest's, any other the log's.
    pub fn catch_up(&mut self, progress: &mut Progress<'_>) -> Result<u64> {
        let Self { instance, log, sequence, entries } = self;
        let (before, started) = (*entries, Instant::now());
        let mut told = started;
        let newest = log.appended();
        *sequence = log.replay(*sequence, &mut |batch| {
            instance.apply(batch)?;
            *entries += batch.len() as u64;
            let Some(last) = batch.last() else { return Ok(()) };
            progress(*entries, last.sequence);
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                let rate = (*entries - before) as f64 / started.elapsed().as_secs_f64();
                info!("replaying: {entries} entries, sequence {} of {newest}, {rate:.0} entries/s", last.sequence);
            }
            Ok(())
        })?;
        Ok(*entries - before)
    }

    /// What it took in, and how long that took when it began at `started`.
    pub fn replayed(&mut self, started: Instant) -> Result<Replayed> {
        let keys = self.instance.stats().context("stats failed")?.keys;
        Ok(Replayed { entries: self.entries, keys, took: started.elapsed() })
    }
}
