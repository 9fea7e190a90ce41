//! The spare: the next segment, made ahead, so that a full disk is met before a write is accepted and not after.
//!
//! Owns: the making of segments, and the thread that does it. The space for the segment after the next is taken before
//! anything is written to the next: what is accepted always has its place, and whatever else happens on the disk, the
//! queue knows when there is none.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvs_runtime::Clock;
use uuid::Uuid;

use super::Shared;
use super::disk::{Disk, File, is_full, is_shortage};
use super::segment::{HEAD_BYTES, Head, Numbers, VERSION};

/// How long a full disk, or a system without descriptors, is left alone before it is asked again.
const RETRY: Duration = Duration::from_millis(200);

/// A start makes the first segment of a log before it serves, and reads the newest of one that is there.
const FIRST_BYTES: u64 = 8 << 20;
/// How many times as large as the one before the next is.
const GROWTH: u64 = 4;

/// How large segments are: the first small, so that a new log is begun at once, and each larger than the one before until
/// they are as large as they may be.
#[derive(Clone, Copy)]
pub struct Sizes {
    first: u64,
    largest: u64,
}

impl Sizes {
    /// None is smaller than what the largest group needs, which is at most `largest`.
    pub fn new(needed: u64, largest: u64) -> Self {
        Self { first: FIRST_BYTES.max(needed).min(largest), largest }
    }

    /// Of the segment that follows on one of this size, 0 for none.
    pub fn after(self, size: u64) -> u64 {
        size.saturating_mul(GROWTH).clamp(self.first, self.largest)
    }

    /// The smallest that is made while another is written.
    pub fn smallest_spare(self) -> u64 {
        self.after(self.first)
    }
}

pub struct Spare {
    pub number: u64,
    pub file: Arc<dyn File>,
    pub size: u64,
}

pub struct Spares {
    state: Mutex<State>,
    changed: Condvar,
    sizes: Sizes,
}

struct State {
    /// More than one only when they were found at the start.
    ready: VecDeque<Spare>,
    next: u64,
    /// The size of that.
    size: u64,
    /// Its file, when its space is taken and nothing is in it yet.
    begun: Option<Arc<dyn File>>,
    full: bool,
    /// A writer that waits on a full disk gives up.
    closing: bool,
    stopped: bool,
}

