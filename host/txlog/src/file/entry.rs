//! One entry in the body of a frame.
//!
//! The format is described in `docs/txlog-format.md`.

use std::ops::Range;

use super::bytes::{u32_at, u64_at};
use crate::{Entry, Event, EventRef, PutRef};

/// Offset, kind, time, and the lengths of key, value and metadata.
const FIXED_BYTES: usize = 4 + 1 + 8 + 4 + 4 + 4;

/// As in the book's text format.
const DELETE: u8 = 1;
const PUT: u8 = 2;
const PUT_UNTIL: u8 = 3;

/// The bytes an event takes in a frame.
pub fn size(event: &Event) -> usize {
    match event {
        Event::Put(put) => put_size(&put.key, &put.value, put.expires, pairs(&put.metadata)),
        Event::Delete(key) => FIXED_BYTES + key.len(),
    }
}

/// [`size`] of a borrowed event.
pub fn size_ref(event: &EventRef<'_>) -> usize {
    match event {
        EventRef::Put(put) => put_size(put.key, put.value, put.expires, put.metadata.iter().copied()),
        EventRef::Delete(key) => FIXED_BYTES + key.len(),
    }
}

fn put_size<'e>(
    key: &str,
    value: &[u8],
    expires: Option<u64>,
    metadata: impl Iterator<Item = (&'e str, &'e str)>,
) -> usize {
    let expires = if expires.is_some() { 8 } else { 0 };
    FIXED_BYTES + expires + key.len() + value.len() + metadata_size(metadata)
}

fn metadata_size<'e>(metadata: impl Iterator<Item = (&'e str, &'e str)>) -> usize {
    metadata.map(|(name, value)| 8 + name.len() + value.len()).sum()
}

fn pairs(metadata: &[(String, String)]) -> impl Iterator<Item = (&str, &str)> + Clone {
    metadata.iter().map(|(name, value)| (&**name, &**value))
}

/// Appends an event to the body of a frame. Lengths fit because a group is bounded before it comes here.
pub fn encode(body: &mut Vec<u8>, offset: u32, time: u64, event: &Event) {
    match event {
        Event::Delete(key) => encode_delete(body, offset, time, key),
        Event::Put(put) => encode_put(body, (offset, time), &put.key, (&put.value, put.expires), pairs(&put.metadata)),
    }
}

/// [`encode`] for a borrowed event.
pub fn encode_ref(body: &mut Vec<u8>, offset: u32, time: u64, event: &EventRef<'_>) {
    match event {
        EventRef::Delete(key) => encode_delete(body, offset, time, key),
        EventRef::Put(put) => {
            encode_put(body, (offset, time), put.key, (put.value, put.expires), put.metadata.iter().copied());
        }
    }
}

fn encode_delete(body: &mut Vec<u8>, offset: u32, time: u64, key: &str) {
    encode_fixed(body, (offset, time), DELETE, [key.len(), 0, 0]);
    body.extend_from_slice(key.as_bytes());
}

fn encode_put<'e>(
    body: &mut Vec<u8>,
    at: (u32, u64),
    key: &str,
    (value, expires): (&[u8], Option<u64>),
    metadata: impl Iterator<Item = (&'e str, &'e str)> + Clone,
) {
    let kind = if expires.is_some() { PUT_UNTIL } else { PUT };
    encode_fixed(body, at, kind, [key.len(), value.len(), metadata_size(metadata.clone())]);
    if let Some(expires) = expires {
        body.extend_from_slice(&expires.to_le_bytes());
    }
    body.extend_from_slice(key.as_bytes());
    body.extend_from_slice(value);
    for text in metadata.flat_map(|(name, value)| [name, value]) {
        body.extend_from_slice(&(text.len() as u32).to_le_bytes());
        body.extend_from_slice(text.as_bytes());
    }
}

