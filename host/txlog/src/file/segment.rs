//! Segment headers, and the names of segment files.
//!
//! The byte layout is at the head of `mod.rs`.

use uuid::Uuid;

use super::bytes::{array, u32_at, u64_at};
use super::frame::Ending;

/// Size of the header, which has the first sector for itself. Frames follow it.
pub const HEAD_BYTES: u64 = 512;

/// Extension of segment files.
pub const SUFFIX: &str = ".seg";

const MAGIC: [u8; 8] = *b"kvs log\n";
/// Format version of new segments. Format 1 can be read.
pub const VERSION: u32 = 2;
/// Offset of the checksum. It is the same in every version of the format, like magic and version, so that a binary can
/// distinguish a header of an unsupported version from a corrupt one.
const CHECKSUM_AT: usize = 508;

/// The numbers of the segments in a file: one, or those that were compacted into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    pub first: u64,
    pub last: u64,
}

impl Numbers {
    pub fn one(number: u64) -> Self {
        Self { first: number, last: number }
    }

    /// `0000000003.seg`, or `0000000003-0000000007.seg`.
    pub fn file_name(self) -> String {
        let Self { first, last } = self;
        if first == last { format!("{first:010}{SUFFIX}") } else { format!("{first:010}-{last:010}{SUFFIX}") }
    }

    pub fn parse(name: &str) -> Option<Self> {
        let numbers = name.strip_suffix(SUFFIX)?;
        let (first, last) = numbers.split_once('-').unwrap_or((numbers, numbers));
        let numbers = Self { first: first.parse().ok()?, last: last.parse().ok()? };
        // Only the canonical spelling counts, so that `3.seg` does not stand beside `0000000003.seg`.
        (1 <= numbers.first && numbers.first <= numbers.last && numbers.file_name() == name).then_some(numbers)
    }

    pub fn contains(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }
}

/// Header of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub version: u32,
    pub log: Uuid,
    pub numbers: Numbers,
    /// Size of the file, which never shrinks.
    pub size: u64,
    /// Set in a segment written by compaction.
    pub compacted: Option<Compacted>,
}

/// Header fields of a compacted segment. It is written as a whole and never grows, so the header states where it ends.
/// It also states properties of the segments it replaces, which its own frames do not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// The sequences it covers, including those of dropped entries, which must never be reused.
    pub first: u64,
    pub last: u64,
    /// Checksum of the frame before the first frame it replaces, and of the last frame it replaces.
    pub before: u32,
    pub after: u32,
    /// Checksum of its own last frame, or `before` if it has none.
    pub tip: u32,
    /// The last frame it replaces.
    pub ending: Ending,
    /// End of its frames.
    pub end: u64,
    /// Compaction horizon: the newest sequence of a dropped tombstone. A reader that resumes at an older sequence would
    /// miss it.
    pub horizon: u64,
    /// The oldest sequence from which on every state of the log can be restored, as far as this segment shows; 0 if unknown.
    pub retained: u64,
}

impl Head {
    pub fn encode(&self) -> [u8; HEAD_BYTES as usize] {
        let mut bytes = [0; HEAD_BYTES as usize];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(8, &self.version.to_le_bytes());
        put(12, &u32::from(self.compacted.is_some()).to_le_bytes());
        put(16, self.log.as_bytes());
        put(32, &self.numbers.first.to_le_bytes());
        put(40, &self.numbers.last.to_le_bytes());
        if let Some(compacted) = &self.compacted {
            put(48, &compacted.first.to_le_bytes());
            put(56, &compacted.last.to_le_bytes());
            put(64, &compacted.end.to_le_bytes());
            put(72, &compacted.before.to_le_bytes());
            put(76, &compacted.after.to_le_bytes());
            put(80, &compacted.tip.to_le_bytes());
            put(84, &compacted.ending.epoch.to_le_bytes());
            put(88, &compacted.horizon.to_le_bytes());
            put(112, &compacted.retained.to_le_bytes());
            put(104, &(u32::from(compacted.ending.kind) | compacted.ending.flags << 8).to_le_bytes());
        }
        put(96, &self.size.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Parses a header. The error is a description that fits after "at byte 0:".
    pub fn decode(bytes: &[u8; HEAD_BYTES as usize]) -> Result<Self, String> {
        if bytes[..8] != MAGIC {
            return Err("it is not a segment of a log".into());
        }
        if crc32c::crc32c(&bytes[..CHECKSUM_AT]) != u32_at(bytes, CHECKSUM_AT) {
            return Err("the checksum of its header does not match".into());
        }
        let version = u32_at(bytes, 8);
        if !(1..=VERSION).contains(&version) {
            let age = if version > VERSION { "newer" } else { "older" };
            return Err(format!(
                "it has format version {version} and this binary reads 1 to {VERSION}; use the {age} kvs that wrote it"
            ));
        }
        let compacted = match u32_at(bytes, 12) {
            0 => None,
            1 => Some(Compacted {
                first: u64_at(bytes, 48),
                last: u64_at(bytes, 56),
                end: u64_at(bytes, 64),
                before: u32_at(bytes, 72),
                after: u32_at(bytes, 76),
                tip: u32_at(bytes, 80),
                // Zeros in format 1.
                ending: Ending { kind: bytes[104], flags: u32_at(bytes, 104) >> 8, epoch: u32_at(bytes, 84) },
                horizon: u64_at(bytes, 88),
                // 0 where an older binary wrote it.
                retained: u64_at(bytes, 112),
            }),
            kind => return Err(format!("its kind {kind} is unknown")),
        };
        Ok(Self {
            version,
            log: Uuid::from_bytes(array(bytes, 16)),
            numbers: Numbers { first: u64_at(bytes, 32), last: u64_at(bytes, 40) },
            size: u64_at(bytes, 96),
            compacted,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_range_rejects_noncanonical_names() {
        for (first, last) in [(1, 1), (3, 7), (9_999_999_999, 10_000_000_000)] {
            assert_eq!(Numbers::parse(&Numbers { first, last }.file_name()), Some(Numbers { first, last }));
        }
        let none = [
            "",
            ".seg",
            "3.seg",
            "0000000000.seg",
            "0000000003",
            "+000000003.seg",
            "0000000003-0000000003.seg",
            "0000000007-0000000003.seg",
            "0000000000-0000000003.seg",
            "0000000001-3.seg",
        ];
        for name in none {
            assert_eq!(Numbers::parse(name), None, "{name}");
        }
    }
}
