//! A shard: one instance of the guest, its queue, and its resurrection.
//!
//! There is no thread for the guest. Whoever finds the instance free calls it on the spot, and then serves those who
//! queued meanwhile; whoever finds it busy queues and awaits the answer. When a call traps, the instance is dropped and a
//! new one is built from the log, while those who queue wait within their deadlines.
//!
//! Owns: whose turn it is. Must never know: what is asked, how the log keeps its promise.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::{Notify, oneshot};
use tokio::task;
use tokio::time::{sleep, timeout_at};
use tracing::{error, info};

use super::engine::Guest;
use super::instance::{Answer, Incoming, Instance};
use crate::contract::Description;
use crate::log::TransactionLog;

/// How many of the others one caller serves before its own answer has to wait no longer.
const OTHERS: usize = 16;
/// A trap this long after the last rebuild is not a repetition of what led to that one.
const QUIET: Duration = Duration::from_secs(10);
/// The pauses before rebuilds that follow on each other: doubled from the first to the last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// How often a long replay tells how far it is.
const PROGRESS: Duration = Duration::from_secs(1);

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
    guest: Guest,
    description: Description,
    log: Arc<dyn TransactionLog>,
    state: Mutex<State>,
    more_to_tick: Notify,
}

#[derive(Default)]
struct State {
    /// The instance, when it is nobody's turn. Else it is with the caller whose turn it is, or being rebuilt.
    free: Option<Box<Instance>>,
    /// Bounded by the connections: each has one request under way.
    queue: VecDeque<Waiting>,
    tickets: u64,
    tick_due: bool,
    last_rebuild: Option<Instant>,
    pause: Duration,
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

/// How an instance came by its state.
pub struct Replayed {
    pub entries: u64,
    /// Keys the guest holds after it.
    pub keys: u64,
    pub took: Duration,
}

impl Shard {
    /// Builds the instance from the log. Blocks until it is ready to be called.
    pub fn build(guest: Guest, log: Arc<dyn TransactionLog>) -> Result<(Arc<Self>, Replayed)> {
        let (instance, replayed) = build(&guest, &log)?;
        let description = instance.description().clone();
        let state = State { free: Some(instance), ..State::default() };
        Ok((
            Arc::new(Self { guest, description, log, state: Mutex::new(state), more_to_tick: Notify::new() }),
            replayed,
        ))
    }

    pub fn description(&self) -> &Description {
        &self.description
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
                let mut turn = Turn { shard: Arc::clone(self), instance: Some(instance), over: false };
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
            let mut turn = Turn { shard: Arc::clone(self), instance: Some(instance), over: false };
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

    /// Builds a new instance in the background, and gives it to those who wait.
    fn rebuild(self: Arc<Self>) {
        task::spawn(async move {
            loop {
                sleep(self.next_pause()).await;
                // The guest is rebuilt from what is durable, so all it appended has to be.
                if self.log.watermark().reached(self.log.appended()).await.is_err() {
                    return; // The log failed, and the process is about to stop.
                }
                let shard = Arc::clone(&self);
                match task::spawn_blocking(move || build(&shard.guest, &shard.log)).await {
                    Ok(Ok((instance, replayed))) => {
                        info!(entries = replayed.entries, keys = replayed.keys, took = ?replayed.took, "the guest is rebuilt");
                        return Turn { shard: self, instance: Some(instance), over: false }.serve_others();
                    }
                    Ok(Err(error)) => error!("the guest cannot be rebuilt: {error:#}"),
                    Err(panic) => error!("the guest cannot be rebuilt: {panic}"),
                }
            }
        });
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
    over: bool,
}

impl Turn {
    fn handle(&mut self, incoming: &Incoming) -> Result<Answer, CallError> {
        let mut instance = self.instance.take().ok_or(CallError::Trapped)?;
        match instance.handle(incoming) {
            Ok(answer) => {
                self.instance = Some(instance);
                Ok(answer)
            }
            Err(trapped) => {
                let request = &incoming.request;
                let guest = &self.shard.description.name;
                error!(guest, method = %request.method(), target = %request.uri(), "the guest trapped: {trapped}");
                Err(CallError::Trapped)
            }
        }
    }

    fn tick(&mut self) {
        let Some(mut instance) = self.instance.take() else { return };
        match instance.tick() {
            Ok(more) => {
                self.instance = Some(instance);
                if more {
                    self.shard.more_to_tick.notify_one();
                }
            }
            Err(trapped) => error!(guest = self.shard.description.name, "the guest trapped in tick: {trapped}"),
        }
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
            None => Arc::clone(&self.shard).rebuild(),
        }
    }
}

/// A new instance of the guest, with everything the log has.
fn build(guest: &Guest, log: &Arc<dyn TransactionLog>) -> Result<(Box<Instance>, Replayed)> {
    let started = Instant::now();
    let mut told = started;
    let mut instance = guest.instantiate(Arc::clone(log))?;
    let mut entries = 0;
    let newest = log.appended();
    log.replay(0, &mut |batch| {
        instance.apply(batch)?;
        entries += batch.len() as u64;
        if let Some(last) = batch.last()
            && told.elapsed() >= PROGRESS
        {
            told = Instant::now();
            let rate = entries as f64 / started.elapsed().as_secs_f64();
            info!("replaying: {entries} entries, sequence {} of {newest}, {rate:.0} entries/s", last.sequence);
        }
        Ok(())
    })?;
    let keys = instance.stats().context("stats failed")?.keys;
    Ok((Box::new(instance), Replayed { entries, keys, took: started.elapsed() }))
}
