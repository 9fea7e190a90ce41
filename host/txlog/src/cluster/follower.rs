//! Follower: reads what the primary writes, and claims the log when the primary is gone.
//!
//! The primary is gone when it has released the log, or when no frame of it was received for its lease, which it counts from
//! an earlier moment and only to four fifths (`lease`). A claim is put after the last frame that was read, so it succeeds
//! only if the follower has read everything. A follower that cannot reach the engine does not count: a silence may be that
//! of the engine.
//!
//! Owns: the end of the log as far as it was read, and the status of the primary. Must never know: how entries are applied.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use tracing::{info, warn};
use uuid::Uuid;

use super::engine::{Ends, FULL, Put, REFUSED, ReadError};
use super::frame::{Holder, Kind, Tip, is_mutant};
use super::handover::Position;
use super::reader::{Failure, Read};
use super::writer::Writer;
use super::{START_TIMEOUT, Shared};
use crate::News;

/// Maximum time to wait for a frame.
const WAIT: Duration = Duration::from_millis(250);
/// Interval at which the engine is asked for the end of the log: hence a bound for the age of reads.
const ENDS_INTERVAL: Duration = Duration::from_millis(500);
/// Time after which a frame that must be there counts as missing: a replica may lag behind.
const MISSING: Duration = Duration::from_secs(5);
/// Lease of a primary that is not known.
const LONGEST_LEASE: Duration = Duration::from_secs(10);
/// Frames received for longer than this after the start are from a primary that is alive.
const GRACE: Duration = Duration::from_secs(1);
/// Delay between attempts to reach the engine at the start.
const RETRY_DELAY: Duration = Duration::from_secs(1);

pub struct Follower {
    tip: Tip,
    holder: Option<Holder>,
    is_released: bool,
    /// A frame was read that follows the one at which this began.
    is_confirmed: bool,
    /// Time at which the last frame was received.
    received: Instant,
    /// The end of the log that this process has claimed, and the time of the first attempt.
    claim: Option<(Tip, Instant)>,
    is_owned: bool,
    /// Time since which every claim fails, and the reason for the last one.
    unclaimed: Option<(Instant, String)>,
    /// The id with which this process claims the log.
    id: Uuid,
    /// Where the log was handed over, to this process or by it, and the first other process that has claimed it since.
    handed: Option<Position>,
    successor: Option<Uuid>,
    /// The last answer about the ends of the log, and a time before which it was asked for.
    ends: Option<(Ends, Instant)>,
    asked: Option<Instant>,
}

impl Follower {
    /// Finds the end of the log.
    pub async fn begin(shared: &Shared) -> Result<Self, Failure> {
        let now = shared.env.clock.now();
        let ends = shared.ends().await?;
        let (mut tip, mut kind) = (Tip::default(), Kind::Released);
        if ends.last > 0 {
            shared.read_restored().await?;
            (tip, kind) = last(shared, ends.last).await?;
        }
        shared.check_end(&tip)?;
        let mut follower = Self { ends: Some((ends, now)), asked: Some(now), ..Self::at(shared, tip) };
        follower.note(kind);
        Ok(follower)
    }

    /// Follows the log from here on.
    pub fn at(shared: &Shared, tip: Tip) -> Self {
        Self {
            tip,
            holder: None,
            is_released: false,
            is_confirmed: false,
            // After the last frame was read, which can have been sent after the ends were asked for.
            received: shared.env.clock.now(),
            claim: None,
            is_owned: false,
            unclaimed: None,
            id: shared.holder.id,
            handed: None,
            successor: None,
            ends: None,
            asked: None,
        }
    }

    /// Follows a log that this process has handed over.
    pub fn of_handed_over(shared: &Shared, tip: Tip, handed: Position) -> Self {
        Self { handed: Some(handed), ..Self::at(shared, tip) }
    }

