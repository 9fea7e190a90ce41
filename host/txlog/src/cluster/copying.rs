//! Copying: keeps the local copy of the log beside what this process does with it, and reads it instead of the engine at a start.
//!
//! The copy is read from the engine like any other reader reads it, so it has what is durable only, and what was verified. It
//! begins again with a newer snapshot when the log in it has grown. It is no part of the durability of the log: an error
//! stops it for a while, and is reported.
//!
//! Owns: when a copy is used, continued and begun again. Must never know: the bytes in its file.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use super::Shared;
use super::copy::Copy;
use super::follower::last;
use super::frame::Tip;
use super::reader::{Failure, Read};
use super::snapshot::Scan;
use crate::remote::queue::End;

/// Maximum time to wait for a frame, and delay after a read that found few: several frames are written at once.
const WAIT: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(100);
const MANY_FRAMES: usize = 128;
/// Delay after an error, and between attempts to lock the directory.
const RETRY_DELAY: Duration = Duration::from_secs(60);
const LOCK_DELAY: Duration = Duration::from_secs(5);
/// Interval of syncs, and of looks for a newer snapshot when one is wanted.
const INTERVAL: Duration = Duration::from_secs(10);
/// Maximum time without a frame of a snapshot.
const PATIENCE: Duration = Duration::from_secs(30);

/// A copy that the log cannot continue any more.
#[derive(Debug, thiserror::Error)]
#[error("the log was compacted beyond it")]
struct Behind;

