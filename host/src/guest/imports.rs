//! What an instance finds when it calls out: the contract's imports, for one call at a time.
//!
//! Owns: what a call may append, the time that it receives, and its calls beside the response. Must never know: what a
//! request is, when calls are made. WASI is the `sandbox`'s.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use hyper::header::HeaderValue;
use kvs_txlog::TransactionLog;
use kvs_txlog::subscribers::{GUEST_KEY, Keys, Selection};
use wasmtime::component::{HasSelf, Linker, ResourceTable};

use super::cache::{self, Declared, ResponseCache};
use super::clock::Clock;
use super::custom::CustomMetrics;
use super::housekeeping::Next;
use super::key;
use super::limits::Limits;
use super::memory::Memory;
use super::message::{Client, Watch};
use super::owner::Part;
use super::quota::{Quota, Quotas, Refused};
use super::sandbox::Sandbox;
use super::shadow::{Append, Appends, Surroundings};
use crate::contract::{
    AppendError, Event, Imports, Selector, config, connection, http, logging, metrics, request_context, response_cache,
    timer, transaction_log, watch,
};

/// The contract's own imports. `http` has types only, and a component that names those imports it too.
pub const OFFERED: [&str; 10] = [
    "kvs:store/transaction-log",
    "kvs:store/connection",
    "kvs:store/watch",
    "kvs:store/response-cache",
    "kvs:store/request-context",
    "kvs:store/logging",
    "kvs:store/timer",
    "kvs:store/metrics",
    "kvs:store/http",
    "wasi:config/store",
];

/// What all instances of a guest share.
#[derive(Clone)]
pub struct Common {
    pub config: Arc<[(String, String)]>,
    pub limits: Limits,
    pub clock: Arc<Clock>,
    pub cache: Arc<ResponseCache>,
    /// Linear memory of the instances of all guests.
    pub total_memory: Arc<AtomicU64>,
    pub metrics: Arc<CustomMetrics>,
    pub quotas: Arc<Quotas>,
}

/// What an instance holds on the host's side.
pub struct State {
    pub(super) log: Arc<dyn TransactionLog>,
    part: Part,
    config: Arc<[(String, String)]>,
    limits: Limits,
    pub(super) memory: Memory,
    sandbox: Sandbox,
    pub(super) call: Call,
    pub(super) clock: Arc<Clock>,
    pub(super) cache: Arc<ResponseCache>,
    metrics: Arc<CustomMetrics>,
    quotas: Arc<Quotas>,
    /// Time of the call in progress, in milliseconds since 1970.
    time: u64,
    /// Epochs that it may take beyond those it has been given.
    pub(super) rest: u64,
}

/// What the call in progress may do, and has done.
#[derive(Default)]
pub(super) struct Call {
    pub(super) may_append: bool,
    pub(super) client: Option<Arc<Client>>,
    /// Prefix of the keys that the client may read and change, if not all.
    pub(super) key_prefix: Option<Arc<str>>,
    /// Of the keys with that prefix.
    pub(super) quota: Option<Quota>,
    /// Taken when the call begins.
    pub(super) request_id: Option<HeaderValue>,
    /// The newest sequence it appended.
    pub(super) appended: Option<u64>,
    /// How often it asked to append.
    pub(super) appends: u32,
    /// Whether an append was refused because the guest is near its limit of memory.
    pub(super) refused: bool,
    /// Whether an append was refused for the quota of the client.
    pub(super) is_over_quota: bool,
    pub(super) asked: Option<Asked>,
    /// The generation that it serves in, where responses are kept.
    pub(super) serving: Option<cache::Serving>,
    pub(super) reuse: Reuse,
    /// Whether it read the connection, or the identifier of the request.
    pub(super) origin_read: bool,
    /// The time of the next tick that it set; `u64::MAX` is never.
    pub(super) timer: Option<u64>,
    /// Recorded for a candidate, or those of a candidate.
    pub(super) effects: Appends,
    /// Taken when the call begins.
    pub(super) surroundings: Surroundings,
}

/// Its declaration that the response can be reused.
#[derive(Default)]
pub(super) enum Reuse {
    #[default]
    None,
    Void,
    Declared(Declared),
}

/// What it asked for in place of its response as it is.
pub(super) enum Asked {
    Watch(Watch),
    Wait { key: String, timeout: Duration },
}

