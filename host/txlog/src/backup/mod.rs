//! Backups: a prefix of a log up to one durable sequence, as one stream of bytes. The format is described in `docs/backup.md`.
//!
//! Owns: the format, which is the same for all logs, and the rules for chains of backups. Must never know: where a backup is
//! stored, or how a log is written.

mod chain;
mod cut;
mod read;
mod write;

#[cfg(test)]
mod tests;

use uuid::Uuid;

use crate::file::bytes::{array, u32_at, u64_at};

pub use self::chain::{Chain, Open, Until, check};
pub use self::cut::Cut;
pub use self::read::Reader;
pub use self::write::{SinceError, write};

const MAGIC: [u8; 8] = *b"kvs bkup";
const VERSION: u32 = 1;
pub const HEADER_BYTES: usize = 64;
/// Offset of the checksum in the header.
const CHECKSUM_AT: usize = 60;
/// Size of the body of the trailer.
const TRAILER_BYTES: usize = 72;

/// The beginning of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// UUID of the log.
    pub log: Uuid,
    /// The sequence that the backup begins after; 0 in a full one.
    pub since: u64,
    /// The incarnation that this sequence belongs to.
    pub incarnation: Uuid,
    /// A frame with the incarnations of the log follows.
    pub has_history: bool,
}

/// The end of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// The durable sequence that the backup ends with.
    pub sequence: u64,
    /// Number of entries.
    pub count: u64,
    /// The oldest sequence from which on every state of the log is in the backup.
    pub retained: u64,
    /// The incarnation that the last sequence belongs to.
    pub incarnation: Uuid,
    /// SHA-256 of everything before the trailer.
    pub digest: [u8; 32],
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(self.log.as_bytes());
        bytes[32..40].copy_from_slice(&self.since.to_le_bytes());
        bytes[40..56].copy_from_slice(self.incarnation.as_bytes());
        bytes[56..60].copy_from_slice(&u32::from(self.has_history).to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Parses a header. The error is a description that fits after "at byte 0:".
    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, String> {
        if bytes[..8] != MAGIC {
            return Err("it is not a backup of kvs".into());
        }
        if crc32c::crc32c(&bytes[..CHECKSUM_AT]) != u32_at(bytes, CHECKSUM_AT) {
            return Err("the checksum of its header does not match".into());
        }
        match u32_at(bytes, 8) {
            VERSION => Ok(Self {
                log: Uuid::from_bytes(array(bytes, 16)),
                since: u64_at(bytes, 32),
                incarnation: Uuid::from_bytes(array(bytes, 40)),
                has_history: u32_at(bytes, 56) != 0,
            }),
            version => Err(format!(
                "it has format version {version} and this binary reads {VERSION}; use the kvs that wrote it"
            )),
        }
    }
}

impl Trailer {
    fn encode(&self, body: &mut Vec<u8>) {
        for number in [self.sequence, self.count, self.retained] {
            body.extend_from_slice(&number.to_le_bytes());
        }
        body.extend_from_slice(self.incarnation.as_bytes());
        body.extend_from_slice(&self.digest);
    }

    fn decode(body: &[u8]) -> Option<Self> {
        (body.len() == TRAILER_BYTES).then(|| Self {
            sequence: u64_at(body, 0),
            count: u64_at(body, 8),
            retained: u64_at(body, 16),
            incarnation: Uuid::from_bytes(array(body, 24)),
            digest: array(body, 40),
        })
    }
}
