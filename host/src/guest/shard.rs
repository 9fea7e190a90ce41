//! A shard: one instance of the guest, its queue, its resurrection, and its replacement.
//!
//! There is no thread for the guest. Whoever finds the instance free calls it on the spot, and then serves those who
//! queued meanwhile; whoever finds it busy queues and awaits the answer. When a call traps, the instance is dropped and a
//! new one is built from the log, while those who queue wait within their deadlines. Another guest takes the place of
//! this one between two calls, once it has the whole log.
//!
//! Owns: whose turn it is, and which guest serves. Must never know: what is asked, how the log keeps its promise, why
//! another guest is wanted.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::{Notify, oneshot};
use tokio::task;
use tokio::time::{sleep, timeout_at};
use tracing::{error, info};

use super::engine::Guest;
use super::instance::{Answer, Incoming, Instance, Trapped};
use super::metrics::{Metrics, next_count};
use super::replica::{Replayed, Replica};
use crate::contract::Description;
use crate::log::TransactionLog;

/// How many of the others one caller serves before its own answer has to wait no longer.
const OTHERS: usize = 16;
/// A trap this long after the last rebuild is not a repetition of what led to that one.
const QUIET: Duration = Duration::from_secs(10);
/// The pauses before rebuilds that follow on each other: doubled from the first to the last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It was called and trapped. What it had appended stays.
    #[error("the store failed on this request")]
    Trapped,
    /// The deadline passed before the guest was called: nothing happened.
    #[error("the store was not free in time")]
    Late,
}

pub struct Shard {
    log: Arc<dyn TransactionLog>,
    state: Mutex<State>,
    more_to_tick: Notify,
    metrics: Metrics,
}

struct State {
    /// What is rebuilt after a trap.
    serving: Serving,
    /// The instance, when it is nobody's turn. Else it is with the caller whose turn it is, or being rebuilt.
    free: Option<Box<Instance>>,
    /// Bounded by the connections: each has one request under way.
    queue: VecDeque<Waiting>,
    tickets: u64,
    tick_due: bool,
    /// When the guest may be asked again what it holds.
    count_from: Instant,
    /// Wants the turn for itself, before all others.
    visitor: Option<oneshot::Sender<Turn>>,
    probation: Option<Probation>,
    last_rebuild: Option<Instant>,
    pause: Duration,
}

/// The guest that serves, and what it says it is.
#[derive(Clone)]
pub struct Serving {
    pub guest: Arc<Guest>,
    pub description: Arc<Description>,
}

/// While a new guest has yet to prove itself, the one before it is kept.
struct Probation {
    before: Serving,
    /// None when it had trapped and was being rebuilt.
    replica: Option<Replica>,
    /// Told when the new guest trapped and was taken out.
    failed: oneshot::Sender<String>,
}

/// Another guest serves.
pub struct Switched {
    /// How long no call was made.
    pub pause: Duration,
    /// Tells why, when the guest traps on probation and is taken out.
    pub failed: oneshot::Receiver<String>,
}

struct Waiting {
    ticket: u64,
    incoming: Incoming,
    reply: oneshot::Sender<Result<Answer, CallError>>,
}

/// A place in the queue. Without its end, clients that come and go while the guest is rebuilt would leave their requests
/// behind.
struct Place<'s> {
    shard: &'s Shard,
    ticket: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.shard.withdraw(self.ticket);
    }
}

impl Shard {
    /// Builds the instance from the log. Blocks until it is ready to be called.
    pub fn build(guest: Guest, log: Arc<dyn TransactionLog>) -> Result<(Arc<Self>, Replayed)> {
        let (Replica { instance, .. }, replayed) = Replica::build(&guest, &log)?;
        let state = State {
            serving: Serving::new(guest, &instance),
            free: Some(instance),
            queue: VecDeque::new(),
            tickets: 0,
            tick_due: false,
            count_from: Instant::now(),
            visitor: None,
            probation: None,
            last_rebuild: None,
            pause: Duration::ZERO,
        };
        let (more_to_tick, metrics) = (Notify::new(), Metrics::new());
        Ok((Arc::new(Self { log, state: Mutex::new(state), more_to_tick, metrics }), replayed))
    }

