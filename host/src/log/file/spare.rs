//! The spare: the next segment, made ahead, so that a full disk is met before a write is accepted and not after.
//!
//! Owns: the making of segments, and the thread that does it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use super::Shared;
use super::disk::{Disk, File, is_full};
use super::segment::{HEAD_BYTES, Head, Numbers};

/// How long a full disk is left alone before it is asked again.
const RETRY: Duration = Duration::from_millis(200);

pub struct Spare {
    pub number: u64,
    pub file: Arc<dyn File>,
    pub size: u64,
}

pub struct Spares {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// More than one only when they were found at the start.
    ready: VecDeque<Spare>,
    next: u64,
    full: bool,
    /// A writer that waits on a full disk gives up.
    closing: bool,
    stopped: bool,
}

impl Spares {
    pub fn new(ready: VecDeque<Spare>, next: u64) -> Self {
        let state = State { ready, next, full: false, closing: false, stopped: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Takes the spare, and waits for it where it is not ready. None when there will be none.
    pub fn take(&self) -> Option<Spare> {
        let mut state = self.lock();
        loop {
            if let Some(spare) = state.ready.pop_front() {
                self.changed.notify_all();
                return Some(spare);
            }
            if state.stopped || (state.full && state.closing) {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
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
    fn wait(&self, time: Option<Duration>, holds: impl Fn(&State) -> bool) -> bool {
        let (state, holds) = (self.lock(), |state: &mut State| holds(state) && !state.stopped);
        let state = match time {
            None => self.changed.wait_while(state, holds).unwrap_or_else(PoisonError::into_inner),
            Some(time) => self.changed.wait_timeout_while(state, time, holds).unwrap_or_else(PoisonError::into_inner).0,
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
    while spares.wait(None, |state| !state.ready.is_empty()) {
        if !fill(shared)? && !spares.wait(Some(RETRY), |_| true) {
            break;
        }
    }
    Ok(())
}

/// Makes a spare where there is none; false when there is no room for it.
pub fn fill(shared: &Shared) -> anyhow::Result<bool> {
    let spares = &shared.spares;
    let state = spares.lock();
    if !state.ready.is_empty() {
        return Ok(true);
    }
    let number = state.next;
    drop(state);
    let made = make(&*shared.home.disk, shared.log, number, shared.segment_bytes);
    let mut state = spares.lock();
    let full = match made {
        Ok(file) => {
            state.next += 1;
            state.ready.push_back(Spare { number, file, size: shared.segment_bytes });
            None
        }
        // Not the end: nothing was promised yet, and there may be room again.
        Err(error) if is_full(&error) => Some(error),
        // A disk that fails is not trusted with what comes next.
        Err(error) => return Err(error.into()),
    };
    match &full {
        Some(error) if !state.full => {
            tracing::warn!("no room for the next segment of the log, writes will be refused: {error}");
        }
        None if state.full => tracing::info!("there is room for the log again"),
        _ => {}
    }
    state.full = full.is_some();
    shared.queue.set_full(state.full);
    spares.changed.notify_all();
    Ok(!state.full)
}

/// Makes an empty segment under a temporary name, so that one found under its own name is always whole.
pub fn make(disk: &dyn Disk, log: Uuid, number: u64, size: u64) -> io::Result<Arc<dyn File>> {
    let name = Numbers::one(number).file_name();
    let temporary = format!("{name}.tmp");
    let made = disk.create(&temporary).and_then(|file| {
        file.allocate(size)?;
        file.write_at(&Head { log, numbers: Numbers::one(number), size, compacted: None }.encode(), 0)?;
        zero(&*file, HEAD_BYTES, size)?;
        file.sync()?;
        disk.rename(&temporary, &name)?;
        disk.sync()?;
        Ok(file)
    });
    if made.as_ref().is_err_and(is_full) {
        // Gives back what little there was. Where even this fails, the next attempt empties the file.
        let _ = disk.remove(&temporary);
    }
    made
}

/// Writes zeros, and not only for a clean end of the log: a sync into space that was merely allocated must also note in
/// the file system's journal that the space is now in use. On ext4, zeros made a commit of 8 KiB take 93 us instead of
/// 146, and of 64 KiB 115 instead of 189.
pub fn zero(file: &dyn File, from: u64, to: u64) -> io::Result<()> {
    const ZEROS: &[u8] = &[0; 1 << 20];
    let mut at = from;
    while at < to {
        let chunk = &ZEROS[..(to - at).min(ZEROS.len() as u64) as usize];
        file.write_at(chunk, at)?;
        at += chunk.len() as u64;
    }
    Ok(())
}
