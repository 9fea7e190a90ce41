//! A compacted segment being written, by compaction or by a restore.

use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::disk::{File, is_full};
use super::frame::Builder;
use super::packer::Packer;
use super::segment::{Compacted, HEAD_BYTES, Head, Numbers, VERSION};

/// Writes and syncs frame by frame: a concurrent commit then waits for the disk behind one frame, not a whole segment.
pub struct Output {
    file: Arc<dyn File>,
    pub packer: Packer,
    /// End of its frames.
    pub end: u64,
}

impl Output {
    pub fn new(file: Arc<dyn File>, packer: Packer) -> Self {
        Self { file, packer, end: HEAD_BYTES }
    }

    pub fn push(&mut self, sequence: u64, bytes: usize, encode: impl FnOnce(&mut Vec<u8>, u32)) -> anyhow::Result<()> {
        let Self { file, packer, end } = self;
        packer.push(sequence, bytes, encode, &mut |frame| append(&**file, end, frame))
    }

    pub fn put(&mut self, frame: Builder) -> anyhow::Result<()> {
        let Self { file, packer, end } = self;
        packer.put(frame, &mut |frame| append(&**file, end, frame))
    }

    pub fn flush(&mut self) -> anyhow::Result<()> {
        let Self { file, packer, end } = self;
        packer.flush(&mut |frame| append(&**file, end, frame))
    }

    /// Writes the header of the segment, which is complete then.
    pub fn finish(&self, log: Uuid, numbers: Numbers, compacted: Compacted) -> anyhow::Result<()> {
        let head = Head { version: VERSION, log, numbers, size: self.end, compacted: Some(compacted) };
        self.file.write_at(&head.encode(), 0)?;
        sync(&*self.file)
    }
}

fn append(file: &dyn File, end: &mut u64, frame: &[u8]) -> anyhow::Result<()> {
    file.write_at(frame, *end)?;
    *end += frame.len() as u64;
    sync(file)
}

/// A full disk is a recoverable error here: the file has no name yet and nothing depends on it.
fn sync(file: &dyn File) -> anyhow::Result<()> {
    file.sync().map_err(|error| if is_full(&error) { error.into() } else { SyncFailed(error).into() })
}

/// A failed sync. The state of the disk is unknown after it, so the log fails too.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct SyncFailed(pub io::Error);