    /// The guest that serves now.
    pub fn serving(&self) -> Serving {
        self.state().serving.clone()
    }

    /// How many requests wait for their turn.
    pub fn waiting(&self) -> usize {
        self.state().queue.len()
    }

    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Calls the guest with one request, when its turn has come.
    pub async fn call(
        self: &Arc<Self>,
        incoming: Incoming,
        deadline: tokio::time::Instant,
    ) -> Result<Answer, CallError> {
        let (ticket, mut answer) = {
            let mut state = self.state();
            if let Some(instance) = state.free.take() {
                drop(state);
                let mut turn = Turn::new(self, instance);
                let answer = turn.handle(&incoming);
                turn.serve_others();
                return answer;
            }
            let ticket = state.tickets;
            state.tickets += 1;
            let (reply, answer) = oneshot::channel();
            state.queue.push_back(Waiting { ticket, incoming, reply });
            (ticket, answer)
        };
        // Whoever stops waiting, because the client left, takes the request out of the queue.
        let place = Place { shard: self, ticket };
        let answer = match timeout_at(deadline, &mut answer).await {
            Ok(answer) => answer,
            Err(_) if self.withdraw(ticket) => return Err(CallError::Late),
            // It is being called right now, and a call is short: only its answer tells what happened.
            Err(_) => answer.await,
        };
        // It was called, so it is in the queue no more.
        std::mem::forget(place);
        // The reply was dropped when the call panicked.
        answer.unwrap_or(Err(CallError::Trapped))
    }

    /// Lets the guest do its housekeeping, as soon as its turn has come.
    pub fn tick(self: &Arc<Self>) {
        let mut state = self.state();
        if let Some(instance) = state.free.take() {
            drop(state);
            let mut turn = Turn::new(self, instance);
            turn.tick();
            turn.serve_others();
        } else {
            state.tick_due = true;
        }
    }

    /// Waits until a tick left something undone.
    pub async fn more_to_tick(&self) {
        self.more_to_tick.notified().await;
    }

    /// Takes a request out of the queue, if it is still there.
    fn withdraw(&self, ticket: u64) -> bool {
        let mut state = self.state();
        let found = state.queue.iter().position(|waiting| waiting.ticket == ticket);
        found.and_then(|index| state.queue.remove(index)).is_some()
    }

    /// Puts another guest in the place of the one that serves, between two calls. It is given what it misses of the log
    /// while no call is made, so it should miss little. An error leaves everything as it was.
    ///
    /// When the new guest traps while it is on probation, the one before is put back.
    pub async fn switch(self: &Arc<Self>, guest: Guest, mut replica: Replica) -> Result<Switched> {
        let mut turn = self.visit().await?;
        let paused = Instant::now();
        let newest = self.log.appended();
        let caught_up = async {
            self.log.watermark().reached(newest).await?;
            task::spawn_blocking(move || replica.catch_up(&mut |_, _| {}).map(|_| replica)).await?
        };
        let replica = match caught_up.await {
            Ok(replica) => replica,
            Err(error) => {
                turn.serve_others();
                return Err(error);
            }
        };
        let serving = Serving::new(guest, &replica.instance);
        let before = turn.instance.replace(replica.instance);
        let replica = before.map(|instance| Replica::served(instance, Arc::clone(&self.log), newest));
        let (failing, failed) = oneshot::channel();
        {
            let mut state = self.state();
            let before = std::mem::replace(&mut state.serving, serving);
            state.probation = Some(Probation { before, replica, failed: failing });
        }
        let pause = paused.elapsed();
        turn.serve_others();
        Ok(Switched { pause, failed })
    }

