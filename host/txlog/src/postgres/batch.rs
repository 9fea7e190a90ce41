//! What is committed together: entries that follow on each other, as columns.

use std::time::Instant;

use crate::Event;

/// As in the book's table.
pub const DELETE: i16 = 1;
pub const PUT: i16 = 2;

/// What an entry takes beside its key, value and metadata, as limits count it.
const ENTRY_BYTES: u64 = 32;

pub struct Batch {
    /// The newest entry when it was begun.
    pub before: u64,
    /// The sequence of its first entry.
    pub first: u64,
    pub times: Vec<i64>,
    pub types: Vec<i16>,
    pub keys: Vec<Vec<u8>>,
    /// None where the key was deleted.
    pub values: Vec<Option<Vec<u8>>>,
    /// JSON: a list of names and values, in order.
    pub metadata: Vec<Option<String>>,
    pub expires: Vec<Option<i64>>,
    pub bytes: u64,
    /// Groups of entries that were appended at once, most of them for a client each.
    pub appends: u64,
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
            appends: 0,
            begun,
        }
    }

    pub fn len(&self) -> u64 {
        self.keys.len() as u64
    }

    /// The sequence of its last entry.
    pub fn last(&self) -> u64 {
        self.first + self.len() - 1
    }

    pub fn push(&mut self, time: u64, event: &Event) {
        self.bytes += size(event);
        // Numbers of the contract have 64 bits without a sign, those of the database have one: the bits stay.
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

/// What an event takes, as limits count it.
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
