//! The writer: the single task that puts frames, with several of them in flight.
//!
//! Frames are put in order, each at the position after the one before it, so that the engine refuses all that follow a lost
//! one. They become durable in order too: the watermark advances over those at the front only. When an outcome is not known,
//! the writer believes no other that is in flight, and reads the first open position. Its own frame there is durable.
//! Another one shows that another process has claimed the log: none of those in flight will ever be in it. If there is
//! none yet, the same bytes are put again, at the same positions, so that no frame is there twice.
//!
//! Owns: the frames in flight. Must never know: how a log is claimed.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;

use super::Shared;
use super::engine::{Call, FULL, Put, REFUSED};
use super::frame::{Entries, Kind, Tip, WINDOW, is_mutant};
use super::reader::Failure;
use crate::remote::queue::{Batch, End, WriterCommand};

/// Number of heartbeats per lease while nothing is written.
const HEARTBEATS: u32 = 10;
/// Timeout of a shutdown while the engine is unavailable.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

pub struct Writer {
    /// The end of the log as far as it is durable, and after the frames in flight.
    durable: Tip,
    end: Tip,
    in_flight: VecDeque<InFlight>,
    /// Outcomes of the frames in flight, in their order.
    outcomes: FuturesOrdered<Call<'static, Put>>,
    /// Time at which the last frame was sent, and the last one that names this process.
    sent: Instant,
    named: Instant,
    /// Consecutive refusals.
    refusals: u32,
    /// The frame that releases the log was put, or the log is handed over.
    is_released: bool,
    /// Time from which a shutdown waits for outcomes.
    closing: Option<Instant>,
}

struct InFlight {
    bytes: Bytes,
    sent: Instant,
    /// The end of the log after it.
    tip: Tip,
    /// None for frames without entries.
    batch: Option<Batch<Entries>>,
}

impl Writer {
    /// Creates the writer of a process that has claimed the log at `tip`.
    pub fn new(tip: Tip, sent: Instant) -> Self {
        Self {
            durable: tip,
            end: tip,
            in_flight: VecDeque::new(),
            outcomes: FuturesOrdered::new(),
            sent,
            named: sent,
            refusals: 0,
            is_released: false,
            closing: None,
        }
    }

    /// Writes until the log is closed, fails, or is taken over.
    pub async fn run(mut self, shared: &Shared) {
        let pause = shared.lease.time / HEARTBEATS;
        loop {
            let rest = pause.saturating_sub(shared.env.clock.elapsed(self.sent));
            // The barrier is filled at once, one frame after the other.
            let is_in_barrier = self.durable.is_in_barrier();
            let window = if is_in_barrier { 1 } else { WINDOW };
            let can_take = self.in_flight.len() < window && !self.is_released;
            // Also without a pause: a standby that starts then must learn whose lease it waits for.
            if can_take && shared.env.clock.elapsed(self.named) >= shared.lease.time {
                self.heartbeat(shared);
                continue;
            }
            let idle = match self.in_flight.is_empty() {
                true if is_in_barrier => Duration::ZERO,
                true => rest,
                false => pause,
            };
            let goes_on = tokio::select! {
                biased;
                Some(outcome) = self.outcomes.next(), if !self.in_flight.is_empty() => self.on_outcome(shared, outcome).await,
                command = shared.queue.take(idle), if can_take => {
                    match command {
                        WriterCommand::Write(mut batch) => {
                            let frame = self.end.entries(shared.log, &mut batch);
                            self.put(shared, frame, Some(batch));
                        }
                        WriterCommand::Idle if self.in_flight.is_empty() => self.heartbeat(shared),
                        WriterCommand::Idle => {}
                        // The next process has the id with which to claim it.
                        WriterCommand::Closed if shared.queue.ended() == Some(End::HandedOver) => {
                            self.is_released = true;
                        }
                        WriterCommand::Closed => {
                            self.is_released = true;
                            let frame = self.end.release(shared.log);
                            self.put(shared, frame, None);
                        }
                    }
                    true
                }
            };
            if !goes_on || self.is_released && self.in_flight.is_empty() {
                return shared.leave(self.durable);
            }
        }
    }

    fn heartbeat(&mut self, shared: &Shared) {
        let frame = self.end.heartbeat(shared.log, &shared.holder);
        self.put(shared, frame, None);
        self.named = self.sent;
    }

    fn put(&mut self, shared: &Shared, bytes: Bytes, batch: Option<Batch<Entries>>) {
        let sent = shared.env.clock.now();
        self.sent = sent;
        if is_mutant("WatchBeforeDurable") {
            shared.watermark.advance(self.end.sequence);
        }
        self.outcomes.push_back(shared.engine.put(self.end.position - 1, bytes.clone()));
        self.in_flight.push_back(InFlight { bytes, sent, tip: self.end, batch });
    }

