//! Tests of guests, as native programs: a guest with a log in memory.
//!
//! [`Served`] is a guest that serves requests; [`Served::rebuilt`] is what another instance makes of its log, to be compared.

use std::cell::RefCell;

use crate::bindings::exports::kvs::store::lifecycle::{Batch, Entry, EntryPut};
use crate::bindings::kvs::store::http::{Grant, Scope};
use crate::bindings::kvs::store::watch::Selector;
use crate::guest::{Guest, apply, handle, tick};
use crate::host::Host;
use crate::{AppendError, Event, Header, Request, Response};

thread_local! {
    /// Identifier of the request that is handled.
    static REQUEST_ID: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The grant of a client that may do everything.
pub const EVERYTHING: Grant = Grant { scope: Scope::Admin, key_prefix: None };

/// A request without headers.
pub fn request(method: &str, target: &str, body: impl Into<Vec<u8>>) -> Request {
    Request {
        method: method.to_owned(),
        target: target.to_owned(),
        headers: Vec::new(),
        body: body.into(),
        principal: None,
        grant: EVERYTHING,
        time_ms: 0,
    }
}

/// A header of a response.
pub fn header_of<'r>(response: &'r Response, name: &str) -> Option<&'r str> {
    let Header { value, .. } = response.headers.iter().find(|header| header.name == name)?;
    Some(str::from_utf8(value).expect("text"))
}

/// The body of a response.
pub fn text_of(response: &Response) -> &str {
    str::from_utf8(&response.body).expect("text")
}

/// Identifier of the request that is handled (`log::request_id`).
pub(crate) fn request_id() -> Option<String> {
    REQUEST_ID.with_borrow(Clone::clone)
}

/// A log in memory, with what a guest asked of the host.
#[derive(Default)]
pub struct Log {
    /// All entries: sequence, time and event.
    pub entries: Vec<(u64, u64, Event)>,
    /// What `append` returns in place of appending.
    pub error: Option<AppendError>,
    /// The key that the call in progress waits for.
    pub waits_for: Option<String>,
    /// What the timer was last set to: a time, or never.
    pub timer: Option<Option<u64>>,
    now_ms: u64,
}

impl Host for Log {
    fn append(&mut self, events: &[Event]) -> Result<u64, AppendError> {
        let first = self.entries.last().map_or(0, |(sequence, ..)| *sequence) + 1;
        if let Some(error) = self.error {
            return Err(error);
        }
        self.entries.extend((first..).zip(events).map(|(sequence, event)| (sequence, self.now_ms, event.clone())));
        Ok(first)
    }

    fn subscribe(&mut self, _selectors: &[Selector], _after: Option<&str>, _puts_only: bool) {}

    fn wait_for_change(&mut self, key: &str, _timeout_ms: u64) {
        self.waits_for = Some(key.to_owned());
    }

    fn reuse(&mut self, _key: &str, _until_ms: Option<u64>) {}

    fn set_timer(&mut self, at_ms: Option<u64>) {
        self.timer = Some(at_ms);
    }
}

/// A guest that serves.
pub struct Served<G: Guest> {
    pub state: G::State,
    pub log: Log,
    pub now_ms: u64,
    /// Identifier of the requests from now on.
    pub request_id: Option<String>,
}

impl<G: Guest> Default for Served<G> {
    fn default() -> Self {
        Self { state: G::State::default(), log: Log::default(), now_ms: 0, request_id: None }
    }
}

impl<G: Guest> Served<G> {
    /// The response to a request without headers: status and text.
    pub fn ask(&mut self, method: &str, target: &str, body: &str) -> (u16, String) {
        let response = self.handle(request(method, target, body));
        (response.status, text_of(&response).to_owned())
    }

    pub fn handle(&mut self, request: Request) -> Response {
        self.log.now_ms = self.now_ms;
        self.log.waits_for = None;
        REQUEST_ID.set(self.request_id.clone());
        handle::<G>(&mut self.state, Request { time_ms: self.now_ms, ..request }, &mut self.log)
    }

    pub fn tick(&mut self) -> Option<u64> {
        self.log.now_ms = self.now_ms;
        self.log.timer = None;
        tick::<G>(&mut self.state, self.now_ms, &mut self.log)
    }

    /// Appends as another guest would.
    pub fn append(&mut self, events: &[Event]) {
        self.log.now_ms = self.now_ms;
        let before = self.log.entries.len();
        self.log.append(events).expect("the log takes it");
        apply::<G>(&mut self.state, &batch(&self.log.entries[before..]));
    }

    /// Another instance, whose state is made of the log.
    pub fn rebuilt(&self) -> Self {
        let Log { entries, .. } = &self.log;
        let mut rebuilt = Self { now_ms: self.now_ms, ..Self::default() };
        rebuilt.log.entries.clone_from(entries);
        apply::<G>(&mut rebuilt.state, &batch(entries));
        rebuilt
    }
}

/// Entries as the host gives them to `apply`.
pub fn batch(entries: &[(u64, u64, Event)]) -> Batch {
    let mut batch = Batch { entries: Vec::new(), bytes: Vec::new(), metadata: Vec::new() };
    for (sequence, time_ms, event) in entries {
        let (key, put) = match event {
            Event::Delete(key) => (key, None),
            Event::Put(put) => {
                let metadata = (!put.metadata.is_empty()).then(|| {
                    batch.metadata.push(put.metadata.clone());
                    batch.metadata.len() as u32 - 1
                });
                let value_bytes = put.value.len() as u32;
                (&put.key, Some((put, EntryPut { value_bytes, metadata, expires_at_ms: put.expires_at_ms })))
            }
        };
        batch.bytes.extend(key.as_bytes());
        batch.bytes.extend(put.as_ref().map_or(&[][..], |(put, _)| &put.value));
        let (sequence, time_ms, key_bytes) = (*sequence, *time_ms, key.len() as u32);
        batch.entries.push(Entry { sequence, time_ms, key_bytes, put: put.map(|(_, put)| put) });
    }
    batch
}
