//! A turn at the instance of a shard.
//!
//! Owns: what is done in it, and that the instance is given on at its end. Must never know: whose turn comes when there is
//! no instance.

use std::sync::Arc;
use std::time::Duration;

use kvs_runtime::Clock;
use kvs_txlog::REPLAY_ENTRIES;
use kvs_txlog::change::Change;
use tracing::{error, info};

use super::super::instance::{Instance, Trapped};
use super::super::message::{Answer, Incoming};
use super::super::metrics::next_count;
use super::super::replica::Replayed;
use super::{CallError, Called, OTHERS, Raised, Serving, Shard, Waiting};

/// A turn at the instance. Ends by giving the instance to nobody (it is free), to another turn, or, when a call trapped or
/// panicked, to nobody ever: then the shard is rebuilt, unless the guest was on probation.
pub struct Turn {
    shard: Arc<Shard>,
    /// Taken out during a call, so that it is lost with a panic.
    instance: Option<Box<Instance>>,
    /// Why it was lost, when it was not by a panic.
    failure: Option<String>,
    /// That there is none is known, and no trap of its own.
    told: bool,
    over: bool,
}

impl Turn {
    pub(super) fn new(shard: &Arc<Shard>, instance: Box<Instance>) -> Self {
        Self { shard: Arc::clone(shard), instance: Some(instance), failure: None, told: false, over: false }
    }

    /// For one who brings another: else one is built when this is dropped.
    pub(super) fn without_instance(shard: &Arc<Shard>) -> Self {
        Self { shard: Arc::clone(shard), instance: None, failure: None, told: true, over: false }
    }

    fn clock(&self) -> &Clock {
        &self.shard.shared.env.clock
    }

    /// Whether it is a turn at this shard.
    pub fn is_at(&self, shard: &Arc<Shard>) -> bool {
        Arc::ptr_eq(&self.shard, shard)
    }

    /// Puts another guest in the place of the one that serves, with an instance or, where it has none yet, without.
    pub fn replace(&mut self, serving: Serving, instance: Option<Box<Instance>>) -> Option<Box<Instance>> {
        let mut state = self.shard.state();
        state.serving = serving;
        self.told = instance.is_none();
        if !self.told {
            state.outage = None;
        }
        drop(state);
        std::mem::replace(&mut self.instance, instance)
    }

    /// Goes on with an instance that was brought back from the log.
    pub fn brought_back(mut self, instance: Box<Instance>, replayed: Replayed) {
        (self.instance, self.told) = (Some(instance), false);
        self.rebuilt(replayed);
    }

    pub(super) fn rebuilt(self, Replayed { entries, keys, took }: Replayed) {
        info!(shard = self.shard.part.told(), entries, keys, ?took, "the guest is rebuilt");
        self.shard.shared.metrics.rebuilds.add(1);
        let tick_trapped = {
            let mut state = self.shard.state();
            state.outage = None;
            // One that was due comes later as well, so that a guest that traps in all of them serves in between.
            state.tick_due = false;
            state.tick_trapped
        };
        if !tick_trapped {
            // What the lost instance wished for is unknown to this one.
            self.shard.shared.housekeeping.wish(Duration::ZERO);
        }
        self.serve_others();
    }

    pub(super) fn call(&mut self, incoming: Incoming, routed_by: Option<u64>) -> Result<Called, CallError> {
        let serves = self.instance.as_ref().map(|instance| instance.guest());
        if routed_by.is_some() && routed_by != serves {
            return Ok(Called::Moved(incoming));
        }
        self.handle(&incoming).map(Called::Answered)
    }

    fn handle(&mut self, incoming: &Incoming) -> Result<Answer, CallError> {
        let mut instance = self.instance.take().ok_or(CallError::Trapped)?;
        let begun = self.clock().now();
        let handled = instance.handle(incoming);
        self.shard.shared.metrics.calls.observe_time(self.clock().elapsed(begun));
        self.shard.held.memory(instance.memory_bytes());
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

    pub(super) fn tick(&mut self) {
        let Some(mut instance) = self.instance.take() else { return };
        match instance.tick().and_then(|wish| self.count(&mut instance).map(|()| wish)) {
            Ok(wish) => {
                self.instance = Some(instance);
                self.shard.state().tick_trapped = false;
                if let Some(after) = wish {
                    self.shard.shared.housekeeping.wish(after);
                }
            }
            Err(trapped) => {
                error!(guest = instance.description().name, "the guest trapped in tick: {trapped}");
                self.failure = Some(format!("in tick: {trapped}"));
                self.shard.state().tick_trapped = true;
            }
        }
    }

    /// An instance that was built meanwhile has some of it already.
    pub(super) fn take_in(&mut self, changes: &[Change], until: u64) {
        let Some(mut instance) = self.instance.take() else { return };
        let (shard, known) = (&self.shard, instance.sequence);
        let own = changes.iter().filter(|change| shard.part.owns(change.key()));
        // Before any of them can be seen; those that it has already, too.
        own.clone().for_each(|change| instance.announce(change.key()));
        let new: Vec<_> = own.filter(|change| change.sequence > known).collect();
        for some in new.chunks(REPLAY_ENTRIES) {
            let metadata: Vec<_> = some.iter().map(|change| change.metadata()).collect();
            let entries: Vec<_> = some.iter().zip(&metadata).map(|(change, metadata)| change.entry(metadata)).collect();
            if let Err(error) = instance.apply(&entries) {
                error!(guest = instance.description().name, "the guest trapped: {error:#}");
                self.failure = Some(format!("{error:#}"));
                return;
            }
        }
        instance.sequence = until.max(known);
        self.instance = Some(instance);
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
        let instance = self.instance.take()?;
        let mut state = self.shard.state();
        if let Some(visitor) = state.visitor.take().or_else(|| state.follower.take()) {
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
            None if self.told => {
                if self.shard.outage().is_none() {
                    self.shard.is_down("the guest is rebuilt".to_owned());
                }
                Arc::clone(&self.shard).rebuild();
            }
            None => {
                let reason = self.failure.take().unwrap_or_else(|| "a call into it panicked".to_owned());
                self.shard.shared.metrics.traps.add(1);
                self.shard.is_down(format!("the guest trapped: {reason}"));
                let turn = Some(Self::without_instance(&self.shard));
                self.shard.shared.alarm.raise(Raised { reason, turn });
            }
        }
    }
}
