//! A frame: one batch of entries, written and synced as one, or a record of something else that happened to the log.
//!
//! Owns: which frames this binary knows. One that it does not is never skipped, and never taken for a torn write. The
//! bytes are drawn at the head of `mod.rs`.

use std::time::Instant;

use uuid::Uuid;

use super::bytes::{u32_at, u64_at};
use super::entry::{self, Raw};
use super::incarnations;
use crate::Incarnation;

pub const HEAD_BYTES: usize = 64;
const MAGIC: [u8; 4] = *b"FRME";
/// Frames begin at multiples of this, so that looking for one need not try every byte.
pub const ALIGNMENT: usize = 8;
const CHECKSUM_AT: usize = 60;

/// Kinds of frames.
pub const ENTRIES: u8 = 0;
pub const CLOSE: u8 = 1;
pub const INCARNATION: u8 = 2;
// In replicated logs only: a claim begins an epoch, a heartbeat says that its holder is alive.
pub const CLAIM: u8 = 3;
pub const HEARTBEAT: u8 = 5;
// What a replicated log was restored from: its first frame, if it was.
pub const RESTORED: u8 = 6;
/// The last frame of a snapshot of a replicated log.
pub const SNAPSHOT: u8 = 7;
/// The last frame of a backup, which no log contains.
pub const TRAILER: u8 = 4;

/// Flags of frames: optional fields come before the rest of the body.
const HAS_FIELDS: u32 = 1;
/// The run that wrote the frame answers writes before they are synced.
pub const NOT_SYNCED: u32 = 2;

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
    pub kind: u8,
    pub flags: u32,
    /// Of the process that wrote it: one more at each open for writing. 0 in format 1.
    pub epoch: u32,
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
            kind: bytes[52],
            flags: u32_at(bytes, 52) >> 8,
            epoch: u32_at(bytes, 56),
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

    /// Checks a frame whose checksums are right: whether this binary knows all of it, and whether it may stand where it
    /// is. `version` is that of its segment, `is_first` whether it is the first there. The error fits after "at byte 0:".
    pub fn check(&self, version: u32, is_first: bool, body: &[u8]) -> Result<(), String> {
        if version == 1 {
            let is_plain = (self.kind, self.flags, self.epoch) == (ENTRIES, 0, 0);
            return if is_plain { Ok(()) } else { Err("a frame of a newer format is in a segment of format 1".into()) };
        }
        if self.kind > INCARNATION {
            return Err(unknown(&format!("is of kind {}", self.kind)));
        }
        if self.flags & !(HAS_FIELDS | NOT_SYNCED) != 0 {
            return Err(unknown(&format!("has the flags {:#x}", self.flags)));
        }
        if self.flags & HAS_FIELDS != 0 {
            let field = fields(body).ok_or("the optional fields of a frame are longer than it")?.0;
            if !field.is_empty() {
                return Err(unknown(&format!("has the optional field `{}`", field.escape_ascii())));
            }
        }
        match (self.kind, self.count) {
            (ENTRIES, 1..) | (CLOSE, 0) => Ok(()),
            (INCARNATION, 0) if is_first => Ok(()),
            (INCARNATION, 0) => Err("a frame that begins an incarnation is not the first of its segment".into()),
            (kind, count) => Err(format!("a frame of kind {kind} has {count} entries")),
        }
    }

    /// The newest sequence up to this frame.
    pub fn last(&self) -> u64 {
        self.first.saturating_add(self.count.into()).saturating_sub(1)
    }

    /// What the log says of its end when it ends with this frame.
    pub fn ending(&self) -> Ending {
        // Format 1 has no kinds.
        let kind = if (self.kind, self.count) == (ENTRIES, 0) { CLOSE } else { self.kind };
        Ending { kind, flags: self.flags, epoch: self.epoch }
    }
}

fn unknown(what: &str) -> String {
    format!("the frame {what}, which this binary does not know; use a newer kvs")
}

/// The name of the first optional field of a body, empty where there is none, and what follows the fields.
fn fields(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = body.split_at_checked(2)?;
    let (fields, rest) = rest.split_at_checked(u16::from_le_bytes([length[0], length[1]]).into())?;
    let Some((length, names)) = fields.split_first() else { return Some((&[], rest)) };
    Some((names.get(..usize::from(*length))?, rest))
}

/// The last frame, as far as it says how the process that wrote it ended. Compaction hands it on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ending {
    pub kind: u8,
    pub flags: u32,
    pub epoch: u32,
}

impl Ending {
    /// The log was closed: all of it is there.
    pub fn is_closed(self) -> bool {
        self.kind == CLOSE
    }

    /// Something was appended since the log was closed last, or since its incarnation began.
    pub fn is_unclean(self) -> bool {
        self.kind == ENTRIES
    }

    /// Sequences that clients have seen can be lost.
    pub fn is_not_synced(self) -> bool {
        self.flags & NOT_SYNCED != 0
    }
}

/// A frame being filled: room for the head, then entries.
pub struct Builder {
    pub first: u64,
    pub count: u32,
    /// Deletes among them. Those of a commit are counted, those that compaction copies are not.
    pub deletes: u32,
    pub kind: u8,
    pub flags: u32,
    pub begun: Option<Instant>,
    bytes: Vec<u8>,
}

impl Builder {
    /// Uses the memory of `buffer`, whatever is in it.
    pub fn new(first: u64, mut buffer: Vec<u8>) -> Self {
        buffer.clear();
        buffer.resize(HEAD_BYTES, 0);
        Self { first, count: 0, deletes: 0, kind: ENTRIES, flags: 0, begun: None, bytes: buffer }
    }

    /// Where the next entry is encoded to. The caller that adds one counts it.
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
    pub fn seal(&mut self, log: Uuid, epoch: u32, durable: u64, previous: u32) -> u32 {
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
        put(52, &(u32::from(self.kind) | self.flags << 8).to_le_bytes());
        put(56, &epoch.to_le_bytes());
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
    /// The body without optional fields.
    fn content(&self) -> &'a [u8] {
        match self.head.flags & HAS_FIELDS {
            0 => self.body,
            _ => fields(self.body).map_or(&[], |(_, rest)| rest),
        }
    }

    /// The incarnations that it records, oldest first; none when it is of another kind.
    pub fn incarnations(&self) -> Vec<Incarnation> {
        if self.head.kind == INCARNATION { incarnations::decode(self.content()) } else { Vec::new() }
    }

    /// Its entries, oldest first. One that is None is damage, and the last.
    pub fn entries(&self) -> impl Iterator<Item = Option<Raw<'a>>> + use<'a> {
        let (mut rest, first, mut left) = (self.content(), self.head.first, self.head.count);
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