    /// Lets go of the guest that served before. False when it serves again, or is about to.
    pub fn end_probation(&self) -> bool {
        let probation = self.state().probation.take();
        probation.is_some()
    }

    /// Waits for a turn between two calls, or, while there is no instance, between two attempts to rebuild it.
    async fn visit(self: &Arc<Self>) -> Result<Turn> {
        let turn = {
            let mut state = self.state();
            if let Some(instance) = state.free.take() {
                return Ok(Turn::new(self, instance));
            }
            let (visitor, turn) = oneshot::channel();
            state.visitor = Some(visitor);
            turn
        };
        turn.await.context("the store is shutting down")
    }

    /// Builds a new instance in the background, and gives it to those who wait.
    fn rebuild(self: Arc<Self>, failure: String) {
        self.metrics.traps.add(1);
        task::spawn(async move {
            let mut before = self.take_back(failure);
            loop {
                sleep(self.next_pause()).await;
                // The guest is rebuilt from what is durable, so all it appended has to be.
                if self.log.watermark().reached(self.log.appended()).await.is_err() {
                    return; // The log failed, and the process is about to stop.
                }
                let visitor = self.state().visitor.take();
                if let Some(visitor) = visitor {
                    // Should it fail, this begins anew.
                    let _ = visitor.send(Turn { shard: self, instance: None, failure: None, over: false });
                    return;
                }
                let (guest, log, kept) = (self.serving().guest, Arc::clone(&self.log), before.take());
                match task::spawn_blocking(move || bring_back(&guest, &log, kept)).await {
                    Ok(Ok((instance, replayed))) => {
                        info!(entries = replayed.entries, keys = replayed.keys, took = ?replayed.took, "the guest is rebuilt");
                        self.metrics.rebuilds.add(1);
                        return Turn::new(&self, instance).serve_others();
                    }
                    Ok(Err(error)) => error!("the guest cannot be rebuilt: {error:#}"),
                    Err(panic) => error!("the guest cannot be rebuilt: {panic}"),
                }
                self.metrics.failed_rebuilds.add(1);
            }
        });
    }

    /// Ends the probation of a guest that trapped: the one before serves again. Gives its instance, which has yet to catch
    /// up.
    fn take_back(&self, failure: String) -> Option<Replica> {
        let mut state = self.state();
        let Probation { before, replica, failed } = state.probation.take()?;
        let out = std::mem::replace(&mut state.serving, before);
        let (out, back) = (&out.description.name, &state.serving.description.name);
        error!("{out} trapped on probation and is taken out, {back} serves again");
        // Nobody may be left to hear it.
        let _ = failed.send(failure);
        replica
    }

