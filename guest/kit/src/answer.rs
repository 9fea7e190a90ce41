//! Responses that guests have in common: one line of text, errors, JSON, and headers.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::conditions::{self, tag_of};
use crate::key::NoKey;
use crate::path::BadSegment;
use crate::query::BadQuery;
use crate::text::printable;
use crate::{AppendError, Header, Response};

/// The response to a request. An error is a response too: `?` responds early.
pub type Result = std::result::Result<Response, Response>;

/// Name of the header, and of the metadata that keeps it.
pub const CONTENT_TYPE: &str = "content-type";

/// The read sequence of an answer that would be the same in any state.
pub const NO_STATE: Option<u64> = Some(0);

/// A response of one line of text, which would be the same in any state.
pub fn line(status: u16, text: &str) -> Response {
    Response {
        status,
        headers: vec![header(CONTENT_TYPE, "text/plain; charset=utf-8")],
        body: format!("{text}\n").into_bytes(),
        read_sequence: NO_STATE,
    }
}

/// Response header of an error: its stable code, for programs, and parameters of it. The host sends both as fields of
/// `application/problem+json` too, and derives the code from the status where there is none.
const ERROR: &str = "kvs-error";
/// Codes that are used in several places.
pub const NO_SUCH_KEY: &str = "no_such_key";

/// An error with a code of its own. Without a read sequence, it depends on everything there is.
pub fn problem(status: u16, code: &str, text: &str) -> Response {
    Response { read_sequence: None, ..invalid(status, code, text) }
}

/// As `problem`, in any state.
pub fn invalid(status: u16, code: &str, text: &str) -> Response {
    with(line(status, text), header(ERROR, code))
}

/// A response in JSON, 200. Without a read sequence, it depends on everything there is.
pub fn json(body: &impl Serialize) -> Response {
    json_of(body, 128)
}

/// As `json`, of about this many bytes: while a buffer grows, it takes three times what it holds.
pub fn json_of(body: &impl Serialize, bytes: usize) -> Response {
    let mut text = Vec::with_capacity(bytes);
    match serde_json::to_writer(&mut text, body) {
        Ok(()) => {
            let headers = vec![header(CONTENT_TYPE, "application/json")];
            Response { status: 200, headers, body: text, read_sequence: None }
        }
        Err(error) => line(500, &error.to_string()),
    }
}

/// Parses a body in JSON. An error is 400 with the reason.
pub fn parsed<T: DeserializeOwned>(body: &[u8]) -> std::result::Result<T, Response> {
    serde_json::from_slice(body)
        .map_err(|error| line(400, &format!("the body: {}", printable(&error.to_string(), 200))))
}

/// 405, with the methods that there are, like `GET, HEAD, PUT`.
pub fn not_allowed(what_has: &str, methods: &str) -> Response {
    let text = match methods.rsplit_once(", ") {
        Some((others, last)) => format!("{what_has} {others} and {last}"),
        None => format!("{what_has} {methods}"),
    };
    with(line(405, &text), header("allow", methods))
}

/// 422: the keys of a request lie in several shards.
pub fn cross_shard() -> Response {
    invalid(
        422,
        "cross_shard",
        "the keys lie in different shards; those that share a {tag}, like {cart7}:items and {cart7}:total, share a shard",
    )
}

/// The response to a write that was not appended.
impl From<AppendError> for Response {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::InsufficientStorage => line(507, "no room is left, on disk or in memory; nothing was stored"),
            AppendError::Unavailable => line(503, "the log takes no writes at the moment; nothing was stored"),
            AppendError::ReadOnly => invalid(403, "read_only", "writes are not allowed here; nothing was stored"),
            AppendError::TooLarge(_) => line(413, "this is too large for the log; nothing was stored"),
            AppendError::InvalidKey => line(400, "the host rejects the key; nothing was stored"),
        }
    }
}

impl From<NoKey> for Response {
    fn from(no_key: NoKey) -> Self {
        match no_key {
            NoKey::UnknownPath | NoKey::RawSlash => invalid(404, "unknown_path", &no_key.to_string()),
            _ => line(400, &no_key.to_string()),
        }
    }
}

impl From<BadQuery> for Response {
    fn from(bad: BadQuery) -> Self {
        line(400, &bad.to_string())
    }
}

impl From<BadSegment> for Response {
    fn from(bad: BadSegment) -> Self {
        line(400, &bad.to_string())
    }
}

impl From<conditions::Malformed> for Response {
    fn from(malformed: conditions::Malformed) -> Self {
        line(400, &malformed.to_string())
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
