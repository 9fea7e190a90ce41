//! Reads the frames of one segment in order, many at a time, and checks them as it goes.
//!
//! Owns: the rule where a run of frames ends, and what makes one bad. Must never know: what follows from a bad one.
//! Holds one buffer, as large as the largest frame met or [`CHUNK_BYTES`].

use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::disk::File;
use super::frame::{self, Frame, Head};
use super::segment::HEAD_BYTES;

/// Large enough that a call costs nothing beside it, small enough to stay in the processor's cache.
const CHUNK_BYTES: usize = 1 << 20;

pub struct Scan {
    file: Arc<dyn File>,
    /// The format of the segment.
    version: u32,
    log: Uuid,
    /// Nothing is read from here on.
    limit: u64,
    buffer: Vec<u8>,
    /// Where in the file the buffer begins, how much of it is filled, and how much of that was gone over.
    base: u64,
    filled: usize,
    passed: usize,
    frames: Vec<(usize, Head)>,
    /// The checksum that the next frame must call the previous one's; unknown before the first when None.
    chain: Option<u32>,
    stop: Option<Stop>,
}

/// Why there are no more frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Zeros, where nothing was written yet, or the limit.
    End,
    /// Something else, and what is wrong with it.
    Bad(&'static str),
    /// A frame whose checksums are right, and why this binary does not read it. It was written so: no tear, and no
    /// damage.
    Refused(String),
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
        Self { file, version, log, limit, buffer, base: from, filled: 0, passed: 0, frames, chain, stop: None }
    }

    /// Goes on to the next frames, false when there are none. What `frames` gave before is gone.
    pub fn advance(&mut self) -> io::Result<bool> {
        self.frames.clear();
        self.buffer.copy_within(self.passed..self.filled, 0);
        self.base += self.passed as u64;
        self.filled -= self.passed;
        self.passed = 0;
        while self.stop.is_none() && self.frames.is_empty() {
            self.fill()?;
            let needed = self.check();
            // Not even one frame fits: `check` made sure that the file holds as much as it says it needs.
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

    /// Goes over the whole frames in the buffer. Returns the bytes that the first one which is not whole needs.
    fn check(&mut self) -> usize {
        loop {
            let rest = &self.buffer[self.passed..self.filled];
            let left = self.limit.saturating_sub(self.base + self.passed as u64);
            if left < frame::HEAD_BYTES as u64 && rest.len() as u64 == left {
                // Too short for a head: the very end of the file.
                self.stop = Some(if is_zero(rest) { Stop::End } else { Stop::Bad("it is cut off") });
                return 0;
            }
            if rest.len() < frame::HEAD_BYTES {
                return frame::HEAD_BYTES;
            }
            if is_zero(&rest[..frame::HEAD_BYTES]) {
                self.stop = Some(Stop::End);
                return 0;
            }
            let bad = match Head::decode(rest, self.log) {
                None => "this is not the head of a frame of this log",
                // A length is believed only when the file has that many bytes: nothing larger is ever allocated.
                Some(head) if head.total() > left => "a frame is longer than its segment",
                Some(head) if self.chain.is_some_and(|chain| chain != head.previous) => {
                    "a frame does not follow the one before it"
                }
                Some(head) if head.total() > rest.len() as u64 => return head.total() as usize,
                Some(head) => {
                    let total = head.total() as usize;
                    let body = &rest[frame::HEAD_BYTES..total];
                    if head.accepts(body) {
                        let is_first = self.base + self.passed as u64 == HEAD_BYTES;
                        if let Err(why) = head.check(self.version, is_first, body) {
                            self.stop = Some(Stop::Refused(why));
                            return 0;
                        }
                        self.frames.push((self.passed, head));
                        self.passed += total;
                        self.chain = Some(head.checksum);
                        continue;
                    }
                    "the checksum of a frame is wrong"
                }
            };
            self.stop = Some(Stop::Bad(bad));
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

    /// Where the frame after the last good one begins, or would.
    pub fn offset(&self) -> u64 {
        self.base + self.passed as u64
    }

    /// The checksum of the last good frame.
    pub fn chain(&self) -> Option<u32> {
        self.chain
    }

    /// Why it went no further; [`Stop::End`] while it still can.
    pub fn stop(&self) -> Stop {
        self.stop.clone().unwrap_or(Stop::End)
    }
}

/// The end of the last byte in `from..size` that is not zero; None when all are.
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
    // By words: a start looks at the rest of a segment, and a build for size makes no wide loop of single bytes.
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}
