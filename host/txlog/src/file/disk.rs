//! The disk: what the log asks of a directory and of the files in it, small enough that a test can stand in for it.
//!
//! Owns: the calls to the operating system. Must never know: what the bytes mean.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::UNIX_EPOCH;

#[cfg(target_os = "linux")]
use rustix::fs::{Advice, FallocateFlags};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::identity::Identity;

/// One flat directory. A name made, renamed or removed is certain only after [`Disk::sync`].
pub trait Disk: Send + Sync {
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes an empty file to read and write; one of that name is emptied.
    fn create(&self, name: &str) -> io::Result<Arc<dyn File>>;
    fn open(&self, name: &str) -> io::Result<Arc<dyn File>>;
    /// Replaces `to`, at once and whole.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes names durable, not what is in the files.
    fn sync(&self) -> io::Result<()>;
}

/// Bytes at offsets; nothing here appends. What was written is certain only after [`File::sync`].
pub trait File: Send + Sync {
    fn size(&self) -> io::Result<u64>;
    /// Fills the buffer, or fails.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Takes the space that a file of this size needs, so that writing within it cannot meet a full disk.
    fn allocate(&self, size: u64) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
    /// Drops what the operating system holds of the file in memory and believes to be on disk: what is read afterwards
    /// comes from the disk itself. After a failed sync, Linux marks pages as clean that never reached it.
    fn forget_cached(&self) -> io::Result<()>;
    /// What the file system knows the file by, and a copy of it by not.
    fn identity(&self) -> io::Result<Identity>;
}

/// A real directory.
pub struct Directory {
    path: PathBuf,
    /// Opened at the first sync and kept: a later one needs no descriptor, which there may be none of.
    opened: OnceLock<fs::File>,
}

impl Directory {
    pub fn new(path: PathBuf) -> Self {
        Self { path, opened: OnceLock::new() }
    }

    /// Returns an error if the path has another directory than the first sync, or none: what is written there would not be found
    /// with the rest.
    fn check(&self) -> io::Result<()> {
        let Some(opened) = self.opened.get() else { return Ok(()) };
        let place = |metadata: &fs::Metadata| (metadata.dev(), metadata.ino());
        let error = match fs::metadata(&self.path) {
            Ok(found) if place(&found) == place(&opened.metadata()?) => return Ok(()),
            Ok(_) => "it is another directory",
            Err(error) if error.kind() == io::ErrorKind::NotFound => "it is gone",
            Err(error) => return Err(naming("stat", &self.path, error)),
        };
        let reason = format!(
            "{} was removed or replaced while the log was open ({error}); put the directory back, or restore a backup",
            self.path.display()
        );
        Err(io::Error::new(io::ErrorKind::NotFound, reason))
    }

    fn file(&self, name: &str, file: io::Result<fs::File>) -> io::Result<Arc<dyn File>> {
        let path = self.path.join(name);
        let file = file.map_err(|error| naming("open", &path, error))?;
        Ok(Arc::new(RealFile { file, path }))
    }
}

impl Disk for Directory {
    fn list(&self) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(&self.path).map_err(|error| naming("read directory", &self.path, error))?;
        // A name that is not UTF-8 cannot be one of ours.
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        self.check()?;
        let path = self.path.join(name);
        self.file(name, fs::File::options().read(true).write(true).create(true).truncate(true).open(path))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn File>> {
        self.check()?;
        self.file(name, fs::File::options().read(true).write(true).open(self.path.join(name)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.check()?;
        let from = self.path.join(from);
        fs::rename(&from, self.path.join(to)).map_err(|error| naming("rename", &from, error))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.check()?;
        let path = self.path.join(name);
        fs::remove_file(&path).map_err(|error| naming("remove", &path, error))
    }

    fn sync(&self) -> io::Result<()> {
        let opened = match self.opened.get() {
            Some(opened) => opened,
            None => {
                let opened = fs::File::open(&self.path).map_err(|error| naming("open", &self.path, error))?;
                self.opened.get_or_init(|| opened)
            }
        };
        opened.sync_all().map_err(|error| sync_failed("sync", &self.path, error))
    }
}

/// Makes the names in a directory durable.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    fs::File::open(path).and_then(|directory| directory.sync_all()).map_err(|error| naming("sync", path, error))
}

struct RealFile {
    file: fs::File,
    path: PathBuf,
}

impl File for RealFile {
    fn size(&self) -> io::Result<u64> {
        self.file.metadata().map(|metadata| metadata.len()).map_err(|error| naming("stat", &self.path, error))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|error| naming("read", &self.path, error))
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|error| naming("write", &self.path, error))
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        match rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, size)) {
            // A file system without it: the zeros that are written next take the space all the same.
            Err(Errno::OPNOTSUPP) => {}
            result => return result.map_err(|error| naming("allocate", &self.path, error.into())),
        }
        self.file.set_len(size).map_err(|error| naming("allocate", &self.path, error))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data().map_err(|error| sync_failed("fdatasync", &self.path, error))
    }

    fn forget_cached(&self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed)
            .map_err(|error| naming("fadvise", &self.path, error.into()))?;
        Ok(())
    }

    fn identity(&self) -> io::Result<Identity> {
        let metadata = self.file.metadata().map_err(|error| naming("stat", &self.path, error))?;
        // Not every file system keeps it.
        let born = metadata.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Ok(Identity { inode: metadata.ino(), born: born.map_or(0, |since| since.as_nanos() as u64) })
    }
}

