//! The open batch: where appended events wait for the writer.
//!
//! Owns: the sequences, hence the order of the service, and every reason for which an append is refused. What is in here
//! was accepted: it will be written, or nothing after it ever will. Must never know: the database.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use super::batch::{Batch, size};
use super::breaker::Breaker;
use crate::{AppendError, Event};

/// What may wait at most. A database that is this far behind will not catch up within a request's deadline.
const QUEUE_BYTES: u64 = 32 << 20;
/// A batch larger than this is committed as several.
const BATCH_BYTES: u64 = 4 << 20;

pub struct Queue {
    state: Mutex<State>,
    /// Tells the writer that there is something to do.
    ready: Notify,
    appended: AtomicU64,
    group_bytes: u64,
}

#[derive(Default)]
struct State {
    /// The last is being filled.
    batches: VecDeque<Batch>,
    /// Of all batches here and the one being written.
    bytes: u64,
    /// Appends that the writer waits for.
    wanted: u64,
    next: u64,
    /// The log is this process's to write.
    begun: bool,
    /// The database said that it has no room.
    full: bool,
    end: Option<End>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Closed,
    Failed,
    /// Another process writes this log now.
    ReadOnly,
}

/// What the writer is to do.
pub enum Work {
    Write(Batch),
    /// Nothing came for a while.
    Idle,
    /// Nothing will come any more, and everything was written.
    Closed,
}

/// What a batch may wait for before it is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Company {
    pub appends: u64,
    pub patience: Duration,
}

impl State {
    /// Whether there is no reason to wait for so many appends any more.
    fn has(&self, appends: u64) -> bool {
        self.end.is_some()
            || self.batches.len() > 1
            || self.batches.front().is_some_and(|batch| batch.appends >= appends)
    }
}

impl Queue {
    /// One that takes nothing before it is begun.
    pub fn new(appended: u64, group_bytes: u64) -> Self {
        Self { state: Mutex::default(), ready: Notify::new(), appended: AtomicU64::new(appended), group_bytes }
    }

    /// What others wrote is taken in up to this sequence.
    pub fn follow(&self, appended: u64) {
        self.appended.store(appended, Ordering::Release);
    }

    /// The log is this process's, and goes on with this sequence.
    pub fn begin(&self, next: u64) {
        let mut state = self.lock();
        state.begun = true;
        state.next = next;
    }

    pub fn append(&self, breaker: &Breaker, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        let size: u64 = events.iter().map(size).sum();
        let mut state = self.lock();
        match state.end {
            // Also where another process took the log over while the guest was called: asked again, the client is told so.
            Some(_) => return Err(AppendError::Unavailable),
            None if !state.begun => return Err(AppendError::ReadOnly),
            None => {}
        }
        let first = state.next;
        if events.is_empty() {
            return Ok(first);
        }
        if size > self.group_bytes {
            return Err(AppendError::TooLarge(self.group_bytes));
        }
        if state.full {
            return Err(AppendError::InsufficientStorage);
        }
        // One group is taken into an empty queue however large it is.
        if !breaker.is_closed() || state.bytes > 0 && state.bytes + size > QUEUE_BYTES {
            return Err(AppendError::Unavailable);
        }
        // A group lies within one batch: that is what makes it all or nothing.
        if state.batches.back().is_none_or(|batch| batch.bytes + size > BATCH_BYTES) {
            state.batches.push_back(Batch::new(self.appended(), first, breaker.now()));
        }
        let Some(batch) = state.batches.back_mut() else { return Err(AppendError::Unavailable) };
        events.iter().for_each(|event| batch.push(time, event));
        batch.appends += 1;
        state.bytes += size;
        state.next += events.len() as u64;
        self.appended.store(state.next - 1, Ordering::Release);
        let is_awaited = state.has(state.wanted);
        drop(state);
        if is_awaited {
            self.ready.notify_one();
        }
        Ok(first)
    }

    pub fn appended(&self) -> u64 {
        self.appended.load(Ordering::Acquire)
    }

    /// Waits for work: all that came while the last batch was being written, up to a batch. Gives up after `idle`. Where
    /// there is less than it would like, it gives more a moment to come.
    pub async fn take(&self, idle: Duration, company: Company) -> Work {
        if !self.comes(1, idle).await {
            return Work::Idle;
        }
        self.comes(company.appends, company.patience).await;
        // Nothing is here any more only when the log has come to its end.
        self.lock().batches.pop_front().map_or(Work::Closed, Work::Write)
    }

    /// Whether so many appends, or all that there will be, are here in time.
    async fn comes(&self, appends: u64, time: Duration) -> bool {
        let coming = async {
            loop {
                {
                    let mut state = self.lock();
                    if state.has(appends) {
                        return;
                    }
                    state.wanted = appends;
                }
                // What came in between has left a permit.
                self.ready.notified().await;
            }
        };
        timeout(time, coming).await.is_ok()
    }

    /// A batch that was taken is durable.
    pub fn written(&self, batch: &Batch) {
        let mut state = self.lock();
        state.bytes -= batch.bytes;
        state.full = false;
    }

    pub fn set_full(&self) {
        self.lock().full = true;
    }

    /// No appends from now on. What is here is still to be written when it is closed, and is lost else.
    pub fn end(&self, end: End) {
        let mut state = self.lock();
        state.end.get_or_insert(end);
        if end != End::Closed {
            state.batches.clear();
        }
        drop(state);
        self.ready.notify_one();
    }

    pub fn begun(&self) -> bool {
        self.lock().begun
    }

