//! A shard: one instance of the guest, its queue, and its spare.
//!
//! A request takes a turn at the instance (`turn`), which is handed from one turn to the next (`handoff`). When a call traps,
//! the instance is dropped, and replaced by the spare or by a new one built from the log (`rebuild`), while queued requests
//! wait within their deadlines. Every replacement takes place in a turn, between two calls (`promotion`).
//!
//! Owns: calls of the instance, one at a time. Must never know: the meaning of a request, how entries become durable, other
//! shards, why a guest is replaced.

mod handoff;
mod promotion;
mod rebuild;
#[cfg(test)]
mod tests;
mod turn;

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use arc_swap::ArcSwapOption;
use tokio::sync::oneshot;
use tokio::time::timeout_at;

use self::handoff::{Entered, Handoff, Visit};
pub use self::promotion::promote;
pub use self::turn::Turn;
use super::alarm::Alarm;
use super::cache::ResponseCache;
use super::engine::Guest;
use super::housekeeping::Housekeeping;
use super::instance::Instance;
use super::message::{Answer, Incoming, Wanted};
use super::metrics::{Held, Metrics};
use super::outage::Outage;
use super::owner::Part;
use super::quota::Quotas;
use super::replica::Replica;
use super::replica::spare::{Spare, Surroundings};
use super::shadow::{Queue, Shadow};
use super::sync;
use crate::contract::Description;
use kvs_runtime::Env;
use kvs_txlog::TransactionLog;
use kvs_txlog::change::Change;

#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The call trapped after this time in the guest. Entries that it appended stay.
    #[error("the store failed on this request")]
    Trapped { guest_time: Duration },
    /// The deadline passed before the call, which has no effect.
    #[error("the store was not free in time")]
    Late,
    /// Some shards were called and appended, and others were not called.
    #[error("outcome unknown: only some of the shards did this")]
    Partial,
    /// The shard has had no instance for a while. The request has no effect.
    #[error("the store is down: its guest is being rebuilt")]
    Down,
    /// Another process serves. The request has no effect here.
    #[error("another process serves")]
    HandedOver(Box<Incoming>),
    /// The token has a key prefix, which the guest does not enforce. The request has no effect.
    #[error("the guest enforces no key prefix, which the token has")]
    KeyPrefix,
}

/// Result of a call.
pub enum Called {
    Answered(Answer),
    /// Not called: the guest that routed the request here was replaced, or another process serves.
    Moved(Incoming),
}

pub struct Shard {
    shared: Arc<Shared>,
    part: Part,
    instance: Handoff<Box<Replica>, Waiting, oneshot::Sender<Turn>>,
    state: Mutex<State>,
    held: Held,
    housekeeping: Housekeeping,
    /// Replacement for an instance that traps, with `--spare`.
    spare: Option<Spare>,
    /// Takes all calls to a candidate, during shadow traffic.
    tap: ArcSwapOption<Queue>,
}

/// State that all shards share.
pub struct Shared {
    pub log: Arc<dyn TransactionLog>,
    pub cache: Arc<ResponseCache>,
    pub quotas: Arc<Quotas>,
    pub metrics: Metrics,
    pub alarm: Alarm<Raised>,
    /// Held while a spare is built and during a swap: there is memory for one more instance of each shard, not for two.
    pub building: Arc<tokio::sync::Mutex<()>>,
    pub last_trap: Mutex<Option<LastTrap>>,
    /// Another process serves. Set before callers are rejected for it.
    pub handed_over: AtomicBool,
    pub shadow: Shadow,
    pub env: Env,
}

/// The last trap of a serving instance or a router.
#[derive(Clone)]
pub struct LastTrap {
    /// In milliseconds since 1970.
    pub at: u64,
    pub reason: String,
}