fn encode_fixed(body: &mut Vec<u8>, (offset, time): (u32, u64), kind: u8, lengths: [usize; 3]) {
    body.extend_from_slice(&offset.to_le_bytes());
    body.push(kind);
    body.extend_from_slice(&time.to_le_bytes());
    for length in lengths {
        body.extend_from_slice(&(length as u32).to_le_bytes());
    }
}

/// Appends an entry of another frame as it is, but for its offset.
pub fn copy(body: &mut Vec<u8>, offset: u32, encoded: &[u8]) {
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&encoded[4..]);
}

/// An entry as it lies in a buffer, taken apart but for its metadata.
#[derive(Clone, Copy, Debug)]
pub struct Raw<'a> {
    pub sequence: u64,
    pub time: u64,
    pub key: &'a str,
    /// None when the key was deleted.
    pub put: Option<RawPut<'a>>,
    /// All of it, as it is in the body.
    pub encoded: &'a [u8],
}

#[derive(Clone, Copy, Debug)]
pub struct RawPut<'a> {
    pub value: &'a [u8],
    pub expires: Option<u64>,
    metadata: &'a [u8],
}

/// Takes one entry from the front of a body; `first` is the first sequence of its frame. None is damage: the bytes were
/// not written by this code, whatever their checksum says.
pub fn decode<'a>(body: &mut &'a [u8], first: u64) -> Option<Raw<'a>> {
    let whole = *body;
    let (fixed, rest) = body.split_at_checked(FIXED_BYTES)?;
    let sequence = first.checked_add(u64::from(u32_at(fixed, 0)))?;
    let kind = fixed[4];
    let time = u64_at(fixed, 5);
    let [key, value, metadata] = [13, 17, 21].map(|at| u32_at(fixed, at) as usize);
    let (expires, rest) = match kind {
        PUT_UNTIL => {
            let (expires, rest) = rest.split_at_checked(8)?;
            (Some(u64_at(expires, 0)), rest)
        }
        PUT => (None, rest),
        DELETE if value == 0 && metadata == 0 => (None, rest),
        _ => return None,
    };
    let (key, rest) = rest.split_at_checked(key)?;
    let (value, rest) = rest.split_at_checked(value)?;
    let (metadata, rest) = rest.split_at_checked(metadata)?;
    *body = rest;
    let key = std::str::from_utf8(key).ok()?;
    let put = (kind != DELETE).then_some(RawPut { value, expires, metadata });
    Some(Raw { sequence, time, key, put, encoded: &whole[..whole.len() - rest.len()] })
}

impl<'a> Raw<'a> {
    /// Of its key and value.
    pub fn bytes(&self) -> usize {
        self.key.len() + self.put.map_or(0, |put| put.value.len())
    }

    /// Adds the pairs of its metadata to `pairs` and says where they lie there. None is damage.
    pub fn metadata(&self, pairs: &mut Vec<(&'a str, &'a str)>) -> Option<Range<usize>> {
        let start = pairs.len();
        let mut rest = self.put.map_or(&[][..], |put| put.metadata);
        while !rest.is_empty() {
            pairs.push((text(&mut rest)?, text(&mut rest)?));
        }
        Some(start..pairs.len())
    }

    pub fn entry<'b>(&self, metadata: &'b [(&'b str, &'b str)]) -> Entry<'b>
    where
        'a: 'b,
    {
        let event = match self.put {
            Some(RawPut { value, expires, .. }) => EventRef::Put(PutRef { key: self.key, value, metadata, expires }),
            None => EventRef::Delete(self.key),
        };
        Entry { sequence: self.sequence, time: self.time, event }
    }
}

fn text<'a>(bytes: &mut &'a [u8]) -> Option<&'a str> {
    let (length, rest) = bytes.split_at_checked(4)?;
    let (text, rest) = rest.split_at_checked(u32_at(length, 0) as usize)?;
    *bytes = rest;
    std::str::from_utf8(text).ok()
}
