//! The open batch: where appended events wait, encoded, for the writer.
//!
//! Owns: the sequences, hence the order of the service, and every reason for which an append is refused. What is in here
//! was accepted: it will be written unless the disk fails. Must never know: files.

use std::collections::VecDeque;
use std::time::Duration;

use super::entry;
use super::frame::{self, Builder};
use super::sync::atomic::{AtomicU64, Ordering};
use super::sync::{Clock, Condvar, Mutex, MutexGuard, PoisonError};
use crate::{AppendError, Event};

/// What may wait at most. A disk that is this far behind will not catch up within a request's deadline.
const QUEUE_BYTES: u64 = 32 << 20;

/// A batch larger than this is written as several frames: it bounds what recovery and replay hold in memory.
pub const FRAME_BYTES: u64 = 4 << 20;

/// What a frame needs beside its entries: its head, and padding to be aligned.
pub const FRAME_OVERHEAD: u64 = (frame::HEAD_BYTES + frame::ALIGNMENT - 1) as u64;

pub struct Queue {
    state: Mutex<State>,
    /// Tells the writer that there is something to do.
    ready: Condvar,
    appended: AtomicU64,
    /// The size at which a frame is closed and the next begun.
    frame_bytes: u64,
    group_bytes: u64,
    /// What may wait at most, and never more than a segment can hold.
    queue_bytes: u64,
    clock: Clock,
}

#[derive(Default)]
struct State {
    /// The last is being filled. Each is one write and one sync.
    frames: VecDeque<Builder>,
    /// Of all frames here and the one being written.
    bytes: u64,
    next: u64,
    /// What is certainly left in the newest segment.
    room: u64,
    /// There is no spare segment and no space for one: only `room` is left.
    full: bool,
    end: Option<End>,
    /// The writer sleeps and must be woken.
    waiting: bool,
    /// Memory of a written frame, to be used again.
    buffer: Vec<u8>,
}

#[derive(Clone, Copy)]
enum End {
    Closed,
    Failed,
}

/// What the writer is to do.
pub enum Work {
    Write(Builder),
    /// Nothing came for a while.
    Idle,
    /// Nothing will come any more, and everything was written.
    Closed,
    /// The log failed; what is here stays unwritten.
    Failed,
}

impl Queue {
    /// `appended` is the newest sequence given out and `next` the one to give next; `room` is what is left in the newest
    /// segment, `segment_room` what a new one has.
    pub fn new(
        (appended, next): (u64, u64),
        room: u64,
        full: bool,
        segment_room: u64,
        group_bytes: u64,
        clock: Clock,
    ) -> Self {
        let state = State { next, room, full, ..State::default() };
        let (state, ready, appended) = (Mutex::new(state), Condvar::new(), AtomicU64::new(appended));
        let frame_bytes = FRAME_BYTES.min(segment_room - FRAME_OVERHEAD);
        let queue_bytes = QUEUE_BYTES.min(segment_room);
        Self { state, ready, appended, frame_bytes, group_bytes, queue_bytes, clock }
    }

    pub fn append(&self, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        let size: u64 = events.iter().map(|event| entry::size(event) as u64).sum();
        let mut state = self.lock();
        if state.end.is_some() {
            return Err(AppendError::Unavailable);
        }
        let first = state.next;
        if events.is_empty() {
            return Ok(first);
        }
        if size > self.group_bytes {
            return Err(AppendError::TooLarge(self.group_bytes));
        }
        // A group lies within one frame: that is what makes it all or nothing.
        let fits = state.frames.back().is_some_and(|frame| frame.len() as u64 + size <= self.frame_bytes);
        let added = if fits { size } else { size + FRAME_OVERHEAD };
        // One group is taken into an empty queue however large it is.
        if state.bytes > 0 && state.bytes + added > self.queue_bytes {
            return Err(AppendError::Unavailable);
        }
        // What is accepted has its place: in the newest segment, or all of it in the next.
        if state.full && state.bytes + added > state.room {
            return Err(AppendError::InsufficientStorage);
        }
        if !fits {
            let buffer = std::mem::take(&mut state.buffer);
            let mut frame = Builder::new(first, buffer);
            frame.begun = Some(self.clock.now());
            state.frames.push_back(frame);
        }
        let Some(frame) = state.frames.back_mut() else { return Err(AppendError::Unavailable) };
        for event in events {
            let offset = frame.count;
            entry::encode(frame.body(), offset, time, event);
            frame.count += 1;
            frame.deletes += u32::from(matches!(event, Event::Delete(_)));
        }
        state.bytes += added;
        state.next += events.len() as u64;
        self.appended.store(state.next - 1, Ordering::Release);
        // A writer that is at work finds this by itself.
        if std::mem::take(&mut state.waiting) {
            self.ready.notify_one();
        }
        Ok(first)
    }

    pub fn appended(&self) -> u64 {
        self.appended.load(Ordering::Acquire)
    }

    /// Waits for work: all that came while the last frame was being written, up to a frame. With `idle`, gives up after
    /// that time.
    pub fn take(&self, idle: Option<Duration>) -> Work {
        let mut state = self.lock();
        loop {
            match (state.end, state.frames.pop_front()) {
                (Some(End::Failed), _) => return Work::Failed,
                (_, Some(frame)) => return Work::Write(frame),
                (Some(End::Closed), None) => return Work::Closed,
                (None, None) => {}
            }
            state.waiting = true;
            let Some(idle) = idle else {
                state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let (woken, timed_out) = self.clock.wait_timeout(&self.ready, state, idle);
            state = woken;
            if timed_out && state.waiting {
                state.waiting = false;
                return Work::Idle;
            }
        }
    }

    /// A frame that was taken is on disk, and this much room is left after it.
    pub fn written(&self, frame: Builder, room: u64) {
        let mut state = self.lock();
        state.room = room;
        // Each frame was counted with the most padding it can need; an empty queue holds nothing.
        let queued: u64 = state.frames.iter().map(|frame| frame.len() as u64 + frame::ALIGNMENT as u64 - 1).sum();
        state.bytes = queued;
        let buffer = frame.into_buffer();
        // One very large group must not keep its memory for ever.
        if buffer.capacity() as u64 <= 2 * self.frame_bytes {
            state.buffer = buffer;
        }
    }

    /// The writer goes on in a segment with this much room. All that waits fits: no more is ever accepted.
    pub fn begin_segment(&self, room: u64, full: bool) {
        let mut state = self.lock();
        (state.room, state.full) = (room, full);
    }

    pub fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    /// No appends from now on; what is here is still to be written.
    pub fn close(&self) {
        self.lock().end.get_or_insert(End::Closed);
        self.ready.notify_one();
    }

    /// No appends from now on, and nothing is written any more.
    pub fn fail(&self) {
        self.lock().end = Some(End::Failed);
        self.ready.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // An append that panicked half-way may have left half a group. Only the encoder runs under this lock, and it
        // does nothing that can panic but run out of memory, which aborts.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
