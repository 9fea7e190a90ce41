//! One running instance of a guest: the calls into it, and what it finds when it calls out (all but WASI).
//!
//! Owns: the limits of a call, what a call may append, the guest's clock, the translation between HTTP messages and the
//! contract's records. Must never know: what the records mean, who else calls the guest, how it comes by its entries.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use tracing::{error, warn};
use wasmtime::component::{HasSelf, Linker};
use wasmtime::{Store, StoreContextMut, Trap, UpdateDeadline, WasmBacktrace};

use super::clock::Clock;
use super::engine::{LONG, Limits, epochs, make_way};
use super::memory::Memory;
use super::owner::Part;
use super::sandbox::Sandbox;
use crate::contract::{
    self, AppendError, Description, Entry, Event, Exports, ExportsPre, HeaderRef, Placement, ResponseRef, Statistics,
    changes, config, connection, http, transaction_log,
};
use crate::log::TransactionLog;

/// The contract's own imports. `http` has types only, and a component that names those imports it too.
pub const OFFERED: [&str; 5] =
    ["kvs:store/transaction-log", "kvs:store/connection", "kvs:store/changes", "kvs:store/http", "wasi:config/store"];

/// Request headers a guest may ask for: each is looked up and copied on every request.
const WANTED_HEADERS: usize = 64;
/// Headers a response may carry; far more than any needs, far fewer than an HTTP library can hold.
const RESPONSE_HEADERS: usize = 256;
/// What a guest hands over in one call beside a body: headers, keys, and what comes with them.
const TRANSFER_BYTES: usize = 1 << 20;

