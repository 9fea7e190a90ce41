//! The open batch: where appended events wait, encoded, for the writer.
//!
//! Owns: the sequences, hence the order of the service, and every reason for which an append is refused. What is in here
//! was accepted: it will be written unless the disk fails. Must never know: files.

use std::collections::VecDeque;
use std::time::Duration;

use super::entry;
use super::frame::{self, Builder};
use super::group_commit::GroupCommit;
use super::sync::atomic::{AtomicU64, Ordering};
use super::sync::{Clock, Condvar, Mutex, MutexGuard, PoisonError};
#[cfg(test)]
use crate::file::tests::mutants::{self, Mutant};
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
    group_commit: GroupCommit,
    clock: Clock,
}

#[derive(Default)]
struct State {
    /// The last is being filled. Each is one write and one sync.
    frames: VecDeque<Builder>,
    /// Number of appends in the one being written.
    committing: u64,
    /// Of all frames here and the one being written.
    bytes: u64,
    next: u64,
    /// What is certainly left in the newest segment.
    room: u64,
    /// Why there is no spare segment and none can be made: only `room` is left.
    short: Option<Shortage>,
    end: Option<End>,
    waiting: Waiting,
    /// Memory of a written frame, to be used again.
    buffer: Vec<u8>,
}

/// Why no segment can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// The disk is full.
    Space,
    /// There are no file descriptors, or there is no memory, now.
    Resources,
}

/// What the writer waits for.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Waiting {
    #[default]
    Nothing,
    /// Any append.
    Appends,
    /// More appends for a batch that it delays.
    More,
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
        short: Option<Shortage>,
        segment_room: u64,
        group_bytes: u64,
        clock: Clock,
    ) -> Self {
        let state = State { next, room, short, ..State::default() };
        let (state, ready, appended) = (Mutex::new(state), Condvar::new(), AtomicU64::new(appended));
        let frame_bytes = FRAME_BYTES.min(segment_room - FRAME_OVERHEAD);
        let queue_bytes = QUEUE_BYTES.min(segment_room);
        Self { state, ready, appended, frame_bytes, group_bytes, queue_bytes, group_commit: GroupCommit::new(), clock }
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
        if let Some(short) = state.short.filter(|_| state.bytes + added > state.room) {
            return Err(match short {
                Shortage::Space => AppendError::InsufficientStorage,
                Shortage::Resources => AppendError::Unavailable,
            });
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
        let is_due = self.group_commit.append(state.bytes);
        let is_awaited = match state.waiting {
            // A writer that is at work finds this by itself.
            Waiting::Nothing => false,
            Waiting::Appends => true,
            Waiting::More => is_due || state.frames.len() > 1,
        };
        if is_awaited {
            state.waiting = Waiting::Nothing;
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
            if let Some(delay) = self.delay(&state) {
                state.waiting = Waiting::More;
                state = self.clock.wait_timeout(&self.ready, state, delay).0;
                state.waiting = Waiting::Nothing;
                continue;
            }
            match (state.end, state.frames.pop_front()) {
                (Some(End::Failed), _) => return Work::Failed,
                (_, Some(frame)) => {
                    state.committing = self.group_commit.taken();
                    return Work::Write(frame);
                }
                (Some(End::Closed), None) => return Work::Closed,
                (None, None) => {}
            }
            state.waiting = Waiting::Appends;
            let Some(idle) = idle else {
                state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let (woken, timed_out) = self.clock.wait_timeout(&self.ready, state, idle);
            state = woken;
            if timed_out && state.waiting == Waiting::Appends {
                state.waiting = Waiting::Nothing;
                return Work::Idle;
            }
        }
    }

    /// Returns for how long to delay the batch, if it is the open one.
    fn delay(&self, state: &State) -> Option<Duration> {
        let begun = match state.frames.front() {
            Some(frame) if state.end.is_none() && state.frames.len() == 1 => frame.begun?,
            _ => return None,
        };
        self.group_commit.delay(self.clock.elapsed(begun), state.bytes)
    }

    /// Notes whether the threads that append are idle, and ends the delay of a batch if they are.
    pub fn set_idle(&self, idle: bool) {
        if self.group_commit.set_idle(idle) {
            #[cfg(test)]
            if mutants::is(Mutant::IdleUnlocked) {
                self.ready.notify_one();
                return;
            }
            // The writer decided to delay under this lock, so it waits by now, or has ended the delay.
            drop(self.lock());
            self.ready.notify_one();
        }
    }

    #[cfg(test)]
    pub fn is_delayed(&self) -> bool {
        self.lock().waiting == Waiting::More
    }

    /// A frame that was taken is on disk, which took this long, and this much room is left after it.
    pub fn written(&self, frame: Builder, room: u64, took: Duration) {
        let mut state = self.lock();
        self.group_commit.committed(state.committing, took);
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

    /// The writer continues in a segment with this much room. All that waits fits: no more is ever accepted.
    pub fn begin_segment(&self, room: u64, short: Option<Shortage>) {
        let mut state = self.lock();
        (state.room, state.short) = (room, short);
    }

    pub fn set_short(&self, short: Option<Shortage>) {
        self.lock().short = short;
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
