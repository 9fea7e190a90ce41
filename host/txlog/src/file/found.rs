//! A segment file of which only the header was read.

use std::sync::Arc;

use anyhow::bail;
use uuid::Uuid;

use super::Home;
use super::disk::File;
use super::segment::{Compacted, HEAD_BYTES, Head, Numbers};

/// An open segment file with a valid header.
pub struct Found {
    pub name: String,
    pub file: Arc<dyn File>,
    pub size: u64,
    pub version: u32,
    pub log: Uuid,
    pub numbers: Numbers,
    pub compacted: Option<Compacted>,
}

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
        Ok(Self { name, file, size, version, log, numbers, compacted })
    }
}