/// Headers that speak of the connection or the framing, which are the host's.
const CONNECTION_HEADERS: [HeaderName; 7] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    HeaderName::from_static("keep-alive"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// The guest trapped, or passed a limit: its memory can be in any state, and the instance must not be called again.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Trapped(String);

/// Who is at the other end of a connection.
#[derive(Debug)]
pub struct Client {
    pub address: SocketAddr,
    pub tls_version: Option<&'static str>,
    /// The subject of its certificate, which was found good.
    pub identity: Option<Arc<str>>,
    /// Its requests are called for one after the other: a hundred streams of one connection get no more of the guest than
    /// one request of another.
    pub turn: tokio::sync::Mutex<()>,
}

/// A request, read whole.
#[derive(Clone)]
pub struct Incoming {
    pub request: Request<Bytes>,
    pub client: Arc<Client>,
    /// By which it is known outside.
    pub id: HeaderValue,
    /// Who asks, when that is known.
    pub principal: Option<Arc<str>>,
}

impl Incoming {
    pub fn id(&self) -> &str {
        self.id.to_str().unwrap_or_default()
    }
}

/// What a call gave.
pub struct Answer {
    pub response: Response<Bytes>,
    /// The response may leave when the log is durable up to this.
    pub rests_on: u64,
    /// Whether the call appended, so that it has an outcome at all.
    pub appended: bool,
    /// What the guest asked for in place of the response as it is.
    pub sequel: Option<Sequel>,
}

pub enum Sequel {
    /// The head, and then changes.
    Follow(Follow),
    /// Another response, later. Boxed, since hardly any request waits.
    Hold(Box<Hold>),
}

/// Changes that a response goes on with: of keys that begin so, and newer than this.
pub struct Follow {
    pub prefix: String,
    pub after: u64,
}

/// A request that waits until something happens to a key, or the time is over.
pub struct Hold {
    pub key: String,
    pub time: Duration,
    /// To be handled again.
    pub incoming: Incoming,
}

pub struct Instance {
    store: Store<State>,
    exports: Exports,
    /// It was given the log up to here. What it appended itself is newer.
    pub(super) sequence: u64,
    /// The number of its guest.
    guest: u64,
    limits: Limits,
    description: Description,
    wanted_headers: Box<[HeaderName]>,
}

impl Instance {
    pub(super) fn new(exports: &ExportsPre<State>, guest: u64, limits: Limits, state: State) -> Result<Self> {
        let mut store = Store::new(exports.engine(), state);
        store.limiter(|state| &mut state.memory);
        // A response that is a little too large can still be looked at and refused, which costs less than a trap.
        store.set_hostcall_fuel(2 * limits.response_bytes + TRANSFER_BYTES);
        store.epoch_deadline_callback(overdue);
        begin(&mut store, limits);
        let mut told = |error| anyhow!(trapped(&error, limits));
        let exports = exports.instantiate(&mut store).map_err(&mut told).context("the guest does not start")?;
        let description =
            exports.kvs_store_lifecycle().call_describe(&mut store).map_err(told).context("describe failed")?;
        let wanted_headers = check(&description)?;
        store.data_mut().sandbox.set_name(&description.name);
        store.data_mut().sandbox.end_call();
        Ok(Self { store, exports, sequence: 0, guest, limits, description, wanted_headers })
    }

    pub fn description(&self) -> &Description {
        &self.description
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
        self.call(Call::default(), |exports, store| exports.kvs_store_lifecycle().call_apply(store, entries))
            .with_context(|| format!("apply of entries {} to {} failed", first.sequence, last.sequence))
    }

    /// Housekeeping. Returns whether the guest wants to go on with it soon.
    pub fn tick(&mut self) -> Result<bool, Trapped> {
        let now = self.store.data_mut().now();
        let more = self.call(Call { may_append: true, ..Call::default() }, |exports, store| {
            exports.kvs_store_lifecycle().call_tick(store, now)
        })?;
        if self.store.data().memory.is_full() {
            self.count()?;
        }
        Ok(more)
    }

    /// Sees how much of what the guest stored when it was full is gone.
    fn count(&mut self) -> Result<(), Trapped> {
        let stored = self.stats()?.bytes;
        self.store.data_mut().memory.count(stored);
        Ok(())
    }

    pub fn stats(&mut self) -> Result<Statistics, Trapped> {
        self.call(Call::default(), |exports, store| exports.kvs_store_lifecycle().call_stats(store))
    }

    /// Where a request belongs.
    pub fn place(&mut self, incoming: &Incoming) -> Result<Placement, Trapped> {
        let (method, target) = (incoming.request.method().as_str(), incoming.target());
        self.call(Call::default(), |exports, store| exports.kvs_store_sharding().call_place(store, method, target))
    }

    /// The keys in its body.
    pub fn keys(&mut self, incoming: &Incoming) -> Result<Vec<String>, Trapped> {
        let body = incoming.request.body();
        self.call(Call::default(), |exports, store| exports.kvs_store_sharding().call_keys(store, body))
    }

    /// One answer of those that all instances gave.
    pub fn merge(&mut self, incoming: &Incoming, answers: &[Answer]) -> Result<Answer, Trapped> {
        let time = self.store.data_mut().now();
        let headers = self.headers(incoming);
        let record = incoming.record(&headers, time);
        let all = |_: &_| true;
        let heads: Vec<_> = answers.iter().map(|answer| header_refs(answer.response.headers(), all)).collect();
        let responses: Vec<_> = answers.iter().zip(&heads).map(|(answer, head)| answer.record(head)).collect();
        let merged = self.call(Call::default(), |exports, store| {
            exports.kvs_store_sharding().call_merge(store, record, &responses)
        })?;
        Ok(Answer {
            response: self.checked(incoming, merged),
            rests_on: answers.iter().map(|answer| answer.rests_on).max().unwrap_or(0),
            appended: answers.iter().any(|answer| answer.appended),
            sequel: None,
        })
    }

    pub fn handle(&mut self, incoming: &Incoming) -> Result<Answer, Trapped> {
        let time = self.store.data_mut().now();
        let headers = self.headers(incoming);
        let record = incoming.record(&headers, time);
        let call = Call { may_append: true, client: Some(Arc::clone(&incoming.client)), ..Call::default() };
        let response = self.call(call, |exports, store| exports.kvs_store_handler().call_handle(store, record))?;

        let sequel = match self.store.data_mut().call.asked.take() {
            Some(Asked::Follow { prefix, after }) => Some(Sequel::Follow(Follow { prefix, after })),
            Some(Asked::Hold { key, time }) => {
                Some(Sequel::Hold(Box::new(Hold { key, time, incoming: incoming.without_body() })))
            }
            None => None,
        };
        let state = self.store.data();
        let (appended, refused) = (state.call.appended, state.call.refused);
        // A guest may name too little (its own entries) or what does not exist yet; neither is believed.
        let everything = state.log.appended();
        let rests_on = response.depends_on.unwrap_or(everything).max(appended.unwrap_or(0)).min(everything);
        if refused && !state.memory.is_full() {
            let (held, limit) = (state.memory.held(), self.limits.memory_bytes);
            let guest = &self.description.name;
            warn!(guest, "it holds {held} of {limit} bytes of memory: until keys are deleted, writes are refused");
            self.count()?;
        }
        Ok(Answer { response: self.checked(incoming, response), rests_on, appended: appended.is_some(), sequel })
    }

    /// What the guest is shown of the headers.
    fn headers<'r>(&self, incoming: &'r Incoming) -> Vec<HeaderRef<'r>> {
        // There are fewer of those that came than of those that can be asked for, and to look for each costs a hash.
        header_refs(incoming.request.headers(), |name| self.wanted_headers.contains(name))
    }

    /// The response to a request; another in its place when it is none.
    fn checked(&self, incoming: &Incoming, record: contract::Response) -> Response<Bytes> {
        message(record, self.limits.response_bytes).unwrap_or_else(|invalid| {
            let request_id = incoming.id();
            error!(guest = self.description.name, request_id, "invalid response: {invalid:#}");
            let mut response = Response::new(Bytes::from_static(b"the store gave an invalid response\n"));
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            let text = HeaderValue::from_static("text/plain; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, text);
            response
        })
    }

    /// Makes one call, within the limits of a call.
    fn call<T>(
        &mut self,
        call: Call,
        make: impl FnOnce(&Exports, &mut Store<State>) -> wasmtime::Result<T>,
    ) -> Result<T, Trapped> {
        self.store.data_mut().call = call;
        begin(&mut self.store, self.limits);
        let result = make(&self.exports, &mut self.store);
        self.store.data_mut().sandbox.end_call();
        result.map_err(|error| trapped(&error, self.limits))
    }
}

