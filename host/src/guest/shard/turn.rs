//! A turn at the instance of a shard.
//!
//! Owns: what is done in it, and that the instance is given on at its end. Must never know: whose turn comes when there is
//! no instance, or where another comes from.

use std::sync::Arc;
use std::time::Duration;

use kvs_runtime::Clock;
use kvs_txlog::change::Change;
use tokio::task;
use tracing::error;

use super::super::instance::Instance;
use super::super::message::{Answer, Incoming};
use super::super::metrics::next_count;
use super::super::replica::Replica;
use super::super::trap::Trapped;
use super::{CallError, Called, OTHERS, Raised, Serving, Shard, Waiting};

/// A turn at the instance. Ends by giving the instance to nobody (it is free), to another turn, or, when a call trapped or
/// panicked, to nobody ever: then the shard is rebuilt, unless the guest was on probation.
pub struct Turn {
    shard: Arc<Shard>,
    /// Taken out during a call, so that it is lost with a panic.
    replica: Option<Box<Replica>>,
    /// Why it was lost, when it was not by a panic.
    failure: Option<String>,
    /// That there is none is known, and no trap of its own.
    told: bool,
    over: bool,
}

impl Turn {
    pub(super) fn new(shard: &Arc<Shard>, replica: Box<Replica>) -> Self {
        Self { shard: Arc::clone(shard), replica: Some(replica), failure: None, told: false, over: false }
    }

    /// For one who brings another: else one is built when this is dropped.
    pub(super) fn without_instance(shard: &Arc<Shard>) -> Self {
        Self { shard: Arc::clone(shard), replica: None, failure: None, told: true, over: false }
    }

    /// For the rebuild itself, which goes on when this is dropped before an instance is in it.
    pub(super) fn of_rebuild(shard: &Arc<Shard>) -> Self {
        let mut turn = Self::without_instance(shard);
        turn.over = true;
        turn
    }

    fn clock(&self) -> &Clock {
        &self.shard.shared.env.clock
    }

    /// Whether it is a turn at this shard.
    pub fn is_at(&self, shard: &Arc<Shard>) -> bool {
        Arc::ptr_eq(&self.shard, shard)
    }

    /// Puts another instance, of this guest or another, in the place of the one that serves.
    pub(super) fn promote(&mut self, serving: Serving, replica: Replica) -> Option<Box<Replica>> {
        let tick_trapped = {
            let mut state = self.shard.state();
            (state.serving, state.outage) = (serving, None);
            // One that was due comes later as well, so that a guest that traps in all of them serves in between.
            state.tick_due = false;
            state.tick_trapped
        };
        if !tick_trapped {
            // What the instance before wished for is unknown to this one.
            self.shard.shared.housekeeping.wish(Duration::ZERO);
        }
        (self.told, self.over) = (false, false);
        self.replica.replace(Box::new(replica))
    }

    /// Takes the instance out, where another guest is to serve that has none yet.
    pub fn take_out(&mut self, serving: Serving) {
        self.shard.state().serving = serving;
        self.told = true;
        self.replica.take().into_iter().for_each(discard);
    }

    pub(super) fn call(&mut self, incoming: Incoming, routed_by: Option<u64>) -> Result<Called, CallError> {
        let serves = self.replica.as_ref().map(|replica| replica.instance.guest());
        if routed_by.is_some() && routed_by != serves {
            return Ok(Called::Moved(incoming));
        }
        self.handle(&incoming).map(Called::Answered)
    }

    fn handle(&mut self, incoming: &Incoming) -> Result<Answer, CallError> {
        let mut replica = self.replica.take().ok_or(CallError::Trapped)?;
        let begun = self.clock().now();
        let handled = replica.instance.handle(incoming);
        self.shard.shared.metrics.calls.observe_time(self.clock().elapsed(begun));
        self.shard.held.memory(replica.instance.memory_bytes());
        match handled {
            Ok(answer) => {
                self.replica = Some(replica);
                Ok(answer)
            }
            Err(trapped) => {
                let (guest, request, request_id) =
                    (&replica.instance.description().name, &incoming.request, incoming.id());
                let (method, target) = (request.method(), request.uri());
                error!(guest, request_id, %method, %target, "the guest trapped: {trapped}");
                self.lost(replica, trapped.to_string());
                Err(CallError::Trapped)
            }
        }
    }

