//! Integrity of the log in the engine, which is not trusted with it: frames can be lost in the middle and at the end.
//!
//! Owns: the newest frame that was durable, before which the log must never end, and what is known of damage. Must never
//! know: how frames are read.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use tokio::task;
use tracing::{error, info};

use super::Shared;
use super::engine::{Ends, Engine, ReadError};
use super::frame::Tip;
use super::mark::Mark;
use super::reader::Failure;
use crate::remote::queue::End;

/// Interval at which the engine is asked whether it has lost frames, and the watermark file is written.
const INTERVAL: Duration = Duration::from_secs(5);
/// Time after which a log that ends too early has lost its end: until then the answers can be those of a former leader,
/// which the engine has replaced within [`READ_LEASE`](super::READ_LEASE).
pub const LOSS_TIMEOUT: Duration = Duration::from_secs(15);

/// Number of reads per interval of a frame that a replica lacks, and of consecutive good ones after which no replica does: each
/// is answered by any of them.
const PROBES: u32 = 4;
const GOOD_PROBES: u32 = 40;

/// A frame that a replica lacks or returns damaged, while others have it.
struct Suspect {
    /// The log or a snapshot, and the end of it before the frame.
    engine: Arc<dyn Engine>,
    before: Tip,
    reason: String,
    /// Consecutive good reads.
    good: u32,
}

/// State of a log in the engine.
pub struct Integrity {
    /// The newest frame that was durable.
    mark: Mark,
    /// Time since which the engine answers that the log ends before the mark.
    short: Option<Instant>,
    /// Time since which the engine answers that the log begins after its snapshots.
    headless: Option<Instant>,
    /// Position of the first frame, and the bytes of all, as of the last answer.
    first: u64,
    bytes: u64,
    /// A frame that no replica returns.
    frame: Option<String>,
    /// A frame that some replica does not return.
    suspect: Option<Suspect>,
    /// Number of frames that the engine says it has lost.
    lost: u64,
}

impl Integrity {
    pub fn new(mark: Mark) -> Self {
        Self { mark, short: None, headless: None, first: 1, bytes: 0, frame: None, suspect: None, lost: 0 }
    }
}

impl Shared {
    /// Asks the engine for the ends of the log. An error if frames are gone that were durable.
    pub async fn ends(&self) -> Result<Ends, Failure> {
        // Both from before the call: frames become durable during it, and the process can be paused after it.
        let (mark, asked) = (self.mark(), self.env.clock.now());
        let ends = self.engine.ends().await?;
        let is_whole = self.reaches(ends.first) || {
            self.find_snapshot().await?;
            self.reaches(ends.first)
        };
        let mut integrity = self.lock_integrity();
        let Integrity { short, headless, .. } = &mut *integrity;
        let (since, reason) = if !is_whole {
            (headless, lost_beginning(ends.first, &self.name))
        } else if ends.last < mark.position {
            (short, lost_end(ends.last, mark))
        } else {
            (*short, *headless) = (None, None);
            if integrity.first < ends.first {
                self.index.drop_before(ends.first);
            }
            integrity.first = ends.first;
            integrity.bytes = ends.bytes;
            return Ok(ends);
        };
        let since = *since.get_or_insert(asked);
        let is_lost = asked.saturating_duration_since(since) >= LOSS_TIMEOUT;
        Err(if is_lost { Failure::Gone(reason) } else { Failure::Silent(reason) })
    }

    /// Returns whether the frames before this position were dropped by compaction: a snapshot has their entries.
    fn reaches(&self, first: u64) -> bool {
        first == 1 || self.snapshot().is_some_and(|snapshot| snapshot.tip.position + 1 >= first)
    }

    /// Returns the position of the first frame of the log, as of the last answer.
    pub fn first(&self) -> u64 {
        self.lock_integrity().first
    }

    /// Returns the bytes of the log in the engine, as of the last answer.
    pub fn bytes(&self) -> u64 {
        self.lock_integrity().bytes
    }

    /// Checks that the log that ends there is the one with the mark, and not another one that was written after a loss.
    pub fn check_end(&self, tip: &Tip) -> Result<(), Failure> {
        let mark = self.mark();
        if tip.sequence < mark.sequence {
            return Err(Failure::Gone(lost_end(tip.position, mark)));
        }
        self.advance(tip);
        Ok(())
    }

    /// Notes a frame that is durable.
    pub fn advance(&self, tip: &Tip) {
        let Integrity { mark, short, .. } = &mut *self.lock_integrity();
        if tip.position > mark.position {
            (mark.position, mark.sequence) = (tip.position, tip.sequence);
            // After a loss none can follow the frames that were lost.
            *short = None;
        }
    }

