//! Reading of a backup: every byte is checked, and one that is cut off is an error.

use std::io::{ErrorKind, Read};

use anyhow::{Result, anyhow, bail, ensure};
use sha2::{Digest, Sha256};

use super::{HEADER_BYTES, Header, Trailer};
use crate::file::frame::{self, Frame, Head, TRAILER};
use crate::file::segment::VERSION;
use crate::file::{Batch, incarnations};
use crate::{History, Receive};

/// A backup being read, once and from the front. Holds one frame.
pub struct Reader<R> {
    input: R,
    header: Header,
    history: History,
    digest: Sha256,
    /// Bytes read.
    offset: u64,
    /// Checksum of the last frame.
    chain: u32,
    /// The newest sequence so far.
    last: u64,
    count: u64,
    body: Vec<u8>,
}

impl<R: Read> Reader<R> {
    pub fn new(mut input: R) -> Result<Self> {
        let mut bytes = [0; HEADER_BYTES];
        let read = fill(&mut input, &mut bytes)?;
        ensure!(read == HEADER_BYTES, cut_off(read as u64));
        let header = Header::decode(&bytes).map_err(|what| corrupted(0, &what))?;
        let mut digest = Sha256::new();
        digest.update(bytes);
        let (history, last, body) = (History::default(), header.since, Vec::new());
        let mut reader =
            Self { input, header, history, digest, offset: HEADER_BYTES as u64, chain: 0, last, count: 0, body };
        if header.has_history {
            reader.read_history()?;
        }
        Ok(reader)
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns the incarnations of the log.
    pub fn history(&self) -> &History {
        &self.history
    }

    fn read_history(&mut self) -> Result<()> {
        let (at, head) = self.frame()?;
        ensure!(head.kind == frame::INCARNATION, corrupted(at, "the incarnations of the log are missing"));
        let records = Frame { head, offset: at, body: &self.body }.incarnations();
        incarnations::check(&records, None).map_err(|what| corrupted(at, what))?;
        self.history = History::new(records);
        Ok(())
    }

    /// Hands over all entries, and returns the trailer. An error means that the entries so far are worth nothing.
    pub fn read(&mut self, receive: &mut Receive<'_>) -> Result<Trailer> {
        loop {
            let (at, head) = self.frame()?;
            let frame = Frame { head, offset: at, body: &self.body };
            match head.kind {
                TRAILER => return self.end(at, &head),
                frame::ENTRIES => self.last = entries(&frame, self.last, &self.history, receive)?,
                kind => return Err(corrupted(at, &format!("a frame of kind {kind} is not expected here"))),
            }
            self.count += u64::from(head.count);
        }
    }

    /// Reads a frame into `body`. The trailer is not part of the digest.
    fn frame(&mut self) -> Result<(u64, Head)> {
        let at = self.offset;
        let (head, bytes) = self.head()?;
        self.body(&head)?;
        if head.kind != TRAILER {
            let is_first = at == HEADER_BYTES as u64;
            head.check(VERSION, is_first, &self.body).map_err(|why| corrupted(at, &why))?;
            self.digest.update(bytes);
            self.digest.update(&self.body);
        }
        Ok((at, head))
    }

    fn head(&mut self) -> Result<(Head, [u8; frame::HEAD_BYTES])> {
        let mut bytes = [0; frame::HEAD_BYTES];
        let read = fill(&mut self.input, &mut bytes)?;
        ensure!(read == frame::HEAD_BYTES, cut_off(self.offset + read as u64));
        let head = Head::decode(&bytes, self.header.log);
        let head = head.ok_or_else(|| corrupted(self.offset, "this is not the header of a frame of this backup"))?;
        ensure!(head.previous == self.chain, corrupted(self.offset, "a frame does not follow the one before it"));
        self.chain = head.checksum;
        self.offset += frame::HEAD_BYTES as u64;
        Ok((head, bytes))
    }

    /// Reads the body of a frame. Memory is taken for what is there, whatever the length says.
    fn body(&mut self, head: &Head) -> Result<()> {
        self.body.clear();
        let read = self.input.by_ref().take(head.length.into()).read_to_end(&mut self.body)?;
        ensure!(read == head.length as usize, cut_off(self.offset + read as u64));
        ensure!(head.accepts(&self.body), corrupted(self.offset, "the checksum of a frame is wrong"));
        self.offset += read as u64;
        Ok(())
    }

    fn end(&mut self, at: u64, head: &Head) -> Result<Trailer> {
        let trailer = Trailer::decode(&self.body).filter(|_| (head.count, head.flags) == (0, 0));
        let trailer = trailer.ok_or_else(|| corrupted(at, "the trailer is of another version"))?;
        let Trailer { sequence, count, incarnation, digest, .. } = trailer;
        ensure!(self.digest.finalize_reset().as_slice() == digest, corrupted(at, "the digest does not match"));
        ensure!(
            count == self.count
                && sequence >= self.last
                && self.history.contains(sequence)
                && incarnation == self.history.at(self.header.log, sequence),
            corrupted(at, "the trailer does not describe the entries")
        );
        let mut more = [0];
        ensure!(fill(&mut self.input, &mut more)? == 0, corrupted(self.offset, "something follows the trailer"));
        Ok(trailer)
    }
}

/// Hands over the entries of a frame, and returns the newest sequence.
fn entries(frame: &Frame<'_>, mut last: u64, history: &History, receive: &mut Receive<'_>) -> Result<u64> {
    let invalid = || corrupted(frame.offset, "a frame contains an invalid entry");
    let mut batch = Batch::default();
    for entry in frame.entries() {
        let entry = entry.ok_or_else(invalid)?;
        ensure!(entry.sequence > last && history.contains(entry.sequence), invalid());
        last = entry.sequence;
        if !batch.has_room_for(&entry) {
            batch.hand_over(receive)?;
        }
        batch.push(entry).ok_or_else(invalid)?;
    }
    batch.hand_over(receive)?;
    Ok(last)
}

/// Reads until the buffer is full or the input ends.
fn fill(input: &mut dyn Read, buffer: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => bail!(error),
        }
    }
    Ok(filled)
}

fn cut_off(at: u64) -> anyhow::Error {
    anyhow!("the backup is cut off at byte {at}; take another one")
}

fn corrupted(at: u64, what: &str) -> anyhow::Error {
    anyhow!("the backup is corrupted at byte {at}: {what}")
}
