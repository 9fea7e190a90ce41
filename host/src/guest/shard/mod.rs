//! A shard: one instance of the guest, its queue, and its spare.
//!
//! There is no thread for the guest. Whoever finds the instance free calls it on the spot, and then serves those who
//! queued meanwhile; whoever finds it busy queues and awaits the answer. When a call traps, the instance is dropped and its
//! spare or a new one built from the log takes its place (`rebuild`), while those who queue wait within their deadlines. Who
//! puts another in its place takes a turn for it, between two calls: whatever it is for, `promotion` does that.
//!
//! Owns: whose turn it is. Must never know: what is asked, how the log keeps its promise, what other shards do, why
//! another guest is wanted.

mod promotion;
mod rebuild;
mod turn;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hyper::header::HeaderName;
use tokio::sync::oneshot;
use tokio::time::timeout_at;

pub use self::promotion::promote;
pub use self::turn::Turn;
use super::alarm::Alarm;
use super::cache::ResponseCache;
use super::engine::Guest;
use super::housekeeping::Housekeeping;
use super::instance::Instance;
use super::message::{Answer, Incoming};
use super::metrics::{Held, Metrics};
use super::outage::Outage;
use super::owner::Part;
use super::replica::Replica;
use super::replica::spare::{Spare, Surroundings};
use crate::contract::Description;
use kvs_runtime::Env;
use kvs_txlog::TransactionLog;
use kvs_txlog::change::Change;

/// How many of the others one caller serves before its own answer has to wait no longer.
const OTHERS: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It was called and trapped. What it had appended stays.
    #[error("the store failed on this request")]
    Trapped,
    /// The deadline passed before the guest was called: nothing happened.
    #[error("the store was not free in time")]
    Late,
    /// Some shards were called, and then another guest served.
    #[error("the store was replaced while this was done")]
    Replaced,
    /// The shard has no instance, and has had none for a while: nothing happened.
    #[error("the store is down: its guest is being rebuilt")]
    Down,
}

/// What came of a call.
pub enum Called {
    Answered(Answer),
    /// It was not made: another guest serves than the one that routed the request here.
    Moved(Incoming),
}

pub struct Shard {
    shared: Arc<Shared>,
    part: Part,
    state: Mutex<State>,
    held: Held,
    /// What takes the place of the instance when that traps, where one is wanted.
    spare: Option<Spare>,
}

/// What all shards share.
pub struct Shared {
    pub log: Arc<dyn TransactionLog>,
    pub cache: Arc<ResponseCache>,
    pub housekeeping: Housekeeping,
    pub metrics: Metrics,
    pub alarm: Alarm<Raised>,
    /// Held by whoever builds a spare, and during a swap: there is memory for one more instance of each shard, not for two.
    pub building: Arc<tokio::sync::Mutex<()>>,
    pub last_trap: Mutex<Option<LastTrap>>,
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
    /// What is rebuilt after a trap.
    serving: Serving,
    /// The instance, when it is nobody's turn. Else it is with the caller whose turn it is, or being rebuilt.
    free: Option<Box<Replica>>,
    /// Bounded by the connections: each has one request under way.
    queue: VecDeque<Waiting>,
    tickets: u64,
    tick_due: bool,
    /// The last tick trapped.
    tick_trapped: bool,
    /// When the guest may be asked again what it holds.
    count_from: Instant,
    /// Wants the turn for itself, before all others.
    visitor: Option<oneshot::Sender<Turn>>,
    /// As well, when there is an instance.
    follower: Option<oneshot::Sender<Turn>>,
    last_rebuild: Option<Instant>,
    pause: Duration,
    /// While there is no instance.
    outage: Option<Outage>,
}

/// The guest that serves, and what it says it is.
#[derive(Clone)]
pub struct Serving {
    pub guest: Arc<Guest>,
    pub description: Arc<Description>,
    /// Names of the request headers that it is given.
    pub headers: Arc<[HeaderName]>,
}

struct Waiting {
    ticket: u64,
    incoming: Incoming,
    routed_by: Option<u64>,
    reply: oneshot::Sender<Result<Called, CallError>>,
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
    /// The shard of a part of the keys, with an instance that has them.
    pub fn new(shared: Arc<Shared>, part: Part, serving: Serving, replica: Replica, with_spare: bool) -> Self {
        let spare = with_spare.then(|| Spare::new(part.clone()));
        let (held, count_from) = (Held::default(), shared.env.clock.now());
        held.memory(replica.instance.memory_bytes());
        let state = State {
            serving,
            free: Some(Box::new(replica)),
            queue: VecDeque::new(),
            tickets: 0,
            tick_due: false,
            tick_trapped: false,
            count_from,
            visitor: None,
            follower: None,
            last_rebuild: None,
            pause: Duration::ZERO,
            outage: None,
        };
        Self { shared, part, state: Mutex::new(state), held, spare }
    }

