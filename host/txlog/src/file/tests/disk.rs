//! A disk in memory that does what a test tells it to, and can remember what was done to it.
//!
//! What was written is seen by every later read, as on any disk whose system is up. A call can be made to fail, and then
//! it does nothing. What a power cut would leave of what was recorded is the business of `surface`.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use fastrand::Rng;

use super::super::disk::{Disk, File};
use super::super::identity::Identity;
use super::super::segment::Numbers;

#[derive(Clone, Default)]
pub struct FakeDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    names: BTreeMap<String, usize>,
    /// Shared with copies of the disk until one of them writes.
    files: Vec<Arc<Vec<u8>>>,
    /// What is on disk of a file, where that is not what is in memory and is believed to be.
    on_disk: BTreeMap<usize, Arc<Vec<u8>>>,
    full: bool,
    /// Cannot be opened.
    refused: Option<String>,
    /// The process is killed after this many operations more.
    left: Option<usize>,
    record: Option<Record>,
    lie: Option<Lie>,
    before_each: Option<Hook>,
    /// Another in a copy, where files are others.
    number: u64,
}

/// Called before something is done to the disk, which can be used meanwhile. An error is that of the operation.
type Hook = Arc<dyn Fn(&Operation) -> io::Result<()> + Send + Sync>;

/// Tells how far the log says that it is durable.
type Promised = Arc<dyn Fn() -> Promise + Send + Sync>;

struct Record {
    operations: Vec<Recorded>,
    promised: Promised,
    /// What the files held at their last sync.
    synced: BTreeMap<usize, Arc<Vec<u8>>>,
    /// The next sync of a file fails, and some of what it was to make durable is lost.
    lose: Option<Rng>,
}

/// Something done to the disk. Files are known by numbers, since names come and go.
#[derive(Clone, Debug)]
pub enum Operation {
    Create {
        name: String,
        file: usize,
    },
    Rename {
        from: String,
        to: String,
        file: usize,
    },
    Remove {
        name: String,
        file: usize,
    },
    SyncNames,
    Write {
        file: usize,
        offset: usize,
        bytes: Vec<u8>,
    },
    Resize {
        file: usize,
        size: usize,
    },
    Sync {
        file: usize,
    },
    /// A sync that failed: this is what is on disk, and what is in memory is taken for it.
    Lost {
        file: usize,
        left: Arc<Vec<u8>>,
    },
    /// Nothing was done to the disk: this one is a copy of it.
    Copied,
}

pub struct Recorded {
    pub operation: Operation,
    /// How far the log said that it is durable when this was begun, and the newest sequence that clients had seen.
    pub promised: Promise,
}

/// What holds of a log at some moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Promise {
    /// What is there whatever happens.
    pub durable: u64,
    /// What was answered: it is there, or its sequence is never given again.
    pub seen: u64,
}

/// What a disk says it did and did not do, or what amounts to code that forgot to do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    FileSync,
    NameSync,
    /// The sync of names while segments are there that a compacted one has replaced: they go before its name is certain.
    NameSyncWhileReplaced,
    /// The sync of a file that has its name.
    SegmentSync,
    /// The syncs of the file that compaction writes.
    CompactedSync,
    /// Zeros written into a segment: a torn tail stays.
    Zeros,
    /// What is in memory is not dropped.
    Forget,
}

impl FakeDisk {
    /// From now on no file can be made to take more space, or again it can.
    pub fn set_full(&self, full: bool) {
        self.state().full = full;
    }

    pub fn refuse_to_open(&self, name: &str) {
        self.state().refused = Some(name.into());
    }

    pub fn fail_syncs(&self) {
        self.before_each(|operation| match operation {
            Operation::Sync { .. } | Operation::SyncNames => Err(io::Error::other("sync failed")),
            _ => Ok(()),
        });
    }

    pub fn fail_writes(&self) {
        self.before_each(|operation| match operation {
            Operation::Write { .. } => Err(io::Error::other("write failed")),
            _ => Ok(()),
        });
    }

    /// Does this many more operations and then none, as if the process had been killed; with none, it never stops.
    pub fn kill_after(&self, operations: Option<usize>) {
        self.state().left = operations;
    }

    pub fn is_killed(&self) -> bool {
        self.state().left == Some(0)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        self.bytes(name).to_vec()
    }

    pub fn bytes(&self, name: &str) -> Arc<Vec<u8>> {
        let state = self.state();
        state.files[state.names[name]].clone()
    }

