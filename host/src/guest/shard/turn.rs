//! A turn: exclusive use of the instance of a shard.
//!
//! Owns: the calls in a turn, and what follows a trap or a panic in one. Must never know: the order of turns, or where a new
//! instance comes from.

use std::sync::Arc;
use std::time::Duration;

use kvs_runtime::Clock;
use kvs_txlog::change::Change;
use tokio::task;
use tracing::{error, warn};

use super::super::engine::Guest;
use super::super::instance::Instance;
use super::super::message::{Answer, Incoming};
use super::super::metrics::next_count;
use super::super::replica::Replica;
use super::super::shadow::{Loss, Record};
use super::super::trap::Trapped;
use super::handoff::Next;
use super::{CallError, Called, Raised, Serving, Shard, Waiting};

/// Number of queued requests that one caller serves before it gets its own answer.
const OTHERS: usize = 16;

/// A turn at the instance. It ends in [`serve_others`](Self::serve_others). A turn that is dropped was cut short, by the end of
/// the runtime or by a panic: see [`Instanced`] for what follows.
pub struct Turn {
    shard: Arc<Shard>,
    has: Instanced,
}

/// The instance of a turn.
enum Instanced {
    Free(Box<Replica>),
    /// In a call. A panic in it counts as a trap.
    Called,
    /// Not there, and to be rebuilt unless the turn brings one.
    Missing,
    /// Passed on, lost in a trap that is reported, or built elsewhere.
    Over,
}

impl Turn {
    pub(super) fn new(shard: &Arc<Shard>, replica: Box<Replica>) -> Self {
        Self { shard: Arc::clone(shard), has: Instanced::Free(replica) }
    }

    /// A turn for a promotion. A rebuild begins if none takes place.
    pub(super) fn without_instance(shard: &Arc<Shard>) -> Self {
        Self { shard: Arc::clone(shard), has: Instanced::Missing }
    }

    /// A turn for the promotion of a rebuild, which tries again itself.
    pub(super) fn of_rebuild(shard: &Arc<Shard>) -> Self {
        Self { shard: Arc::clone(shard), has: Instanced::Over }
    }

    fn clock(&self) -> &Clock {
        &self.shard.shared.env.clock
    }

    /// Whether this is a turn at the instance of `shard`.
    pub fn is_at(&self, shard: &Arc<Shard>) -> bool {
        Arc::ptr_eq(&self.shard, shard)
    }

    /// The guest that serves.
    pub fn serving(&self) -> Serving {
        self.shard.serving()
    }

    fn take(&mut self, then: Instanced) -> Option<Box<Replica>> {
        match std::mem::replace(&mut self.has, then) {
            Instanced::Free(replica) => Some(replica),
            other => {
                self.has = other;
                None
            }
        }
    }

    /// Replaces the instance, and returns the previous one. `serving` is the guest of the new one.
    pub(super) fn promote(&mut self, serving: Serving, replica: Replica) -> Option<Box<Replica>> {
        let tick_trapped = {
            let mut state = self.shard.state();
            (state.serving, state.outage) = (serving, None);
            state.tick_trapped
        };
        // Without a tick that was due: a guest that traps in each of them serves in between.
        self.shard.instance.replaced();
        // The wake time of the previous instance is unknown to this one.
        self.shard.housekeeping.begin_again(!tick_trapped);
        let previous = self.take(Instanced::Over);
        self.shard.held.changed();
        self.shard.held.memory(replica.instance.memory_bytes());
        self.has = Instanced::Free(Box::new(replica));
        previous
    }

    /// Drops the instance, where a guest without one is to serve.
    pub fn take_out(&mut self, serving: Serving) {
        self.shard.state().serving = serving;
        if let Some(tap) = self.shard.tap() {
            tap.lose(Loss::Abandoned);
        }
        self.take(Instanced::Missing).into_iter().for_each(discard);
        self.has = Instanced::Missing;
        // It may have held what the log does not, or was of another guest.
        self.shard.held.changed();
        self.shard.shared.quotas.forget();
        // Also of a turn that is held: the log may not become durable for long.
        if self.shard.outage().is_none() {
            self.shard.is_down("the instance is replaced".to_owned());
        }
    }

