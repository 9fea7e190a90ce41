//! Request ids, for clients and log lines: that of the client, if it is safe to log, or else a new one.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use super::head;

pub const HEADER: HeaderName = HeaderName::from_static("x-request-id");

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Maximum length of an id.
const MAX_LENGTH: usize = 128;

/// Generator of unique ids. It starts at a random number, so that those of two processes differ.
pub struct RequestIds(AtomicU64);

impl Default for RequestIds {
    fn default() -> Self {
        Self(AtomicU64::new(RandomState::new().hash_one(())))
    }
}

impl RequestIds {
    pub fn of(&self, headers: &HeaderMap) -> HeaderValue {
        let mut given = head::values(headers, HEADER);
        match (given.next(), given.next()) {
            (Some(id), None) if is_sane(id) => id.clone(),
            _ => self.next(),
        }
    }

    fn next(&self) -> HeaderValue {
        let number = self.0.fetch_add(1, Ordering::Relaxed);
        // Sixteen hexadecimal digits, which formatting by `core::fmt` would make the most expensive part of a hit.
        let id: [u8; 16] = std::array::from_fn(|digit| DIGITS[(number >> (60 - 4 * digit)) as usize % DIGITS.len()]);
        HeaderValue::from_bytes(&id).unwrap_or_else(|_| HeaderValue::from_static("-"))
    }
}

/// Returns whether an id consists of characters that need no quoting anywhere.
fn is_sane(id: &HeaderValue) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(&byte);
    let text = id.to_str().unwrap_or_default();
    (1..=MAX_LENGTH).contains(&text.len()) && text.bytes().all(fits)
}