    /// What `again` found, with what was handed over to this process.
    fn begun_again(&self, again: Self) -> Self {
        Self { id: self.id, handed: self.handed, successor: self.successor, ..again }
    }

    /// Returns the newest sequence.
    pub fn sequence(&self) -> u64 {
        self.tip.sequence
    }

    /// Claims the log at the start of a process, unless another one writes it.
    pub async fn claim_at_start(mut self, shared: &Shared) -> Result<(Self, Writer)> {
        let clock = &shared.env.clock;
        let begun = clock.now();
        let mut succeeded = begun;
        if !self.is_free(shared) {
            info!("waiting until the lease of {} expires", self.name());
        }
        loop {
            let before = self.received;
            match self.step(shared).await {
                Ok(Some(writer)) => return Ok((self, writer)),
                Ok(None) if self.received != before && clock.elapsed(begun) > GRACE => {
                    let holder = self.name();
                    bail!("it is in use by {holder}; stop it first, or serve with --standby");
                }
                Ok(None) => succeeded = clock.now(),
                Err(failure @ (Failure::Gone(_) | Failure::Damaged(_) | Failure::Dropped(_))) => {
                    return Err(failure.into());
                }
                Err(Failure::Silent(reason)) => {
                    // A primary that could not be observed may have written.
                    self.received = clock.now();
                    if self.unclaimed.is_none() && clock.elapsed(succeeded) > START_TIMEOUT {
                        bail!("{reason}");
                    }
                    clock.sleep(RETRY_DELAY).await;
                }
            }
            // Counted over all attempts: those in between wait for a lease, and succeed.
            if let Some((since, reason)) = &self.unclaimed
                && clock.elapsed(*since) > START_TIMEOUT
            {
                bail!("it cannot be claimed for {START_TIMEOUT:?}: {reason}");
            }
        }
    }

    /// Standby task: follows until the log is claimed, and then writes. Ends with the log.
    pub async fn run(mut self, shared: &Shared) {
        let mut handed = shared.handed.subscribe();
        while shared.queue.ended().is_none() {
            shared.breaker.on_attempt();
            let step = tokio::select! {
                step = self.step(shared) => step,
                // The sender is in `shared`. What was read is noted at once, and a claim that was put is read again.
                _ = handed.changed() => {
                    self.handed = *handed.borrow_and_update();
                    self.id = self.handed.map_or(self.id, |handed| handed.id);
                    continue;
                }
            };
            match step {
                Ok(_) if self.is_superseded() => {
                    let name = self.name();
                    return shared.fail(&anyhow!("it was handed over to this process, but {name} has claimed it"));
                }
                Ok(None) => {
                    shared.breaker.succeeded();
                    shared.set_damage(None);
                }
                Ok(Some(writer)) => {
                    info!("claimed the log in {}, epoch {}", shared.name, self.tip.epoch);
                    shared.breaker.succeeded();
                    return writer.run(shared).await;
                }
                Err(Failure::Gone(reason)) => return shared.fail(&anyhow!(reason)),
                Err(Failure::Damaged(reason)) => {
                    shared.set_damage(Some(reason));
                    shared.env.clock.sleep(RETRY_DELAY).await;
                    // Nothing precedes the frame at which this began, so it can be the one that is wrong.
                    if !self.is_confirmed
                        && let Ok(again) = Self::begin(shared).await
                    {
                        shared.clear_suspect();
                        self = self.begun_again(again);
                    }
                }
                Err(Failure::Dropped(reason)) => {
                    info!("following the log from its end, since it was compacted beyond what was read: {reason}");
                    match Self::begin(shared).await {
                        Ok(again) => {
                            self = self.begun_again(again);
                            self.publish(shared);
                        }
                        Err(_) => shared.env.clock.sleep(RETRY_DELAY).await,
                    }
                }
                Err(Failure::Silent(reason)) => {
                    // A primary that could not be observed may have written.
                    self.received = shared.env.clock.now();
                    shared.env.clock.sleep(shared.breaker.failed(&reason)).await;
                }
            }
        }
    }