/// Returns the number of files that the process may have open.
pub fn open_files() -> u64 {
    // None means unlimited.
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Whether an error says that there is no room. It can come from any call that needs some, even from a sync.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether an error says that something is short that there can be more of later: descriptors or memory. It says nothing
/// about the disk, and never comes from a sync.
pub fn is_shortage(error: &io::Error) -> bool {
    // std has no kind for most of these.
    let errno = Errno::from_io_error(error);
    let is_errno = matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN));
    is_errno || error.kind() == io::ErrorKind::WouldBlock
}

/// The error of a call says on which file it failed, and what helps where that is known; its kind, by which callers
/// decide, stays.
fn naming(call: &str, path: &Path, error: io::Error) -> io::Error {
    let (kind, help) = match error.kind() {
        _ if is_shortage(&error) => (io::ErrorKind::WouldBlock, ""),
        kind @ io::ErrorKind::PermissionDenied => (kind, "; change its owner or mode"),
        kind => (kind, ""),
    };
    io::Error::new(kind, format!("{call} {}: {error}{help}", path.display()))
}

/// The error of a sync, after which nothing is certain whatever the reason: it is no shortage.
fn sync_failed(call: &str, path: &Path, error: io::Error) -> io::Error {
    let named = naming(call, path, error);
    if is_shortage(&named) { io::Error::other(named) } else { named }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shortages_differ_from_failures_and_syncs_have_none() {
        let path = Path::new("file");
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::AGAIN] {
            let error = naming("open", path, errno.into());
            assert!(is_shortage(&error) && !is_full(&error) && error.to_string().starts_with("open file: "), "{error}");
            assert!(!is_shortage(&sync_failed("sync", path, errno.into())), "{errno}");
        }
        for errno in [Errno::IO, Errno::NOSPC, Errno::NOENT, Errno::ROFS] {
            assert!(!is_shortage(&naming("open", path, errno.into())), "{errno}");
        }
    }

    #[test]
    fn removed_or_replaced_directory_is_an_error() {
        let above = tempfile::tempdir().expect("a temporary directory can be made");
        let path = above.path().join("log");
        fs::create_dir(&path).expect("it is new");
        let disk = Directory::new(path.clone());
        disk.create("file").expect("it is there");
        disk.sync().expect("it is there");
        let errors = || {
            let results = [
                disk.create("file").map(drop),
                disk.open("file").map(drop),
                disk.rename("file", "other"),
                disk.remove("other"),
            ];
            results.map(|result| result.err().map(|error| error.to_string()))
        };
        assert_eq!(errors(), [const { None }; 4]);
        disk.create("file").expect("it is there");
        let aside = above.path().join("aside");
        fs::rename(&path, &aside).expect("it can be moved");
        let all_say = |reason: &str| errors().iter().flatten().filter(|error| error.contains(reason)).count() == 4;
        assert!(all_say("it is gone"), "{:?}", errors());
        fs::create_dir(&path).expect("nothing is there");
        assert!(all_say("it is another directory"), "{:?}", errors());
        fs::remove_dir(&path).and_then(|()| fs::rename(&aside, &path)).expect("it can be put back");
        assert_eq!(errors(), [const { None }; 4]);
    }
}