impl Asked {
    /// Describes it, for a comparison.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Watch(Watch { selection, after, end: _ }) => format!("watch of {selection:?} after {after:?}"),
            Self::Wait { key, timeout } => format!("wait for {key:?}, at most {timeout:?}"),
        }
    }
}

impl Call {
    /// Whether the client may read and change a key, as far as it can be given one: those of guests are not its own.
    fn may_access(&self, key: &str) -> bool {
        self.key_prefix.as_ref().is_none_or(|prefix| key.starts_with(&**prefix) || key.starts_with(GUEST_KEY))
    }
}

impl State {
    pub(super) fn new(log: Arc<dyn TransactionLog>, part: Part, common: Common) -> Self {
        let Common { config, limits, clock, cache, total_memory, metrics, quotas } = common;
        let memory = Memory::new(limits, total_memory);
        let sandbox = Sandbox::new(limits, Arc::clone(metrics.exceeded()), Arc::clone(&clock));
        let call = Call::default();
        Self { log, part, config, limits, memory, sandbox, call, clock, cache, metrics, quotas, time: 0, rest: 0 }
    }

    pub(super) fn sandbox(&mut self) -> &mut Sandbox {
        &mut self.sandbox
    }

    /// Handles of the instance, whose number is limited.
    pub(super) fn handles(&mut self) -> &mut ResourceTable {
        self.sandbox.handles()
    }

    /// The declaration of the call that is over. Void when the call did more than to read keys of its own.
    pub(super) fn reuse_declared(&mut self) -> Option<Declared> {
        let Call { appends, asked, reuse, origin_read, .. } = &mut self.call;
        let reuse = std::mem::take(reuse);
        let read_more = *appends > 0 || asked.is_some() || *origin_read || self.sandbox.has_read_surroundings();
        match reuse {
            Reuse::Declared(declared) if !read_more => return Some(declared),
            Reuse::None => {}
            Reuse::Declared(_) | Reuse::Void => self.cache.count_void(),
        }
        None
    }

    /// The client of the call in progress, when that asks about it.
    fn client(&mut self) -> Option<&Client> {
        self.call.origin_read = true;
        self.call.client.as_deref()
    }

    /// The next tick, when the call that is over has set its time.
    pub(super) fn timer(&mut self) -> Option<Next> {
        let at = self.call.timer.take()?;
        Some(Next { timer: at, after: Some(Duration::from_millis(at.saturating_sub(self.time))) })
    }

    /// Time of the next call.
    pub(super) fn now(&mut self) -> u64 {
        let now = self.clock.now();
        self.at(now)
    }

    /// The same, for a call that sees a certain time.
    pub(super) fn at(&mut self, time: u64) -> u64 {
        self.time = time;
        time
    }

    /// The time that the last call saw.
    pub(super) fn time(&self) -> u64 {
        self.time
    }
}

pub(super) fn add_to_linker(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    Imports::add_to_linker::<_, HasSelf<State>>(linker, |state| state)
}

impl transaction_log::Host for State {
    fn append(&mut self, events: Vec<Event>) -> Result<u64, AppendError> {
        let events: Vec<kvs_txlog::Event> = events.into_iter().map(Into::into).collect();
        if let Appends::Scripted(script) = &mut self.call.effects {
            return script.append(&events);
        }
        let result = self.append_real(&events);
        if let Appends::Recorded(recording) = &mut self.call.effects {
            recording.add(Append { events, result });
        }
        result
    }
}

impl State {
    fn append_real(&mut self, events: &[kvs_txlog::Event]) -> Result<u64, AppendError> {
        // What it does not own, it would not be given again.
        let may_append = |key| self.part.owns(key) && self.call.may_access(key);
        if !self.call.may_append || !events.iter().map(kvs_txlog::Event::key).all(may_append) {
            return Err(AppendError::ReadOnly);
        }
        self.call.appends += 1;
        if self.call.appends > self.limits.appends {
            return Err(AppendError::Unavailable);
        }
        // What is there by other ways can be deleted.
        if events.iter().any(|event| matches!(event, kvs_txlog::Event::Put(put) if !key::is_valid(&put.key))) {
            return Err(AppendError::InvalidKey);
        }
        // Before anything changed. Deletes are still accepted, since they free memory.
        let taken_in = events.iter().filter_map(taken_in).sum();
        if taken_in > 0 && !self.memory.takes(taken_in) {
            self.call.refused = true;
            return Err(AppendError::InsufficientStorage);
        }
        // Before the log has them: a watch can receive them before the call returns.
        events.iter().for_each(|event| self.cache.announce(event.key()));
        let client = self.call.key_prefix.as_deref().zip(self.call.quota);
        let first = self.quotas.append(client, events, || self.log.append(self.time, events));
        let first = first.map_err(|refused| match refused {
            Refused::Exceeded => {
                self.call.is_over_quota = true;
                AppendError::InsufficientStorage
            }
            Refused::Append(error) => error.into(),
        })?;
        if let Some(others) = events.len().checked_sub(1) {
            self.call.appended = Some(first + others as u64);
        }
        Ok(first)
    }
}

