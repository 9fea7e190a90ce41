//! The queue of log lines, bounded in bytes, and the thread that writes them to standard error.
//!
//! Whoever logs never waits and never fails: standard error can be a pipe that nobody reads, or a file on a full disk. Lines
//! beyond the bound, and those that cannot be written, are lost and counted.
//!
//! Not tracing-appender: it counts the lines that its queue drops and not those that fail to be written, its guard prints
//! to standard output by a macro that panics, and its thread is not one of the supervisor's.
//!
//! Must never know: what is in a line.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvs_runtime::Clock;

/// Bytes of lines that wait to be written; more are lost.
const BYTES: usize = 1 << 20;
/// The pause before standard error is asked again, when it is a pipe that takes nothing now and does not block.
const FULL: Duration = Duration::from_millis(10);

pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    lines: VecDeque<Box<[u8]>>,
    bytes: usize,
    /// A line that was taken is being written.
    is_writing: bool,
    lost: u64,
    /// Of these, those that no line has reported yet.
    unreported: u64,
    /// The reason why lines are lost now.
    failure: Option<String>,
}

impl Queue {
    pub const fn new() -> Self {
        let state =
            State { lines: VecDeque::new(), bytes: 0, is_writing: false, lost: 0, unreported: 0, failure: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Puts a line in, or loses it.
    pub fn push(&self, line: &[u8]) {
        let mut state = self.lock();
        if state.bytes + line.len() > BYTES {
            state.lose("nobody reads standard error");
            return;
        }
        state.bytes += line.len();
        state.lines.push_back(line.into());
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until every line is written or lost, but no longer than this.
    pub fn flush(&self, time: Duration) {
        let is_busy = |state: &mut State| state.is_writing || !state.lines.is_empty();
        drop(self.changed.wait_timeout_while(self.lock(), time, is_busy).unwrap_or_else(PoisonError::into_inner));
    }

    /// The number of lines that were lost.
    pub fn lost(&self) -> u64 {
        self.lock().lost
    }

    /// The reason why lines are lost now.
    pub fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Writes lines as they come, and calls `recovered` with the number of lost ones when they can be written again.
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
            is_torn = is_torn && written.as_ref().is_err_and(|unwritten| unwritten.begun);
            let unreported = self.done(written.map_err(|unwritten| unwritten.error));
            if unreported > 0 {
                recovered(unreported);
            }
        }
    }

    /// Counts the line as lost that a run before, which panicked, had taken.
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

    /// Notes the fate of a line, and returns how many lost ones are to be reported now.
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
        // Every change under this lock is whole.
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
    /// Some of the line was written.
    begun: bool,
}

/// [`Write::write_all`], which waits where a pipe that does not block is full.
fn write(out: &mut dyn Write, line: &[u8], clock: &Clock) -> Result<(), Unwritten> {
    let mut rest = line;
    while !rest.is_empty() {
        match out.write(rest) {
            Ok(0) => return Err(Unwritten { error: ErrorKind::WriteZero.into(), begun: rest.len() < line.len() }),
            Ok(count) => rest = &rest[count.min(rest.len())..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => clock.pause(FULL),
            Err(error) => return Err(Unwritten { error, begun: rest.len() < line.len() }),
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

    /// Answers each write as it is told to, and passes on what it took.
    struct Told {
        answers: Receiver<io::Result<usize>>,
        taken: Sender<Vec<u8>>,
    }

    impl Write for Told {
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
            let mut out = Told { answers: asked, taken: took };
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
    fn line_after_a_torn_one_begins_anew() {
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
    fn full_pipe_that_does_not_block_is_waited_for() {
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
