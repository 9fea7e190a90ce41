//! The local copy of the log: its frames as the engine has them, verified, in a file of the data directory.
//!
//! A file begins with the frames of a snapshot, if its name says so, and continues with those of the log, each after the one
//! before it. Nothing else is in it: a frame says how long it is, and names the checksum of its predecessor. What does not
//! follow, and all after it, is not used. A copy may lag behind the log, which is durable in the engine.
//!
//! Owns: the file. Must never know: which frames are copied when.

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::future::ready;
use std::io::{self, BufReader, Read as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[cfg(feature = "nats")]
use anyhow::ensure;
use anyhow::{Context, Result};
use bytes::Bytes;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
#[cfg(feature = "nats")]
use tokio::runtime::Builder;
use uuid::Uuid;

use super::engine::{Call, Ends, Engine, Put, ReadError};
use super::frame::{Kind, Snapshot, Tip};
#[cfg(feature = "nats")]
use super::mark::Mark;
#[cfg(feature = "nats")]
use super::{ClusterLog, Options, Stored};
use crate::file::frame::{HEAD_BYTES, Head};

/// Directory of copies in the data directory.
pub const DIRECTORY: &str = "txlog-copy";
/// Suffix of a copy that is not complete yet, and of one that the log does not continue.
const INCOMPLETE: &str = "tmp";
const ASIDE: &str = "old";
/// Maximum number of frames of one read, and their size unless one is larger.
const READ_FRAMES: usize = 256;
const READ_BYTES: u64 = 4 << 20;
/// Size of reads while a copy is verified.
const BUFFER_BYTES: usize = 1 << 20;

const READ_ONLY: &str = "a copy is only read";

/// The directory of the copies of one server.
pub struct Directory {
    path: PathBuf,
    /// Held while this process writes a copy: during an upgrade there are two processes.
    lock: Mutex<Option<File>>,
}

/// A copy of a log.
pub struct Copy {
    path: PathBuf,
    log: Uuid,
    file: File,
    /// Position of the snapshot that it begins with; 0 without one.
    base: u64,
    contents: Mutex<Contents>,
}

/// What of a copy was verified.
#[derive(Default)]
struct Contents {
    /// The snapshot that the copy begins with, and the number of its frames.
    snapshot: Option<Snapshot>,
    snapshot_frames: usize,
    /// Offset after each frame.
    ends: Vec<u64>,
    /// The end of the log as far as it was copied, or of the snapshot while that is not complete.
    tip: Tip,
    /// Offset and reason of what does not follow.
    damage: Option<String>,
}

impl Contents {
    fn end(&self) -> u64 {
        self.ends.last().copied().unwrap_or_default()
    }

    /// Offset at which a frame begins.
    fn begin_of(&self, index: usize) -> u64 {
        index.checked_sub(1).map_or(0, |before| self.ends[before])
    }

    /// Takes in the next frame. The error says why it does not follow.
    fn accept(&mut self, log: Uuid, base: u64, bytes: &[u8]) -> Result<(), &'static str> {
        let is_in_snapshot = base > 0 && self.snapshot.is_none();
        match self.tip.accept(log, bytes)? {
            Kind::Snapshot(snapshot) if is_in_snapshot && snapshot.tip.position == base => {
                self.snapshot_frames = self.ends.len() + 1;
                self.tip = snapshot.tip;
                self.snapshot = Some(snapshot);
            }
            Kind::Snapshot(_) => return Err("it ends another snapshot than that of the copy"),
            _ => {}
        }
        self.ends.push(self.end() + bytes.len() as u64);
        Ok(())
    }
}

impl Directory {
    pub fn new(data: &Path) -> Self {
        Self { path: data.join(DIRECTORY), lock: Mutex::default() }
    }