    pub fn put(&self, name: &str, bytes: Vec<u8>) {
        let mut state = self.state();
        let id = state.files.len();
        state.files.push(Arc::new(bytes));
        state.names.insert(name.into(), id);
    }

    /// What is on disk of a file; what it holds by now is in memory only, as after a sync that failed.
    pub fn put_on_disk(&self, name: &str, bytes: Vec<u8>) {
        let mut state = self.state();
        let file = state.names[name];
        state.on_disk.insert(file, Arc::new(bytes));
    }

    pub fn names(&self) -> Vec<String> {
        self.state().names.keys().cloned().collect()
    }

    /// Bytes of all files.
    pub fn size(&self) -> u64 {
        let state = self.state();
        state.names.values().map(|file| state.files[*file].len() as u64).sum()
    }

    /// The same disk, after the process that used it is gone.
    pub fn copy(&self) -> Self {
        let (names, files) = self.content();
        Self::new(names, files, self.number())
    }

    /// From now on it is a copy of what it was: its files have the same content, and are others.
    pub fn become_copy(&self) {
        let mut state = self.state();
        state.number += 1;
        if let Some(record) = &mut state.record {
            let promised = (record.promised)();
            record.operations.push(Recorded { operation: Operation::Copied, promised });
        }
    }

    pub fn number(&self) -> u64 {
        self.state().number
    }

    pub fn new(names: BTreeMap<String, usize>, files: Vec<Arc<Vec<u8>>>, number: u64) -> Self {
        Self { state: Arc::new(Mutex::new(State { names, files, number, ..State::default() })) }
    }

    pub fn content(&self) -> (BTreeMap<String, usize>, Vec<Arc<Vec<u8>>>) {
        let state = self.state();
        (state.names.clone(), state.files.clone())
    }

    /// Remembers what is done from now on.
    pub fn record(&self) {
        let mut state = self.state();
        let synced = state.files.iter().cloned().enumerate().collect();
        state.record =
            Some(Record { operations: Vec::new(), promised: Arc::new(Promise::default), synced, lose: None });
    }

    pub fn set_promised(&self, promised: impl Fn() -> Promise + Send + Sync + 'static) {
        self.state().record.as_mut().unwrap().promised = Arc::new(promised);
    }

    pub fn set_lie(&self, lie: Option<Lie>) {
        self.state().lie = lie;
    }

    pub fn lose_at_next_sync(&self, dice: Option<Rng>) {
        self.state().record.as_mut().unwrap().lose = dice;
    }

    pub fn recorded(&self) -> usize {
        self.state().record.as_ref().unwrap().operations.len()
    }

    pub fn take_record(&self) -> Vec<Recorded> {
        self.state().record.take().unwrap().operations
    }

