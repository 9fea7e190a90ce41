//! Progress of an import, in a checkpoint file beside the one that it reads.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// A place in a text, and what was before it: a text that was changed there is another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Checkpoint {
    pub line: u64,
    pub bytes: u64,
    crc32c: u32,
}

impl Checkpoint {
    /// Goes on behind a line, whose end is with it.
    pub fn pass(&mut self, line: &[u8]) {
        self.line += 1;
        self.bytes += line.len() as u64;
        self.crc32c = crc32c::crc32c_append(self.crc32c, line);
    }
}

pub struct CheckpointFile {
    path: PathBuf,
    server: String,
}

#[derive(Deserialize, Serialize)]
struct Content {
    server: String,
    #[serde(flatten)]
    mark: Checkpoint,
}

impl CheckpointFile {
    pub fn beside(file: &Path, server: &str) -> Self {
        Self { path: with(file, ".kvs-import"), server: server.to_owned() }
    }

    /// None when there is nothing to go on from.
    pub fn read(&self) -> Result<Option<Checkpoint>> {
        let name = self.path.display();
        let text = match fs::read(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("{name} cannot be read"))?,
        };
        let content: Content = serde_json::from_slice(&text)
            .with_context(|| format!("{name} is not a checkpoint of an import; import without --resume"))?;
        if content.server != self.server {
            bail!("{name} is of an import into {}, not {}; import without --resume", content.server, self.server);
        }
        Ok(Some(content.mark))
    }

    /// Replaces the checkpoint before, whole or not at all.
    pub fn keep(&self, mark: &Checkpoint) -> Result<()> {
        let new = with(&self.path, ".new");
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec(&Content { server: self.server.clone(), mark: *mark })?)?;
            file.sync_data()?;
            fs::rename(&new, &self.path)
        };
        let told = || {
            let name = self.path.display();
            format!("cannot write the checkpoint {name}; without one, read the file through standard input")
        };
        write().with_context(told)
    }

    /// Removes the checkpoint of a finished import.
    pub fn remove(&self) -> Result<()> {
        fs::remove_file(&self.path).with_context(|| format!("{} cannot be removed", self.path.display()))
    }
}

fn with(file: &Path, end: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(end);
    name.into()
}
