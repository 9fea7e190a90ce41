//! The lock: a data directory belongs to one process at a time, and whoever comes second is told who holds it.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::disk::{is_full, sync_directory};

const NAME: &str = "LOCK";
/// The most that is read of it: a number, and a URL that fits in a header.
const HOLDER_BYTES: u64 = 1 << 10;

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
    /// `url` is what standbys are told of where it serves clients.
    pub fn take(data: &Path, url: Option<&str>) -> anyhow::Result<Self> {
        make_directory(data)?;
        make_directory(&data.join("log"))?;
        Self::attempt(data, url)?.ok_or_else(|| {
            let (holder, _) = holder(data);
            let data = data.display();
            anyhow!("data directory {data} is in use by {holder}; stop it, or give another directory with --data-dir")
        })
    }

    /// Takes directories that are there, unless another process has them. Until they are taken nothing is changed in them.
    pub fn attempt(data: &Path, url: Option<&str>) -> anyhow::Result<Option<Self>> {
        let log = data.join("log");
        let directory = File::open(&log).map_err(|error| unusable(&log, error))?;
        if !lock(&directory, &log)? {
            return Ok(None);
        }
        let path = data.join(NAME);
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| unusable(data, error))?;
        if !lock(&file, &path)? {
            return Ok(None);
        }
        let url = url.map(|url| format!("{url}\n")).unwrap_or_default();
        let holder = format!("{}\n{url}", std::process::id());
        match file.set_len(0).and_then(|()| file.write_all(holder.as_bytes())) {
            // A full disk must not keep the log from opening; whoever comes second is told less.
            Err(error) if !is_full(&error) => {
                return Err(error).with_context(|| format!("cannot write {}", path.display()));
            }
            _ => {}
        }
        Ok(Some(Self { _directory: directory, _file: file }))
    }
}

/// False where another process has locked it.
fn lock(file: &File, path: &Path) -> anyhow::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => {
            bail!("cannot lock {}: {error}; give a directory on a local disk with --data-dir", path.display())
        }
    }
}

/// The process that has the directory, as `LOCK` names it, and its URL: not in the moment before that is written down, nor when
/// the file was removed.
pub fn holder(data: &Path) -> (String, Option<String>) {
    let mut text = String::new();
    let _ = File::open(data.join(NAME)).and_then(|file| file.take(HOLDER_BYTES).read_to_string(&mut text));
    let mut lines = text.split_terminator('\n');
    let holder = lines.next().and_then(|pid| pid.parse::<u32>().ok()).map(|pid| format!("process {pid}"));
    (holder.unwrap_or_else(|| "another process".into()), lines.next().map(str::to_owned))
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
            anyhow!(
                "data directory {path} is not writable: {error}; change its owner or mode, or give another with --data-dir"
            )
        }
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            anyhow!("{path} is not a directory; give a directory with --data-dir")
        }
        ErrorKind::ReadOnlyFilesystem => {
            anyhow!("data directory {path} is on a read-only file system; give another directory with --data-dir")
        }
        _ => anyhow!("cannot use data directory {path}: {error}; give another directory with --data-dir"),
    }
}