    /// Makes the directory, and locks it. False if another process has it.
    pub fn lock(&self) -> Result<bool> {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if lock.is_some() {
            return Ok(true);
        }
        let open = || -> io::Result<Option<File>> {
            fs::create_dir_all(&self.path)?;
            let directory = File::open(&self.path)?;
            match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => Ok(Some(directory)),
                Err(Errno::WOULDBLOCK) => Ok(None),
                Err(error) => Err(error.into()),
            }
        };
        *lock = open().with_context(|| format!("cannot open {}", self.path.display()))?;
        Ok(lock.is_some())
    }

    /// Opens the newest copy of a log that can be used.
    pub fn open(&self, log: Uuid) -> Result<Option<Copy>> {
        for (_, position, path) in self.list()?.into_iter().filter(|(of, ..)| *of == log) {
            let copy = Copy::open(path, log, position)?;
            if copy.tip().position > 0 {
                return Ok(Some(copy));
            }
        }
        Ok(None)
    }

    /// Lists the copies, of the newest snapshot first.
    pub fn list(&self) -> Result<Vec<(Uuid, u64, PathBuf)>> {
        let files = match fs::read_dir(&self.path) {
            Ok(files) => files,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", self.path.display())),
        };
        let mut copies = Vec::new();
        for file in files {
            let path = file.with_context(|| format!("cannot read {}", self.path.display()))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let parsed = name.and_then(|name| name.rsplit_once('-'));
            if let Some((log, position)) = parsed
                && let (Ok(log), Ok(position)) = (log.parse::<Uuid>(), position.parse::<u64>())
            {
                copies.push((log, position, path));
            }
        }
        copies.sort_by_key(|(_, position, _)| std::cmp::Reverse(*position));
        Ok(copies)
    }

    /// Creates a copy that begins with the snapshot of a position, or with the first frame. It is not used until it is complete.
    pub fn create(&self, log: Uuid, base: u64) -> Result<Copy> {
        let path = self.path.join(format!("{log}-{base}"));
        let incomplete = with_suffix(&path, INCOMPLETE);
        self.remove_incomplete(log).with_context(|| format!("cannot remove files of {}", self.path.display()))?;
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&incomplete);
        let file = file.with_context(|| format!("cannot create {}", incomplete.display()))?;
        Ok(Copy { path, log, file, base, contents: Mutex::default() })
    }

    /// Uses a copy that is complete from now on, instead of all others of its log.
    pub fn complete(&self, copy: &Copy) -> Result<()> {
        let complete = || -> Result<()> {
            copy.file.sync_all()?;
            fs::rename(with_suffix(&copy.path, INCOMPLETE), &copy.path)?;
            File::open(&self.path)?.sync_all()?;
            for (log, _, path) in self.list()? {
                if log == copy.log && path != copy.path {
                    fs::remove_file(path)?;
                }
            }
            Ok(())
        };
        complete().with_context(|| format!("cannot complete {}", copy.path.display()))
    }

    /// Removes what processes left that were killed.
    fn remove_incomplete(&self, log: Uuid) -> io::Result<()> {
        let (begin, end) = (format!("{log}-"), format!(".{INCOMPLETE}"));
        for file in fs::read_dir(&self.path)? {
            let file = file?;
            if file.file_name().to_str().is_some_and(|name| name.starts_with(&begin) && name.ends_with(&end)) {
                fs::remove_file(file.path())?;
            }
        }
        Ok(())
    }

    /// Removes a copy that will not become complete.
    pub fn abandon(&self, copy: &Copy) {
        let _ = fs::remove_file(with_suffix(&copy.path, INCOMPLETE));
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".");
    name.push(suffix);
    name.into()
}