    /// Checks the log in the engine, until it ends.
    pub async fn watch_integrity(self: &Arc<Self>) -> Result<()> {
        loop {
            match self.queue.ended() {
                None => self.check_integrity().await?,
                // Another process does this, unless it fails.
                Some(End::HandedOver) => {}
                Some(_) => return Ok(()),
            }
            self.env.clock.sleep(INTERVAL).await;
        }
    }

    async fn check_integrity(self: &Arc<Self>) -> Result<()> {
        match self.ends().await {
            Ok(ends) => {
                let lost = (ends.last + 1 - ends.first).saturating_sub(ends.frames);
                let known = std::mem::replace(&mut self.lock_integrity().lost, lost);
                if lost > known {
                    error!("{lost} frames of {} are lost in the engine; see docs/jetstream.md", self.name);
                }
            }
            Err(Failure::Gone(reason)) => self.fail(&anyhow!(reason)),
            Err(_) => {}
        }
        self.probe().await;
        if self.mark_file.is_some() {
            let shared = Arc::clone(self);
            task::spawn_blocking(move || shared.write_mark()).await??;
        }
        Ok(())
    }

    /// Writes the watermark file, if there is one.
    pub fn write_mark(&self) -> Result<()> {
        self.mark_file.as_ref().map_or(Ok(()), |file| file.write(self.mark()))
    }

    /// Notes the bad answer of a replica about the frame after `before`, in the log or in a snapshot.
    pub fn suspect(&self, engine: &Arc<dyn Engine>, before: Tip, reason: &str) {
        let suspect = &mut self.lock_integrity().suspect;
        match suspect {
            Some(known) if known.before == before => known.good = 0,
            // One is enough to know that a replica is damaged.
            Some(_) => {}
            None => {
                error!("a replica of the log is damaged: {reason}; see docs/jetstream.md");
                *suspect = Some(Suspect { engine: Arc::clone(engine), before, reason: reason.to_owned(), good: 0 });
            }
        }
    }

    /// Forgets the bad answer of a replica: it was not the frame that was wrong, but what it was compared with.
    pub fn clear_suspect(&self) {
        self.lock_integrity().suspect = None;
    }

    /// Reads the frame again that a replica does not return, until all replicas do, or compaction has dropped it.
    async fn probe(&self) {
        let known = self.lock_integrity().suspect.as_ref().map(|known| (Arc::clone(&known.engine), known.before));
        let Some((engine, before)) = known else { return };
        let position = before.position + 1;
        for _ in 0..PROBES {
            let (is_good, is_dropped) = match engine.read(position, Duration::ZERO).await {
                Ok(frames) if frames.is_empty() => continue,
                Ok(frames) => (before.clone().accept(self.log, &frames[0]).is_ok(), false),
                Err(ReadError::Missing(_)) => (false, engine.ends().await.is_ok_and(|ends| ends.first > position)),
                Err(ReadError::Gone(_)) => (false, true),
                Err(ReadError::Unavailable(_)) => return,
            };
            let suspect = &mut self.lock_integrity().suspect;
            let Some(known) = suspect else { return };
            known.good = if is_good { known.good + 1 } else { 0 };
            if known.good == GOOD_PROBES || is_dropped {
                info!("resolved: no replica lacks the frame any more: {}", known.reason);
                *suspect = None;
            }
        }
    }

    /// Notes the frame that no replica returns, or that there is none.
    pub fn set_damage(&self, frame: Option<String>) {
        let mut integrity = self.lock_integrity();
        match &frame {
            Some(reason) if integrity.frame.is_none() => {
                error!("the log is damaged: {reason}; see docs/jetstream.md");
            }
            None if integrity.frame.is_some() => info!("resolved: the log can be read again"),
            _ => {}
        }
        integrity.frame = frame;
    }

    pub fn damage(&self) -> Option<String> {
        let integrity = self.lock_integrity();
        let lost = (integrity.lost > 0).then(|| format!("the engine has lost {} frames", integrity.lost));
        integrity.frame.clone().or(lost)
    }

    /// Returns the frame that some replica does not return, and others do.
    pub fn replica_damage(&self) -> Option<String> {
        self.lock_integrity().suspect.as_ref().map(|suspect| suspect.reason.clone())
    }

    /// Returns the newest frame that was durable.
    pub fn mark(&self) -> Mark {
        self.lock_integrity().mark
    }

    fn lock_integrity(&self) -> MutexGuard<'_, Integrity> {
        self.integrity.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lost_beginning(first: u64, name: &str) -> String {
    format!(
        "the first {} frames of the log in the {name} are gone, and no snapshot has their entries: it was purged by hand; \
         restore it from a copy",
        first - 1
    )
}

fn lost_end(last: u64, mark: Mark) -> String {
    let Mark { position, sequence, .. } = mark;
    format!(
        "the engine has lost the end of the log: it ends at frame {last}, but frame {position} with sequence {sequence} was \
         durable; restore it from a copy, or serve with another --data-dir to accept the loss"
    )
}
