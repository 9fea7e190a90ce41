//! The watermark file: the log that a data directory was used with, and the newest frame of it that was durable.
//!
//! An engine that has lost the end of the log, in a power cut or because an empty replica leads, answers like one that never
//! had it. Without this file a server would give sequences out again that clients have seen.
//!
//! Owns: the file. Must never know: what is done about a loss.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use uuid::Uuid;

/// A frame that was durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// UUID of its log.
    pub log: Uuid,
    /// Its position; 0 if none is known.
    pub position: u64,
    /// The newest sequence up to it.
    pub sequence: u64,
}

impl Mark {
    /// Returns the mark of a log of which no frame is known.
    pub fn new(log: Uuid) -> Self {
        Self { log, position: 0, sequence: 0 }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let log = words.next()?.parse().ok()?;
        let mut number = || words.next()?.parse().ok();
        Some(Self { log, position: number()?, sequence: number()? })
    }
}

pub struct MarkFile {
    path: PathBuf,
    /// Newest mark that was written.
    written: Mutex<Option<Mark>>,
}

impl MarkFile {
    pub fn new(path: PathBuf) -> Self {
        Self { path, written: Mutex::default() }
    }

    /// Returns the mark; None if the directory was not used with a log yet.
    pub fn read(&self) -> Result<Option<Mark>> {
        let path = self.path.display();
        match fs::read_to_string(&self.path) {
            Ok(text) => {
                let mark = Mark::parse(&text);
                Ok(Some(mark.with_context(|| format!("{path} does not contain a UUID, a position and a sequence"))?))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {path}")),
        }
    }

    /// Writes a mark, unless it is there already. Synced: a file that a power cut has emptied would prevent the next start.
    pub fn write(&self, mark: Mark) -> Result<()> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if written.is_some_and(|written| written.position >= mark.position) {
            return Ok(());
        }
        let Mark { log, position, sequence } = mark;
        let temporary = self.path.with_extension("tmp");
        let directory = self.path.parent().unwrap_or(Path::new("."));
        let write = || -> io::Result<()> {
            // During an upgrade two processes write it.
            let directory = File::open(directory)?;
            flock(&directory, FlockOperation::LockExclusive)?;
            let mut file = File::create(&temporary)?;
            file.write_all(format!("{log} {position} {sequence}\n").as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &self.path)
        };
        write().with_context(|| format!("cannot write {}", self.path.display()))?;
        *written = Some(mark);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mark_is_read_back_and_never_goes_back() {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let path = directory.path().join("mark");
        let file = MarkFile::new(path.clone());
        let mark = |position| Mark { log: Uuid::from_u128(7), position, sequence: position * 10 };
        assert_eq!(file.read().unwrap(), None);
        for (position, expected) in [(0, 0), (5, 5), (4, 5), (6, 6)] {
            file.write(mark(position)).unwrap();
            assert_eq!(file.read().unwrap(), Some(mark(expected)));
        }
        fs::write(&path, "").unwrap();
        let error = file.read().expect_err("it is empty").to_string();
        assert!(error.contains("mark does not contain a UUID"), "{error}");
    }
}
