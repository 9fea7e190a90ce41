//! The words of answers that are much the same everywhere: one line of text, and headers.

use serde::Serialize;

use crate::conditions::tag_of;
use crate::content_type;
use crate::kvs::store::http::{Header, Response};
use crate::kvs::store::transaction_log::{AppendError, Event};
use crate::kvs::store::watch::Selector;

/// What a request may ask of the host.
pub trait Host {
    /// See `transaction-log.append`.
    fn append(&mut self, events: &[Event]) -> Result<u64, AppendError>;

    /// See `watch.subscribe`.
    fn subscribe(&mut self, selectors: &[Selector], after: Option<&str>, puts_only: bool);

    /// See `watch.wait-for-change`.
    fn wait_for_change(&mut self, key: &str, timeout_ms: u64);

    /// See `response-cache.reuse`.
    fn reuse(&mut self, key: &str, until_ms: Option<u64>);
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

/// The read sequence of an answer that would be the same in any state.
pub const NO_STATE: Option<u64> = Some(0);

/// A response of one line of text.
pub fn line(status: u16, text: &str) -> Response {
    Response {
        status,
        headers: vec![header(content_type::NAME, "text/plain; charset=utf-8")],
        body: format!("{text}\n").into_bytes(),
        read_sequence: NO_STATE,
    }
}

/// Response header of an error: its stable code, for programs, and parameters of it. The host sends both as fields of
/// `application/problem+json` too, and derives the code from the status where there is none.
const ERROR: &str = "kvs-error";
/// Codes that are used in several places.
pub const NO_SUCH_KEY: &str = "no_such_key";

/// An error with a code of its own.
pub fn problem(status: u16, code: &str, text: &str) -> Response {
    with(line(status, text), header(ERROR, code))
}

/// What is asked for, in JSON. Without a read sequence, it depends on everything there is.
pub fn json(body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(body) => {
            let headers = vec![header(content_type::NAME, "application/json")];
            Response { status: 200, headers, body, read_sequence: None }
        }
        Err(error) => line(500, &error.to_string()),
    }
}

/// Why a write was not appended, for the one who asked for it.
pub fn not_stored(error: AppendError) -> Response {
    match error {
        AppendError::InsufficientStorage => line(507, "no room is left, on disk or in memory; nothing was stored"),
        AppendError::Unavailable => line(503, "the log takes no writes at the moment; nothing was stored"),
        AppendError::ReadOnly => problem(403, "read_only", "writes are not allowed here; nothing was stored"),
        AppendError::TooLarge(_) => line(413, "this is too large for the log; nothing was stored"),
        AppendError::InvalidKey => line(400, "the host rejects the key; nothing was stored"),
    }
}

pub fn with(mut response: Response, header: Header) -> Response {
    response.headers.push(header);
    response
}

pub fn header(name: &str, value: impl Into<Vec<u8>>) -> Header {
    Header { name: name.to_owned(), value: value.into() }
}

pub fn etag(sequence: u64) -> Header {
    header("etag", tag_of(sequence))
}
