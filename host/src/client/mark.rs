//! How far a load came, in a file beside the one that it reads.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// A place in a text, and what was before it: a text that was changed there is another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Mark {
    pub line: u64,
    pub bytes: u64,
    crc32c: u32,
}

impl Mark {
    /// Goes on behind a line, whose end is with it.
    pub fn pass(&mut self, line: &[u8]) {
        self.line += 1;
        self.bytes += line.len() as u64;
        self.crc32c = crc32c::crc32c_append(self.crc32c, line);
    }
}

pub struct MarkFile {
    path: PathBuf,
    server: String,
}

#[derive(Deserialize, Serialize)]
struct Content {
    server: String,
    #[serde(flatten)]
    mark: Mark,
}

impl MarkFile {
    pub fn beside(file: &Path, server: &str) -> Self {
        Self { path: with(file, ".kvs-load"), server: server.to_owned() }
    }

    /// None when there is nothing to go on from.
    pub fn read(&self) -> Result<Option<Mark>> {
        let name = self.path.display();
        let text = match fs::read(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("{name} cannot be read"))?,
        };
        let content: Content = serde_json::from_slice(&text)
            .with_context(|| format!("{name} does not say how far a load came; load without --resume"))?;
        if content.server != self.server {
            bail!("{name} is of a load into {}, not {}; load without --resume", content.server, self.server);
        }
        Ok(Some(content.mark))
    }

    /// Replaces the mark before, whole or not at all.
    pub fn keep(&self, mark: &Mark) -> Result<()> {
        let new = with(&self.path, ".new");
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec(&Content { server: self.server.clone(), mark: *mark })?)?;
            file.sync_data()?;
            fs::rename(&new, &self.path)
        };
        let told = || {
            let name = self.path.display();
            format!("it cannot be kept how far the load came, in {name}; a file can also come through standard input")
        };
        write().with_context(told)
    }

    /// The load is done.
    pub fn remove(&self) -> Result<()> {
        fs::remove_file(&self.path).with_context(|| format!("{} cannot be removed", self.path.display()))
    }
}

fn with(file: &Path, end: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(end);
    name.into()
}
