//! What a key has, in one piece of memory.
//!
//! A million small items are most of what a store holds, so each is one allocation without room to grow: its key, its
//! value, and what comes with them, behind a head of 16 bytes. Must never know: other items, or what metadata says.

use std::fmt;

use crate::kvs::store::transaction_log::Put;

/// Sequence, length of the key, length of the value: little-endian. Key and value follow, and then, when there is anything
/// of it, the expiry and the metadata.
const HEAD: usize = 16;

#[derive(Clone, Default, PartialEq, Eq)]
pub struct Item(Box<[u8]>);

impl Item {
    /// What an event puts.
    pub fn new(sequence: u64, put: &Put) -> Self {
        Self::of(sequence, put.key.as_bytes(), &put.value, &put.metadata, put.expires_at_ms)
    }

    /// What an entry of the log puts. The key is UTF-8.
    pub fn of(sequence: u64, key: &[u8], value: &[u8], metadata: &[(String, String)], expires: Option<u64>) -> Self {
        let tail = if expires.is_none() && metadata.is_empty() { 0 } else { 9 + metadata_bytes(metadata) };
        let mut bytes = Vec::with_capacity(HEAD + key.len() + value.len() + tail);
        bytes.extend(sequence.to_le_bytes());
        bytes.extend(length(key.len()));
        bytes.extend(length(value.len()));
        bytes.extend(key);
        bytes.extend(value);
        if tail > 0 {
            bytes.push(expires.is_some().into());
            bytes.extend(expires.unwrap_or_default().to_le_bytes());
            for text in metadata.iter().flat_map(|(name, value)| [name, value]) {
                bytes.extend(length(text.len()));
                bytes.extend(text.as_bytes());
            }
        }
        Self(bytes.into())
    }

    /// Whether it is none: what `default` gives.
    pub fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// Of the entry that put it.
    pub fn sequence(&self) -> u64 {
        u64::from_le_bytes(array(&self.0))
    }

    /// Its bytes, which are UTF-8, and whose order is that of the text.
    pub fn key(&self) -> &[u8] {
        &self.0[HEAD..self.value_at()]
    }

    pub fn value(&self) -> &[u8] {
        &self.0[self.value_at()..self.tail_at()]
    }

    /// From this moment on no reader finds it.
    pub fn expires(&self) -> Option<u64> {
        let (set, expires) = self.0[self.tail_at()..].split_first()?;
        (*set != 0).then(|| u64::from_le_bytes(array(expires)))
    }

    pub fn is_expired(&self, now: u64) -> bool {
        self.expires().is_some_and(|expires| expires <= now)
    }

    /// What belongs to the value and is not the value, in the order it was put.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        let mut rest = self.0.get(self.tail_at() + 9..).unwrap_or_default();
        let mut text = move || {
            let (text, after) = rest.get(4..)?.split_at_checked(u32::from_le_bytes(array(rest)) as usize)?;
            rest = after;
            str::from_utf8(text).ok()
        };
        std::iter::from_fn(move || Some((text()?, text()?)))
    }

    /// Metadata as an entry of the log has it.
    pub fn owned_metadata(&self) -> Vec<(String, String)> {
        self.metadata().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// Key and value.
    pub fn bytes(&self) -> u64 {
        (self.tail_at() - HEAD) as u64
    }

    fn value_at(&self) -> usize {
        HEAD + u32::from_le_bytes(array(&self.0[8..])) as usize
    }

    fn tail_at(&self) -> usize {
        self.value_at() + u32::from_le_bytes(array(&self.0[12..])) as usize
    }
}

impl fmt::Debug for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut fields = f.debug_struct("Item");
        fields.field("sequence", &self.sequence()).field("key", &String::from_utf8_lossy(self.key()));
        fields.field("value", &self.value()).field("expires", &self.expires());
        fields.field("metadata", &self.metadata().collect::<Vec<_>>()).finish()
    }
}

fn metadata_bytes(metadata: &[(String, String)]) -> usize {
    metadata.iter().map(|(name, value)| 8 + name.len() + value.len()).sum()
}

/// A length as it is kept. Nothing in a guest's memory, which is addressed with 32 bits, is longer.
fn length(length: usize) -> [u8; 4] {
    (length as u32).to_le_bytes()
}

/// The bytes at the head of a slice that holds at least as many.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk().copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn everything_comes_back(
            sequence: u64, key: String, value: Vec<u8>, metadata: Vec<(String, String)>, expires: Option<u64>,
        ) {
            let put = Put { key, value, metadata, expires_at_ms: expires };
            let item = Item::new(sequence, &put);
            prop_assert_eq!((item.sequence(), item.key()), (sequence, put.key.as_bytes()));
            prop_assert_eq!((item.value(), item.expires()), (put.value.as_slice(), put.expires_at_ms));
            prop_assert_eq!(item.owned_metadata(), put.metadata);
            prop_assert_eq!(item.bytes(), (put.key.len() + put.value.len()) as u64);
        }
    }

    #[test]
    fn a_plain_item_has_nothing_but_its_head_beside_key_and_value() {
        let put = Put { key: "key".into(), value: b"value".into(), metadata: vec![], expires_at_ms: None };
        assert_eq!(Item::new(1, &put).0.len(), 16 + 3 + 5);
    }
}