    /// How long to wait before a rebuild: not at all for the first, longer when they follow on each other.
    fn next_pause(&self) -> Duration {
        let mut state = self.state();
        let again = state.last_rebuild.is_some_and(|last| last.elapsed() < QUIET + state.pause);
        state.pause = if again { (state.pause * 2).clamp(PAUSES.0, PAUSES.1) } else { Duration::ZERO };
        state.last_rebuild = Some(Instant::now());
        state.pause
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is called under this lock that could panic and leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A turn at the instance. Ends by giving the instance to nobody (it is free), to another turn, or, when a call trapped or
/// panicked, to nobody ever: then the shard is rebuilt.
struct Turn {
    shard: Arc<Shard>,
    /// Taken out during a call, so that it is lost with a panic.
    instance: Option<Box<Instance>>,
    /// Why it was lost, when it was not by a panic.
    failure: Option<String>,
    over: bool,
}

impl Turn {
    fn new(shard: &Arc<Shard>, instance: Box<Instance>) -> Self {
        Self { shard: Arc::clone(shard), instance: Some(instance), failure: None, over: false }
    }

    fn handle(&mut self, incoming: &Incoming) -> Result<Answer, CallError> {
        let mut instance = self.instance.take().ok_or(CallError::Trapped)?;
        let begun = Instant::now();
        let handled = instance.handle(incoming);
        self.shard.metrics.calls.observe_time(begun.elapsed());
        self.shard.metrics.memory(instance.memory_bytes());
        match handled {
            Ok(answer) => {
                self.instance = Some(instance);
                Ok(answer)
            }
            Err(trapped) => {
                let (guest, request, request_id) = (&instance.description().name, &incoming.request, incoming.id());
                let (method, target) = (request.method(), request.uri());
                error!(guest, request_id, %method, %target, "the guest trapped: {trapped}");
                self.failure = Some(trapped.to_string());
                Err(CallError::Trapped)
            }
        }
    }

    fn tick(&mut self) {
        let Some(mut instance) = self.instance.take() else { return };
        match instance.tick().and_then(|more| self.count(&mut instance).map(|()| more)) {
            Ok(more) => {
                self.instance = Some(instance);
                if more {
                    self.shard.more_to_tick.notify_one();
                }
            }
            Err(trapped) => {
                error!(guest = instance.description().name, "the guest trapped in tick: {trapped}");
                self.failure = Some(format!("in tick: {trapped}"));
            }
        }
    }

    /// Asks what the guest holds, now and again.
    fn count(&self, instance: &mut Instance) -> Result<(), Trapped> {
        let begun = Instant::now();
        if begun < self.shard.state().count_from {
            return Ok(());
        }
        let counted = instance.stats()?;
        self.shard.metrics.holds(&counted);
        self.shard.metrics.memory(instance.memory_bytes());
        self.shard.state().count_from = next_count(begun.elapsed());
        Ok(())
    }

    /// Serves those who queued; when there are many, leaves the rest to a task, so that this caller gets away.
    fn serve_others(mut self) {
        for _ in 0..OTHERS {
            let Some(Waiting { incoming, reply, .. }) = self.next() else { return };
            // A client that left is not called for.
            if !reply.is_closed() {
                let _ = reply.send(self.handle(&incoming));
            }
        }
        task::spawn(async move { self.serve_others() });
    }

    /// The next in the queue; when there is none, the turn is over and the instance free.
    fn next(&mut self) -> Option<Waiting> {
        let tick_due = std::mem::take(&mut self.shard.state().tick_due);
        if tick_due {
            self.tick();
        }
        let instance = self.instance.take()?;
        let mut state = self.shard.state();
        if let Some(visitor) = state.visitor.take() {
            drop(state);
            self.over = true;
            if let Err(turn) = visitor.send(Self::new(&self.shard, instance)) {
                // It did not wait for it.
                turn.serve_others();
            }
            return None;
        }
        let next = state.queue.pop_front();
        match next {
            Some(_) => self.instance = Some(instance),
            None => {
                state.free = Some(instance);
                self.over = true;
            }
        }
        next
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        match self.instance.take() {
            // The runtime is going down with the task that held the turn.
            Some(instance) => self.shard.state().free = Some(instance),
            None => {
                let failure = self.failure.take().unwrap_or_else(|| "a call into it panicked".to_owned());
                Arc::clone(&self.shard).rebuild(failure);
            }
        }
    }
}

impl Serving {
    fn new(guest: Guest, instance: &Instance) -> Self {
        Self { guest: Arc::new(guest), description: Arc::new(instance.description().clone()) }
    }
}

/// An instance with the whole log: the one that was kept, or a new one where that cannot be brought up to date.
fn bring_back(
    guest: &Guest,
    log: &Arc<dyn TransactionLog>,
    kept: Option<Replica>,
) -> Result<(Box<Instance>, Replayed)> {
    if let Some(mut replica) = kept {
        let started = Instant::now();
        match replica.catch_up(&mut |_, _| {}).and_then(|_| replica.replayed(started)) {
            Ok(replayed) => return Ok((replica.instance, replayed)),
            Err(error) => error!("the guest cannot catch up, and is rebuilt: {error:#}"),
        }
    }
    let (replica, replayed) = Replica::build(guest, log)?;
    Ok((replica.instance, replayed))
}
