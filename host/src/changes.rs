//! Whether files have changed: certificates, tokens and guests are all read again when they have.
//!
//! Files are polled: unlike notifications of the system this also finds symbolic links that point to another directory, as on
//! container platforms, and changes on network file systems.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

/// Interval between two looks at the files.
pub const LOOK: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub struct Changes {
    files: Vec<PathBuf>,
    /// The files as they were when they were last read, and as they were when last looked at.
    read: Marks,
    looked: Marks,
}

/// Distinguishes one state of the files from another.
type Marks = Vec<Option<(u64, u64, i64, i64, u64)>>;

impl Changes {
    /// Of files that are about to be read.
    pub fn of(files: Vec<PathBuf>) -> Self {
        let read = marks(&files);
        Self { files, looked: read.clone(), read }
    }

    /// Whether the files are others than those that were read, and have been for a while: who replaces two files does it
    /// one after the other, and a large one is written in pieces.
    pub fn settled(&mut self) -> bool {
        let now = marks(&self.files);
        let settled = now == self.looked;
        self.looked = now;
        settled && self.looked != self.read
    }

    /// They are about to be read. To be said before, so that a change in between is seen as one.
    pub fn reading(&mut self) {
        self.read = marks(&self.files);
    }

    /// They were not read after all, and are to be read at the next look.
    pub fn unread(&mut self) {
        self.read.clear();
    }
}

fn marks(files: &[PathBuf]) -> Marks {
    let mark = |file: &PathBuf| {
        let metadata = fs::metadata(file).ok()?;
        Some((metadata.dev(), metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len()))
    };
    files.iter().map(mark).collect()
}
