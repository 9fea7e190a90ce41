//! The lock: a data directory belongs to one process at a time, and the error of a second one names the holder.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use kvs_runtime::Clock;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::disk::{is_full, sync_directory};

const NAME: &str = "LOCK";
/// The most that is read of it: a number, and a URL that fits in a header.
const HOLDER_BYTES: u64 = 1 << 10;
/// Limit of the wait for a holder that is ending: the kernel frees its memory, gigabytes for many keys, before it unlocks its
/// files.
const ENDING: Duration = Duration::from_secs(30);
const ENDING_POLL: Duration = Duration::from_millis(5);

/// Lock of a data directory, held for the life of the log. The operating system releases it however the process ends, so it is
/// never stale. It belongs to the open files, not to the process: one that gets their descriptors holds it too.
///
/// The directory of the log itself is locked. A file can be removed, and then two processes lock two files of one name;
/// `LOCK` names the holder, and is locked too, since a kvs that wrote format 1 knows no other lock.
pub struct Lock {
    directory: File,
    file: File,
}

impl Lock {
    /// Locks the data directory, which is created if it is missing. A holder that is ending is waited for; any other is an error.
    /// `url` is the address that standbys read from `LOCK`.
    pub fn take(data: &Path, url: Option<&str>, clock: &Clock) -> anyhow::Result<Self> {
        make_directory(data)?;
        make_directory(&data.join("log"))?;
        let begun = clock.now();
        loop {
            if let Some(lock) = Self::attempt(data, url)? {
                return Ok(lock);
            }
            let Holder { process, .. } = Holder::read(data);
            if clock.elapsed(begun) > ENDING || !process.is_some_and(is_ending) {
                let (holder, data) = (describe(process), data.display());
                bail!(
                    "data directory {data} is in use by {holder}; stop it, or give another directory with --data-dir"
                );
            }
            clock.pause(ENDING_POLL);
        }
    }

    /// Locks a data directory that exists, unless another process holds it. Changes nothing before it is locked.
    pub fn attempt(data: &Path, url: Option<&str>) -> anyhow::Result<Option<Self>> {
        let log = data.join("log");
        let directory = File::open(&log).map_err(|error| unusable(&log, error))?;
        if !lock(&directory, &log)? {
            return Ok(None);
        }
        let path = data.join(NAME);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| unusable(data, error))?;
        if !lock(&file, &path)? {
            return Ok(None);
        }
        let lock = Self { directory, file };
        lock.announce(data, url)?;
        Ok(Some(lock))
    }

    /// Names this process as the holder.
    pub(super) fn announce(&self, data: &Path, url: Option<&str>) -> anyhow::Result<()> {
        let url = url.map(|url| format!("{url}\n")).unwrap_or_default();
        let holder = format!("{}\n{url}", std::process::id());
        let mut file = &self.file;
        match file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(holder.as_bytes())) {
            // A full disk must not prevent the log from opening; the error of a second process names no holder then.
            Err(error) if !is_full(&error) => {
                Err(error).with_context(|| format!("cannot write {}", data.join(NAME).display()))
            }
            _ => Ok(()),
        }
    }

    /// Returns the descriptors that hold the lock, for another process.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.directory.as_fd(), self.file.as_fd()]
    }

    /// Returns the same lock, which is held until both are dropped.
    pub fn duplicate(&self) -> std::io::Result<Self> {
        Ok(Self { directory: self.directory.try_clone()?, file: self.file.try_clone()? })
    }

    /// Takes the descriptors of a lock that another process holds.
    pub fn from_descriptors([directory, file]: [OwnedFd; 2]) -> Self {
        Self { directory: directory.into(), file: file.into() }
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

/// Content of `LOCK`: incomplete while the holder is writing it, and empty if the file was removed.
struct Holder {
    process: Option<u32>,
    url: Option<String>,
}

impl Holder {
    fn read(data: &Path) -> Self {
        let mut text = String::new();
        let _ = File::open(data.join(NAME)).and_then(|file| file.take(HOLDER_BYTES).read_to_string(&mut text));
        let mut lines = text.split_terminator('\n');
        let process = lines.next().and_then(|pid| pid.parse().ok());
        Self { process, url: lines.next().map(str::to_owned) }
    }
}

/// Returns a name for the holder of the lock, and its URL if it announced one.
pub fn holder(data: &Path) -> (String, Option<String>) {
    let Holder { process, url } = Holder::read(data);
    (describe(process), url)
}

fn describe(process: Option<u32>) -> String {
    process.map_or_else(|| "another process".into(), |pid| format!("process {pid}"))
}

/// Whether a process has ended or is ending: it has no program any more. A process that this one cannot see, as in another
/// container, looks the same.
fn is_ending(process: u32) -> bool {
    let program = |process: &str| fs::read_link(format!("/proc/{process}/exe")).map_err(|error| error.kind());
    program("self").is_ok() && program(&process.to_string()) == Err(ErrorKind::NotFound)
}

/// Creates a directory, and makes its name durable.
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
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(String);

fn unusable(path: &Path, error: std::io::Error) -> anyhow::Error {
    let path = path.display();
    let reason = match error.kind() {
        ErrorKind::PermissionDenied => {
            format!(
                "data directory {path} is not writable: {error}; change its owner or mode, or give another with --data-dir"
            )
        }
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            format!("{path} is not a directory; give a directory with --data-dir")
        }
        ErrorKind::ReadOnlyFilesystem => {
            format!("data directory {path} is on a read-only file system; give another directory with --data-dir")
        }
        // It may pass: a shortage, or a network.
        _ => return anyhow!("cannot use data directory {path}: {error}; give another directory with --data-dir"),
    };
    Unusable(reason).into()
}