    /// Compares what a replica counts with what the instance before it counted, where that is of the same guest, and nothing was
    /// appended since. It has all entries; while another process writes the log, it can have more.
    pub(super) fn compare(&self, guest: &Guest, replica: &mut Replica) -> Result<(), Trapped> {
        if self.shard.shared.log.read_only().is_some() {
            return Ok(());
        }
        let Some((keys, bytes)) = self.shard.held.exactly() else { return Ok(()) };
        if self.serving().guest.digest() != guest.digest() {
            return Ok(());
        }
        let now = replica.instance.stats()?;
        if (now.keys, now.bytes) != (keys, bytes) {
            self.shard.shared.metrics.differing.add(1);
            let (guest, shard) = (&replica.instance.description().name, self.shard.part.label());
            warn!(
                guest,
                shard,
                "statistics differ after a rebuild: {} keys and {} bytes, and {keys} keys and {bytes} bytes before it; \
                 the guest has state that is not in the log, or its apply depends on more than the entries",
                now.keys,
                now.bytes
            );
        }
        Ok(())
    }

    pub(super) fn call(&mut self, incoming: Incoming, routed_by: Option<u64>) -> Result<Called, CallError> {
        let Some(replica) = self.take(Instanced::Called) else {
            return Err(CallError::Trapped { guest_time: Duration::ZERO });
        };
        if routed_by.is_some_and(|routed_by| routed_by != replica.instance.guest()) {
            self.has = Instanced::Free(replica);
            return Ok(Called::Moved(incoming));
        }
        if incoming.key_prefix.is_some() && !replica.instance.enforces_key_prefix() {
            self.has = Instanced::Free(replica);
            return Err(CallError::KeyPrefix);
        }
        self.handle(replica, incoming).map(Called::Answered)
    }

    fn handle(&mut self, mut replica: Box<Replica>, incoming: Incoming) -> Result<Answer, CallError> {
        let tap = self.shard.tap();
        let record = match &tap {
            None => Record::Nothing,
            Some(_) if incoming.is_sampled => Record::All,
            Some(_) => Record::Entries,
        };
        let begun = self.clock().now();
        let handled = replica.instance.handle(&incoming, record);
        let guest_time = self.clock().elapsed(begun);
        self.note_change(&replica.instance);
        self.shard.shared.metrics.calls.observe_time(guest_time);
        self.shard.held.memory(replica.instance.memory_bytes());
        match handled {
            Ok(answer) => {
                if let Some((tap, recorded)) = tap.zip(replica.instance.recorded()) {
                    tap.add(recorded, (record == Record::All).then_some((incoming, &answer, guest_time)));
                }
                if let Some(next) = replica.instance.timer() {
                    self.shard.housekeeping.wish(next);
                }
                self.has = Instanced::Free(replica);
                Ok(Answer { guest_time, ..answer })
            }
            Err(trapped) => {
                let (guest, request, request_id) =
                    (&replica.instance.description().name, &incoming.request, incoming.id());
                let (method, target) = (request.method(), request.uri());
                error!(guest, request_id, %method, %target, "the guest trapped: {trapped}");
                self.lost(replica, &trapped.to_string());
                Err(CallError::Trapped { guest_time })
            }
        }
    }

    pub(super) fn tick(&mut self) {
        let Some(mut replica) = self.take(Instanced::Called) else { return };
        let (instance, tap) = (&mut replica.instance, self.shard.tap());
        let record = if tap.is_some() { Record::Entries } else { Record::Nothing };
        match self.keep_house(instance, record) {
            Ok(()) => {
                if let Some((tap, recorded)) = tap.zip(instance.recorded()) {
                    tap.add(recorded, None);
                }
                self.shard.held.memory(replica.instance.memory_bytes());
                self.has = Instanced::Free(replica);
                self.shard.state().tick_trapped = false;
            }
            Err(trapped) => {
                error!(guest = replica.instance.description().name, "the guest trapped in tick: {trapped}");
                self.shard.state().tick_trapped = true;
                self.lost(replica, &format!("in tick: {trapped}"));
            }
        }
    }

    /// Calls `tick` when the guest wants it now, and `stats` from time to time.
    fn keep_house(&self, instance: &mut Instance, record: Record) -> Result<(), Trapped> {
        if self.shard.housekeeping.is_due(instance.now()) {
            let ticked = instance.tick(record);
            self.note_change(instance);
            self.shard.housekeeping.wish(ticked?);
        }
        instance.make_room()?;
        self.count(instance)
    }