/// What a guest is likely to keep of an event.
fn taken_in(event: &kvs_txlog::Event) -> Option<u64> {
    match event {
        kvs_txlog::Event::Put(put) => Some((put.key.len() + put.value.len()).max(1) as u64),
        kvs_txlog::Event::Delete(_) => None,
    }
}

impl watch::Host for State {
    fn subscribe(&mut self, selectors: Vec<Selector>, after: Option<String>, puts_only: bool) {
        let keys = selectors.into_iter().map(|selector| match selector {
            Selector::Key(key) => Keys::One(key.into()),
            Selector::Prefix(prefix) => Keys::Begin(prefix.into()),
        });
        let selection = Selection { keys: keys.collect(), puts_only };
        self.call.asked = Some(Asked::Watch(Watch { selection, after, end: self.log.appended() }));
    }

    fn wait_for_change(&mut self, key: String, timeout_ms: u64) {
        // The client of a wait learns when the key changes.
        let timeout_ms = if self.call.may_access(&key) { timeout_ms } else { 0 };
        self.call.asked = Some(Asked::Wait { key, timeout: Duration::from_millis(timeout_ms) });
    }
}

impl response_cache::Host for State {
    fn reuse(&mut self, keys: Vec<String>, until_ms: Option<u64>) {
        let Some(serving) = &self.call.serving else { return };
        let is_over = until_ms.is_some_and(|until| until <= self.time);
        self.call.reuse = if keys.iter().any(String::is_empty) || is_over {
            Reuse::None
        } else if keys.len() > cache::KEYS || !keys.iter().all(|key| self.part.owns(key)) {
            Reuse::Void
        } else {
            Reuse::Declared(self.cache.declare(serving, &keys, until_ms))
        };
    }
}

impl connection::Host for State {
    fn peer_address(&mut self) -> Option<String> {
        Some(self.client()?.address?.to_string())
    }
    fn tls_version(&mut self) -> Option<String> {
        Some(self.client()?.tls_version?.to_owned())
    }
    fn client_identity(&mut self) -> Option<String> {
        Some(self.client()?.identity.as_ref()?.to_string())
    }
}

impl request_context::Host for State {
    fn request_id(&mut self) -> Option<String> {
        self.call.origin_read = true;
        self.sandbox.lines().request_id().map(str::to_owned)
    }
}

impl logging::Host for State {
    fn log(&mut self, level: logging::Level, message: String) {
        self.sandbox.lines().log(level.into(), &message);
    }
}

impl From<logging::Level> for tracing::Level {
    fn from(level: logging::Level) -> Self {
        match level {
            logging::Level::Trace => Self::TRACE,
            logging::Level::Debug => Self::DEBUG,
            logging::Level::Info => Self::INFO,
            logging::Level::Warn => Self::WARN,
            logging::Level::Error => Self::ERROR,
        }
    }
}

// What may append is `handle` and `tick` of an instance that serves.
impl timer::Host for State {
    fn set(&mut self, at_ms: Option<u64>) {
        if self.call.may_append {
            self.call.timer = Some(at_ms.unwrap_or(u64::MAX));
        }
    }
}

impl metrics::Host for State {
    fn add(&mut self, name: String, labels: Vec<(String, String)>, by: u64) {
        if self.call.may_append {
            self.metrics.add(&name, labels, by);
        }
    }

    fn set(&mut self, name: String, labels: Vec<(String, String)>, value: f64) {
        if self.call.may_append {
            self.metrics.set(&name, labels, self.part.label(), value);
        }
    }
}

impl config::Host for State {
    fn get(&mut self, key: String) -> Result<Option<String>, config::Error> {
        Ok(self.config.iter().find(|(name, _)| *name == key).map(|(_, value)| value.clone()))
    }
    fn get_all(&mut self) -> Result<Vec<(String, String)>, config::Error> {
        Ok(self.config.to_vec())
    }
}

impl http::Host for State {}
