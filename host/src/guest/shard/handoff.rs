//! Exclusive access to one value, handed from each user to the next.
//!
//! Owns: who uses the value next, and that nobody waits while it is free. Must never know: the value, or what it is used for.
//!
//! There is no thread for the value. A caller that finds it free uses it at once, and then serves those who queued meanwhile;
//! a caller that finds it in use queues. A value that is lost in use leaves the queue as it is, for its replacement.

use std::collections::VecDeque;

use super::sync::{Mutex, MutexGuard, PoisonError};

/// `T` is the value, `W` a queued caller, and `V` a visitor, which gets the value itself.
pub struct Handoff<T, W, V> {
    state: Mutex<State<T, W, V>>,
}

struct State<T, W, V> {
    /// The value while it is not in use.
    free: Option<T>,
    queue: VecDeque<(u64, W)>,
    tickets: u64,
    visitors: [VecDeque<V>; 2],
    tick_due: bool,
    /// Callers are rejected, since the value was lost and not replaced in time.
    rejects: bool,
}

/// Kinds of visitors, in the order in which they go first.
#[derive(Clone, Copy)]
pub enum Visit {
    Swap,
    Follow,
}

/// Result of a call's arrival, `C`.
pub enum Entered<T, C, R> {
    Free(T, C),
    /// With its ticket, and where its answer is received.
    Queued(u64, R),
    Rejected(C),
}

/// The next use of the value.
pub enum Next<T, W, V> {
    Tick(T),
    Visit(T, V),
    Call(T, W),
    /// None: the value is free.
    Idle,
}

impl<T, W, V> Handoff<T, W, V> {
    pub fn new(value: T) -> Self {
        let state = State {
            free: Some(value),
            queue: VecDeque::new(),
            tickets: 0,
            visitors: [VecDeque::new(), VecDeque::new()],
            tick_due: false,
            rejects: false,
        };
        Self { state: Mutex::new(state) }
    }

    /// Takes the value if it is free, and queues otherwise.
    pub fn enter<C, R>(&self, call: C, queue: impl FnOnce(C) -> (W, R)) -> Entered<T, C, R> {
        let mut state = self.state();
        if let Some(value) = state.free.take() {
            return Entered::Free(value, call);
        }
        if state.rejects {
            return Entered::Rejected(call);
        }
        let ticket = state.tickets;
        state.tickets += 1;
        let (waiting, receiver) = queue(call);
        state.queue.push_back((ticket, waiting));
        Entered::Queued(ticket, receiver)
    }

    /// Removes a caller from the queue. Returns whether it was still there.
    pub fn withdraw(&self, ticket: u64) -> bool {
        let mut state = self.state();
        let found = state.queue.iter().position(|(queued, _)| *queued == ticket);
        found.and_then(|index| state.queue.remove(index)).is_some()
    }

    /// Takes the value if it is free; otherwise a tick is due before its next use.
    pub fn tick(&self) -> Option<T> {
        let mut state = self.state();
        let value = state.free.take();
        state.tick_due |= value.is_none();
        value
    }

    /// Takes the value if it is free; otherwise the visitor gets it before any queued caller.
    pub fn visit(&self, visit: Visit, visitor: impl FnOnce() -> V) -> Option<T> {
        let mut state = self.state();
        let value = state.free.take();
        if value.is_none() {
            state.visitors[visit as usize].push_back(visitor());
        }
        value
    }

    /// Returns whether a visitor of a kind waits.
    pub fn is_awaited(&self, visit: Visit) -> bool {
        !self.state().visitors[visit as usize].is_empty()
    }

    /// Removes the first waiting visitor of a kind.
    pub fn take_visitor(&self, visit: Visit) -> Option<V> {
        self.state().visitors[visit as usize].pop_front()
    }

    /// Passes the value on after a use.
    pub fn next(&self, value: T) -> Next<T, W, V> {
        let mut state = self.state();
        if std::mem::take(&mut state.tick_due) {
            return Next::Tick(value);
        }
        if let Some(visitor) = state.visitors.iter_mut().find_map(VecDeque::pop_front) {
            return Next::Visit(value, visitor);
        }
        if let Some((_, waiting)) = state.queue.pop_front() {
            return Next::Call(value, waiting);
        }
        state.free = Some(value);
        Next::Idle
    }

    /// Leaves the value to the next caller or tick, which serves the queue too.
    pub fn release(&self, value: T) {
        self.state().free = Some(value);
    }

    /// Rejects the next callers, and returns those in the queue.
    pub fn reject(&self) -> impl Iterator<Item = W> + use<T, W, V> {
        let mut state = self.state();
        state.rejects = true;
        std::mem::take(&mut state.queue).into_iter().map(|(_, waiting)| waiting)
    }

    /// Accepts callers again: the value was replaced. A tick that was due is dropped.
    pub fn replaced(&self) {
        let mut state = self.state();
        (state.rejects, state.tick_due) = (false, false);
    }

    /// Returns the number of queued callers.
    pub fn queued(&self) -> usize {
        self.state().queue.len()
    }

    fn state(&self) -> MutexGuard<'_, State<T, W, V>> {
        // Every change under this lock is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
