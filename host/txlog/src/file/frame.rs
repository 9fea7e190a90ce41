//! A frame: one batch of entries, written and synced as one.
//!
//! The bytes are drawn at the head of `mod.rs`.

use std::time::Instant;

use uuid::Uuid;

use super::bytes::{u32_at, u64_at};
use super::entry::{self, Raw};

pub const HEAD_BYTES: usize = 64;
const MAGIC: [u8; 4] = *b"FRME";
/// Frames begin at multiples of this, so that looking for one need not try every byte.
pub const ALIGNMENT: usize = 8;
const CHECKSUM_AT: usize = 60;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Of the body, padding included.
    pub length: u32,
    /// The sequence that offsets of entries count from.
    pub first: u64,
    /// The newest sequence known to be on disk when this was written.
    pub durable: u64,
    pub count: u32,
    /// The checksum of the frame before this one.
    pub previous: u32,
    body_checksum: u32,
    /// Of this head, and hence of the body too: what the next frame calls `previous`.
    pub checksum: u32,
}

impl Head {
    /// None when these bytes are not the head of a frame of this log.
    pub fn decode(bytes: &[u8], log: Uuid) -> Option<Self> {
        let bytes = bytes.get(..HEAD_BYTES)?;
        let checksum = u32_at(bytes, CHECKSUM_AT);
        let ours = bytes[..4] == MAGIC && bytes[32..48] == *log.as_bytes();
        // The checksum last: looking for a frame tries many places.
        (ours && crc32c::crc32c(&bytes[..CHECKSUM_AT]) == checksum).then(|| Self {
            length: u32_at(bytes, 4),
            first: u64_at(bytes, 8),
            durable: u64_at(bytes, 16),
            count: u32_at(bytes, 24),
            previous: u32_at(bytes, 28),
            body_checksum: u32_at(bytes, 48),
            checksum,
        })
    }

    pub fn accepts(&self, body: &[u8]) -> bool {
        #[cfg(test)]
        if super::tests::mutants::is(super::tests::mutants::Mutant::NoChecksum) {
            return true;
        }
        body.len() == self.length as usize && crc32c::crc32c(body) == self.body_checksum
    }

    /// Of head and body together.
    pub fn total(&self) -> u64 {
        HEAD_BYTES as u64 + u64::from(self.length)
    }
}

/// A frame being filled: room for the head, then entries.
pub struct Builder {
    pub first: u64,
    pub count: u32,
    /// Deletes among them. Those of a commit are counted, those that compaction copies are not.
    pub deletes: u32,
    pub begun: Option<Instant>,
    bytes: Vec<u8>,
}

impl Builder {
    /// Uses the memory of `buffer`, whatever is in it.
    pub fn new(first: u64, mut buffer: Vec<u8>) -> Self {
        buffer.clear();
        buffer.resize(HEAD_BYTES, 0);
        Self { first, count: 0, deletes: 0, begun: None, bytes: buffer }
    }

    /// Where the next entry is encoded to. Whoever adds one counts it.
    pub fn body(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Head and body so far, without padding.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// What it will be on disk.
    pub fn sealed_len(&self) -> u64 {
        self.bytes.len().next_multiple_of(ALIGNMENT) as u64
    }

    /// Closes the frame: pads the body and writes the head, whose checksum comes back.
    pub fn seal(&mut self, log: Uuid, durable: u64, previous: u32) -> u32 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let (head, body) = self.bytes.split_at_mut(HEAD_BYTES);
        let mut put = |at: usize, field: &[u8]| head[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(4, &(body.len() as u32).to_le_bytes());
        put(8, &self.first.to_le_bytes());
        put(16, &durable.to_le_bytes());
        put(24, &self.count.to_le_bytes());
        put(28, &previous.to_le_bytes());
        put(32, log.as_bytes());
        put(48, &crc32c::crc32c(body).to_le_bytes());
        let checksum = crc32c::crc32c(&head[..CHECKSUM_AT]);
        head[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        checksum
    }

    /// The bytes to write, once sealed.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Gives the memory back for another frame.
    pub fn into_buffer(self) -> Vec<u8> {
        self.bytes
    }
}

/// A frame whose checksums were found right, in a buffer.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    pub head: Head,
    /// Where it begins in its file.
    pub offset: u64,
    pub body: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Its entries, oldest first. One that is None is damage, and the last.
    pub fn entries(&self) -> impl Iterator<Item = Option<Raw<'a>>> + use<'a> {
        let (mut rest, first, mut left) = (self.body, self.head.first, self.head.count);
        std::iter::from_fn(move || {
            left = left.checked_sub(1)?;
            let entry = entry::decode(&mut rest, first);
            if entry.is_none() {
                left = 0;
            }
            Some(entry)
        })
    }
}