    /// Takes in new frames, or claims the log if it is free. Returns the writer once it is claimed.
    pub async fn step(&mut self, shared: &Shared) -> Result<Option<Writer>, Failure> {
        let clock = &shared.env.clock;
        if self.asked.is_none_or(|asked| clock.elapsed(asked) >= ENDS_INTERVAL) {
            let asked = clock.now();
            let ends = shared.ends().await?;
            // The time of an answer is only worth something once everything up to it was read.
            if self.ends.is_none_or(|(known, _)| known.last <= self.tip.position) {
                self.ends = Some((ends, asked));
            }
            self.asked = Some(asked);
        }
        let wait = if self.is_free(shared) { Duration::ZERO } else { WAIT };
        let frames = shared.read(&mut self.tip, wait).await?;
        if frames.is_empty() {
            if let Some((Ends { last, .. }, asked)) = self.ends
                && last > self.tip.position
                && clock.elapsed(asked) > MISSING
            {
                let reason = format!(
                    "frame {} of {} is missing in the replicas that answer",
                    self.tip.position + 1,
                    shared.name
                );
                return Err(Failure::Damaged(reason));
            }
            if self.is_free(shared) {
                self.claim(shared).await?;
            }
        } else if frames.iter().any(|frame| frame.kind != Kind::Void) {
            self.received = clock.now();
            self.is_confirmed = true;
            self.unclaimed = None;
        }
        shared.advance(&self.tip);
        for Read { kind, before, .. } in frames {
            shared.index.note(before);
            self.note(kind);
        }
        let claimed = self.claim.filter(|_| self.is_owned);
        let writer = claimed.map(|(_, sent)| {
            shared.metrics.claims.add(1);
            // Before others see that this process has the log.
            shared.lease.renew_with(sent, true, true);
            Writer::new(self.tip, sent)
        });
        self.publish(shared);
        Ok(writer)
    }

    fn note(&mut self, kind: Kind) {
        match kind {
            Kind::Void | Kind::Restored(_) | Kind::Snapshot(_) => {}
            Kind::Entries => self.is_released = false,
            Kind::Released => self.is_released = true,
            Kind::Held(holder) => {
                self.is_released = false;
                // Without the claim, after the follower began again, this process waits for its own lease like any other.
                self.is_owned = self.claim.is_some() && holder.id == self.id;
                // Not one's own heartbeat that was still on its way.
                if self.handed.is_some() && holder.id != self.id {
                    self.successor.get_or_insert(holder.id);
                }
                self.holder = Some(holder);
            }
        }
    }

    fn is_free(&self, shared: &Shared) -> bool {
        let lease = self.holder.as_ref().map_or(LONGEST_LEASE, |holder| Duration::from_millis(holder.lease_ms.into()));
        self.is_released || self.is_handed() || shared.env.clock.elapsed(self.received) >= lease
    }

    /// Returns whether the log was handed over, and no third process has claimed it since.
    fn is_handed(&self) -> bool {
        let Tip { position, epoch, .. } = self.tip;
        self.handed.is_some_and(|handed| {
            position >= handed.position
                && (epoch == handed.epoch || epoch == handed.epoch + 1 && self.successor == Some(handed.id))
        })
    }

    /// Returns whether the log was handed over, but another process has it.
    pub fn is_superseded(&self) -> bool {
        let Tip { position, .. } = self.tip;
        !self.is_owned && !self.is_handed() && self.handed.is_some_and(|handed| position >= handed.position)
    }