/// The time of a call begins.
fn begin(store: &mut Store<State>, limits: Limits) {
    let all = epochs(limits.call);
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
fn check(description: &Description) -> Result<Box<[HeaderName]>> {
    let is_word = |text: &str| (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    ensure!(is_word(&description.name), "its name is not a word of at most 64 printable ASCII characters");
    ensure!(is_word(&description.version), "its version is not a word of at most 64 printable ASCII characters");
    let count = description.headers.len();
    ensure!(count <= WANTED_HEADERS, "it asks for {count} request headers, at most {WANTED_HEADERS} are allowed");
    let parse = |name: &String| HeaderName::from_bytes(name.as_bytes()).context("it asks for an invalid header");
    description.headers.iter().map(parse).collect()
}

/// The contract's response as an HTTP message, if it is one.
fn message(record: contract::Response, most: usize) -> Result<Response<Bytes>> {
    ensure!((200..=599).contains(&record.status), "status {}", record.status);
    let bytes = record.body.len();
    ensure!(bytes <= most, "a body of {bytes} bytes, at most {most} are allowed");
    let count = record.headers.len();
    ensure!(count <= RESPONSE_HEADERS, "{count} headers, at most {RESPONSE_HEADERS} are allowed");
    let mut response = Response::new(Bytes::from(record.body));
    *response.status_mut() = StatusCode::from_u16(record.status)?;
    response.headers_mut().reserve(count);
    for header in record.headers {
        let name = HeaderName::from_bytes(header.name.as_bytes())?;
        ensure!(!CONNECTION_HEADERS.contains(&name), "the header {name} is the host's to set");
        let value = HeaderValue::from_maybe_shared(Bytes::from(header.value))?;
        response.headers_mut().append(name, value);
    }
    Ok(response)
}

/// Those of these names, for the guest to see.
fn header_refs(headers: &HeaderMap, is_shown: impl Fn(&HeaderName) -> bool) -> Vec<HeaderRef<'_>> {
    let shown = headers.iter().filter(|(name, _)| is_shown(name));
    shown.map(|(name, value)| HeaderRef { name: name.as_str(), value: value.as_bytes() }).collect()
}

/// What happened and in which functions, in one line.
fn trapped(error: &wasmtime::Error, limits: Limits) -> Trapped {
    let cause = match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) => format!("the call took longer than {:?}", limits.call),
        _ => error.root_cause().to_string(),
    };
    let frames = error.downcast_ref::<WasmBacktrace>().map(WasmBacktrace::frames).unwrap_or_default();
    let names = frames.iter().filter_map(|frame| frame.func_name()).take(10);
    // Without the hash that Rust adds; names of other languages stay as they are.
    let functions: Vec<_> = names.map(|name| format!("{:#}", rustc_demangle::demangle(name))).collect();
    Trapped(if functions.is_empty() { cause } else { format!("{cause}, in {}", functions.join(" < ")) })
}

/// What an instance holds on the host's side.
pub struct State {
    log: Arc<dyn TransactionLog>,
    part: Part,
    config: Arc<[(String, String)]>,
    limits: Limits,
    memory: Memory,
    sandbox: Sandbox,
    call: Call,
    clock: Arc<Clock>,
    /// What the call in progress was told, in milliseconds since 1970.
    time: u64,
    /// Epochs that it may take beyond those it has been given.
    rest: u64,
}

