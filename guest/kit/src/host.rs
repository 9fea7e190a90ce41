//! The host, as a guest uses it in a call.

use std::marker::PhantomData;

use crate::bindings::kvs::store::response_cache::reuse;
use crate::bindings::kvs::store::timer;
use crate::bindings::kvs::store::transaction_log::{AppendError, Event, append};
use crate::bindings::kvs::store::watch::{Selector, subscribe, wait_for_change};
use crate::guest::Guest;
use crate::{Response, answer};

/// Functions of the host.
pub trait Host {
    /// See `transaction-log.append`.
    fn append(&mut self, events: &[Event]) -> Result<u64, AppendError>;

    /// See `watch.subscribe`.
    fn subscribe(&mut self, selectors: &[Selector], after: Option<&str>, puts_only: bool);

    /// See `watch.wait-for-change`.
    fn wait_for_change(&mut self, key: &str, timeout_ms: u64);

    /// See `response-cache.reuse`.
    fn reuse(&mut self, key: &str, until_ms: Option<u64>);

    /// See `timer.set`. Without one, a guest is called as before.
    fn set_timer(&mut self, _at_ms: Option<u64>) {}
}

/// A host that accepts appends, delivers no changes and keeps no responses.
impl<A: FnMut(&[Event]) -> Result<u64, AppendError>> Host for A {
    fn append(&mut self, events: &[Event]) -> Result<u64, AppendError> {
        self(events)
    }

    fn subscribe(&mut self, _selectors: &[Selector], _after: Option<&str>, _puts_only: bool) {}

    fn wait_for_change(&mut self, _key: &str, _timeout_ms: u64) {}

    fn reuse(&mut self, _key: &str, _until_ms: Option<u64>) {}
}

/// The host that runs the component.
pub struct Imports;

impl Host for Imports {
    fn append(&mut self, events: &[Event]) -> Result<u64, AppendError> {
        append(events)
    }

    fn subscribe(&mut self, selectors: &[Selector], after: Option<&str>, puts_only: bool) {
        subscribe(selectors, after, puts_only);
    }

    fn wait_for_change(&mut self, key: &str, timeout_ms: u64) {
        wait_for_change(key, timeout_ms);
    }

    fn reuse(&mut self, key: &str, until_ms: Option<u64>) {
        reuse(&[key.to_owned()], until_ms);
    }

    fn set_timer(&mut self, at_ms: Option<u64>) {
        timer::set(at_ms);
    }
}

/// A host that appends what the guest's policy allows (`Guest::check`).
pub(crate) struct Checked<'h, G, H> {
    host: &'h mut H,
    refusal: Option<Response>,
    guest: PhantomData<G>,
}

impl<'h, G: Guest, H: Host> Checked<'h, G, H> {
    pub(crate) fn new(host: &'h mut H) -> Self {
        Self { host, refusal: None, guest: PhantomData }
    }

    /// The response to a request: that of the policy, when it refused something. The event can come from the state, such as a
    /// sum, and with it the refusal, which then depends on everything there is.
    pub(crate) fn response(self, response: answer::Result) -> Response {
        match self.refusal {
            Some(refusal) => Response { read_sequence: None, ..refusal },
            None => response.unwrap_or_else(|early| early),
        }
    }
}

impl<G: Guest, H: Host> Host for Checked<'_, G, H> {
    fn append(&mut self, events: &[Event]) -> Result<u64, AppendError> {
        if let Some(refusal) = events.iter().find_map(|event| G::check(event).err()) {
            self.refusal = Some(refusal);
            return Err(AppendError::ReadOnly);
        }
        self.host.append(events)
    }

    fn subscribe(&mut self, selectors: &[Selector], after: Option<&str>, puts_only: bool) {
        self.host.subscribe(selectors, after, puts_only);
    }

    fn wait_for_change(&mut self, key: &str, timeout_ms: u64) {
        self.host.wait_for_change(key, timeout_ms);
    }

    fn reuse(&mut self, key: &str, until_ms: Option<u64>) {
        self.host.reuse(key, until_ms);
    }

    fn set_timer(&mut self, at_ms: Option<u64>) {
        self.host.set_timer(at_ms);
    }
}