    /// Handles the outcome of the first frame in flight. Returns false when the writer must end.
    async fn on_outcome(&mut self, shared: &Shared, outcome: Put) -> bool {
        let reason = match outcome {
            Put::Durable => {
                self.landed(shared);
                return true;
            }
            Put::Unknown(_) if is_mutant("UnknownIsDurable") => {
                self.landed(shared);
                return true;
            }
            Put::Refused if is_mutant("RefusedIsLost") => {
                shared.step_down();
                return false;
            }
            Put::Refused => {
                self.refusals += 1;
                // Once is spurious, or another process is primary, which the next read shows.
                (self.refusals > 1).then(|| REFUSED.to_owned())
            }
            Put::Full => {
                shared.queue.set_full(true);
                Some(FULL.to_owned())
            }
            Put::Unknown(reason) => Some(reason),
        };
        self.resolve(shared, reason).await
    }

    /// The first frame in flight is durable.
    fn landed(&mut self, shared: &Shared) {
        let Some(InFlight { sent, tip, batch, .. }) = self.in_flight.pop_front() else { return };
        shared.index.note(self.durable);
        shared.advance(&tip);
        self.durable = tip;
        self.refusals = 0;
        // Counted from sending: the acknowledgement can have been on its way for long.
        shared.lease.renew(if is_mutant("LeaseFromReceipt") { shared.env.clock.now() } else { sent });
        shared.breaker.succeeded();
        // Also for a heartbeat: without space, no batch is accepted that could show that there is some again.
        shared.queue.set_full(false);
        if let Some(batch) = batch {
            shared.watermark.advance(batch.last());
            let (clock, metrics) = (&shared.env.clock, &shared.metrics);
            let took = clock.elapsed(sent);
            metrics.append.observe_time(clock.elapsed(batch.begun));
            metrics.write.observe_time(took);
            metrics.batch.observe(batch.len);
            metrics.written.add(batch.bytes);
            shared.queue.written(&batch, took);
        }
    }

    /// Finds out where the log ends, and puts again what is not in it. Returns false when the writer must end.
    async fn resolve(&mut self, shared: &Shared, mut reason: Option<String>) -> bool {
        // Dropped calls can still arrive: at their positions, at most once.
        self.outcomes = FuturesOrdered::new();
        loop {
            if let Some(reason) = &reason {
                let pause = shared.breaker.failed(reason);
                // The engine may be back at any moment, and the lease ends whether it was seen or not.
                shared.env.clock.sleep(pause.min(shared.lease.time / HEARTBEATS)).await;
            }
            shared.breaker.on_attempt();
            shared.metrics.lookups.add(1);
            reason = match self.look(shared).await {
                Ok(true) => {
                    shared.set_damage(None);
                    // The lease still counts from the first put: it may be that one which lands.
                    for frame in &self.in_flight {
                        self.outcomes.push_back(shared.engine.put(frame.tip.position - 1, frame.bytes.clone()));
                    }
                    return !self.is_late(shared);
                }
                Ok(false) => {
                    shared.step_down();
                    return false;
                }
                Err(Failure::Gone(reason)) => {
                    shared.fail(&anyhow!(reason));
                    return false;
                }
                Err(Failure::Silent(reason)) => Some(reason),
                // By another process, which has put more than the window of this one: compaction keeps the last frames.
                Err(Failure::Dropped(_)) if !is_mutant("DroppedIsDamage") => {
                    shared.step_down();
                    return false;
                }
                Err(Failure::Damaged(reason) | Failure::Dropped(reason)) => {
                    shared.set_damage(Some(reason.clone()));
                    Some(reason)
                }
            };
            if self.is_late(shared) {
                return false;
            }
        }
    }

    /// Reads the log from the first open position on. Returns false when another process has written there.
    async fn look(&mut self, shared: &Shared) -> Result<bool, Failure> {
        loop {
            let mut tip = self.durable;
            let frames = shared.read(&mut tip, Duration::ZERO).await?;
            if frames.is_empty() {
                return Ok(true);
            }
            for frame in frames {
                if frame.kind == Kind::Void {
                    self.skip();
                    continue;
                }
                if self.in_flight.front().is_none_or(|ours| ours.bytes != frame.bytes) {
                    return Ok(false);
                }
                self.landed(shared);
            }
        }
    }

    /// A frame of a deposed primary has the first open position.
    fn skip(&mut self) {
        self.durable.position += 1;
        self.end.position += 1;
        for frame in &mut self.in_flight {
            frame.tip.position += 1;
        }
    }

    /// Returns whether the writer has to end although frames are in flight.
    fn is_late(&mut self, shared: &Shared) -> bool {
        let clock = &shared.env.clock;
        let is_late = !self.in_flight.is_empty()
            && shared.queue.ended().is_some()
            && clock.elapsed(*self.closing.get_or_insert_with(|| clock.now())) > SHUTDOWN_TIMEOUT;
        if is_late && self.in_flight.iter().any(|frame| frame.batch.is_some()) {
            let reason = shared.breaker.reason().unwrap_or_default();
            let first = self.durable.sequence + 1;
            shared.fail(&anyhow!("the outcome of entries from sequence {first} on is unknown: {reason}"));
        }
        is_late
    }
}