    pub fn before_each(&self, hook: impl Fn(&Operation) -> io::Result<()> + Send + Sync + 'static) {
        self.state().before_each = Some(Arc::new(hook));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Remembers an operation and does it.
    fn carry_out(&self, operation: Operation) -> io::Result<()> {
        let (before, promised) = {
            let state = self.state();
            (state.before_each.clone(), state.record.as_ref().map(|record| record.promised.clone()))
        };
        if let Some(before) = before {
            before(&operation)?;
        }
        let promised = promised.map_or_else(Promise::default, |promised| promised());
        let mut state = self.state();
        state.fails(&operation)?;
        state.left = state.left.map(|left| left - 1);
        if let Some(lost) = state.loses(&operation) {
            state.record.as_mut().unwrap().operations.push(Recorded { operation: lost, promised });
            return Err(io::Error::other("sync failed"));
        }
        if !state.lies(&operation) {
            apply(&mut state, &operation);
            if let Some(record) = &mut state.record {
                record.operations.push(Recorded { operation, promised });
            }
        }
        Ok(())
    }
}

impl State {
    fn fails(&self, operation: &Operation) -> io::Result<()> {
        match operation {
            _ if self.left == Some(0) => Err(io::Error::other("killed")),
            Operation::Resize { file, size } if self.full && *size > self.files[*file].len() => {
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => Ok(()),
        }
    }

    fn loses(&mut self, operation: &Operation) -> Option<Operation> {
        let (Operation::Sync { file }, Some(record)) = (operation, &mut self.record) else { return None };
        let mut dice = record.lose.take()?;
        let new = &self.files[*file];
        let mut left = record.synced.get(file).map_or(Vec::new(), |synced| synced.to_vec());
        if dice.bool() {
            left.resize(new.len(), 0);
        }
        for (left, new) in left.chunks_mut(512).zip(new.chunks(512)).filter(|_| dice.bool()) {
            left.copy_from_slice(&new[..left.len()]);
        }
        let left = Arc::new(left);
        self.on_disk.insert(*file, left.clone());
        Some(Operation::Lost { file: *file, left })
    }

    fn lies(&self, operation: &Operation) -> bool {
        let Some(lie) = self.lie else { return false };
        let name = |file| self.names.iter().find(|(_, id)| **id == file).map_or("", |(name, _)| name);
        match (lie, operation) {
            (Lie::FileSync, Operation::Sync { .. }) | (Lie::NameSync, Operation::SyncNames) => true,
            (Lie::NameSyncWhileReplaced, Operation::SyncNames) => {
                let numbers: Vec<_> = self.names.keys().filter_map(|name| Numbers::parse(name)).collect();
                numbers.iter().any(|new| numbers.iter().any(|old| old != new && new.contains(*old)))
            }
            (Lie::SegmentSync, Operation::Sync { file }) => name(*file).ends_with(".seg"),
            (Lie::CompactedSync, Operation::Sync { file }) => name(*file).contains('-'),
            (Lie::Zeros, Operation::Write { file, bytes, .. }) => {
                name(*file).ends_with(".seg") && bytes.iter().all(|byte| *byte == 0)
            }
            _ => false,
        }
    }
}

fn apply(state: &mut State, operation: &Operation) {
    match operation {
        Operation::Sync { file } => {
            if let Some(record) = &mut state.record {
                record.synced.insert(*file, state.files[*file].clone());
            }
        }
        Operation::Write { file, offset, bytes } => write(&mut state.files[*file], *offset, bytes),
        Operation::Resize { file, size } => Arc::make_mut(&mut state.files[*file]).resize(*size, 0),
        names => name(&mut state.names, names),
    }
}

pub fn write(file: &mut Arc<Vec<u8>>, offset: usize, bytes: &[u8]) {
    Arc::make_mut(file)[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// Does to names what an operation does to them, as far as what it rests on was done.
pub fn name(names: &mut BTreeMap<String, usize>, operation: &Operation) {
    match operation {
        Operation::Create { name, file } => drop(names.insert(name.clone(), *file)),
        Operation::Rename { from, to, file } => {
            if names.get(from) == Some(file) {
                names.remove(from);
            }
            names.insert(to.clone(), *file);
        }
        Operation::Remove { name, file } if names.get(name) == Some(file) => drop(names.remove(name)),
        _ => {}
    }
}

impl Disk for FakeDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.names())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        let file = {
            let mut state = self.state();
            state.files.push(Arc::default());
            state.files.len() - 1
        };
        self.carry_out(Operation::Create { name: name.into(), file })?;
        Ok(Arc::new(FakeFile { disk: self.clone(), file }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn File>> {
        let state = self.state();
        if state.refused.as_deref() == Some(name) {
            return Err(io::Error::other(format!("open {name}: input/output error")));
        }
        let file = *state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(FakeFile { disk: self.clone(), file }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let file = *self.state().names.get(from).ok_or(io::ErrorKind::NotFound)?;
        self.carry_out(Operation::Rename { from: from.into(), to: to.into(), file })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let file = *self.state().names.get(name).ok_or(io::ErrorKind::NotFound)?;
        self.carry_out(Operation::Remove { name: name.into(), file })
    }

    fn sync(&self) -> io::Result<()> {
        self.carry_out(Operation::SyncNames)
    }
}

struct FakeFile {
    disk: FakeDisk,
    file: usize,
}

impl File for FakeFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.disk.state().files[self.file].len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.disk.state();
        let bytes = state.files[self.file].get(offset as usize..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let (file, offset) = (self.file, offset as usize);
        let size = offset + bytes.len();
        if size > self.disk.state().files[file].len() {
            self.disk.carry_out(Operation::Resize { file, size })?;
        }
        self.disk.carry_out(Operation::Write { file, offset, bytes: bytes.into() })
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        self.disk.carry_out(Operation::Resize { file: self.file, size: size as usize })
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.carry_out(Operation::Sync { file: self.file })
    }

    fn forget_cached(&self) -> io::Result<()> {
        let mut state = self.disk.state();
        if state.lie != Some(Lie::Forget)
            && let Some(bytes) = state.on_disk.remove(&self.file)
        {
            state.files[self.file] = bytes;
        }
        Ok(())
    }

    fn identity(&self) -> io::Result<Identity> {
        Ok(Identity { inode: self.file as u64, born: self.disk.number() + 1 })
    }
}
