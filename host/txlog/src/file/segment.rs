//! The head of a segment, and the names of segment files.
//!
//! The bytes are drawn at the head of `mod.rs`.

use uuid::Uuid;

use super::bytes::{array, u32_at, u64_at};
use super::frame::Ending;

/// Frames begin here. The head has the first sector for itself.
pub const HEAD_BYTES: u64 = 512;

/// The names of segment files end with this.
pub const SUFFIX: &str = ".seg";

const MAGIC: [u8; 8] = *b"kvs log\n";
/// The version that is written. Format 1 is read.
pub const VERSION: u32 = 2;
/// Magic, version and the place of this checksum stay as they are in every version of the format, so that a binary can
/// tell a head from another time from a damaged one.
const CHECKSUM_AT: usize = 508;

/// The numbers of the segments that a file stands for: one, or several that were compacted into it.
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
        // Written another way it is not one of ours: `3.seg` beside `0000000003.seg`.
        (1 <= numbers.first && numbers.first <= numbers.last && numbers.file_name() == name).then_some(numbers)
    }

    pub fn contains(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub version: u32,
    pub log: Uuid,
    pub numbers: Numbers,
    /// Of its file, which never becomes smaller.
    pub size: u64,
    /// In a segment that compaction made.
    pub compacted: Option<Compacted>,
}

/// What a compacted segment says of itself. It is written whole and never grows, so it can say where it ends; and it
/// says what the segments it stands for said, which its frames cannot: they are others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// The sequences it covers, those of dropped entries included: they must never be given again.
    pub first: u64,
    pub last: u64,
    /// The checksum of the frame before the first that it stands for, and of the last that it stands for.
    pub before: u32,
    pub after: u32,
    /// The checksum of its own last frame, or `before` if it has none.
    pub tip: u32,
    /// The last frame that it stands for.
    pub ending: Ending,
    /// Where its frames end.
    pub end: u64,
    /// The newest sequence of a delete, or of a put that had expired, which is not in the log any more: whoever knows
    /// the log up to an older one and not further would never hear of it.
    pub forgotten: u64,
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
            put(88, &compacted.forgotten.to_le_bytes());
            put(104, &(u32::from(compacted.ending.kind) | compacted.ending.flags << 8).to_le_bytes());
        }
        put(96, &self.size.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..CHECKSUM_AT]);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The error says what is wrong, in words that fit after "at byte 0:".
    pub fn decode(bytes: &[u8; HEAD_BYTES as usize]) -> Result<Self, String> {
        if bytes[..8] != MAGIC {
            return Err("it does not begin as a segment does".into());
        }
        if crc32c::crc32c(&bytes[..CHECKSUM_AT]) != u32_at(bytes, CHECKSUM_AT) {
            return Err("the checksum of its head is wrong".into());
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
                forgotten: u64_at(bytes, 88),
            }),
            kind => return Err(format!("it is of an unknown kind, {kind}")),
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
    fn only_names_that_are_given_are_read() {
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
