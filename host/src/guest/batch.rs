//! Entries of the log, as `lifecycle.apply` takes them: keys and values one after the other.
//!
//! A string or list of its own would cost a call of the guest's allocator each, which was most of a replay. Must never know:
//! where entries come from, or which guest takes them in.

use kvs_txlog::{Entry, EventRef};

use crate::contract;

pub struct Batch<'e> {
    entries: Vec<contract::Entry>,
    bytes: Vec<u8>,
    metadata: Vec<&'e [(&'e str, &'e str)]>,
}

impl<'e> Batch<'e> {
    pub fn of(entries: &[Entry<'e>]) -> Self {
        let mut batch = Self { entries: Vec::with_capacity(entries.len()), bytes: Vec::new(), metadata: Vec::new() };
        batch.bytes.reserve(entries.iter().map(|entry| entry.event.key().len() + value(entry).len()).sum());
        for entry in entries {
            batch.add(entry);
        }
        batch
    }

    fn add(&mut self, entry: &Entry<'e>) {
        let (key, value) = (entry.event.key(), value(entry));
        self.bytes.extend_from_slice(key.as_bytes());
        self.bytes.extend_from_slice(value);
        let put = match entry.event {
            EventRef::Delete(_) => None,
            EventRef::Put(put) => Some(contract::EntryPut {
                // The log keeps lengths as such numbers, too.
                value_bytes: value.len() as u32,
                metadata: self.index_of(put.metadata),
                expires_at_ms: put.expires,
            }),
        };
        let (sequence, time_ms, key_bytes) = (entry.sequence, entry.time, key.len() as u32);
        self.entries.push(contract::Entry { sequence, time_ms, key_bytes, put });
    }

    /// Entries that follow each other often have the same, such as a content type.
    fn index_of(&mut self, metadata: &'e [(&'e str, &'e str)]) -> Option<u32> {
        if metadata.is_empty() {
            return None;
        }
        if self.metadata.last() != Some(&metadata) {
            self.metadata.push(metadata);
        }
        Some(self.metadata.len() as u32 - 1)
    }

    pub fn record(&self) -> contract::Batch<'_> {
        contract::Batch { entries: &self.entries, bytes: &self.bytes, metadata: &self.metadata }
    }
}

fn value<'e>(entry: &Entry<'e>) -> &'e [u8] {
    match entry.event {
        EventRef::Put(put) => put.value,
        EventRef::Delete(_) => &[],
    }
}

#[cfg(test)]
mod tests {
    use kvs_txlog::PutRef;

    use super::*;

    #[test]
    fn batch_has_keys_and_values_in_order() {
        let text = [("content-type", "text/plain")];
        let other = [("content-type", "text/html")];
        let put = |key, value, metadata, expires| EventRef::Put(PutRef { key, value, metadata, expires });
        let events = [
            put("a", &b"12"[..], &text[..], Some(7)),
            EventRef::Delete("bc"),
            put("d", b"", &text, None),
            put("e", b"3", &[], None),
            put("f", b"4", &other, None),
        ];
        let entries: Vec<_> =
            events.iter().zip(1..).map(|(event, sequence)| Entry { sequence, time: 9, event: *event }).collect();
        let batch = Batch::of(&entries);
        assert_eq!(batch.bytes, b"a12bcde3f4");
        assert_eq!(batch.metadata, [&text, &other]);
        let puts = batch.entries.iter().map(|entry| {
            let put = entry.put.as_ref().map(|put| (put.value_bytes, put.metadata, put.expires_at_ms));
            (entry.sequence, entry.time_ms, entry.key_bytes, put)
        });
        let expected = [
            (1, 9, 1, Some((2, Some(0), Some(7)))),
            (2, 9, 2, None),
            (3, 9, 1, Some((0, Some(0), None))),
            (4, 9, 1, Some((1, None, None))),
            (5, 9, 1, Some((1, Some(1), None))),
        ];
        assert_eq!(puts.collect::<Vec<_>>(), expected);
    }
}
