//! Packing of entries into frames of about one mebibyte, for compacted segments and backups.
//!
//! Must never know: where the frames are written to.

use uuid::Uuid;

use super::frame::Builder;

/// About one read.
const FRAME_BYTES: usize = 1 << 20;

pub struct Packer {
    log: Uuid,
    pub durable: u64,
    pub epoch: u32,
    /// Checksum of the last complete frame.
    pub chain: u32,
    /// Maximum size of a frame with more than one entry.
    pub frame_bytes: usize,
    frame: Option<Builder>,
    buffer: Vec<u8>,
}

/// Takes a complete frame.
pub type WriteFrame<'w> = dyn FnMut(&[u8]) -> anyhow::Result<()> + 'w;

impl Packer {
    pub fn new(log: Uuid, durable: u64, chain: u32) -> Self {
        Self { log, durable, epoch: 0, chain, frame_bytes: FRAME_BYTES, frame: None, buffer: Vec::new() }
    }

    /// Adds an entry of this size, which `encode` appends to a body for an offset. A full frame is written before.
    pub fn push(
        &mut self,
        sequence: u64,
        bytes: usize,
        encode: impl FnOnce(&mut Vec<u8>, u32),
        write: &mut WriteFrame<'_>,
    ) -> anyhow::Result<()> {
        let offset = |frame: &Builder| u32::try_from(sequence - frame.first).ok();
        let fits = |frame: &Builder| frame.len() + bytes <= self.frame_bytes && offset(frame).is_some();
        if self.frame.as_ref().is_some_and(|frame| !fits(frame)) {
            self.flush(write)?;
        }
        let buffer = &mut self.buffer;
        let frame = self.frame.get_or_insert_with(|| Builder::new(sequence, std::mem::take(buffer)));
        let offset = (sequence - frame.first) as u32;
        encode(frame.body(), offset);
        frame.count += 1;
        Ok(())
    }

    /// Writes a frame of its own after the entries so far.
    pub fn put(&mut self, frame: Builder, write: &mut WriteFrame<'_>) -> anyhow::Result<()> {
        self.flush(write)?;
        self.frame = Some(frame);
        self.flush(write)
    }

    /// Writes the frame that was begun, if any.
    pub fn flush(&mut self, write: &mut WriteFrame<'_>) -> anyhow::Result<()> {
        let Some(mut frame) = self.frame.take() else { return Ok(()) };
        self.chain = frame.seal(self.log, self.epoch, self.durable, self.chain);
        write(frame.bytes())?;
        self.buffer = frame.into_buffer();
        Ok(())
    }

    /// Returns the bytes of the frame that was begun.
    pub fn pending(&self) -> u64 {
        self.frame.as_ref().map_or(0, Builder::sealed_len)
    }
}