    pub fn ended(&self) -> Option<End> {
        self.lock().end
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // An append that panicked half-way may have left half a group. Nothing under this lock panics but running out of
        // memory, which aborts.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use kvs_runtime::Clock;
    use tokio::runtime::Builder;
    use tokio::{join, task};

    use super::*;
    use crate::Put;

    const LONG: Duration = Duration::from_secs(3600);

    /// How many entries the next batch has, when `meanwhile` runs once the writer waits for it.
    fn taken(queue: &Queue, company: Company, meanwhile: impl FnOnce()) -> Option<u64> {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
        runtime.block_on(async {
            let later = async {
                task::yield_now().await;
                meanwhile();
            };
            match join!(queue.take(LONG, company), later).0 {
                Work::Write(batch) => Some(batch.len()),
                Work::Idle | Work::Closed => None,
            }
        })
    }

    fn append(queue: &Queue, entries: usize) {
        let event = Event::Delete("a".into());
        queue.append(&Breaker::new(Clock::system()), 0, &vec![event; entries]).expect("it is taken");
    }

    #[test]
    fn a_batch_waits_for_as_many_appends_as_it_is_to_have_and_no_longer_than_it_may() {
        let queue = Queue::new(0, 1 << 20);
        queue.begin(1);
        let wanted = |appends| Company { appends, patience: LONG };
        append(&queue, 1);
        assert_eq!(taken(&queue, wanted(1), || ()), Some(1));
        append(&queue, 10);
        assert_eq!(taken(&queue, wanted(3), || (0..2).for_each(|_| append(&queue, 1))), Some(12));
        assert_eq!(taken(&queue, wanted(2), || (0..5).for_each(|_| append(&queue, 1))), Some(5));
        append(&queue, 1);
        assert_eq!(taken(&queue, Company { appends: 2, patience: Duration::ZERO }, || ()), Some(1));
        // What comes to its end, or is full, waits for nobody.
        append(&queue, 1);
        assert_eq!(taken(&queue, wanted(2), || queue.end(End::Closed)), Some(1));
        assert_eq!(taken(&queue, wanted(2), || ()), None);
    }

    /// Appends what takes so many bytes, as limits count them.
    fn append_bytes(queue: &Queue, bytes: u64) -> Result<u64, AppendError> {
        let put =
            |value| Put { key: "key".into(), value, metadata: vec![("name".into(), "of it".into())], expires: None };
        let besides = size(&Event::Put(put(Vec::new())));
        assert_eq!(besides, 32 + 3 + 8 + 9);
        queue.append(&Breaker::new(Clock::system()), 0, &[Event::Put(put(vec![0; (bytes - besides) as usize]))])
    }

    #[test]
    fn no_more_waits_than_may_and_no_batch_is_larger_than_it_may_be() {
        let group_bytes = 2 << 20;
        let queue = Queue::new(0, group_bytes);
        queue.begin(1);
        assert!(
            matches!(append_bytes(&queue, group_bytes + 1), Err(AppendError::TooLarge(most)) if most == group_bytes)
        );
        for sequence in 1..=QUEUE_BYTES / group_bytes {
            assert_eq!(append_bytes(&queue, group_bytes).ok(), Some(sequence));
        }
        assert!(matches!(append_bytes(&queue, 100), Err(AppendError::Unavailable)));
        for _ in 0..QUEUE_BYTES / BATCH_BYTES {
            assert_eq!(taken(&queue, Company::default(), || ()), Some(BATCH_BYTES / group_bytes));
        }
        // What is being written waits too, until it is durable.
        assert!(matches!(append_bytes(&queue, 100), Err(AppendError::Unavailable)));
        let mut batch = Batch::new(0, 1, Clock::system().now());
        batch.bytes = 100;
        queue.written(&batch);
        assert!(append_bytes(&queue, 101).is_err() && append_bytes(&queue, 100).is_ok());
    }

    #[test]
    fn first_batch_of_incarnation_follows_on_fork() {
        let queue = Queue::new(7, 1 << 20);
        queue.begin(1_000);
        append(&queue, 2);
        assert_eq!(queue.appended(), 1_001);
        let Work::Write(batch) = taken_batch(&queue) else { panic!("there is work") };
        assert_eq!((batch.before, batch.first, batch.last()), (7, 1_000, 1_001));
        append(&queue, 1);
        let Work::Write(batch) = taken_batch(&queue) else { panic!("there is work") };
        assert_eq!((batch.before, batch.first, batch.last()), (1_001, 1_002, 1_002));
    }

    fn taken_batch(queue: &Queue) -> Work {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
        runtime.block_on(queue.take(LONG, Company::default()))
    }

    #[test]
    fn one_group_is_taken_into_an_empty_queue_however_large_it_is() {
        let queue = Queue::new(0, 2 * QUEUE_BYTES);
        queue.begin(1);
        assert!(append_bytes(&queue, QUEUE_BYTES + 1).is_ok());
        assert!(matches!(append_bytes(&queue, 100), Err(AppendError::Unavailable)));
    }

    #[test]
    fn a_database_without_room_is_written_to_again_when_a_batch_was() {
        let queue = Queue::new(0, 1 << 20);
        queue.begin(1);
        queue.set_full();
        assert!(matches!(append_bytes(&queue, 100), Err(AppendError::InsufficientStorage)));
        queue.written(&Batch::new(0, 1, Clock::system().now()));
        assert!(append_bytes(&queue, 100).is_ok());
    }

    #[test]
    fn what_comes_too_late_for_this_process_can_be_tried_elsewhere() {
        for end in [End::Closed, End::Failed, End::ReadOnly] {
            let queue = Queue::new(0, 1 << 20);
            queue.begin(1);
            queue.end(end);
            let refused = queue.append(&Breaker::new(Clock::system()), 0, &[Event::Delete("a".into())]);
            assert!(matches!(refused, Err(AppendError::Unavailable)), "{end:?}: {refused:?}");
        }
    }
}