/// What the call in progress may do, and has done.
#[derive(Default)]
struct Call {
    may_append: bool,
    client: Option<Arc<Client>>,
    /// The newest sequence it appended.
    appended: Option<u64>,
    /// How often it asked to append.
    appends: u32,
    /// Whether an append was refused because the guest is near its limit of memory.
    refused: bool,
    asked: Option<Asked>,
}

/// What it asked for in place of its response as it is.
enum Asked {
    Follow { prefix: String, after: u64 },
    Hold { key: String, time: Duration },
}

impl Incoming {
    fn target(&self) -> &str {
        self.request.uri().path_and_query().map_or("", |target| target.as_str())
    }

    fn record<'r>(&'r self, headers: &'r [HeaderRef<'r>], time: u64) -> contract::Request<'r> {
        contract::Request {
            method: self.request.method().as_str(),
            target: self.target(),
            headers,
            body: self.request.body(),
            principal: self.principal.as_deref(),
            time,
        }
    }

    fn without_body(&self) -> Self {
        let mut request = Request::new(Bytes::new());
        (*request.method_mut(), *request.uri_mut()) = (self.request.method().clone(), self.request.uri().clone());
        (*request.version_mut(), *request.headers_mut()) = (self.request.version(), self.request.headers().clone());
        Self { request, client: Arc::clone(&self.client), id: self.id.clone(), principal: self.principal.clone() }
    }
}

impl Answer {
    fn record<'r>(&'r self, headers: &'r [HeaderRef<'r>]) -> ResponseRef<'r> {
        let (status, body) = (self.response.status().as_u16(), self.response.body());
        ResponseRef { status, headers, body, depends_on: Some(self.rests_on) }
    }
}

impl State {
    pub(super) fn new(
        log: Arc<dyn TransactionLog>,
        part: Part,
        config: Arc<[(String, String)]>,
        limits: Limits,
        clock: Arc<Clock>,
    ) -> Self {
        let (memory, sandbox) = (Memory::new(limits), Sandbox::new(limits));
        Self { log, part, config, limits, memory, sandbox, call: Call::default(), clock, time: 0, rest: 0 }
    }

    pub(super) fn sandbox(&mut self) -> &mut Sandbox {
        &mut self.sandbox
    }

    fn now(&mut self) -> u64 {
        self.time = self.clock.now();
        self.time
    }
}

pub(super) fn add_to_linker(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    Exports::add_to_linker::<_, HasSelf<State>>(linker, |state| state)
}

impl transaction_log::Host for State {
    fn append(&mut self, events: Vec<Event>) -> Result<u64, AppendError> {
        // What it does not own, it would not be given again.
        if !self.call.may_append || !events.iter().all(|event| self.part.owns(event.key())) {
            return Err(AppendError::ReadOnly);
        }
        self.call.appends += 1;
        if self.call.appends > self.limits.appends {
            return Err(AppendError::Unavailable);
        }
        // Before anything changed. What only deletes goes on, for that is how a guest gets out of it.
        let taken_in = events.iter().filter_map(taken_in).sum();
        if taken_in > 0 && !self.memory.takes(taken_in) {
            self.call.refused = true;
            return Err(AppendError::Full);
        }
        let first = self.log.append(self.time, &events)?;
        if let Some(others) = events.len().checked_sub(1) {
            self.call.appended = Some(first + others as u64);
        }
        Ok(first)
    }
}

/// What a guest is likely to keep of an event.
fn taken_in(event: &Event) -> Option<u64> {
    match event {
        Event::Put(put) => Some((put.key.len() + put.value.len()).max(1) as u64),
        Event::Delete(_) => None,
    }
}

impl changes::Host for State {
    fn follow(&mut self, prefix: String, after: Option<u64>) {
        let after = after.unwrap_or_else(|| self.log.appended());
        self.call.asked = Some(Asked::Follow { prefix, after });
    }

    fn hold(&mut self, key: String, milliseconds: u64) {
        self.call.asked = Some(Asked::Hold { key, time: Duration::from_millis(milliseconds) });
    }
}

impl connection::Host for State {
    fn peer_address(&mut self) -> Option<String> {
        Some(self.call.client.as_ref()?.address.to_string())
    }
    fn tls_version(&mut self) -> Option<String> {
        Some(self.call.client.as_ref()?.tls_version?.to_owned())
    }
    fn client_identity(&mut self) -> Option<String> {
        Some(self.call.client.as_ref()?.identity.as_ref()?.to_string())
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
