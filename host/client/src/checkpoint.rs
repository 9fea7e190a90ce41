//! Checkpoint of an import, in a file beside the imported one.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// A position in the imported file, with a checksum of everything before it, to detect a changed file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Checkpoint {
    pub line: u64,
    pub bytes: u64,
    crc32c: u32,
}

impl Checkpoint {
    /// Advances by a line, including its newline.
    pub fn advance(&mut self, line: &[u8]) {
        self.line += 1;
        self.bytes += line.len() as u64;
        self.crc32c = crc32c::crc32c_append(self.crc32c, line);
    }
}

/// The file with the checkpoint of an import.
pub struct CheckpointFile {
    path: PathBuf,
    server: String,
}

#[derive(Deserialize, Serialize)]
struct Content {
    server: String,
    #[serde(flatten)]
    checkpoint: Checkpoint,
}

impl CheckpointFile {
    pub fn beside(file: &Path, server: &str) -> Self {
        Self { path: with(file, ".kvs-import"), server: server.to_owned() }
    }

    /// Reads the checkpoint, None if there is none.
    pub fn read(&self) -> Result<Option<Checkpoint>> {
        let name = self.path.display();
        let text = match fs::read(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("cannot read {name}"))?,
        };
        let content: Content = serde_json::from_slice(&text)
            .with_context(|| format!("{name} is not a checkpoint of an import; import without --resume"))?;
        if content.server != self.server {
            bail!("{name} belongs to an import into {}, not {}; import without --resume", content.server, self.server);
        }
        Ok(Some(content.checkpoint))
    }

    /// Replaces the checkpoint atomically.
    pub fn save(&self, checkpoint: &Checkpoint) -> Result<()> {
        let new = with(&self.path, ".new");
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec(&Content { server: self.server.clone(), checkpoint: *checkpoint })?)?;
            file.sync_data()?;
            fs::rename(&new, &self.path)
        };
        let context = || {
            let name = self.path.display();
            format!("cannot write the checkpoint {name}; without one, read the file through standard input")
        };
        write().with_context(context)
    }

    /// Removes the checkpoint of a finished import.
    pub fn remove(&self) -> Result<()> {
        fs::remove_file(&self.path).with_context(|| format!("cannot remove {}", self.path.display()))
    }
}

fn with(file: &Path, end: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(end);
    name.into()
}
