//! The watermark file: how far the log was durable at some moment when it had nothing to do.
//!
//! A log that ends before that has lost something, even where the loss looks like the end of a log. It is a help, not a
//! part of the log: without it, nothing is wrong.

use std::io;

use uuid::Uuid;

use super::bytes::{array, u32_at, u64_at};
use super::disk::{Disk, is_full};

pub const NAME: &str = "watermark";
const TEMPORARY: &str = "watermark.tmp";
const MAGIC: [u8; 8] = *b"kvs mark";
const BYTES: usize = 36;

pub fn write(disk: &dyn Disk, log: Uuid, durable: u64) -> io::Result<()> {
    let file = disk.create(TEMPORARY)?;
    file.write_at(&encode(log, durable), 0)?;
    file.sync()?;
    disk.rename(TEMPORARY, NAME)?;
    disk.sync()
}

/// Writes the file also on a full disk, in the place of the one that is there. A power cut can leave neither.
pub fn write_where_possible(disk: &dyn Disk, log: Uuid, durable: u64) -> io::Result<()> {
    let full = match write(disk, log, durable) {
        Err(error) if is_full(&error) => error,
        written => return written,
    };
    let file = disk.open(NAME).map_err(|_| full)?;
    file.write_at(&encode(log, durable), 0)?;
    file.sync()
}

fn encode(log: Uuid, durable: u64) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..24].copy_from_slice(log.as_bytes());
    bytes[24..32].copy_from_slice(&durable.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..32]);
    bytes[32..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// The log it speaks of and how far that was durable; None when it says nothing that can be believed.
pub fn read(disk: &dyn Disk) -> io::Result<Option<(Uuid, u64)>> {
    let file = disk.open(NAME)?;
    if file.size()? != BYTES as u64 {
        return Ok(None);
    }
    let mut bytes = [0; BYTES];
    file.read_at(&mut bytes, 0)?;
    let sound = bytes[..8] == MAGIC && crc32c::crc32c(&bytes[..32]) == u32_at(&bytes, 32);
    Ok(sound.then(|| (Uuid::from_bytes(array(&bytes, 8)), u64_at(&bytes, 24))))
}