impl Shared {
    /// Returns the copy of the log in the data directory, if there is one that the log continues.
    pub fn copy(&self) -> Option<Arc<Copy>> {
        self.copy.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_copy(&self, copy: Option<Arc<Copy>>) {
        *self.copy.lock().unwrap_or_else(PoisonError::into_inner) = copy;
    }

    /// Returns why no copy is kept.
    pub fn copy_failure(&self) -> Option<String> {
        self.copy_failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Opens the copy at a start, before the log is looked at: what is in it was durable.
    pub async fn open_copy(&self) -> Option<Arc<Copy>> {
        self.copies.as_ref()?;
        let opened = self.locked_copy().await.inspect_err(|error| self.copy_failed(error)).ok().flatten()?;
        self.advance(&opened.tip());
        Some(opened)
    }

    /// Uses the copy at a start, if the log continues it.
    pub async fn use_copy(&self, copy: Option<Arc<Copy>>) {
        let Some(copy) = copy else { return };
        if let Err(error) = self.adopt(copy).await
            && !error.is::<Failure>()
        {
            self.copy_failed(&error);
        }
    }

    /// Locks the directory, and opens the copy in it. None without one, and while another process has it.
    async fn locked_copy(&self) -> Result<Option<Arc<Copy>>> {
        let (directory, log) = (self.copies.clone(), self.log);
        let opened = spawn_blocking(move || match &directory {
            Some(directory) if directory.lock()? => directory.open(log),
            _ => Ok(None),
        });
        Ok(opened.await??.map(Arc::new))
    }

    /// Uses a copy from now on, if the log continues it.
    async fn adopt(&self, copy: Arc<Copy>) -> Result<()> {
        let tip = copy.tip();
        match self.continues(tip).await {
            Ok(true) => {
                if let Some(damage) = copy.damage() {
                    warn!("the local copy of the log is used up to where it is damaged: {damage}");
                }
                let truncated = Arc::clone(&copy);
                spawn_blocking(move || truncated.truncate()).await??;
                info!("using the local copy of the log up to sequence {}", tip.sequence);
                self.set_copy(Some(copy));
            }
            Ok(false) => {
                let aside = copy.set_aside()?;
                warn!("the log does not continue the local copy, which is now {}; making another one", aside.display());
            }
            Err(Failure::Dropped(_)) => {
                info!("making the local copy of the log again, since the log was compacted beyond it");
            }
            Err(failure) => return Err(failure.into()),
        }
        Ok(())
    }

    /// Returns whether the log continues after this end of it.
    async fn continues(&self, tip: Tip) -> Result<bool, Failure> {
        if self.ends().await?.last == tip.position {
            return Ok(last(self, tip.position).await?.0.is_same_end(&tip));
        }
        match self.read(&mut tip.clone(), WAIT).await {
            Ok(frames) if frames.is_empty() => Err(Failure::Silent("the replicas that answer are behind".into())),
            Ok(_) => Ok(true),
            Err(Failure::Damaged(_)) => {
                // It may be the end that is wrong.
                self.clear_suspect();
                Ok(false)
            }
            Err(failure) => Err(failure),
        }
    }

    fn copy_failed(&self, error: &anyhow::Error) {
        self.metrics.copy_failures.add(1);
        let mut failure = self.copy_failure.lock().unwrap_or_else(PoisonError::into_inner);
        let reason = format!("{error:#}");
        if failure.as_ref() != Some(&reason) {
            warn!("the local copy of the log fails, retrying every {RETRY_DELAY:?}: {reason}");
        }
        *failure = Some(reason);
    }

    fn is_copied(&self) -> bool {
        matches!(self.queue.ended(), None | Some(End::HandedOver))
    }

    /// Appends frames to a copy.
    async fn append_to(&self, copy: &Arc<Copy>, frames: Vec<Read>) -> Result<()> {
        let is_full = frames.len() >= MANY_FRAMES;
        let (copy, clock) = (Arc::clone(copy), &self.env.clock);
        let begun = clock.now();
        let frames: Vec<_> = frames.into_iter().map(|frame| frame.bytes).collect();
        spawn_blocking(move || copy.append(&frames)).await??;
        clock.sleep(if is_full { clock.elapsed(begun) } else { PAUSE }).await;
        Ok(())
    }

    /// Makes a copy from the newest snapshot on. The present one is kept until the new one has got as far.
    async fn copy_again(&self) -> Result<Option<Arc<Copy>>> {
        let Some(directory) = &self.copies else { return Ok(None) };
        let snapshot = self.find_snapshot().await?;
        let reach = self.copy().map_or(0, |copy| copy.tip().position);
        let base = snapshot.as_ref().map_or(0, |snapshot| snapshot.tip.position);
        let copy = Arc::new(directory.create(self.log, base)?);
        let mut scan = Scan::from_snapshot(self, snapshot.as_ref());
        let made = async {
            let mut progress = self.env.clock.now();
            while scan.tip().is_none_or(|tip| tip.position < reach) && self.is_copied() {
                let (_, frames) = scan.next(WAIT).await?;
                if frames.is_empty() {
                    ensure!(
                        self.env.clock.elapsed(progress) < PATIENCE,
                        "a frame is missing in the replicas that answer"
                    );
                    continue;
                }
                progress = self.env.clock.now();
                self.append_to(&copy, frames).await?;
            }
            let (completed, directory) = (Arc::clone(&copy), Arc::clone(directory));
            spawn_blocking(move || directory.complete(&completed)).await?
        };
        if let Err(error) = made.await {
            directory.abandon(&copy);
            return Err(error);
        }
        self.set_copy(Some(Arc::clone(&copy)));
        Ok(Some(copy))
    }

    /// Returns whether a newer snapshot would make the copy much smaller.
    async fn is_long(&self, copy: &Copy) -> bool {
        let (snapshot, log) = copy.sizes();
        log >= self.compaction_bytes.max(snapshot)
            && matches!(self.find_snapshot().await, Ok(Some(newest)) if newest.tip.position > copy.base())
    }

    /// Continues the copy until the log ends, or was compacted beyond it.
    async fn continue_copy(&self, copy: &Arc<Copy>) -> Result<()> {
        let clock = &self.env.clock;
        let mut tip = copy.tip();
        let (mut looked, mut is_synced) = (clock.now(), true);
        while self.is_copied() {
            match self.read(&mut tip, WAIT).await {
                Ok(frames) if frames.is_empty() => {}
                Ok(frames) => {
                    self.append_to(copy, frames).await?;
                    is_synced = false;
                }
                Err(Failure::Dropped(_)) => return Err(Behind.into()),
                // Others report it.
                Err(Failure::Silent(_) | Failure::Damaged(_) | Failure::Gone(_)) => clock.sleep(WAIT).await,
            }
            if clock.elapsed(looked) < INTERVAL {
                continue;
            }
            looked = clock.now();
            if !is_synced {
                let synced = Arc::clone(copy);
                spawn_blocking(move || synced.sync()).await??;
                is_synced = true;
            }
            if self.is_long(copy).await {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Copy task: keeps the copy until the log ends.
pub(super) async fn run(shared: Arc<Shared>) -> Result<()> {
    let clock = &shared.env.clock;
    if shared.copies.is_none() {
        return Ok(());
    }
    while shared.is_copied() {
        match keep(&shared).await {
            Ok(delay) => clock.sleep(delay).await,
            Err(error) => {
                shared.set_copy(None);
                // The engine answers again at some time, which is no failure of the copy.
                if !error.is::<Failure>() {
                    shared.copy_failed(&error);
                    clock.sleep(RETRY_DELAY).await;
                } else {
                    clock.sleep(LOCK_DELAY).await;
                }
            }
        }
    }
    Ok(())
}

/// Makes or continues the copy until another one must be made, and returns the delay before that.
async fn keep(shared: &Shared) -> Result<Duration> {
    let copy = match shared.copy() {
        Some(copy) => copy,
        None => {
            let Some(directory) = shared.copies.clone() else { return Ok(RETRY_DELAY) };
            if !spawn_blocking(move || directory.lock()).await?? {
                return Ok(LOCK_DELAY);
            }
            if let Some(copy) = shared.locked_copy().await? {
                shared.adopt(copy).await?;
            }
            let copy = match shared.copy() {
                None => shared.copy_again().await?,
                copy => copy,
            };
            match copy {
                Some(copy) => copy,
                None => return Ok(RETRY_DELAY),
            }
        }
    };
    *shared.copy_failure.lock().unwrap_or_else(PoisonError::into_inner) = None;
    match shared.continue_copy(&copy).await {
        Err(error) if !error.is::<Behind>() => return Err(error),
        _ if !shared.is_copied() => {}
        _ => drop(shared.copy_again().await?),
    }
    Ok(Duration::ZERO)
}
