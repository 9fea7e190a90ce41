//! Preallocation of the next segment, so that a full disk is detected before a write is accepted and not after.
//!
//! Owns: the creation of segments, and the thread that does it. The space for the segment after the next is reserved
//! before anything is written to the next: there is always space for accepted writes, and the queue knows when there is
//! none for more, whatever else writes to the disk.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvs_runtime::Clock;
use uuid::Uuid;

use super::Shared;
use super::disk::{Disk, File, is_full, is_shortage};
use super::queue::Shortage;
use super::segment::{HEAD_BYTES, Head, Numbers, VERSION};
use crate::Condition;

/// Delay before the next attempt on a full disk, or on a system without free file descriptors.
const RETRY_DELAY: Duration = Duration::from_millis(200);

/// Size of the first segment of a log, which is created before the server is ready.
const FIRST_BYTES: u64 = 8 << 20;
/// Growth factor from one segment to the next.
const GROWTH: u64 = 4;
/// Bytes that are written and synced at a time. A shutdown, during which an upgrade holds all requests, waits for no more.
pub const PIECE_BYTES: u64 = 4 << 20;

/// Sizes of segments: the first is small, so that a new log is created quickly, and each is larger than the previous one
/// up to the maximum.
#[derive(Clone, Copy)]
pub struct Sizes {
    first: u64,
    largest: u64,
}

impl Sizes {
    /// No segment is smaller than `needed`, the size of the largest group, which is at most `largest`.
    pub fn new(needed: u64, largest: u64) -> Self {
        Self { first: FIRST_BYTES.max(needed).min(largest), largest }
    }

    /// Returns the size of the segment that follows one of this size, 0 for none.
    pub fn after(self, size: u64) -> u64 {
        size.saturating_mul(GROWTH).clamp(self.first, self.largest)
    }

    /// Returns the size of the smallest segment that is preallocated while another is written.
    pub fn smallest_spare(self) -> u64 {
        self.after(self.first)
    }
}

/// A segment that is ready to be written.
pub struct PreallocatedSegment {
    pub number: u64,
    pub file: Arc<dyn File>,
    pub size: u64,
}

/// Keeps one segment preallocated.
pub struct Preallocator {
    state: Mutex<State>,
    changed: Condvar,
    sizes: Sizes,
    /// Why the last attempt failed, for those that must not wait for the disk.
    short: Mutex<Option<Shortage>>,
}

struct State {
    /// More than one only when several were found at the start.
    ready: VecDeque<PreallocatedSegment>,
    /// Number and size of the next segment to create.
    next: u64,
    size: u64,
    /// File of that segment, when its space is reserved and nothing is in it yet.
    reserved: Option<Arc<dyn File>>,
    short: Option<Shortage>,
    /// A writer that waits on a full disk gives up, since the log is closing.
    closing: bool,
    stopped: bool,
}