impl Copy {
    /// Opens a copy, and verifies it up to the first frame that does not follow.
    fn open(path: PathBuf, log: Uuid, base: u64) -> Result<Self> {
        let read = || -> io::Result<(File, Contents)> {
            // A copy can be exported from a file system that is only readable.
            let file = OpenOptions::new().read(true).write(true).open(&path).or_else(|_| File::open(&path))?;
            let contents = verified(&file, log, base)?;
            Ok((file, contents))
        };
        let (file, contents) = read().with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self { path, log, file, base, contents: Mutex::new(contents) })
    }

    /// Drops what does not follow, so that the copy can be continued.
    pub fn truncate(&self) -> Result<()> {
        let mut contents = self.lock();
        self.file.set_len(contents.end()).with_context(|| format!("cannot truncate {}", self.path.display()))?;
        contents.damage = None;
        Ok(())
    }

    /// Moves a copy aside that the log does not continue, and returns its new name.
    pub fn set_aside(&self) -> Result<PathBuf> {
        let aside = with_suffix(&self.path, ASIDE);
        fs::rename(&self.path, &aside).with_context(|| format!("cannot rename {}", self.path.display()))?;
        Ok(aside)
    }

    /// Appends frames. After an error the copy must be opened again.
    pub fn append(&self, frames: &[Bytes]) -> Result<()> {
        let mut contents = self.lock();
        let (begin, mut bytes) = (contents.end(), Vec::new());
        for frame in frames {
            contents.accept(self.log, self.base, frame).map_err(anyhow::Error::msg)?;
            bytes.extend_from_slice(frame);
        }
        self.file.write_all_at(&bytes, begin).with_context(|| format!("cannot write {}", self.path.display()))
    }

    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().with_context(|| format!("cannot sync {}", self.path.display()))
    }

    /// Returns the end of the log as far as it was copied; the default one in a copy that cannot be used.
    pub fn tip(&self) -> Tip {
        let contents = self.lock();
        if self.base > 0 && contents.snapshot.is_none() { Tip::default() } else { contents.tip }
    }

    /// Returns the snapshot that the copy begins with.
    pub fn snapshot(&self) -> Option<Snapshot> {
        self.lock().snapshot.clone()
    }

    /// Returns the bytes of the snapshot, and of the log after it.
    pub fn sizes(&self) -> (u64, u64) {
        let contents = self.lock();
        let snapshot = contents.begin_of(contents.snapshot_frames);
        (snapshot, contents.end() - snapshot)
    }

    /// Returns what is damaged, and where.
    pub fn damage(&self) -> Option<String> {
        self.lock().damage.as_ref().map(|damage| format!("{} {damage}", self.path.display()))
    }

    pub fn name(&self) -> String {
        format!("copy {}", self.path.display())
    }

    /// Returns the position of the snapshot that it begins with; 0 without one.
    pub fn base(&self) -> u64 {
        self.base
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        // Every change under this lock is whole.
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads frames from an index on, before another one.
    fn read(&self, from: usize, before: usize) -> io::Result<Vec<Bytes>> {
        let (begin, ends) = {
            let contents = self.lock();
            let begin = contents.begin_of(from);
            let frames = &contents.ends[from..before.min(from + READ_FRAMES)];
            let count = frames.partition_point(|end| end - begin <= READ_BYTES).max(1).min(frames.len());
            (begin, frames[..count].to_vec())
        };
        let Some(end) = ends.last() else { return Ok(Vec::new()) };
        let mut bytes = vec![0; (end - begin) as usize];
        self.file.read_exact_at(&mut bytes, begin)?;
        let mut rest = Bytes::from(bytes);
        let mut at = begin;
        Ok(ends.iter().map(|end| rest.split_to((end - std::mem::replace(&mut at, *end)) as usize)).collect())
    }
}

/// Reads the frames of a file, up to the first that does not follow.
fn verified(file: &File, log: Uuid, base: u64) -> io::Result<Contents> {
    let size = file.metadata()?.len();
    let mut input = BufReader::with_capacity(BUFFER_BYTES, file);
    let mut contents = Contents::default();
    let mut bytes = Vec::new();
    loop {
        let rest = size - contents.end();
        if rest < HEAD_BYTES as u64 {
            // Cut off between two writes, as all that is not synced can be.
            return Ok(contents);
        }
        bytes.resize(HEAD_BYTES, 0);
        input.read_exact(&mut bytes)?;
        let reason = match Head::decode(&bytes, log) {
            None => "it is not the header of a frame of this log",
            Some(head) if head.total() > rest => return Ok(contents),
            Some(head) => {
                bytes.resize(head.total() as usize, 0);
                input.read_exact(&mut bytes[HEAD_BYTES..])?;
                match contents.accept(log, base, &bytes) {
                    Ok(()) => continue,
                    Err(reason) => reason,
                }
            }
        };
        let at = contents.end();
        contents.damage = Some(format!("is damaged at byte {at}, and {rest} bytes are not used: {reason}"));
        return Ok(contents);
    }
}

/// The snapshot of a copy, or the log after it, as an engine that is only read.
pub struct Part {
    pub copy: Arc<Copy>,
    pub is_snapshot: bool,
}

impl Part {
    /// Returns the position before the first frame, and the indexes of the first frame and after the last.
    fn bounds(&self) -> (u64, usize, usize) {
        let contents = self.copy.lock();
        match self.is_snapshot {
            true => (0, 0, contents.snapshot_frames),
            false => (self.copy.base, contents.snapshot_frames, contents.ends.len()),
        }
    }
}

