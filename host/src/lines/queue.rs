//! The queue of log lines, bounded in bytes, and the thread that writes them to standard error.
//!
//! Logging never blocks and never fails: standard error can be a pipe without a reader, or a file on a full disk. Lines over
//! the limit, and those that cannot be written, are dropped and counted.
//!
//! Not tracing-appender: it counts the lines that its queue drops and not those that fail to be written, its guard prints
//! to standard output by a macro that panics, and its thread is not one of the supervisor's.
//!
//! Must never know: the content of a line.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvs_runtime::Clock;

/// Maximum size of the queue in bytes.
const BYTES: usize = 1 << 20;
/// Delay before the next attempt to write to a full non-blocking pipe.
const RETRY_DELAY: Duration = Duration::from_millis(10);

/// The queue of log lines.
pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    lines: VecDeque<Box<[u8]>>,
    bytes: usize,
    /// A line was taken and is being written.
    is_writing: bool,
    lost: u64,
    /// Number of lost lines that are not reported yet.
    unreported: u64,
    /// Reason why lines are being lost.
    failure: Option<String>,
}

impl Queue {
    pub const fn new() -> Self {
        let state =
            State { lines: VecDeque::new(), bytes: 0, is_writing: false, lost: 0, unreported: 0, failure: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Adds a line, or drops it if the queue is full.
    pub fn push(&self, line: &[u8]) {
        let mut state = self.lock();
        if state.bytes + line.len() > BYTES {
            state.lose("standard error is blocked");
            return;
        }
        state.bytes += line.len();
        state.lines.push_back(line.into());
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until every line is written or lost, at most for `time`.
    pub fn flush(&self, time: Duration) {
        let is_busy = |state: &mut State| state.is_writing || !state.lines.is_empty();
        drop(self.changed.wait_timeout_while(self.lock(), time, is_busy).unwrap_or_else(PoisonError::into_inner));
    }

    /// Returns the number of lost lines.
    pub fn lost(&self) -> u64 {
        self.lock().lost
    }

    /// Returns the reason why lines are being lost.
    pub fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Writes lines as they arrive, and calls `recovered` with the number of lost ones when writing succeeds again.
    pub fn write_all(&self, out: &mut dyn Write, clock: &Clock, recovered: impl Fn(u64)) -> ! {
        // A line that was written in part is not continued by another one.
        let mut is_torn = false;
        self.begin();
        loop {
            let line = self.take();
            let written = if is_torn { write(out, b"\n", clock) } else { Ok(()) };
            is_torn = is_torn && written.is_err();
            let written = written.and_then(|()| {
                is_torn = true;
                write(out, &line, clock)
            });
            is_torn = is_torn && written.as_ref().is_err_and(|unwritten| unwritten.is_partial);
            let unreported = self.done(written.map_err(|unwritten| unwritten.error));
            if unreported > 0 {
                recovered(unreported);
            }
        }
    }

    /// Counts the line as lost that was being written when the writer panicked.
    fn begin(&self) {
        let mut state = self.lock();
        if std::mem::take(&mut state.is_writing) {
            state.lose("the thread that writes them panicked");
        }
    }

    fn take(&self) -> Box<[u8]> {
        let mut state = self.lock();
        loop {
            if let Some(line) = state.lines.pop_front() {
                state.bytes -= line.len();
                state.is_writing = true;
                return line;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Notes the result of a line, and returns the number of lost ones to report now.
    fn done(&self, written: io::Result<()>) -> u64 {
        let mut state = self.lock();
        state.is_writing = false;
        let unreported = match written {
            Ok(()) => {
                state.failure = None;
                std::mem::take(&mut state.unreported)
            }
            Err(error) => {
                state.lose(&error.to_string());
                0
            }
        };
        drop(state);
        self.changed.notify_all();
        unreported
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is complete.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn lose(&mut self, reason: &str) {
        self.lost += 1;
        self.unreported += 1;
        if self.failure.as_deref() != Some(reason) {
            self.failure = Some(reason.to_owned());
        }
    }
}

struct Unwritten {
    error: io::Error,
    /// Part of the line was written.
    is_partial: bool,
}

/// [`Write::write_all`] that waits while a non-blocking pipe is full.
fn write(out: &mut dyn Write, line: &[u8], clock: &Clock) -> Result<(), Unwritten> {
    let mut rest = line;
    while !rest.is_empty() {
        match out.write(rest) {
            Ok(0) => return Err(Unwritten { error: ErrorKind::WriteZero.into(), is_partial: rest.len() < line.len() }),
            Ok(count) => rest = &rest[count.min(rest.len())..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => clock.pause(RETRY_DELAY),
            Err(error) => return Err(Unwritten { error, is_partial: rest.len() < line.len() }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread;

    use super::*;

    /// Writer with scripted results, which passes on the written bytes.
    struct Scripted {
        answers: Receiver<io::Result<usize>>,
        taken: Sender<Vec<u8>>,
    }

    impl Write for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = self.answers.recv().map_err(io::Error::other)??.min(bytes.len());
            self.taken.send(bytes[..count].to_vec()).map_err(io::Error::other)?;
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Started {
        queue: Arc<Queue>,
        answers: Sender<io::Result<usize>>,
        taken: Receiver<Vec<u8>>,
        recovered: Receiver<u64>,
    }

    fn start() -> Started {
        let queue = Arc::new(Queue::new());
        let (answers, asked) = channel();
        let (took, taken) = channel();
        let (recover, recovered) = channel();
        let writing = Arc::clone(&queue);
        thread::spawn(move || {
            let mut out = Scripted { answers: asked, taken: took };
            writing.write_all(&mut out, &Clock::system(), |lost| recover.send(lost).unwrap())
        });
        Started { queue, answers, taken, recovered }
    }

    const ALL: usize = usize::MAX;

    #[test]
    fn line_that_fails_is_lost_and_counted() {
        let Started { queue, answers, taken, recovered } = start();
        answers.send(Err(ErrorKind::StorageFull.into())).unwrap();
        queue.push(b"lost\n");
        queue.flush(Duration::from_secs(30));
        assert_eq!(queue.lost(), 1);
        assert!(queue.failure().is_some());
        answers.send(Ok(ALL)).unwrap();
        queue.push(b"written\n");
        assert_eq!((taken.recv().unwrap(), recovered.recv().unwrap()), (b"written\n".to_vec(), 1));
        assert_eq!((queue.lost(), queue.failure()), (1, None));
    }

    #[test]
    fn line_whose_writer_panicked_is_counted() {
        struct Panics;
        impl Write for Panics {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                panic!("sabotage")
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }

        let queue = Arc::new(Queue::new());
        queue.push(b"lost\n");
        let writing = Arc::clone(&queue);
        thread::spawn(move || writing.write_all(&mut Panics, &Clock::system(), |_| {})).join().unwrap_err();
        let (recover, recovered) = channel();
        let writing = Arc::clone(&queue);
        thread::spawn(move || writing.write_all(&mut io::sink(), &Clock::system(), |lost| recover.send(lost).unwrap()));
        queue.push(b"written\n");
        assert_eq!(recovered.recv(), Ok(1));
        queue.flush(Duration::from_secs(30));
        assert_eq!((queue.lost(), queue.failure()), (1, None));
    }

    #[test]
    fn line_after_partial_one_starts_on_new_line() {
        let Started { queue, answers, taken, .. } = start();
        for answer in [Ok(2), Err(ErrorKind::StorageFull.into()), Ok(ALL), Ok(ALL)] {
            answers.send(answer).unwrap();
        }
        queue.push(b"torn\n");
        queue.push(b"whole\n");
        let taken: Vec<_> = taken.iter().take(3).collect();
        assert_eq!(taken, [&b"to"[..], b"\n", b"whole\n"]);
    }

    #[test]
    fn full_nonblocking_pipe_is_retried() {
        let Started { queue, answers, taken, .. } = start();
        for answer in [Err(ErrorKind::WouldBlock.into()), Ok(1), Err(ErrorKind::Interrupted.into()), Ok(ALL)] {
            answers.send(answer).unwrap();
        }
        queue.push(b"line\n");
        let taken: Vec<_> = taken.iter().take(2).collect();
        assert_eq!((taken.concat(), queue.lost()), (b"line\n".to_vec(), 0));
    }

    #[test]
    fn queue_is_bounded_while_nobody_reads() {
        let Started { queue, answers: _answers, .. } = start();
        let line = [b'x'; 1 << 10];
        for _ in 0..10 * BYTES / line.len() {
            queue.push(&line);
        }
        assert!(queue.lock().bytes <= BYTES);
        assert!(queue.lost() > 8 * (BYTES / line.len()) as u64, "{}", queue.lost());
        // Nor does its end wait for long.
        queue.flush(Duration::from_millis(1));
    }
}
