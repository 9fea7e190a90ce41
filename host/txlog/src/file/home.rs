//! The surroundings of the log: the directory, how errors speak of it, and the rest of what is given from outside.

use std::path::PathBuf;
use std::sync::Arc;

use kvs_runtime::Env;

use super::disk::Disk;

#[derive(Clone)]
pub struct Home {
    pub disk: Arc<dyn Disk>,
    pub data: PathBuf,
    pub env: Env,
}

/// What is on disk is not what was written there. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[error("{} is damaged at byte {offset}: {what}; `kvs txlog verify --data-dir {}` lists all damage; restore a backup, or start in an empty directory", file.display(), data.display())]
pub struct Damage {
    pub file: PathBuf,
    pub offset: u64,
    pub what: String,
    data: PathBuf,
}

/// A frame is not damaged, and this binary does not read it all the same.
#[derive(Debug, thiserror::Error)]
#[error("{} at byte {offset}: {why}", file.display())]
pub struct Unsupported {
    file: PathBuf,
    offset: u64,
    why: String,
}

impl Home {
    /// Of a file of the log; of their directory when the name is empty.
    pub fn path(&self, name: &str) -> PathBuf {
        let log = self.data.join("log");
        if name.is_empty() { log } else { log.join(name) }
    }

    pub fn damage(&self, name: &str, offset: u64, what: impl Into<String>) -> anyhow::Error {
        Damage { file: self.path(name), offset, what: what.into(), data: self.data.clone() }.into()
    }

    pub fn refused(&self, name: &str, offset: u64, why: &str) -> anyhow::Error {
        Unsupported { file: self.path(name), offset, why: why.to_owned() }.into()
    }
}