impl Preallocator {
    /// `next` and `size` are the number and the size of the next segment to create.
    pub fn new(ready: VecDeque<PreallocatedSegment>, next: u64, size: u64, sizes: Sizes) -> Self {
        let state = State { ready, next, size, reserved: None, short: None, closing: false, stopped: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), sizes, short: Mutex::default() }
    }

    /// Returns the preallocated segment, and waits for it if necessary. None when there will be none.
    pub fn take(&self, shared: &Shared) -> anyhow::Result<Option<PreallocatedSegment>> {
        let mut state = self.lock();
        loop {
            if let Some(segment) = state.ready.pop_front() {
                state.reserve(shared)?;
                shared.queue.begin_segment(segment.size - HEAD_BYTES, state.short);
                self.changed.notify_all();
                return Ok(Some(segment));
            }
            if state.stopped || (state.short.is_some() && state.closing) {
                return Ok(None);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Reserves the space for the next segment, unless one is ready or reserved.
    pub fn reserve(&self, shared: &Shared) -> anyhow::Result<()> {
        self.lock().reserve(shared)
    }

    pub fn close(&self) {
        self.lock().closing = true;
        self.changed.notify_all();
    }

    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Condition of the disk, for `/readyz`.
    pub fn condition(&self) -> Condition {
        let reason = match *self.short() {
            None => return Condition::Well,
            Some(Shortage::Space) => "the disk is full",
            Some(Shortage::Resources) => "there are no file descriptors, or there is no memory",
        };
        Condition::But(format!(
            "cannot allocate the next segment of the log, writes will be rejected until it can: {reason}; see the log lines"
        ))
    }

    fn short(&self) -> MutexGuard<'_, Option<Shortage>> {
        self.short.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while `holds` is true, at most for `time`; returns false at shutdown.
    fn wait(&self, clock: &Clock, time: Option<Duration>, holds: impl Fn(&State) -> bool) -> bool {
        let (state, holds) = (self.lock(), |state: &mut State| holds(state) && !state.stopped);
        let state = match time {
            None => self.changed.wait_while(state, holds).unwrap_or_else(PoisonError::into_inner),
            Some(time) => clock.wait_timeout_while(&self.changed, state, time, holds),
        };
        !state.stopped
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Preallocation thread: keeps one segment ready until shutdown.
pub fn run(shared: &Shared) -> anyhow::Result<()> {
    let preallocator = &shared.preallocator;
    let clock = shared.clock();
    while preallocator.wait(clock, None, |state| !state.ready.is_empty()) {
        if !preallocate_one(shared)? && !preallocator.wait(clock, Some(RETRY_DELAY), |_| true) {
            break;
        }
    }
    let mut state = preallocator.lock();
    if state.reserved.take().is_some() {
        // The file is not complete. If this fails, the next start removes it.
        let _ = shared.home.disk.remove(&temporary(state.next));
    }
    Ok(())
}

/// Preallocates a segment unless one is ready; returns false when that is not possible now.
pub fn preallocate_one(shared: &Shared) -> anyhow::Result<bool> {
    let preallocator = &shared.preallocator;
    preallocator.reserve(shared)?;
    let mut state = preallocator.lock();
    let Some(file) = state.reserved.take() else { return Ok(state.short.is_none()) };
    let (number, size) = (state.next, state.size);
    drop(state);
    let disk = &*shared.home.disk;
    let filled = fill(&*file, shared.log, number, size, &|| preallocator.lock().stopped);
    if let Ok(false) = filled {
        preallocator.lock().reserved = Some(file);
        return Ok(false);
    }
    let created = remove_if_full(disk, &temporary(number), filled.and_then(|_| give_name(disk, number)));
    let mut state = preallocator.lock();
    if let Some(file) = state.handle_shortage(shared, created)? {
        (state.next, state.size) = (number + 1, preallocator.sizes.after(size));
        state.ready.push_back(PreallocatedSegment { number, file, size });
    }
    preallocator.changed.notify_all();
    Ok(state.short.is_none())
}

impl State {
    fn reserve(&mut self, shared: &Shared) -> anyhow::Result<()> {
        if self.ready.is_empty() && self.reserved.is_none() {
            let reserved = reserve(&*shared.home.disk, self.next, self.size);
            self.reserved = self.handle_shortage(shared, reserved)?;
        }
        Ok(())
    }

    /// Turns a full disk, or a shortage of file descriptors or memory, into None: nothing was acknowledged yet, and there may be
    /// more later. Any other error fails the log.
    fn handle_shortage(
        &mut self,
        shared: &Shared,
        file: io::Result<Arc<dyn File>>,
    ) -> io::Result<Option<Arc<dyn File>>> {
        let short = match &file {
            Err(error) if is_full(error) => Some(Shortage::Space),
            Err(error) if is_shortage(error) => Some(Shortage::Resources),
            _ => None,
        };
        let before = std::mem::replace(&mut self.short, short);
        // Before the log line, which tests and operators act upon.
        shared.queue.set_short(short);
        *shared.preallocator.short() = short;
        match (file, short) {
            (Err(error), Some(_)) if short == before => {
                tracing::debug!("{error}");
                Ok(None)
            }
            (Err(error), Some(Shortage::Space)) => {
                tracing::warn!(
                    "disk full: cannot allocate the next segment of the log, writes will be rejected until there is space: {error}"
                );
                Ok(None)
            }
            (Err(error), Some(Shortage::Resources)) => {
                tracing::warn!(
                    "out of file descriptors or memory: cannot allocate the next segment of the log, writes will be rejected until there are some: {error}"
                );
                Ok(None)
            }
            (Err(error), None) => Err(error),
            (Ok(file), _) => {
                match before {
                    Some(Shortage::Space) => tracing::info!("disk space is available for the log again"),
                    Some(Shortage::Resources) => tracing::info!("the next segment of the log can be allocated again"),
                    None => {}
                }
                Ok(Some(file))
            }
        }
    }
}

/// Creates an empty segment under a temporary name, so that a segment under its final name is always complete.
pub fn create(disk: &dyn Disk, log: Uuid, number: u64, size: u64) -> io::Result<Arc<dyn File>> {
    let file = reserve(disk, number, size)?;
    let created = fill(&*file, log, number, size, &|| false).and_then(|_| give_name(disk, number));
    remove_if_full(disk, &temporary(number), created)
}

/// Reserves the space for a segment.
fn reserve(disk: &dyn Disk, number: u64, size: u64) -> io::Result<Arc<dyn File>> {
    let temporary = temporary(number);
    let reserved = disk.create(&temporary).and_then(|file| {
        file.allocate(size)?;
        Ok(file)
    });
    remove_if_full(disk, &temporary, reserved)
}

/// Writes an empty segment, and syncs it; returns false if it was stopped before the file was complete.
fn fill(file: &dyn File, log: Uuid, number: u64, size: u64, is_stopped: &dyn Fn() -> bool) -> io::Result<bool> {
    file.write_at(&Head { version: VERSION, log, numbers: Numbers::one(number), size, compacted: None }.encode(), 0)?;
    let mut at = HEAD_BYTES;
    while at < size {
        if is_stopped() {
            return Ok(false);
        }
        let end = size.min(at + PIECE_BYTES);
        zero(file, at, end)?;
        // Not of the whole segment at once, which takes long.
        file.sync()?;
        at = end;
    }
    Ok(true)
}

fn give_name(disk: &dyn Disk, number: u64) -> io::Result<Arc<dyn File>> {
    let name = Numbers::one(number).file_name();
    disk.rename(&temporary(number), &name)?;
    disk.sync()?;
    // Reopened, so that errors name the final path from now on.
    disk.open(&name)
}

fn temporary(number: u64) -> String {
    format!("{}.tmp", Numbers::one(number).file_name())
}

/// Frees the partly allocated file on a full disk. If even this fails, the next attempt truncates the file.
fn remove_if_full(disk: &dyn Disk, name: &str, created: io::Result<Arc<dyn File>>) -> io::Result<Arc<dyn File>> {
    if created.as_ref().is_err_and(is_full) {
        let _ = disk.remove(name);
    }
    created
}

/// Writes zeros, not only for a clean end of the log: a sync of space that was merely allocated must also update the file
/// system's journal. On ext4, zeros made a commit of 8 KiB take 93 us instead of 146, and of 64 KiB 115 instead of 189.
pub fn zero(file: &dyn File, from: u64, to: u64) -> io::Result<()> {
    let zeros = vec![0; to.saturating_sub(from).min(1 << 20) as usize];
    let mut at = from;
    while at < to {
        let chunk = &zeros[..(to - at).min(zeros.len() as u64) as usize];
        file.write_at(chunk, at)?;
        at += chunk.len() as u64;
    }
    Ok(())
}
