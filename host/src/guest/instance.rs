//! One running instance of a guest, and the calls into it.
//!
//! Owns: the limits of a call, what a trap reports, what a response depends on. Must never know: what the records mean, who else
//! calls the guest, how it comes by its entries.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use hyper::header::HeaderName;
use kvs_txlog::Entry;
use rustix::process::{Resource, getrlimit};
use tracing::warn;
use wasmtime::{Store, StoreContextMut, UpdateDeadline};

use super::batch::Batch;
use super::epoch::{LONG, epochs, make_way};
use super::housekeeping::Next;
use super::imports::{Asked, Call, State};
use super::limits::{CpuLimit, Limits};
use super::message::{Answer, Given, Incoming, Sequel, Wait, Wanted, Watch};
use super::shadow::{Append, Appends, Difference, Inputs, Record, Recorded, Script, Surroundings};
use super::trap::Trapped;
use crate::contract::{self, Description, Exports, ExportsPre, Statistics, Target};

/// Maximum number of request headers that a guest can name: each is looked up and copied on every request.
const WANTED_HEADERS: usize = 64;
/// Capability of guests that enforce the key prefix of a grant.
const KEY_PREFIX: &str = "key-prefix";
/// Capabilities a guest may declare.
const CAPABILITIES: usize = 64;
/// What a guest hands over in one call beside a body: headers, keys, and what comes with them.
const TRANSFER_BYTES: usize = 1 << 20;

pub struct Instance {
    store: Store<State>,
    exports: Exports,
    /// The number of its guest.
    guest: u64,
    limits: Limits,
    description: Description,
    wanted_headers: Arc<Wanted>,
    /// Of the last call of `handle` or `tick`.
    recorded: Option<Recorded>,
}

/// What a candidate did with a request.
pub struct Scripted {
    pub response: contract::Response,
    /// The last of the entries that it appended as the serving guest did, or the first difference.
    pub appends: Result<Option<u64>, Difference>,
    /// A watch or a wait.
    pub asked: Option<String>,
}

impl Instance {
    pub(super) fn new(exports: &ExportsPre<State>, guest: u64, limits: Limits, state: State) -> Result<Self> {
        let mut store = Store::new(exports.engine(), state);
        store.limiter(|state| &mut state.memory);
        // A response that is a little too large can still be looked at and refused, which costs less than a trap.
        store.set_hostcall_fuel(2 * limits.response_bytes + TRANSFER_BYTES);
        store.epoch_deadline_callback(overdue);
        let limit = limits.of_call();
        begin(&mut store, limit);
        let exports = exports.instantiate(&mut store);
        let exports = exports.map_err(|error| trapped(&mut store, &error, limit)).with_context(does_not_start)?;
        let description = exports.lifecycle.call_describe(&mut store);
        let description = description.map_err(|error| trapped(&mut store, &error, limit)).context("describe failed")?;
        let wanted_headers = Arc::new(Wanted::new(check(&description)?));
        store.data_mut().sandbox().lines().set_name(&description.name);
        store.data_mut().sandbox().end_call();
        Ok(Self { store, exports, guest, limits, description, wanted_headers, recorded: None })
    }

    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Whether the guest enforces the key prefix of a grant.
    pub fn enforces_key_prefix(&self) -> bool {
        self.description.capabilities.iter().any(|capability| capability == KEY_PREFIX)
    }

    /// Names of the request headers that the guest is given.
    pub fn wanted_headers(&self) -> &Arc<Wanted> {
        &self.wanted_headers
    }

    /// Notes that a key is about to change, by an entry that another process appended.
    pub fn announce(&self, key: &str) {
        self.store.data().cache.announce(key);
    }

    /// The number of the guest that this is an instance of.
    pub fn guest(&self) -> u64 {
        self.guest
    }

    pub fn memory_bytes(&self) -> usize {
        self.store.data().memory.held()
    }