    pub(super) fn tick(&mut self) {
        let Some(mut replica) = self.replica.take() else { return };
        let instance = &mut replica.instance;
        match instance.tick().and_then(|wish| self.count(instance).map(|()| wish)) {
            Ok(wish) => {
                self.replica = Some(replica);
                self.shard.state().tick_trapped = false;
                if let Some(after) = wish {
                    self.shard.shared.housekeeping.wish(after);
                }
            }
            Err(trapped) => {
                error!(guest = replica.instance.description().name, "the guest trapped in tick: {trapped}");
                self.lost(replica, format!("in tick: {trapped}"));
                self.shard.state().tick_trapped = true;
            }
        }
    }

    /// Hands over what another process appended.
    pub(super) fn take_in(&mut self, changes: &[Change], until: u64) {
        let Some(mut replica) = self.replica.take() else { return };
        // Before any of them can be seen; those that it has already, too.
        let own = changes.iter().filter(|change| self.shard.part.owns(change.key()));
        own.for_each(|change| replica.instance.announce(change.key()));
        match replica.apply_changes(changes, until) {
            Ok(()) => self.replica = Some(replica),
            Err(error) => {
                error!(guest = replica.instance.description().name, "the guest trapped: {error:#}");
                self.lost(replica, format!("{error:#}"));
            }
        }
    }

    /// It trapped, and is not called again.
    fn lost(&mut self, replica: Box<Replica>, failure: String) {
        self.failure = Some(failure);
        discard(replica);
    }

    /// Asks what the guest holds, now and again.
    fn count(&self, instance: &mut Instance) -> Result<(), Trapped> {
        let begun = self.clock().now();
        if begun < self.shard.state().count_from {
            return Ok(());
        }
        let counted = instance.stats()?;
        self.shard.held.holds(&counted);
        self.shard.held.memory(instance.memory_bytes());
        self.shard.state().count_from = next_count(self.clock().now(), self.clock().elapsed(begun));
        Ok(())
    }

    /// Serves those who queued; when there are many, leaves the rest to a task, so that this caller gets away.
    pub fn serve_others(mut self) {
        for _ in 0..OTHERS {
            let Some(Waiting { incoming, routed_by, reply, .. }) = self.next() else { return };
            // A client that left is not called for.
            if !reply.is_closed() {
                let _ = reply.send(self.call(incoming, routed_by));
            }
        }
        let tasks = self.shard.shared.env.tasks.clone();
        tasks.detach("guest queue", async move { self.serve_others() });
    }

    /// The next in the queue; when there is none, the turn is over and the instance free.
    fn next(&mut self) -> Option<Waiting> {
        let tick_due = std::mem::take(&mut self.shard.state().tick_due);
        if tick_due {
            self.tick();
        }
        let replica = self.replica.take()?;
        let mut state = self.shard.state();
        if let Some(visitor) = state.visitor.take().or_else(|| state.follower.take()) {
            drop(state);
            self.over = true;
            if let Err(turn) = visitor.send(Self::new(&self.shard, replica)) {
                // It did not wait for it.
                turn.serve_others();
            }
            return None;
        }
        let next = state.queue.pop_front();
        match next {
            Some(_) => self.replica = Some(replica),
            None => {
                state.free = Some(replica);
                self.over = true;
            }
        }
        next
    }
}

/// Gives back the memory of an instance, which takes the longer the more it is, while nobody waits for that.
fn discard(replica: Box<Replica>) {
    task::spawn_blocking(move || drop(replica));
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        match self.replica.take() {
            // The runtime is going down with the task that held the turn, or that task panicked outside the guest. Whoever
            // queues is served with the next call or tick.
            Some(replica) => {
                let mut state = self.shard.state();
                state.free = Some(replica);
                state.outage = None;
            }
            None if self.told => {
                if self.shard.outage().is_none() {
                    self.shard.is_down("the guest is rebuilt".to_owned());
                }
                Arc::clone(&self.shard).rebuild();
            }
            None => {
                let reason = self.failure.take().unwrap_or_else(|| "a call into it panicked".to_owned());
                self.shard.shared.trapped(&reason);
                self.shard.is_down(format!("the guest trapped: {reason}"));
                let turn = Some(Self::without_instance(&self.shard));
                self.shard.shared.alarm.raise(Raised { reason, turn });
            }
        }
    }
}
