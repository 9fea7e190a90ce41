//! State that is made of log entries: the only way to change it in a call is to append.
//!
//! Owns: the order of append and change, and entries as `apply` gets them. Must never know: what a state holds.

use std::cell::RefCell;
use std::ops::Deref;

pub use crate::bindings::exports::kvs::store::lifecycle::Statistics;

use crate::bindings::exports::kvs::store::lifecycle::Batch;
use crate::bindings::kvs::store::transaction_log::{AppendError, Event, Put};
use crate::bindings::kvs::store::watch::Selector;
use crate::host::Host;

/// What a guest holds. The same entries make the same state, whichever guest appended them: no clock, no randomness and no
/// settings.
pub trait State: Default {
    /// Takes in an entry: of a replay, or one that was just appended.
    fn apply(&mut self, entry: Entry<'_>);

    /// Completes what `apply` put off. Called before a request, a tick and `statistics`, and after an append.
    fn settle(&mut self) {}

    /// Number of keys, and bytes of their keys and values.
    fn statistics(&self) -> Statistics;

    /// Housekeeping, a bounded amount of work. Returns the time of the next call, in milliseconds, at most a second later; `None`
    /// is about a second. `Logged::set_timer` sets a later one too. Without it, the guest is not called.
    fn tick(state: &mut Logged<'_, Self>, _now_ms: u64) -> Option<u64> {
        state.set_timer(None);
        None
    }

    /// The time of the next `tick`, when what was just appended brings it forward.
    fn earlier_tick(&self) -> Option<u64> {
        None
    }
}

/// An entry of the log: a put, or the delete of a key.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'e> {
    pub sequence: u64,
    /// UTF-8.
    pub key: &'e [u8],
    /// `None` for a delete.
    pub put: Option<Value<'e>>,
}

/// The value of a put, with what belongs to it.
#[derive(Clone, Copy, Debug)]
pub struct Value<'e> {
    pub bytes: &'e [u8],
    pub metadata: &'e [(String, String)],
    /// Time from which on the key is gone, in milliseconds since 1970.
    pub expires_at_ms: Option<u64>,
}

impl<'e> Entry<'e> {
    /// An event that was appended with this sequence.
    pub fn new(sequence: u64, event: &'e Event) -> Self {
        match event {
            Event::Put(Put { key, value: bytes, metadata, expires_at_ms }) => Self {
                sequence,
                key: key.as_bytes(),
                put: Some(Value { bytes, metadata, expires_at_ms: *expires_at_ms }),
            },
            Event::Delete(key) => Self { sequence, key: key.as_bytes(), put: None },
        }
    }

    pub fn key(&self) -> &'e str {
        str::from_utf8(self.key).expect("the host gives keys in UTF-8")
    }
}

/// The entries of a batch, in the order of the log.
pub fn entries(batch: &Batch) -> impl Iterator<Item = Entry<'_>> {
    let mut rest = &batch.bytes[..];
    batch.entries.iter().map(move |entry| {
        let mut take = |length: u32| {
            let (taken, after) = rest.split_at(length as usize);
            rest = after;
            taken
        };
        let key = take(entry.key_bytes);
        let put = entry.put.as_ref().map(|put| Value {
            bytes: take(put.value_bytes),
            metadata: put.metadata.map_or(&[][..], |index| &batch.metadata[index as usize]),
            expires_at_ms: put.expires_at_ms,
        });
        Entry { sequence: entry.sequence, key, put }
    })
}

/// A state within a call: to be read as it is, and changed by what is appended.
pub struct Logged<'c, S> {
    state: &'c mut S,
    host: RefCell<&'c mut dyn Host>,
}

impl<S> Deref for Logged<'_, S> {
    type Target = S;

    fn deref(&self) -> &S {
        self.state
    }
}

impl<'c, S: State> Logged<'c, S> {
    pub fn new(state: &'c mut S, host: &'c mut dyn Host) -> Self {
        state.settle();
        Self { state, host: RefCell::new(host) }
    }

    /// Appends a group of events, all or none, and then applies them. Returns the sequence of the first.
    pub fn append(&mut self, events: &[Event]) -> Result<u64, AppendError> {
        self.append_with(events, |state, first| {
            (first..).zip(events).for_each(|(sequence, event)| state.apply(Entry::new(sequence, event)));
            state.settle();
            first
        })
    }

    /// Appends, and then changes the state with `change`, which gets the sequence of the first event and does what `apply`
    /// and `settle` do; for a state that learns more of it.
    pub fn append_with<R>(
        &mut self,
        events: &[Event],
        change: impl FnOnce(&mut S, u64) -> R,
    ) -> Result<R, AppendError> {
        let first = self.host.get_mut().append(events)?;
        let changed = change(self.state, first);
        if let Some(at_ms) = self.state.earlier_tick() {
            self.set_timer(Some(at_ms));
        }
        Ok(changed)
    }

    /// See `watch.subscribe`.
    pub fn subscribe(&self, selectors: &[Selector], after: Option<&str>, puts_only: bool) {
        self.host.borrow_mut().subscribe(selectors, after, puts_only);
    }

    /// See `watch.wait-for-change`.
    pub fn wait_for_change(&self, key: &str, timeout_ms: u64) {
        self.host.borrow_mut().wait_for_change(key, timeout_ms);
    }

    /// See `timer.set`.
    pub fn set_timer(&self, at_ms: Option<u64>) {
        self.host.borrow_mut().set_timer(at_ms);
    }

    /// See `response-cache.reuse`.
    pub fn reuse(&self, key: &str, until_ms: Option<u64>) {
        self.host.borrow_mut().reuse(key, until_ms);
    }
}