    /// Takes in entries of the log. An error names the entries.
    pub fn apply(&mut self, entries: &[Entry<'_>]) -> Result<()> {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return Ok(()) };
        self.store.data().clock.not_before(last.time);
        let batch = Batch::of(entries);
        self.store.data_mut().sandbox().begin_apply();
        let limit = self.limits.of_replay();
        let applied = self
            .call_within(limit, Call::default(), |exports, store| exports.lifecycle.call_apply(store, batch.record()));
        applied.map_err(|trapped| self.out_of_memory(trapped)).with_context(|| match entries.len() {
            1 => format!("apply of entry {} failed", first.sequence),
            _ => format!("apply of entries {} to {} failed", first.sequence, last.sequence),
        })
    }

    /// Names the limit of memory, where that may be why entries could not be applied.
    fn out_of_memory(&self, trapped: Trapped) -> anyhow::Error {
        let error = anyhow::Error::new(trapped);
        if !self.store.data().memory.was_denied() {
            return error;
        }
        error.context(self.limits.out_of_memory())
    }

    /// The time that the guest sees now, in milliseconds since 1970.
    pub fn now(&self) -> u64 {
        self.store.data().clock.now()
    }

    /// Housekeeping. Returns when the guest wants the next.
    pub fn tick(&mut self, record: Record) -> Result<Next, Trapped> {
        let now = self.store.data_mut().now();
        let call = Call { may_append: true, effects: Appends::new(record), ..Call::default() };
        let wish = self.call(call, |exports, store| exports.lifecycle.call_tick(store, now))?;
        self.keep_recorded();
        let after = wish.map(|wish| Duration::from_millis(wish.saturating_sub(now)));
        Ok(self.timer().unwrap_or(Next { after, timer: 0 }))
    }

    /// The next tick, when the call that is over has set its time.
    pub fn timer(&mut self) -> Option<Next> {
        self.store.data_mut().timer()
    }

    /// Whether the last call appended, even if it trapped after that.
    pub fn has_appended(&self) -> bool {
        self.store.data().call.appended.is_some()
    }

    /// Sees how much of what the guest stored when it was full is gone.
    pub fn make_room(&mut self) -> Result<(), Trapped> {
        if self.store.data().memory.is_full() { self.count() } else { Ok(()) }
    }

    fn count(&mut self) -> Result<(), Trapped> {
        let stored = self.stats()?.bytes;
        self.store.data_mut().memory.count(stored);
        Ok(())
    }

    pub fn stats(&mut self) -> Result<Statistics, Trapped> {
        self.call(Call::default(), |exports, store| exports.lifecycle.call_stats(store))
    }

    /// The same at the end of a replay, when it may have to count everything.
    pub fn stats_after_replay(&mut self) -> Result<Statistics, Trapped> {
        let limit = self.limits.of_replay();
        self.call_within(limit, Call::default(), |exports, store| exports.lifecycle.call_stats(store))
    }

    /// Routes a request.
    pub fn route(&mut self, incoming: &Incoming) -> Result<Target, Trapped> {
        let method = incoming.request.method().as_str();
        let target = incoming.target();
        self.call(Call::default(), |exports, store| sharding(exports)?.call_route(store, method, target))
    }

    /// Returns the keys in the body of a request.
    pub fn extract_keys(&mut self, incoming: &Incoming) -> Result<Vec<String>, Trapped> {
        let body = incoming.request.body();
        self.call(Call::default(), |exports, store| sharding(exports)?.call_extract_keys(store, body))
    }

    /// Makes one answer of those that all instances gave, at this time.
    pub fn merge_responses(&mut self, incoming: &Incoming, answers: &[Answer], time: u64) -> Result<Answer, Trapped> {
        let time = self.store.data_mut().at(time);
        let headers = incoming.headers(&self.wanted_headers);
        let record = incoming.record(&headers, time);
        let heads: Vec<_> = answers.iter().map(|answer| answer.response.headers()).collect();
        let responses: Vec<_> = answers.iter().zip(&heads).map(|(answer, head)| answer.record(head)).collect();
        // What one of them does not show yet may be newer than that.
        let ends = answers.iter().filter_map(|answer| answer.response.end());
        let end = ends.min().unwrap_or_else(|| self.store.data().log.appended());
        let merged = self.call(Call::default(), |exports, store| {
            sharding(exports)?.call_merge_responses(store, record, &responses)
        })?;
        let response = self.given(merged, end);
        let read = answers.iter().map(|answer| answer.read_sequence).max();
        Ok(Answer {
            read_sequence: read.max(response.position()).unwrap_or(0),
            response,
            guest_time: answers.iter().map(|answer| answer.guest_time).max().unwrap_or_default(),
            appended: answers.iter().any(|answer| answer.appended),
            is_over_quota: answers.iter().any(|answer| answer.is_over_quota),
            sequel: None,
            reusable: None,
        })
    }

    pub fn handle(&mut self, incoming: &Incoming, record: Record) -> Result<Answer, Trapped> {
        let time = self.store.data_mut().now();
        let headers = incoming.headers(&self.wanted_headers);
        let request = incoming.record(&headers, time);
        let (client, serving) = (Some(Arc::clone(&incoming.client)), self.store.data().cache.serving());
        let (request_id, key_prefix) = (Some(incoming.id.clone()), incoming.key_prefix.clone());
        let (effects, surroundings) = (Appends::new(record), Surroundings::new(record));
        let call = Call {
            may_append: true,
            client,
            key_prefix,
            quota: incoming.quota,
            request_id,
            serving,
            effects,
            surroundings,
            ..Call::default()
        };
        let end = self.store.data().log.appended();
        let response = self.call(call, |exports, store| exports.handler.call_handle(store, request))?;
        self.keep_recorded();

        let declared = self.store.data_mut().reuse_declared();
        let sequel = match self.store.data_mut().call.asked.take() {
            Some(Asked::Watch(watch)) => Some(Sequel::Watch(watch)),
            Some(Asked::Wait { key, timeout }) => {
                Some(Sequel::Wait(Box::new(Wait { key, timeout, incoming: incoming.without_body() })))
            }
            None => None,
        };
        let state = self.store.data();
        let (appended, refused) = (state.call.appended, state.call.refused);
        let is_over_quota = state.call.is_over_quota;
        // A guest may name too little (its own entries) or what does not exist yet; neither is believed.
        let everything = state.log.appended();
        let read_sequence = response.read_sequence.unwrap_or(everything).max(appended.unwrap_or(0)).min(everything);
        // A client watches from the position that it is shown: what is given out must be durable.
        let response = self.given(response, end);
        let shown = match &sequel {
            Some(Sequel::Watch(Watch { after: None, end, .. })) => Some(*end),
            _ => response.position(),
        };
        let read_sequence = read_sequence.max(shown.unwrap_or(0));
        if refused && !state.memory.is_full() {
            let (held, limit) = (state.memory.held(), self.limits.memory_bytes);
            let guest = &self.description.name;
            warn!(guest, "it holds {held} of {limit} bytes of memory: until keys are deleted, writes are refused");
            let timer = state.call.timer;
            let counted = self.count();
            // Of the call before this one.
            let call = &mut self.store.data_mut().call;
            (call.timer, call.appended) = (timer, appended);
            counted?;
        }
        // Made of what the guest was given.
        let reusable = declared.and_then(|declared| {
            self.store.data().cache.reusable(&incoming.record(&headers, time), declared, read_sequence)
        });
        Ok(Answer {
            response,
            read_sequence,
            guest_time: Duration::ZERO,
            appended: appended.is_some(),
            is_over_quota,
            sequel,
            reusable,
        })
    }

    /// Handles a request as the serving guest did, at the same time, with the same clocks, randomness and results of its appends.
    /// Nothing that it appends goes to the log.
    pub fn handle_scripted(
        &mut self,
        incoming: &Incoming,
        time: u64,
        appends: Vec<Append>,
        surroundings: Inputs,
    ) -> Result<Scripted, Trapped> {
        let time = self.store.data_mut().at(time);
        let headers = incoming.headers(&self.wanted_headers);
        let request = incoming.record(&headers, time);
        let call = Call {
            client: Some(Arc::clone(&incoming.client)),
            key_prefix: incoming.key_prefix.clone(),
            request_id: Some(incoming.id.clone()),
            effects: Appends::Scripted(Script::new(appends)),
            surroundings: Surroundings::Scripted(surroundings),
            ..Call::default()
        };
        let response = self.call(call, |exports, store| exports.handler.call_handle(store, request))?;
        let Call { effects, asked, .. } = &mut self.store.data_mut().call;
        let appends = match std::mem::take(effects) {
            Appends::Scripted(script) => script.end(),
            Appends::Real | Appends::Recorded(_) => Ok(None),
        };
        Ok(Scripted { response, appends, asked: asked.as_ref().map(Asked::describe) })
    }

    /// Keeps what was recorded of the call that is over, before another one.
    fn keep_recorded(&mut self) {
        let state = self.store.data_mut();
        let Appends::Recorded(recording) = std::mem::take(&mut state.call.effects) else { return };
        let (time, asked) = (state.time(), state.call.asked.as_ref().map(Asked::describe));
        self.recorded = Some(Recorded { time, recording, given: state.sandbox().recorded(), asked });
    }

    /// Returns what was recorded of the last call.
    pub fn recorded(&mut self) -> Option<Recorded> {
        self.recorded.take()
    }

    fn given(&self, record: contract::Response, end: u64) -> Given {
        Given::Fresh { record, most: self.limits.response_bytes, end }
    }

    /// Makes one call, within the limits of a call.
    fn call<T>(
        &mut self,
        call: Call,
        make: impl FnOnce(&Exports, &mut Store<State>) -> wasmtime::Result<T>,
    ) -> Result<T, Trapped> {
        self.call_within(self.limits.of_call(), call, make)
    }

    fn call_within<T>(
        &mut self,
        limit: CpuLimit,
        mut call: Call,
        make: impl FnOnce(&Exports, &mut Store<State>) -> wasmtime::Result<T>,
    ) -> Result<T, Trapped> {
        let (request_id, surroundings) = (call.request_id.take(), std::mem::take(&mut call.surroundings));
        self.store.data_mut().call = call;
        self.store.data_mut().sandbox().begin_call(request_id, surroundings);
        begin(&mut self.store, limit);
        let result = make(&self.exports, &mut self.store);
        self.store.data_mut().sandbox().end_call();
        result.map_err(|error| trapped(&mut self.store, &error, limit))
    }
}

/// Names the limit of the address space, where there is one.
fn does_not_start() -> String {
    match getrlimit(Resource::As).current {
        None => "the guest does not start".to_owned(),
        Some(limit) => format!(
            "the guest does not start, with an address space of {} (ulimit -v), of which each memory of an instance \
             reserves more than 4 GiB; raise the limit",
            ByteSize(limit)
        ),
    }
}

fn trapped(store: &mut Store<State>, error: &wasmtime::Error, limit: CpuLimit) -> Trapped {
    Trapped::new(error, limit, store.data_mut().sandbox().lines().printed())
}

/// Exports that are called only with several shards, which a guest without them never serves.
fn sharding(exports: &Exports) -> wasmtime::Result<&contract::Sharding> {
    exports.sharding.as_ref().ok_or_else(|| wasmtime::format_err!("the guest does not export sharding"))
}

/// The time of a call begins.
fn begin(store: &mut Store<State>, limit: CpuLimit) {
    let all = epochs(limit.time);
    let first = all.min(LONG);
    store.data_mut().rest = all - first;
    store.set_epoch_deadline(first);
}

/// A call has taken all the epochs it was given so far.
fn overdue(mut store: StoreContextMut<'_, State>) -> wasmtime::Result<UpdateDeadline> {
    let rest = &mut store.data_mut().rest;
    let more = (*rest).min(LONG);
    if more == 0 {
        return Ok(UpdateDeadline::Interrupt);
    }
    *rest -= more;
    make_way();
    Ok(UpdateDeadline::Continue(more))
}

/// The description is shown in logs and used on every request; refuses what is not fit for that.
fn check(description: &Description) -> Result<Vec<HeaderName>> {
    let is_word = |text: &str| (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    ensure!(is_word(&description.name), "its name is not a word of at most 64 printable ASCII characters");
    ensure!(is_word(&description.version), "its version is not a word of at most 64 printable ASCII characters");
    let count = description.headers.len();
    ensure!(count <= WANTED_HEADERS, "it names {count} request headers, at most {WANTED_HEADERS} are allowed");
    let parse = |name: &String| HeaderName::from_bytes(name.as_bytes()).context("it names an invalid header");
    let headers = description.headers.iter().map(parse).collect::<Result<_>>()?;
    let count = description.capabilities.len();
    ensure!(count <= CAPABILITIES, "it declares {count} capabilities, at most {CAPABILITIES} are allowed");
    ensure!(
        description.capabilities.iter().all(|capability| is_word(capability)),
        "a capability is not a word of at most 64 printable ASCII characters"
    );
    Ok(headers)
}
