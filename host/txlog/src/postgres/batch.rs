//! A batch: consecutive entries that are committed together, as columns.

use std::time::Instant;

use crate::Event;

/// Event types, as in the table of *Cloud Native Go*.
pub const DELETE: i16 = 1;
pub const PUT: i16 = 2;

/// Overhead of an entry beside its key, value and metadata, as limits count it.
const ENTRY_BYTES: u64 = 32;

/// A batch of entries.
pub struct Batch {
    /// The last sequence before the batch.
    pub before: u64,
    /// Sequence of its first entry.
    pub first: u64,
    pub times: Vec<i64>,
    pub types: Vec<i16>,
    pub keys: Vec<Vec<u8>>,
    /// None for a delete.
    pub values: Vec<Option<Vec<u8>>>,
    /// JSON: a list of pairs of name and value, in order.
    pub metadata: Vec<Option<String>>,
    pub expires: Vec<Option<i64>>,
    pub bytes: u64,
    pub begun: Instant,
}

impl Batch {
    pub fn new(before: u64, first: u64, begun: Instant) -> Self {
        Self {
            before,
            first,
            times: Vec::new(),
            types: Vec::new(),
            keys: Vec::new(),
            values: Vec::new(),
            metadata: Vec::new(),
            expires: Vec::new(),
            bytes: 0,
            begun,
        }
    }

    pub fn len(&self) -> u64 {
        self.keys.len() as u64
    }

    /// Returns the sequence of its last entry.
    pub fn last(&self) -> u64 {
        self.first + self.len() - 1
    }

    pub fn push(&mut self, time: u64, event: &Event) {
        self.bytes += size(event);
        // The contract has unsigned numbers, the database signed ones: the bits are kept.
        self.times.push(time.cast_signed());
        match event {
            Event::Delete(key) => {
                self.types.push(DELETE);
                self.keys.push(key.as_bytes().to_vec());
                self.values.push(None);
                self.metadata.push(None);
                self.expires.push(None);
            }
            Event::Put(put) => {
                self.types.push(PUT);
                self.keys.push(put.key.as_bytes().to_vec());
                self.values.push(Some(put.value.clone()));
                self.metadata.push((!put.metadata.is_empty()).then(|| serde_json::json!(put.metadata).to_string()));
                self.expires.push(put.expires.map(u64::cast_signed));
            }
        }
    }
}

/// Returns the size of an event, as limits count it.
pub fn size(event: &Event) -> u64 {
    let bytes = match event {
        Event::Delete(key) => key.len(),
        Event::Put(put) => {
            let metadata: usize = put.metadata.iter().map(|(name, value)| 8 + name.len() + value.len()).sum();
            put.key.len() + put.value.len() + metadata
        }
    };
    ENTRY_BYTES + bytes as u64
}