    /// The guest that serves now.
    pub fn serving(&self) -> Serving {
        self.state().serving.clone()
    }

    /// How many requests wait for their turn.
    pub fn waiting(&self) -> usize {
        self.state().queue.len()
    }

    /// The outage of this shard, when it has no instance.
    pub fn outage(&self) -> Option<Outage> {
        self.state().outage.clone()
    }

    /// What serves after a trap, where that is wanted.
    pub fn spare(&self) -> Option<&Spare> {
        self.spare.as_ref()
    }

    /// Sees to it that there is a spare, as long as `has_room` says that there is memory for it.
    pub async fn keep_spare(self: Arc<Self>, has_room: impl Fn() -> Result<()>) -> Result<()> {
        let Shared { log, metrics, building, env, .. } = &*self.shared;
        let Some(spare) = &self.spare else { return Ok(()) };
        let surroundings = Surroundings { log, metrics, building, clock: &env.clock };
        spare.keep(surroundings, || has_room().map(|()| self.serving().guest)).await
    }

    /// Notes the reason why there is no instance. Once that has lasted, whoever waits is rejected.
    fn is_down(&self, reason: String) {
        let clock = &self.shared.env.clock;
        let mut state = self.state();
        let outage = state.outage.get_or_insert_with(|| Outage::new(clock, String::new()));
        outage.reason = reason;
        if outage.is_long(clock) {
            let rejected = std::mem::take(&mut state.queue);
            drop(state);
            rejected.into_iter().for_each(|waiting| drop(waiting.reply.send(Err(CallError::Down))));
        }
    }

    /// What the instance holds.
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// Calls the guest with one request, when its turn has come; if it was routed here, only the guest that did that.
    pub async fn call(
        self: &Arc<Self>,
        incoming: Incoming,
        routed_by: Option<u64>,
        deadline: tokio::time::Instant,
    ) -> Result<Called, CallError> {
        let (ticket, mut answer) = {
            let mut state = self.state();
            if let Some(replica) = state.free.take() {
                drop(state);
                let mut turn = Turn::new(self, replica);
                let called = turn.call(incoming, routed_by);
                turn.serve_others();
                return called;
            }
            if state.outage.as_ref().is_some_and(|outage| outage.is_long(&self.shared.env.clock)) {
                return Err(CallError::Down);
            }
            let ticket = state.tickets;
            state.tickets += 1;
            let (reply, answer) = oneshot::channel();
            state.queue.push_back(Waiting { ticket, incoming, routed_by, reply });
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
        if let Some(replica) = state.free.take() {
            drop(state);
            let mut turn = Turn::new(self, replica);
            turn.tick();
            turn.serve_others();
        } else {
            state.tick_due = true;
        }
    }

    /// Takes a request out of the queue, if it is still there.
    fn withdraw(&self, ticket: u64) -> bool {
        let mut state = self.state();
        let found = state.queue.iter().position(|waiting| waiting.ticket == ticket);
        found.and_then(|index| state.queue.remove(index)).is_some()
    }

    /// Waits for a turn between two calls, or, while there is no instance, between two attempts to rebuild it.
    pub async fn visit(self: &Arc<Self>) -> Result<Turn> {
        self.next_turn(|state| &mut state.visitor).await
    }

    /// Hands over what another process appended, up to `until`, as soon as the instance's turn has come.
    pub async fn take_in(self: &Arc<Self>, changes: &[Change], until: u64) -> Result<()> {
        let mut turn = self.next_turn(|state| &mut state.follower).await?;
        turn.take_in(changes, until);
        turn.serve_others();
        Ok(())
    }

    async fn next_turn(
        self: &Arc<Self>,
        place: impl FnOnce(&mut State) -> &mut Option<oneshot::Sender<Turn>>,
    ) -> Result<Turn> {
        let turn = {
            let mut state = self.state();
            if let Some(replica) = state.free.take() {
                return Ok(Turn::new(self, replica));
            }
            let (sender, turn) = oneshot::channel();
            *place(&mut state) = Some(sender);
            turn
        };
        turn.await.context("the store is shutting down")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is called under this lock that could panic and leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The guest trapped.
pub struct Raised {
    pub reason: String,
    /// The turn in which it did. None when no shard lost its instance.
    pub turn: Option<Turn>,
}

impl Serving {
    pub fn new(guest: Guest, instance: &Instance) -> Self {
        let (description, headers) = (Arc::new(instance.description().clone()), Arc::clone(instance.wanted_headers()));
        Self { guest: Arc::new(guest), description, headers }
    }
}
