//! The identity file: distinguishes a log that was copied, or restored from a backup, from the original.
//!
//! It holds its own inode and birth time, which no copy of it has, and so is kept by `mv` and by a restart and by nothing
//! else. The file's own and not its directory's: a backup is also restored into a directory that stays, and on some
//! file systems of containers only files keep their inodes. What copies the blocks under a file system copies this too.

use std::io;

use uuid::Uuid;

use super::bytes::{array, u32_at, u64_at};
use super::disk::Disk;

pub const NAME: &str = "identity";
const TEMPORARY: &str = "identity.tmp";
const MAGIC: [u8; 8] = *b"kvs iden";
const BYTES: usize = 44;

/// What a file system knows a file by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub inode: u64,
    /// In nanoseconds since 1970; 0 where the file system does not keep it.
    pub born: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The files are where they were written.
    Same,
    /// They are copies.
    Copied,
    Missing,
}

pub fn write(disk: &dyn Disk, log: Uuid) -> io::Result<()> {
    let file = disk.create(TEMPORARY)?;
    let Identity { inode, born } = file.identity()?;
    let mut bytes = [0; BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..24].copy_from_slice(log.as_bytes());
    bytes[24..32].copy_from_slice(&inode.to_le_bytes());
    bytes[32..40].copy_from_slice(&born.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..40]);
    bytes[40..].copy_from_slice(&checksum.to_le_bytes());
    file.write_at(&bytes, 0)?;
    file.sync()?;
    disk.rename(TEMPORARY, NAME)?;
    disk.sync()
}

/// Compares what the file says with what it is. One that is damaged, or of another log, is as good as none.
pub fn read(disk: &dyn Disk, log: Uuid) -> io::Result<State> {
    let file = match disk.open(NAME) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::Missing),
        file => file?,
    };
    if file.size()? != BYTES as u64 {
        return Ok(State::Missing);
    }
    let mut bytes = [0; BYTES];
    file.read_at(&mut bytes, 0)?;
    let sound = bytes[..8] == MAGIC && crc32c::crc32c(&bytes[..40]) == u32_at(&bytes, 40);
    if !sound || Uuid::from_bytes(array(&bytes, 8)) != log {
        return Ok(State::Missing);
    }
    let written = Identity { inode: u64_at(&bytes, 24), born: u64_at(&bytes, 32) };
    let found = file.identity()?;
    let same_birth = written.born == found.born || written.born == 0 || found.born == 0;
    Ok(if written.inode == found.inode && same_birth { State::Same } else { State::Copied })
}
