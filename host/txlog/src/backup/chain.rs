//! A chain: a full backup and the incremental ones after it, each of which continues the one before.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use kvs_runtime::Random;
use uuid::Uuid;

use super::{Cut, Header, Reader, Trailer};
use crate::{History, Incarnation, Receive, Restoration};

/// Opens a backup for a pass over it.
pub type Open<'o> = dyn Fn(&Path) -> Result<Box<dyn Read>> + 'o;

/// A point in the history of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    Sequence(u64),
    /// Up to the first entry that is newer than this, in milliseconds since 1970.
    Time(u64),
}

/// A chain of which every byte was checked, cut at a point in time.
#[derive(Debug)]
pub struct Chain {
    log: Uuid,
    /// The incarnations up to the cut.
    history: History,
    /// The newest sequence up to the cut, and the incarnation that it belongs to.
    pub last: u64,
    incarnation: Uuid,
    /// The newest sequence that is known to be given out.
    newest: u64,
    files: Vec<PathBuf>,
}

/// Checks a chain, oldest backup first.
pub fn check(files: &[PathBuf], until: Option<Until>, open: &Open<'_>) -> Result<Chain> {
    let mut links = Vec::new();
    let mut cut = None;
    for file in files {
        let link = Link::read(file, links.last(), until.filter(|_| cut.is_none()), open)
            .with_context(|| format!("cannot restore {}", file.display()))?;
        cut = cut.or(link.cut.at.map(|last| (links.len(), last)));
        links.push(link);
    }
    let Some(end) = links.last() else { bail!("no backup was given") };
    let newest = end.history.incarnations().last().map_or(0, |newest| newest.first).max(end.trailer.sequence);
    let (at, last) = match (cut, until) {
        (Some(cut), _) => cut,
        (None, Some(Until::Sequence(sequence))) => {
            bail!("sequence {sequence} is not in the backup, which ends with {}", end.trailer.sequence)
        }
        (None, _) => (links.len() - 1, end.trailer.sequence),
    };
    let link = &links[at];
    ensure!(link.history.contains(last), "sequence {last} is in no incarnation of the log");
    if !link.cut.holds(last, link.trailer.retained) {
        let from = link.trailer.retained;
        let file = &files[at];
        let time = time_of(file, from, open)?.map(|time| format!(", which is --until {time}ms,")).unwrap_or_default();
        bail!(
            "sequence {last} cannot be restored from {}: entries from before it were compacted since; it can be had from \
             sequence {from}{time} on",
            file.display()
        );
    }
    let Header { log, .. } = link.header;
    let (history, incarnation) = (link.history.until(last), link.history.at(log, last));
    Ok(Chain { log, history, last, incarnation, newest, files: files.to_vec() })
}

impl Chain {
    /// Returns what a log is restored from, with the incarnation that continues it: no sequence is given out again.
    pub fn restoration<'r>(
        &self,
        random: &Random,
        replay: &'r dyn Fn(&mut Receive<'_>) -> Result<()>,
    ) -> Result<Restoration<'r>> {
        let incarnation = Incarnation::beyond(self.newest, self.incarnation, self.last, random.uuid()?, random.u64()?);
        Ok(Restoration { log: self.log, history: self.history.clone(), last: self.last, incarnation, replay })
    }

    /// Reads the chain again, and hands over the entries up to the cut.
    pub fn replay(&self, open: &Open<'_>, receive: &mut Receive<'_>) -> Result<()> {
        for file in &self.files {
            let read = Reader::new(open(file)?)?.read(&mut |entries| {
                let count = entries.partition_point(|entry| entry.sequence <= self.last);
                if count == 0 { Ok(()) } else { receive(&entries[..count]) }
            });
            read.with_context(|| format!("cannot restore {}", file.display()))?;
        }
        Ok(())
    }
}

/// One backup of a chain.
struct Link {
    header: Header,
    history: History,
    trailer: Trailer,
    /// The point in time, if that is in this backup.
    cut: Cut,
}

impl Link {
    fn read(file: &Path, before: Option<&Self>, until: Option<Until>, open: &Open<'_>) -> Result<Self> {
        let mut reader = Reader::new(open(file)?)?;
        let header = *reader.header();
        follows(&header, before)?;
        let history = reader.history().clone();
        let mut cut = Cut::new(header.since);
        let trailer = reader.read(&mut |entries| {
            entries.iter().for_each(|entry| cut.visit(entry, &history, until));
            Ok(())
        })?;
        cut.end(trailer.sequence, &history, until);
        Ok(Self { header, history, trailer, cut })
    }
}

/// Checks that a backup continues the one before it.
fn follows(header: &Header, before: Option<&Link>) -> Result<()> {
    let Some(before) = before else {
        ensure!(
            header.since == 0,
            "it is an incremental backup after sequence {}; give the full one, and those in between, before it",
            header.since
        );
        return Ok(());
    };
    ensure!(before.header.log == header.log, "it is a backup of another log than the one before it");
    let end = &before.trailer;
    ensure!(
        (end.sequence, end.incarnation) == (header.since, header.incarnation),
        "it begins after sequence {} of incarnation {}, and the one before it ends with {} of {}: a backup is missing or out \
         of order",
        header.since,
        header.incarnation,
        end.sequence,
        end.incarnation
    );
    Ok(())
}

/// Returns the time of the newest entry up to a sequence.
fn time_of(file: &Path, sequence: u64, open: &Open<'_>) -> Result<Option<u64>> {
    let mut time = None;
    Reader::new(open(file)?)?.read(&mut |entries| {
        time = entries.iter().take_while(|entry| entry.sequence <= sequence).last().map(|entry| entry.time).or(time);
        Ok(())
    })?;
    Ok(time)
}
