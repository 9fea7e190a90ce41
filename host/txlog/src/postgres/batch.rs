//! The columns of a batch, as they are committed together.

use crate::Event;
use crate::remote::queue::Content;

/// Event types, as in the table of *Cloud Native Go*.
pub const DELETE: i16 = 1;
pub const PUT: i16 = 2;

/// Overhead of an entry beside its key, value and metadata, as limits count it.
const ENTRY_BYTES: u64 = 32;

/// Columns of a batch of entries.
#[derive(Default)]
pub struct Columns {
    pub times: Vec<i64>,
    pub types: Vec<i16>,
    pub keys: Vec<Vec<u8>>,
    /// None for a delete.
    pub values: Vec<Option<Vec<u8>>>,
    /// JSON: a list of pairs of name and value, in order.
    pub metadata: Vec<Option<String>>,
    pub expires: Vec<Option<i64>>,
}

impl Content for Columns {
    fn size(event: &Event) -> u64 {
        let bytes = match event {
            Event::Delete(key) => key.len(),
            Event::Put(put) => {
                let metadata: usize = put.metadata.iter().map(|(name, value)| 8 + name.len() + value.len()).sum();
                put.key.len() + put.value.len() + metadata
            }
        };
        ENTRY_BYTES + bytes as u64
    }

    fn push(&mut self, time: u64, event: &Event) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Put;

    #[test]
    fn size_counts_metadata_and_overhead() {
        let metadata = vec![("name".into(), "of it".into())];
        let put = Put { key: "key".into(), value: vec![0; 100], metadata, expires: None };
        assert_eq!(Columns::size(&Event::Put(put)), 32 + 3 + 100 + 8 + 9);
        assert_eq!(Columns::size(&Event::Delete("key".into())), 32 + 3);
    }
}