impl Engine for Part {
    fn put(&self, _: u64, _: Bytes) -> Call<'static, Put> {
        Box::pin(ready(Put::Unknown(READ_ONLY.into())))
    }

    fn read(&self, from: u64, _: Duration) -> Call<'_, Result<Vec<Bytes>, ReadError>> {
        let (before, first, end) = self.bounds();
        let frames = match from.checked_sub(before + 1) {
            None => Err(ReadError::Missing(format!("frame {from} is before the {}", self.copy.name()))),
            Some(skipped) => match usize::try_from(skipped).ok().and_then(|skipped| first.checked_add(skipped)) {
                Some(index) if index < end => self
                    .copy
                    .read(index, end)
                    .map_err(|error| ReadError::Missing(format!("cannot read the {}: {error}", self.copy.name()))),
                _ => Ok(Vec::new()),
            },
        };
        Box::pin(ready(frames))
    }

    fn ends(&self) -> Call<'_, Result<Ends, ReadError>> {
        let (before, first, end) = self.bounds();
        let frames = (end - first) as u64;
        let (snapshot, log) = self.copy.sizes();
        let bytes = if self.is_snapshot { snapshot } else { log };
        Box::pin(ready(Ok(Ends { first: before + 1, last: before + frames, frames, bytes })))
    }

    fn drop_until(&self, _: u64) -> Call<'_, Result<(), ReadError>> {
        Box::pin(ready(Err(ReadError::Unavailable(READ_ONLY.into()))))
    }

    fn snapshots(&self) -> Call<'_, Result<Vec<u64>, ReadError>> {
        Box::pin(ready(Ok(Some(self.copy.base).filter(|base| *base > 0).into_iter().collect())))
    }

    fn make_snapshot(&self, _: u64, _: Uuid) -> Call<'_, Result<(), ReadError>> {
        Box::pin(ready(Err(ReadError::Unavailable(READ_ONLY.into()))))
    }

    fn drop_snapshot(&self, _: u64) -> Call<'_, Result<(), ReadError>> {
        Box::pin(ready(Err(ReadError::Unavailable(READ_ONLY.into()))))
    }

    fn snapshot(&self, _: u64) -> Arc<dyn Engine> {
        Arc::new(Self { copy: Arc::clone(&self.copy), is_snapshot: true })
    }
}

/// Opens the copy in a data directory for reading, also while a server continues it. Returns what of it is damaged, too: the log
/// ends before that.
#[cfg(feature = "nats")]
pub fn read(data: &Path) -> Result<(ClusterLog, Option<String>)> {
    let directory = Directory::new(data);
    let copies = directory.list()?;
    let path = directory.path.display();
    let log = copies.first().map(|(log, ..)| *log).with_context(|| format!("there is no copy of a log in {path}"))?;
    ensure!(
        copies.iter().all(|(other, ..)| *other == log),
        "there are copies of several logs in {path}; move those away that are not meant"
    );
    let copy = directory.open(log)?.map(Arc::new);
    let copy = copy.with_context(|| format!("the copy {path}/{log}-{} is damaged at its beginning", copies[0].1))?;
    let runtime = kvs_runtime::runtime(Builder::new_multi_thread().worker_threads(1).thread_name("log copy"));
    let runtime = runtime.context("no thread for the log")?;
    let engine = Arc::new(Part { copy: Arc::clone(&copy), is_snapshot: false });
    let (mark, damage) = (Mark::new(log), copy.damage());
    // Nothing is appended, nor compacted.
    let (mark_file, copies, group_bytes, compaction_bytes) = (None, None, 0, u64::MAX);
    let stored = Stored { engine, name: copy.name(), mark, mark_file, copies, group_bytes, compaction_bytes };
    let opened = ClusterLog::of_copy(runtime, copy, stored, &Options::at_rest());
    Ok((opened.with_context(|| format!("cannot read the copy of a log in {path}"))?, damage))
}

/// Returns whether a data directory has a copy and no log in files.
#[cfg(feature = "nats")]
pub fn is_all(data: &Path) -> bool {
    !data.join("log").exists() && data.join(DIRECTORY).exists()
}