impl Shared {
    /// Counts and keeps a trap.
    pub fn trapped(&self, reason: &str) {
        self.metrics.traps.add(1);
        let trap = LastTrap { at: self.env.clock.unix_ms(), reason: reason.to_owned() };
        *self.last_trap.lock().unwrap_or_else(PoisonError::into_inner) = Some(trap);
    }
}

struct State {
    /// The guest that is rebuilt after a trap.
    serving: Serving,
    /// The last tick trapped.
    tick_trapped: bool,
    /// Earliest time of the next `stats` call.
    count_from: Instant,
    last_rebuild: Option<Instant>,
    pause: Duration,
    /// Some while there is no instance.
    outage: Option<Outage>,
}

/// The guest that serves, and its description.
#[derive(Clone)]
pub struct Serving {
    pub guest: Arc<Guest>,
    pub description: Arc<Description>,
    /// Names of the request headers that it gets.
    pub headers: Arc<Wanted>,
}

/// A queued request.
struct Waiting {
    incoming: Incoming,
    routed_by: Option<u64>,
    reply: oneshot::Sender<Result<Called, CallError>>,
}

/// A place in the queue, left when it is dropped: clients that disconnect during a rebuild leave no requests behind.
struct Place<'s> {
    shard: &'s Shard,
    ticket: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.shard.instance.withdraw(self.ticket);
    }
}

impl Shard {
    /// `replica` is an instance that has all entries of `part`.
    pub fn new(shared: Arc<Shared>, part: Part, serving: Serving, replica: Replica, with_spare: bool) -> Self {
        let spare = with_spare.then(|| Spare::new(part.clone()));
        let (held, count_from) = (Held::default(), shared.env.clock.now());
        held.memory(replica.instance.memory_bytes());
        let guest = &serving.guest;
        let housekeeping = Housekeeping::new(guest.limits().tick_interval, Arc::clone(guest.metrics().exceeded()));
        let state = Mutex::new(State {
            serving,
            tick_trapped: false,
            count_from,
            last_rebuild: None,
            pause: Duration::ZERO,
            outage: None,
        });
        let (instance, tap) = (Handoff::new(Box::new(replica)), ArcSwapOption::empty());
        Self { shared, part, instance, state, held, housekeeping, spare, tap }
    }

    /// Returns the guest that serves now.
    pub fn serving(&self) -> Serving {
        self.state().serving.clone()
    }

    /// Returns the number of queued requests.
    pub fn waiting(&self) -> usize {
        self.instance.queued()
    }

    /// Returns the outage of this shard while it has no instance.
    pub fn outage(&self) -> Option<Outage> {
        self.state().outage.clone()
    }

    fn tap(&self) -> Option<Arc<Queue>> {
        self.tap.load_full()
    }

    /// Sets the queue that all calls go to, or none. To be set in a turn.
    pub fn set_tap(&self, tap: Option<Arc<Queue>>) {
        self.tap.store(tap);
    }

    /// Returns the replacement for an instance that traps, with `--spare`.
    pub fn spare(&self) -> Option<&Spare> {
        self.spare.as_ref()
    }

    /// Builds spares as they are needed, while `has_room` finds memory for one.
    pub async fn keep_spare(self: Arc<Self>, has_room: impl Fn() -> Result<()>) -> Result<()> {
        let Shared { log, metrics, building, env, .. } = &*self.shared;
        let Some(spare) = &self.spare else { return Ok(()) };
        let surroundings = Surroundings { log, metrics, building, clock: &env.clock };
        spare.keep(surroundings, || has_room().map(|()| self.serving().guest)).await
    }

    /// Records why there is no instance. After a while requests are rejected, the queued ones too.
    fn is_down(&self, reason: String) {
        let clock = &self.shared.env.clock;
        let mut state = self.state();
        let outage = state.outage.get_or_insert_with(|| Outage::new(clock, String::new()));
        outage.reason = reason;
        if outage.is_long(clock) {
            drop(state);
            self.instance.reject().for_each(|waiting| drop(waiting.reply.send(Err(CallError::Down))));
        }
    }

