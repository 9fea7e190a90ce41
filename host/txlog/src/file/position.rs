//! The position file: the durable watermark now, for standbys on the same machine.
//!
//! The primary overwrites it after each sync, before the entries are acknowledged. It is not synced: a power cut ends its
//! readers too. A reader verifies it against the segments, so a stale one, after a power cut or of a former primary, does no
//! harm: the checksum of the last frame covers all frames before it, and is not published before the sync of that frame
//! has returned. Recovery does not read it.

use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use uuid::Uuid;

use super::bytes::{array, u32_at, u64_at};
use super::disk::{Disk, File, is_full};

pub const NAME: &str = "position";
const MAGIC: [u8; 8] = *b"kvs posn";
const BYTES: usize = 56;
/// Number of attempts to read the file, which the primary can overwrite meanwhile.
const ATTEMPTS: u32 = 3;

/// The end of the last durable frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub log: Uuid,
    pub sequence: u64,
    /// Number of the segment, offset of the end in it, and checksum of the frame.
    pub segment: u64,
    pub offset: u64,
    pub chain: u32,
}

impl Position {
    /// Overwrites the file. Its space is allocated, so this fails only if the disk does.
    pub fn write(&self, file: &dyn File) -> io::Result<()> {
        let mut bytes = [0; BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..24].copy_from_slice(self.log.as_bytes());
        bytes[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.segment.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.offset.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.chain.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..52]);
        bytes[52..].copy_from_slice(&checksum.to_le_bytes());
        file.write_at(&bytes, 0)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { log, sequence, segment, offset, chain } = self;
        write!(f, "sequence {sequence} of {log}, byte {offset} of segment {segment}, checksum {chain:08x}")
    }
}

/// Opens the file for writing. None if the disk is full: then no standby can follow.
pub fn open(disk: &dyn Disk) -> io::Result<Option<Arc<dyn File>>> {
    match disk.open(NAME) {
        // Its space is allocated.
        Ok(file) if file.size()? == BYTES as u64 => return Ok(Some(file)),
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let created = disk.create(NAME).and_then(|file| {
        file.allocate(BYTES as u64)?;
        Ok(file)
    });
    match created {
        Err(error) if is_full(&error) => {
            tracing::warn!("disk full: no position file, no standby can follow: {error}");
            Ok(None)
        }
        created => created.map(Some),
    }
}

/// Reads the position; None if there is no file, or no valid one.
pub fn read(disk: &dyn Disk) -> io::Result<Option<Position>> {
    let file = match disk.open(NAME) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    for _ in 0..ATTEMPTS {
        let mut bytes = [0; BYTES];
        match file.read_at(&mut bytes, 0) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        if bytes[..8] == MAGIC && crc32c::crc32c(&bytes[..52]) == u32_at(&bytes, 52) {
            return Ok(Some(Position {
                log: Uuid::from_bytes(array(&bytes, 8)),
                sequence: u64_at(&bytes, 24),
                segment: u64_at(&bytes, 32),
                offset: u64_at(&bytes, 40),
                chain: u32_at(&bytes, 48),
            }));
        }
    }
    Ok(None)
}
