//! A segment file of which only the header was read.
//!
//! Owns: the file of a name between two reads. A log can have more segments than a process can have open files, so most are
//! closed after their header was read, and opened again when they are read.

use std::io::ErrorKind;
use std::sync::Arc;

use anyhow::{bail, ensure};
use uuid::Uuid;

use super::Home;
use super::disk::File;
use super::segment::{Compacted, HEAD_BYTES, Head, Numbers};

/// A segment file with a valid header.
pub struct Found {
    pub name: String,
    /// None after [`Found::closed`].
    file: Option<Arc<dyn File>>,
    pub size: u64,
    pub version: u32,
    pub log: Uuid,
    pub numbers: Numbers,
    pub compacted: Option<Compacted>,
}

/// The primary has compacted a segment since its header was read.
#[derive(Debug, thiserror::Error)]
#[error("{0} was replaced while the log was read")]
pub struct Replaced(String);

impl Found {
    /// Opens a segment, and drops its cached pages: after a failed sync they may differ from the disk.
    pub fn open(home: &Home, numbers: Numbers) -> anyhow::Result<Self> {
        let file = home.disk.open(&numbers.file_name())?;
        file.forget_cached()?;
        Self::read(home, numbers, file)
    }

    /// Opens a segment without that: one that another process writes, and has synced as far as it is read.
    pub fn open_shared(home: &Home, numbers: Numbers) -> anyhow::Result<Self> {
        let file = home.disk.open(&numbers.file_name())?;
        Self::read(home, numbers, file)
    }

    fn read(home: &Home, numbers: Numbers, file: Arc<dyn File>) -> anyhow::Result<Self> {
        let name = numbers.file_name();
        let size = file.size()?;
        if size < HEAD_BYTES {
            return Err(home.damage(&name, size, "it is truncated"));
        }
        let mut head = [0; HEAD_BYTES as usize];
        file.read_at(&mut head, 0)?;
        let head = Head::decode(&head).map_err(|what| home.damage(&name, 0, what))?;
        if head.numbers != numbers {
            bail!("{} was named {}; rename it back", home.path(&name).display(), head.numbers.file_name());
        }
        if size < head.size {
            return Err(home.damage(&name, size, "it is truncated"));
        }
        let Head { version, log, compacted, .. } = head;
        Ok(Self { name, file: Some(file), size, version, log, numbers, compacted })
    }

    /// Closes the file.
    pub fn closed(self) -> Self {
        Self { file: None, ..self }
    }

    /// Returns the file, and opens it if it was closed. The error is [`Replaced`] if the name has another file since, or none.
    pub fn file(&self, home: &Home) -> anyhow::Result<Arc<dyn File>> {
        if let Some(file) = &self.file {
            return Ok(Arc::clone(file));
        }
        let replaced = || Replaced(home.path(&self.name).display().to_string());
        let file = match home.disk.open(&self.name) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(replaced().into()),
            file => file?,
        };
        let found = Self::read(home, self.numbers, Arc::clone(&file))?;
        // A file that is written on has the same header all the time, and the header of a compacted one depends on each
        // entry in it.
        ensure!((found.log, found.compacted) == (self.log, self.compacted), replaced());
        Ok(file)
    }
}
