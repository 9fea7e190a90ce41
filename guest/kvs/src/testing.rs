//! What tests of requests are made of.

use crate::kvs::store::http::{Grant, Request, Response, Scope};
use crate::kvs::store::transaction_log::{AppendError, Event, Put};
use crate::store::Store;

pub const NOW: u64 = 1_000;
/// The grant of a client that may do everything.
pub const EVERYTHING: Grant = Grant { scope: Scope::Admin, key_prefix: None };

/// A request without headers, to `/v1/a` unless said otherwise.
pub fn request(method: &str) -> Request {
    Request {
        method: method.to_owned(),
        target: "/v1/a".to_owned(),
        headers: Vec::new(),
        body: Vec::new(),
        principal: None,
        grant: EVERYTHING,
        time_ms: NOW,
    }
}

/// `/v1/a` with this metadata and expiry, put by some guest at sequence 7.
pub fn store_with(metadata: &[(&str, &str)], expires: Option<u64>) -> Store {
    let metadata = metadata.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let mut store = Store::default();
    store.apply(7, &Event::Put(Put { key: "a".to_owned(), value: b"value".into(), metadata, expires_at_ms: expires }));
    store
}

pub fn unasked(_: &[Event]) -> Result<u64, AppendError> {
    panic!("appended")
}

pub fn header_of<'r>(response: &'r Response, name: &str) -> Option<&'r str> {
    let header = response.headers.iter().find(|header| header.name == name)?;
    Some(str::from_utf8(&header.value).expect("text"))
}

pub fn text_of(response: &Response) -> &str {
    str::from_utf8(&response.body).expect("text")
}