impl Spares {
    /// `next` and `size` are the number and the size of the next that is made.
    pub fn new(ready: VecDeque<Spare>, next: u64, size: u64, sizes: Sizes) -> Self {
        let state = State { ready, next, size, begun: None, full: false, closing: false, stopped: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), sizes }
    }

    /// Takes the spare, and waits for it where it is not ready. None when there will be none.
    pub fn take(&self, shared: &Shared) -> anyhow::Result<Option<Spare>> {
        let mut state = self.lock();
        loop {
            if let Some(spare) = state.ready.pop_front() {
                state.begin(shared)?;
                shared.queue.begin_segment(spare.size - HEAD_BYTES, state.full);
                self.changed.notify_all();
                return Ok(Some(spare));
            }
            if state.stopped || (state.full && state.closing) {
                return Ok(None);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes the space for one where there is none.
    pub fn begin(&self, shared: &Shared) -> anyhow::Result<()> {
        self.lock().begin(shared)
    }

    pub fn close(&self) {
        self.lock().closing = true;
        self.changed.notify_all();
    }

    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Waits as long as something holds, or for a time; false when it is to stop.
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

/// The thread that keeps one spare ready until it is stopped.
pub fn run(shared: &Shared) -> anyhow::Result<()> {
    let spares = &shared.spares;
    let clock = shared.clock();
    while spares.wait(clock, None, |state| !state.ready.is_empty()) {
        if !fill(shared)? && !spares.wait(clock, Some(RETRY), |_| true) {
            break;
        }
    }
    let mut state = spares.lock();
    if state.begun.take().is_some() {
        // Nothing is in it. Where this fails, the next start does it.
        let _ = shared.home.disk.remove(&temporary(state.next));
    }
    Ok(())
}

/// Makes a spare where there is none; false when there is no room for it.
pub fn fill(shared: &Shared) -> anyhow::Result<bool> {
    let spares = &shared.spares;
    spares.begin(shared)?;
    let mut state = spares.lock();
    let Some(file) = state.begun.take() else { return Ok(!state.full) };
    let (number, size) = (state.next, state.size);
    drop(state);
    let made = finish(&*shared.home.disk, shared.log, number, size, &*file);
    let mut state = spares.lock();
    if let Some(file) = state.unless_full(shared, made)? {
        (state.next, state.size) = (number + 1, spares.sizes.after(size));
        state.ready.push_back(Spare { number, file, size });
    }
    spares.changed.notify_all();
    Ok(!state.full)
}

impl State {
    fn begin(&mut self, shared: &Shared) -> anyhow::Result<()> {
        if self.ready.is_empty() && self.begun.is_none() {
            let begun = begin(&*shared.home.disk, self.next, self.size);
            self.begun = self.unless_full(shared, begun)?;
        }
        Ok(())
    }

    /// A full disk is not the end, nor is a shortage of the system: nothing was promised yet, and there may be room again. A
    /// disk that fails is not trusted with what comes next.
    fn unless_full(&mut self, shared: &Shared, file: io::Result<Arc<dyn File>>) -> io::Result<Option<Arc<dyn File>>> {
        let was_full =
            std::mem::replace(&mut self.full, file.as_ref().is_err_and(|error| is_full(error) || is_shortage(error)));
        // Before it is told.
        shared.queue.set_full(self.full);
        match file {
            Err(error) if self.full => {
                if !was_full {
                    tracing::warn!("no room for the next segment of the log, writes will be refused: {error}");
                }
                Ok(None)
            }
            Ok(file) => {
                if was_full {
                    tracing::info!("there is room for the log again");
                }
                Ok(Some(file))
            }
            Err(error) => Err(error),
        }
    }
}

/// Makes an empty segment under a temporary name, so that one found under its own name is always whole.
pub fn make(disk: &dyn Disk, log: Uuid, number: u64, size: u64) -> io::Result<Arc<dyn File>> {
    finish(disk, log, number, size, &*begin(disk, number, size)?)
}

/// Takes the space for a segment.
fn begin(disk: &dyn Disk, number: u64, size: u64) -> io::Result<Arc<dyn File>> {
    let temporary = temporary(number);
    let begun = disk.create(&temporary).and_then(|file| {
        file.allocate(size)?;
        Ok(file)
    });
    give_back_when_full(disk, &temporary, begun)
}

fn finish(disk: &dyn Disk, log: Uuid, number: u64, size: u64, file: &dyn File) -> io::Result<Arc<dyn File>> {
    let (name, temporary) = (Numbers::one(number).file_name(), temporary(number));
    let write = || {
        file.write_at(
            &Head { version: VERSION, log, numbers: Numbers::one(number), size, compacted: None }.encode(),
            0,
        )?;
        zero(file, HEAD_BYTES, size)?;
        file.sync()?;
        disk.rename(&temporary, &name)?;
        disk.sync()?;
        // Under the name that errors are to tell from now on.
        disk.open(&name)
    };
    give_back_when_full(disk, &temporary, write())
}

fn temporary(number: u64) -> String {
    format!("{}.tmp", Numbers::one(number).file_name())
}

/// What little there was. Where even this fails, the next attempt empties the file.
fn give_back_when_full(disk: &dyn Disk, name: &str, made: io::Result<Arc<dyn File>>) -> io::Result<Arc<dyn File>> {
    if made.as_ref().is_err_and(is_full) {
        let _ = disk.remove(name);
    }
    made
}

/// Writes zeros, and not only for a clean end of the log: a sync into space that was merely allocated must also note in
/// the file system's journal that the space is now in use. On ext4, zeros made a commit of 8 KiB take 93 us instead of
/// 146, and of 64 KiB 115 instead of 189.
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
