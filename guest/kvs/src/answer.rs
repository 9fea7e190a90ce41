//! The words of answers that are much the same everywhere: one line of text, and headers.

use serde::Serialize;

use crate::conditions::tag_of;
use crate::content_type;
use crate::kvs::store::http::{Header, Response};
use crate::kvs::store::transaction_log::{AppendError, Event};

/// What a request may ask of the host.
pub trait Host {
    /// See `transaction-log.append`.
    fn append(&mut self, events: &[Event]) -> Result<u64, AppendError>;

    /// See `changes.follow`.
    fn follow(&mut self, prefix: &str, after: Option<u64>);

    /// See `changes.hold`.
    fn hold(&mut self, key: &str, milliseconds: u64);
}

/// One that takes what is appended and tells nothing of what happens.
impl<A: FnMut(&[Event]) -> Result<u64, AppendError>> Host for A {
    fn append(&mut self, events: &[Event]) -> Result<u64, AppendError> {
        self(events)
    }

    fn follow(&mut self, _prefix: &str, _after: Option<u64>) {}

    fn hold(&mut self, _key: &str, _milliseconds: u64) {}
}

/// What an answer rests on that would be the same in any state.
pub const NO_STATE: Option<u64> = Some(0);

/// A response of one line of text.
pub fn line(status: u16, text: &str) -> Response {
    Response {
        status,
        headers: vec![header(content_type::NAME, "text/plain; charset=utf-8")],
        body: format!("{text}\n").into_bytes(),
        depends_on: NO_STATE,
    }
}

/// What is asked for, in JSON. Without a word on what it rests on, it rests on all there is.
pub fn json(body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(body) => {
            let headers = vec![header(content_type::NAME, "application/json")];
            Response { status: 200, headers, body, depends_on: None }
        }
        Err(error) => line(500, &error.to_string()),
    }
}

/// Why a write was not appended, for the one who asked for it.
pub fn not_stored(error: AppendError) -> Response {
    match error {
        AppendError::Full => line(507, "no room is left, on disk or in memory; nothing was stored"),
        AppendError::Unavailable => {
            with(line(503, "the log takes no writes at the moment; nothing was stored"), header("retry-after", "1"))
        }
        AppendError::ReadOnly => line(403, "writes are not allowed here; nothing was stored"),
        AppendError::TooLarge(_) => line(413, "this is too large for the log; nothing was stored"),
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
