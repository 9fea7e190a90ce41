//! Writing of a backup, from a log that is in use.

use std::io::Write;

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};

use super::{Header, Trailer};
use crate::file::entry;
use crate::file::frame::{Builder, TRAILER};
use crate::file::incarnations;
use crate::file::packer::Packer;
use crate::{Entry, History, TransactionLog};

/// Why a backup cannot begin after a sequence.
#[derive(Debug, thiserror::Error)]
#[error("sequence {0} is not in the history of this log; take a full backup")]
pub struct SinceError(u64);

/// Writes the entries after a sequence, up to what is durable, while the log is in use. An error of `out` ends it; so does
/// [`Forgotten`](crate::Forgotten) where compaction has dropped deletes after that sequence.
pub fn write(log: &dyn TransactionLog, since: u64, out: &mut dyn Write) -> Result<Trailer> {
    let history = log.history();
    ensure!(since <= log.watermark().durable() && history.contains(since), SinceError(since));
    let (log_id, has_history) = (log.id(), !history.incarnations().is_empty());
    let header = Header { log: log_id, since, incarnation: history.at(log_id, since), has_history };
    let mut writer = Writer::begin(out, header, &history)?;
    let sequence =
        log.replay(since, &mut |entries| entries.iter().try_for_each(|entry| writer.push(entry, &history)))?;
    ensure!(log.history() == history, "an incarnation of the log began during the backup; take it again");
    // After the replay, during which the log can have been compacted.
    writer.end(sequence, log.retained(), &history)
}

struct Writer<'w> {
    out: &'w mut dyn Write,
    header: Header,
    packer: Packer,
    digest: Sha256,
    count: u64,
    last: u64,
    /// Entries are missing that compaction dropped.
    has_gaps: bool,
}

impl<'w> Writer<'w> {
    fn begin(out: &'w mut dyn Write, header: Header, history: &History) -> Result<Self> {
        let packer = Packer::new(header.log, header.since, 0);
        let (digest, last) = (Sha256::new(), header.since);
        let mut writer = Self { out, header, packer, digest, count: 0, last, has_gaps: false };
        let Self { out, digest, packer, .. } = &mut writer;
        append(*out, digest, &header.encode())?;
        if let Some(frame) = incarnations::frame(history.incarnations()) {
            packer.put(frame, &mut |frame| append(*out, digest, frame))?;
        }
        Ok(writer)
    }

    fn push(&mut self, entry: &Entry<'_>, history: &History) -> Result<()> {
        let Self { out, digest, packer, .. } = self;
        let encode = |body: &mut Vec<u8>, offset: u32| entry::encode_ref(body, offset, entry.time, &entry.event);
        let bytes = entry::size_ref(&entry.event);
        packer.push(entry.sequence, bytes, encode, &mut |frame| append(*out, digest, frame))?;
        self.count += 1;
        self.has_gaps |= history.next(self.last) != entry.sequence;
        self.last = entry.sequence;
        Ok(())
    }

    fn end(mut self, sequence: u64, retained: u64, history: &History) -> Result<Trailer> {
        let Self { out, digest, packer, .. } = &mut self;
        packer.flush(&mut |frame| append(*out, digest, frame))?;
        self.has_gaps |= history.entries(self.last, sequence) > 0;
        let trailer = Trailer {
            sequence,
            count: self.count,
            retained: if self.has_gaps { retained.clamp(self.header.since, sequence) } else { self.header.since },
            incarnation: history.at(self.header.log, sequence),
            digest: self.digest.finalize().into(),
        };
        let mut frame = Builder::new(sequence, Vec::new());
        frame.kind = TRAILER;
        trailer.encode(frame.body());
        self.packer.put(frame, &mut |frame| Ok(self.out.write_all(frame)?))?;
        self.out.flush()?;
        Ok(trailer)
    }
}

fn append(out: &mut dyn Write, digest: &mut Sha256, bytes: &[u8]) -> Result<()> {
    digest.update(bytes);
    out.write_all(bytes)?;
    Ok(())
}