    /// Notes that what was counted is no longer so, when the last call appended.
    fn note_change(&self, instance: &Instance) {
        if instance.has_appended() {
            self.shard.held.changed();
        }
    }

    /// Applies entries that another process appended.
    pub(super) fn take_in(&mut self, changes: &[Change], until: u64) {
        self.shard.shared.quotas.forget();
        let Some(mut replica) = self.take(Instanced::Called) else { return };
        self.shard.held.changed();
        if let Some(tap) = self.shard.tap() {
            tap.lose(Loss::InLog);
        }
        // Before any of them is visible; also for those that the instance has already.
        let own = changes.iter().filter(|change| self.shard.part.owns(change.key()));
        own.for_each(|change| replica.instance.announce(change.key()));
        match replica.apply_changes(changes, until) {
            Ok(()) => {
                self.shard.held.memory(replica.instance.memory_bytes());
                self.has = Instanced::Free(replica);
            }
            Err(error) => {
                error!(guest = replica.instance.description().name, "the guest trapped: {error:#}");
                self.lost(replica, &format!("{error:#}"));
            }
        }
    }

    /// Drops an instance that trapped.
    fn lost(&mut self, replica: Box<Replica>, failure: &str) {
        discard(replica);
        self.trapped(failure);
    }

    /// Reports a trap, which leads to a rebuild, or on probation to a rollback.
    fn trapped(&mut self, failure: &str) {
        self.has = Instanced::Over;
        if let Some(tap) = self.shard.tap() {
            // What the call appended was not recorded.
            tap.lose(Loss::InLog);
        }
        self.shard.shared.trapped(failure);
        let reason = failure.to_owned();
        self.shard.is_down(format!("the guest trapped: {reason}"));
        let turn = Some(Self::without_instance(&self.shard));
        self.shard.shared.alarm.raise(Raised { reason, turn });
    }

    /// Calls `stats` from time to time.
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

    /// Ends the turn, and all that would follow: the instance is dropped, and callers are sent to another process.
    pub fn hand_over(mut self) {
        self.take(Instanced::Over).into_iter().for_each(discard);
        self.has = Instanced::Over;
        for Waiting { incoming, reply, .. } in self.shard.instance.reject() {
            // A client that disconnected needs no answer.
            let _ = reply.send(Ok(Called::Moved(incoming)));
        }
    }

    /// Ends the turn: serves queued requests, and passes the instance on. After [`OTHERS`] a task does that, so that the caller
    /// gets its answer.
    pub fn serve_others(mut self) {
        for _ in 0..OTHERS {
            let Some(Waiting { incoming, routed_by, reply }) = self.next() else { return };
            // A client that disconnected needs no call.
            if !reply.is_closed() {
                let _ = reply.send(self.call(incoming, routed_by));
            }
        }
        let tasks = self.shard.shared.env.tasks.clone();
        tasks.detach("guest queue", async move { self.serve_others() });
    }

    /// Returns the next queued request. None ends the turn: the instance is free, or passed on, or lost.
    fn next(&mut self) -> Option<Waiting> {
        loop {
            let replica = self.take(Instanced::Over)?;
            match self.shard.instance.next(replica) {
                Next::Tick(replica) => {
                    self.has = Instanced::Free(replica);
                    self.tick();
                }
                Next::Visit(replica, visitor) => {
                    if let Err(turn) = visitor.send(Self::new(&self.shard, replica)) {
                        // The visitor gave up.
                        turn.serve_others();
                    }
                    return None;
                }
                Next::Call(replica, waiting) => {
                    self.has = Instanced::Free(replica);
                    return Some(waiting);
                }
                Next::Idle => return None,
            }
        }
    }
}

/// Drops an instance in the background: to free its memory takes long.
fn discard(replica: Box<Replica>) {
    task::spawn_blocking(move || drop(replica));
}

impl Drop for Turn {
    fn drop(&mut self) {
        match std::mem::replace(&mut self.has, Instanced::Over) {
            Instanced::Free(replica) => {
                self.shard.state().outage = None;
                self.shard.instance.release(replica);
            }
            Instanced::Called => {
                self.shard.held.changed();
                self.trapped("a call into it panicked");
            }
            // Its outage has begun.
            Instanced::Missing => Arc::clone(&self.shard).rebuild(),
            Instanced::Over => {}
        }
    }
}
