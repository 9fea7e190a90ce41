//! A disk in memory that does what a test tells it to.
//!
//! The fault model: a call can be made to fail, and then it does nothing. What was written is seen by every later read.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::super::disk::{Disk, File};

#[derive(Clone, Default)]
pub struct FakeDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    names: BTreeMap<String, usize>,
    files: Vec<Vec<u8>>,
    full: bool,
    sync_fails: bool,
    write_fails: bool,
}

impl FakeDisk {
    /// From now on no file can be made to take more space, or again it can.
    pub fn set_full(&self, full: bool) {
        self.state().full = full;
    }

    pub fn fail_syncs(&self) {
        self.state().sync_fails = true;
    }

    pub fn fail_writes(&self) {
        self.state().write_fails = true;
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        let state = self.state();
        state.files[state.names[name]].clone()
    }

    pub fn put(&self, name: &str, bytes: Vec<u8>) {
        let mut state = self.state();
        let id = state.files.len();
        state.files.push(bytes);
        state.names.insert(name.into(), id);
    }

    pub fn names(&self) -> Vec<String> {
        self.state().names.keys().cloned().collect()
    }

    /// The same content on another disk.
    pub fn copy(&self) -> Self {
        let state = self.state();
        let copy = State { names: state.names.clone(), files: state.files.clone(), ..State::default() };
        Self { state: Arc::new(Mutex::new(copy)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl Disk for FakeDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.names())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn File>> {
        self.put(name, Vec::new());
        self.open(name)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn File>> {
        let id = *self.state().names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(FakeFile { disk: self.clone(), id }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state();
        let id = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.into(), id);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.state().names.remove(name).map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn sync(&self) -> io::Result<()> {
        if self.state().sync_fails { Err(io::Error::other("sync failed")) } else { Ok(()) }
    }
}

struct FakeFile {
    disk: FakeDisk,
    id: usize,
}

impl File for FakeFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.disk.state().files[self.id].len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.disk.state();
        let bytes = state.files[self.id].get(offset as usize..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.disk.state();
        if state.write_fails {
            return Err(io::Error::other("write failed"));
        }
        let file = &mut state.files[self.id];
        let end = offset as usize + bytes.len();
        file.resize(file.len().max(end), 0);
        file[offset as usize..end].copy_from_slice(bytes);
        Ok(())
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        let mut state = self.disk.state();
        if state.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        state.files[self.id].resize(size as usize, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.disk.state().sync_fails { Err(io::Error::other("sync failed")) } else { Ok(()) }
    }

    fn forget_cached(&self) -> io::Result<()> {
        Ok(())
    }
}
