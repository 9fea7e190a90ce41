//! What tests of requests are made of.

pub use kvs_kit::testing::{EVERYTHING, header_of, text_of};

use crate::kvs::store::http::Request;
use crate::kvs::store::transaction_log::{AppendError, Event, Put};
use crate::store::Store;

pub const NOW: u64 = 1_000;

/// A request without headers, to `/v1/a` unless said otherwise.
pub fn request(method: &str) -> Request {
    Request { time_ms: NOW, ..kvs_kit::testing::request(method, "/v1/a", "") }
}

/// `/v1/a` with this metadata and expiry, put by some guest at sequence 7.
pub fn store_with(metadata: &[(&str, &str)], expires: Option<u64>) -> Store {
    let metadata = metadata.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let mut store = Store::default();
    store
        .replace(7, &Event::Put(Put { key: "a".to_owned(), value: b"value".into(), metadata, expires_at_ms: expires }));
    store
}

pub fn unasked(_: &[Event]) -> Result<u64, AppendError> {
    panic!("appended")
}