    async fn claim(&mut self, shared: &Shared) -> Result<(), Failure> {
        let ends = match shared.ends().await {
            Ok(ends) => ends,
            Err(failure) => {
                // No writer can have been acknowledged meanwhile.
                self.received = shared.env.clock.now();
                return Err(failure);
            }
        };
        let mut tip = self.tip;
        if ends.last != tip.position {
            if !is_mutant("ClaimWithoutReading") {
                return Ok(());
            }
            tip.position = ends.last;
        }
        if !self.is_released && !self.is_handed() {
            warn!("lease of {} expired, claiming the log", self.name());
        }
        let after = tip.position;
        let holder = Holder { id: self.id, ..shared.holder.clone() };
        let frame = tip.claim(shared.log, &holder);
        // The same claim may be put several times, and the first be the one that lands.
        let (_, sent) = *self.claim.insert(match self.claim {
            Some((claimed, sent)) if claimed == tip => (tip, sent),
            _ => (tip, shared.env.clock.now()),
        });
        match shared.engine.put(after, frame).await {
            Put::Durable => {
                shared.index.note(self.tip);
                shared.advance(&tip);
                (self.tip, self.claim) = (tip, Some((tip, sent)));
                self.note(Kind::Held(holder));
                Ok(())
            }
            // It may be in the log or not: if it is, it will be read.
            Put::Refused => {
                self.unclaimed(shared, REFUSED);
                Ok(())
            }
            Put::Full => Err(self.unclaimed(shared, FULL)),
            Put::Unknown(reason) => Err(self.unclaimed(shared, &reason)),
        }
    }

    /// Notes that a claim failed.
    fn unclaimed(&mut self, shared: &Shared, reason: &str) -> Failure {
        let known = self.unclaimed.take();
        // A refusal is that of a claim that came second, unless it is repeated.
        if reason != REFUSED && known.as_ref().is_none_or(|(_, known)| known != reason) {
            warn!("cannot claim the log, retrying: {reason}");
        }
        let since = known.map_or_else(|| shared.env.clock.now(), |(since, _)| since);
        self.unclaimed = Some((since, reason.to_owned()));
        Failure::Silent(reason.to_owned())
    }

    /// Notifies the receivers of new entries.
    pub fn publish(&self, shared: &Shared) {
        let as_of = match self.ends {
            Some((ends, asked)) if ends.last <= self.tip.position => Some(asked),
            _ => None,
        };
        let primary = self.holder.as_ref().and_then(|holder| holder.url.clone());
        let holder = (!self.is_owned).then(|| self.name());
        // The end of what was restored lies in the jump of the incarnation that continues it.
        let newest = shared.restored().history.newest_given(self.tip.sequence);
        shared.news.send_modify(|news| {
            let as_of = as_of.unwrap_or(news.as_of);
            *news = News { newest, holder, primary, as_of };
        });
    }

    pub fn name(&self) -> String {
        self.holder.as_ref().map_or("another process".into(), |holder| holder.name.clone())
    }
}

/// Reads the last frame of the log, which is all that a process needs to know in order to go on from there: its replay
/// checks the others.
pub async fn last(shared: &Shared, position: u64) -> Result<(Tip, Kind), Failure> {
    let mut why = "no replica that answers has it".to_owned();
    let from = Tip::first_of_last(position);
    let count = (position + 1 - from) as usize;
    for _ in 0..8 {
        let mut frames = Vec::new();
        // Large frames do not fit into one read.
        while frames.len() < count {
            match shared.engine.read(from + frames.len() as u64, WAIT).await {
                Ok(more) if more.is_empty() => break,
                Ok(more) => frames.extend(more),
                Err(ReadError::Missing(reason)) => {
                    why = reason;
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        match Tip::of_last(shared.log, from, frames.iter().map(|bytes| &**bytes).take(count)) {
            Ok(last) if last.0.position == position => return Ok(last),
            Err(reason) if !frames.is_empty() => reason.clone_into(&mut why),
            _ => {}
        }
        shared.env.clock.sleep(WAIT).await;
    }
    Err(Failure::Damaged(format!("frame {position} of {}, the last one, cannot be read: {why}", shared.name)))
}
