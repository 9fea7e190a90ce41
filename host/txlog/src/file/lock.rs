//! The lock: a data directory belongs to one process at a time, and whoever comes second is told who holds it.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::disk::{is_full, sync_directory};

/// Held for the life of the log. The operating system lets go of it however the process ends, so a stale one cannot be.
///
/// What is locked is the directory of the log itself. A file can be removed, and then two processes lock two files of one
/// name; `LOCK` names the holder, and is locked too, for the sake of a kvs that wrote format 1 and knows no other lock.
pub struct Lock {
    _directory: File,
    _file: File,
}

impl Lock {
    /// Makes the data directory and the directory of the log if need be, and takes them.
    pub fn take(data: &Path) -> anyhow::Result<Self> {
        make_directory(data)?;
        let path = data.join("LOCK");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| unusable(data, error))?;
        let log = data.join("log");
        make_directory(&log)?;
        let directory = File::open(&log).map_err(|error| unusable(&log, error))?;
        for (locked, path) in [(&directory, &log), (&file, &path)] {
            match flock(locked, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(in_use(data, &file)),
                Err(error) => {
                    bail!("cannot lock {}: {error}; give a directory on a local disk with --data-dir", path.display())
                }
            }
        }
        match file.set_len(0).and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes())) {
            // A full disk must not keep the log from opening; whoever comes second is told less.
            Err(error) if !is_full(&error) => {
                return Err(error).with_context(|| format!("cannot write {}", path.display()));
            }
            _ => {}
        }
        Ok(Self { _directory: directory, _file: file })
    }
}

/// The error for whoever comes second. `file` names the holder: not in the moment before that is written down, nor
/// when the file was removed.
fn in_use(data: &Path, file: &File) -> anyhow::Error {
    let mut holder = String::new();
    let _ = file.take(32).read_to_string(&mut holder);
    let holder = holder.trim().parse::<u32>().map(|pid| format!("process {pid}"));
    anyhow::anyhow!(
        "data directory {} is in use by {}; stop it, or give another directory with --data-dir",
        data.display(),
        holder.as_deref().unwrap_or("another process")
    )
}

/// Makes a directory and sees to it that its name is durable.
pub fn make_directory(path: &Path) -> anyhow::Result<()> {
    match fs::create_dir_all(path) {
        Ok(()) => {}
        Err(error) => return Err(unusable(path, error)),
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A parent that may be entered but not read cannot be synced; its owner made the directory long ago.
    match sync_directory(parent) {
        Err(error) if error.kind() != ErrorKind::PermissionDenied => Err(unusable(path, error)),
        _ => Ok(()),
    }
}

/// One line that says why a data directory cannot be used, and what to do.
fn unusable(path: &Path, error: std::io::Error) -> anyhow::Error {
    let path = path.display();
    match error.kind() {
        ErrorKind::PermissionDenied => {
            anyhow::anyhow!(
                "data directory {path} is not writable: {error}; change its owner or mode, or give another with --data-dir"
            )
        }
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            anyhow::anyhow!("{path} is not a directory; give a directory with --data-dir")
        }
        ErrorKind::ReadOnlyFilesystem => {
            anyhow::anyhow!(
                "data directory {path} is on a read-only file system; give another directory with --data-dir"
            )
        }
        _ => anyhow::anyhow!("cannot use data directory {path}: {error}; give another directory with --data-dir"),
    }
}
