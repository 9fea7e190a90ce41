//! Sequential scan of the frames of one segment, which reads many at a time and validates them.
//!
//! Owns: the rules for the end of the frames, and for invalid frames. Must never know: the consequences of an invalid
//! frame. Holds one buffer of [`CHUNK_BYTES`], or of the size of the largest frame.

use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::disk::File;
use super::frame::{self, Frame, Head};
use super::segment::HEAD_BYTES;

/// Large enough to make the cost of a system call negligible, small enough for the processor's cache.
const CHUNK_BYTES: usize = 1 << 20;

/// A scan over the frames of a segment.
pub struct Scan {
    file: Arc<dyn File>,
    /// Format version of the segment.
    version: u32,
    log: Uuid,
    /// Offset at which the scan ends.
    limit: u64,
    buffer: Vec<u8>,
    /// Offset of the buffer in the file, bytes in it, and bytes of these that were scanned.
    base: u64,
    filled: usize,
    consumed: usize,
    frames: Vec<(usize, Head)>,
    /// Checksum that the next frame must name as that of the previous frame; None if unknown before the first.
    chain: Option<u32>,
    end: Option<ScanEnd>,
}

/// Reason for the end of a scan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScanEnd {
    /// Zeros, where nothing was written yet, or the limit of the scan.
    Clean,
    /// An invalid frame, and why it is invalid.
    Invalid(&'static str),
    /// A frame with valid checksums that this binary does not support, and why. It is neither torn nor corrupt.
    Unsupported(String),
}

impl Scan {
    /// `version` and `log` are those of the segment. Frames are read from `from` up to `limit`.
    pub fn new(
        file: Arc<dyn File>,
        (version, log): (u32, Uuid),
        (from, limit): (u64, u64),
        chain: Option<u32>,
    ) -> Self {
        let size = limit.saturating_sub(from).min(CHUNK_BYTES as u64) as usize;
        let buffer = vec![0; size];
        let frames = Vec::new();
        Self { file, version, log, limit, buffer, base: from, filled: 0, consumed: 0, frames, chain, end: None }
    }

    /// Reads the next frames, and returns false when there are none. They replace the previous ones of `frames`.
    pub fn advance(&mut self) -> io::Result<bool> {
        self.frames.clear();
        self.buffer.copy_within(self.consumed..self.filled, 0);
        self.base += self.consumed as u64;
        self.filled -= self.consumed;
        self.consumed = 0;
        while self.end.is_none() && self.frames.is_empty() {
            self.fill()?;
            let needed = self.check();
            // The buffer is too small for one frame: `check` ensured that the file holds that many bytes.
            if self.frames.is_empty() && needed > self.buffer.len() {
                self.buffer.resize(needed, 0);
            }
        }
        Ok(!self.frames.is_empty())
    }

    fn fill(&mut self) -> io::Result<()> {
        let at = self.base + self.filled as u64;
        let wanted = self.limit.saturating_sub(at).min((self.buffer.len() - self.filled) as u64) as usize;
        self.file.read_at(&mut self.buffer[self.filled..self.filled + wanted], at)?;
        self.filled += wanted;
        Ok(())
    }

    /// Validates the complete frames in the buffer. Returns the size of the first incomplete one.
    fn check(&mut self) -> usize {
        loop {
            let rest = &self.buffer[self.consumed..self.filled];
            let left = self.limit.saturating_sub(self.base + self.consumed as u64);
            if left < frame::HEAD_BYTES as u64 && rest.len() as u64 == left {
                // Too short for a header: the end of the file.
                self.end = Some(if is_zero(rest) { ScanEnd::Clean } else { ScanEnd::Invalid("it is truncated") });
                return 0;
            }
            if rest.len() < frame::HEAD_BYTES {
                return frame::HEAD_BYTES;
            }
            if is_zero(&rest[..frame::HEAD_BYTES]) {
                self.end = Some(ScanEnd::Clean);
                return 0;
            }
            let reason = match Head::decode(rest, self.log) {
                None => "this is not the header of a frame of this log",
                // A length is trusted only if the file has that many bytes, so that nothing larger is ever allocated.
                Some(head) if head.total() > left => "a frame is longer than its segment",
                Some(head) if self.chain.is_some_and(|chain| chain != head.previous) => {
                    "a frame does not follow the one before it"
                }
                Some(head) if head.total() > rest.len() as u64 => return head.total() as usize,
                Some(head) => {
                    let total = head.total() as usize;
                    let body = &rest[frame::HEAD_BYTES..total];
                    if head.accepts(body) {
                        let is_first = self.base + self.consumed as u64 == HEAD_BYTES;
                        if let Err(why) = head.check(self.version, is_first, body) {
                            self.end = Some(ScanEnd::Unsupported(why));
                            return 0;
                        }
                        self.frames.push((self.consumed, head));
                        self.consumed += total;
                        self.chain = Some(head.checksum);
                        continue;
                    }
                    "the checksum of a frame is wrong"
                }
            };
            self.end = Some(ScanEnd::Invalid(reason));
            return 0;
        }
    }

    pub fn frames(&self) -> impl Iterator<Item = Frame<'_>> {
        self.frames.iter().map(|&(at, head)| Frame {
            head,
            offset: self.base + at as u64,
            body: &self.buffer[at + frame::HEAD_BYTES..at + head.total() as usize],
        })
    }

    /// Returns the offset after the last valid frame.
    pub fn offset(&self) -> u64 {
        self.base + self.consumed as u64
    }

    /// Returns the checksum of the last valid frame.
    pub fn chain(&self) -> Option<u32> {
        self.chain
    }

    /// Returns why the scan ended; [`ScanEnd::Clean`] while it has not.
    pub fn end(&self) -> ScanEnd {
        self.end.clone().unwrap_or(ScanEnd::Clean)
    }
}

/// Returns the offset after the last nonzero byte in `from..size`; None when all are zero.
pub fn written_end(file: &dyn File, from: u64, size: u64) -> io::Result<Option<u64>> {
    let mut buffer = vec![0; size.saturating_sub(from).min(CHUNK_BYTES as u64) as usize];
    let (mut at, mut end) = (from, None);
    while at < size {
        let chunk = &mut buffer[..(size - at).min(CHUNK_BYTES as u64) as usize];
        file.read_at(chunk, at)?;
        if !is_zero(chunk) {
            end = chunk.iter().rposition(|byte| *byte != 0).map(|position| at + position as u64 + 1);
        }
        at += chunk.len() as u64;
    }
    Ok(end)
}

pub fn is_zero(bytes: &[u8]) -> bool {
    // By words: recovery checks the rest of a segment, and a build for size does not vectorize a loop over bytes.
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}