    fn is_long_down(&self) -> bool {
        self.state().outage.as_ref().is_some_and(|outage| outage.is_long(&self.shared.env.clock))
    }

    /// Returns the memory and the keys of the instance.
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// Calls the guest with one request in a turn. `routed_by` is the only guest that may be called, if the request was routed.
    pub async fn call(
        self: &Arc<Self>,
        incoming: Incoming,
        routed_by: Option<u64>,
        deadline: tokio::time::Instant,
    ) -> Result<Called, CallError> {
        let entered = self.instance.enter(incoming, |incoming| {
            let (reply, answer) = oneshot::channel();
            (Waiting { incoming, routed_by, reply }, answer)
        });
        let (ticket, mut answer) = match entered {
            Entered::Free(replica, incoming) => {
                let mut turn = Turn::new(self, replica);
                let called = turn.call(incoming, routed_by);
                turn.serve_others();
                return called;
            }
            Entered::Queued(ticket, answer) => (ticket, answer),
            Entered::Rejected(incoming) if self.shared.handed_over.load(Ordering::Acquire) => {
                return Ok(Called::Moved(incoming));
            }
            Entered::Rejected(_) => return Err(CallError::Down),
        };
        let place = Place { shard: self, ticket };
        if self.is_long_down() && self.instance.withdraw(ticket) {
            return Err(CallError::Down);
        }
        let answer = match timeout_at(deadline, &mut answer).await {
            Ok(answer) => answer,
            Err(_) if self.instance.withdraw(ticket) => return Err(CallError::Late),
            // The call has begun, and is short: only its answer has the outcome.
            Err(_) => answer.await,
        };
        // The request is no longer in the queue.
        std::mem::forget(place);
        // The reply was dropped if the call panicked.
        answer.unwrap_or(Err(CallError::Trapped { guest_time: Duration::ZERO }))
    }

    /// Lets the guest do its housekeeping as soon as its turn has come, at once and whenever it is due.
    pub async fn keep_house(self: &Arc<Self>) -> Infallible {
        loop {
            self.housekeeping.begin();
            self.tick();
            self.housekeeping.next().await;
        }
    }

    /// Has the guest do its housekeeping soon.
    pub fn wake(&self) {
        self.housekeeping.begin_again(true);
    }

    /// Calls `tick` of the guest, now or before the next call.
    fn tick(self: &Arc<Self>) {
        if let Some(replica) = self.instance.tick() {
            let mut turn = Turn::new(self, replica);
            turn.tick();
            turn.serve_others();
        }
    }

    /// Waits for a turn between two calls, or, while there is no instance, between two attempts to rebuild it.
    pub async fn visit(self: &Arc<Self>) -> Result<Turn> {
        self.next_turn(Visit::Swap).await
    }

    /// Applies entries that another process appended, up to `until`, in the next turn.
    pub async fn take_in(self: &Arc<Self>, changes: &[Change], until: u64) -> Result<()> {
        let mut turn = self.next_turn(Visit::Follow).await?;
        turn.take_in(changes, until);
        turn.serve_others();
        Ok(())
    }

    async fn next_turn(self: &Arc<Self>, visit: Visit) -> Result<Turn> {
        let (sender, turn) = oneshot::channel();
        match self.instance.visit(visit, || sender) {
            Some(replica) => Ok(Turn::new(self, replica)),
            None => turn.await.context("the store is shutting down"),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A trap of the guest.
pub struct Raised {
    pub reason: String,
    /// The turn in which it trapped; None if no shard lost its instance.
    pub turn: Option<Turn>,
}

impl Serving {
    pub fn new(guest: Arc<Guest>, instance: &Instance) -> Self {
        let (description, headers) = (Arc::new(instance.description().clone()), Arc::clone(instance.wanted_headers()));
        Self { guest, description, headers }
    }
}
