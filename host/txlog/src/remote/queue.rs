//! The write queue: batches of appended events that wait for the writer.
//!
//! Owns: the sequences, hence the order of the service, and every reason for which an append is rejected. Events in the
//! queue were accepted: they will be written, or no later event ever will. Must never know: where they are written.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvs_runtime::Clock;
use tokio::sync::Notify;

use super::breaker::Breaker;
use crate::{AppendError, Event};

/// Maximum size of the queue. A service this far behind does not catch up within the deadline of a request.
const QUEUE_BYTES: u64 = 32 << 20;

/// Range of the commit delay. A timer is no finer than its start, and commits that fast are better not delayed.
const COMMIT_DELAY: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_millis(5);

/// Consecutive entries in the form in which they are written.
pub trait Content: Default {
    /// Returns the size of an event, as limits count it.
    fn size(event: &Event) -> u64;
    fn push(&mut self, time: u64, event: &Event);
}

/// A batch: consecutive entries that become durable together.
pub struct Batch<C> {
    /// The last sequence before the batch.
    pub before: u64,
    /// Sequence of its first entry.
    pub first: u64,
    pub len: u64,
    pub bytes: u64,
    /// Number of appends, that is of groups of entries: mostly one for each client.
    pub appends: u64,
    pub begun: Instant,
    pub content: C,
}

/// The write queue.
pub struct Queue<C> {
    state: Mutex<State<C>>,
    /// Notifies the writer.
    ready: Notify,
    appended: AtomicU64,
    group_bytes: u64,
    /// Maximum size of a batch, unless one group is larger.
    batch_bytes: u64,
    clock: Clock,
}

struct State<C> {
    /// Batches to write, of which the last is still open.
    batches: VecDeque<Batch<C>>,
    /// Bytes of all batches here and of those in flight.
    bytes: u64,
    /// Number of appends that the writer waits for.
    wanted: u64,
    next: u64,
    /// This process is primary, and appends are accepted.
    begun: bool,
    /// The service reported a full disk.
    full: bool,
    end: Option<End>,
}

/// Why no more appends are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Closed,
    Failed,
    /// Another process is primary.
    ReadOnly,
}

/// Next step of the writer.
pub enum WriterCommand<C> {
    Write(Batch<C>),
    /// No append within the idle time.
    Idle,
    /// The queue is closed, and every batch was taken.
    Closed,
}

/// Delay of a commit so that more appends share it, like `commit_siblings` and `commit_delay` of PostgreSQL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommitDelay {
    /// Number of appends after which the batch is taken at once.
    pub siblings: u64,
    pub delay: Duration,
}

impl CommitDelay {
    /// Returns the delay after a batch of `appends` that took this long. Its clients send their next requests soon. Without
    /// a delay the first of these would be committed alone, and all others after it: twice the commits.
    pub fn after(appends: u64, took: Duration) -> Self {
        let delay = took / 2;
        if delay < *COMMIT_DELAY.start() {
            Self::default()
        } else {
            Self { siblings: appends, delay: delay.min(*COMMIT_DELAY.end()) }
        }
    }
}

impl<C: Content> Batch<C> {
    pub fn new(before: u64, first: u64, begun: Instant) -> Self {
        Self { before, first, len: 0, bytes: 0, appends: 0, begun, content: C::default() }
    }

    /// Returns the sequence of its last entry.
    pub fn last(&self) -> u64 {
        self.first + self.len - 1
    }

    pub fn push(&mut self, time: u64, event: &Event) {
        self.bytes += C::size(event);
        self.content.push(time, event);
        self.len += 1;
    }
}

impl<C> Default for State<C> {
    fn default() -> Self {
        Self { batches: VecDeque::new(), bytes: 0, wanted: 0, next: 0, begun: false, full: false, end: None }
    }
}

impl<C> State<C> {
    /// Returns whether waiting for `appends` is over: they are there, the batch is full, or the queue is closed.
    fn has(&self, appends: u64) -> bool {
        self.end.is_some()
            || self.batches.len() > 1
            || self.batches.front().is_some_and(|batch| batch.appends >= appends)
    }
}

impl<C: Content> Queue<C> {
    /// Creates a queue that rejects appends until [`begin`](Self::begin).
    pub fn new(appended: u64, group_bytes: u64, batch_bytes: u64, clock: Clock) -> Self {
        let (state, ready, appended) = (Mutex::default(), Notify::new(), AtomicU64::new(appended));
        Self { state, ready, appended, group_bytes, batch_bytes, clock }
    }

    /// Notes that the entries of another process were applied up to this sequence.
    pub fn follow(&self, appended: u64) {
        self.appended.store(appended, Ordering::Release);
    }

    /// Accepts appends, beginning with this sequence.
    pub fn begin(&self, next: u64) {
        let mut state = self.lock();
        state.begun = true;
        state.next = next;
    }

    pub fn append(&self, breaker: &Breaker, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        let size: u64 = events.iter().map(C::size).sum();
        let mut state = self.lock();
        match state.end {
            // Also if another process took over during the guest's call: a retry of the client is redirected.
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
        // An empty queue accepts one group of any size.
        if !breaker.is_closed() || state.bytes > 0 && state.bytes + size > QUEUE_BYTES {
            return Err(AppendError::Unavailable);
        }
        // A group is never split, so that it is atomic.
        if state.batches.back().is_none_or(|batch| batch.bytes + size > self.batch_bytes) {
            state.batches.push_back(Batch::new(self.appended(), first, self.clock.now()));
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

    /// Waits for a batch, at most for `idle`: the appends that came while the previous batch was written, up to the maximum
    /// size of a batch. Delays a batch with fewer appends than `delay` asks for.
    pub async fn take(&self, idle: Duration, delay: CommitDelay) -> WriterCommand<C> {
        if !self.wait_for(1, idle).await {
            return WriterCommand::Idle;
        }
        self.wait_for(delay.siblings, delay.delay).await;
        // The queue is empty here only if it is closed.
        self.lock().batches.pop_front().map_or(WriterCommand::Closed, WriterCommand::Write)
    }

    /// Waits for this number of appends, at most for `time`; returns false on timeout.
    async fn wait_for(&self, appends: u64, time: Duration) -> bool {
        let arrival = async {
            loop {
                {
                    let mut state = self.lock();
                    if state.has(appends) {
                        return;
                    }
                    state.wanted = appends;
                }
                // An append in between has left a permit.
                self.ready.notified().await;
            }
        };
        tokio::select! {
            biased;
            () = arrival => true,
            () = self.clock.sleep(time) => false,
        }
    }

    /// Releases the limits of a batch that is durable.
    pub fn written(&self, batch: &Batch<C>) {
        let mut state = self.lock();
        state.bytes -= batch.bytes;
        state.full = false;
    }

    pub fn set_full(&self) {
        self.lock().full = true;
    }

    /// Rejects appends from now on. Queued batches are still written if it is closed, and dropped otherwise.
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

    fn lock(&self) -> MutexGuard<'_, State<C>> {
        // A panic during an append could leave half a group, but only an allocation failure panics here, which aborts.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::runtime::Builder;
    use tokio::{join, task};

    use super::*;
    use crate::Put;

    const LONG: Duration = Duration::from_secs(3600);
    const BATCH_BYTES: u64 = 4 << 20;

    /// Counts entries and keeps nothing.
    #[derive(Default)]
    struct Nothing;

    impl Content for Nothing {
        fn size(event: &Event) -> u64 {
            32 + match event {
                Event::Delete(key) => key.len() as u64,
                Event::Put(put) => (put.key.len() + put.value.len()) as u64,
            }
        }

        fn push(&mut self, _: u64, _: &Event) {}
    }

    type Queue = super::Queue<Nothing>;
    type Batch = super::Batch<Nothing>;
    type WriterCommand = super::WriterCommand<Nothing>;

    fn queue(appended: u64, group_bytes: u64) -> Queue {
        Queue::new(appended, group_bytes, BATCH_BYTES, Clock::system())
    }

    /// Returns the number of entries of the next batch, when `meanwhile` runs once the writer waits for it.
    fn taken(queue: &Queue, delay: CommitDelay, meanwhile: impl FnOnce()) -> Option<u64> {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
        runtime.block_on(async {
            let later = async {
                task::yield_now().await;
                meanwhile();
            };
            match join!(queue.take(LONG, delay), later).0 {
                WriterCommand::Write(batch) => Some(batch.len),
                WriterCommand::Idle | WriterCommand::Closed => None,
            }
        })
    }

    fn append(queue: &Queue, entries: usize) {
        let event = Event::Delete("a".into());
        queue
            .append(&Breaker::new("database", Clock::system()), 0, &vec![event; entries])
            .expect("the append is accepted");
    }

    #[test]
    fn batch_waits_for_siblings_up_to_the_delay() {
        let queue = queue(0, 1 << 20);
        queue.begin(1);
        let wanted = |siblings| CommitDelay { siblings, delay: LONG };
        append(&queue, 1);
        assert_eq!(taken(&queue, wanted(1), || ()), Some(1));
        append(&queue, 10);
        assert_eq!(taken(&queue, wanted(3), || (0..2).for_each(|_| append(&queue, 1))), Some(12));
        assert_eq!(taken(&queue, wanted(2), || (0..5).for_each(|_| append(&queue, 1))), Some(5));
        append(&queue, 1);
        assert_eq!(taken(&queue, CommitDelay { siblings: 2, delay: Duration::ZERO }, || ()), Some(1));
        // A closed queue does not wait.
        append(&queue, 1);
        assert_eq!(taken(&queue, wanted(2), || queue.end(End::Closed)), Some(1));
        assert_eq!(taken(&queue, wanted(2), || ()), None);
    }

    /// Appends an event of this size, as limits count it.
    fn append_bytes(queue: &Queue, bytes: u64) -> Result<u64, AppendError> {
        let put = |value| Put { key: "key".into(), value, metadata: Vec::new(), expires: None };
        let overhead = Nothing::size(&Event::Put(put(Vec::new())));
        queue.append(
            &Breaker::new("database", Clock::system()),
            0,
            &[Event::Put(put(vec![0; (bytes - overhead) as usize]))],
        )
    }

    #[test]
    fn queue_and_batches_stay_within_their_limits() {
        let group_bytes = 2 << 20;
        let queue = queue(0, group_bytes);
        queue.begin(1);
        assert!(
            matches!(append_bytes(&queue, group_bytes + 1), Err(AppendError::TooLarge(most)) if most == group_bytes)
        );
        for sequence in 1..=QUEUE_BYTES / group_bytes {
            assert_eq!(append_bytes(&queue, group_bytes).ok(), Some(sequence));
        }
        assert!(matches!(append_bytes(&queue, 100), Err(AppendError::Unavailable)));
        for _ in 0..QUEUE_BYTES / BATCH_BYTES {
            assert_eq!(taken(&queue, CommitDelay::default(), || ()), Some(BATCH_BYTES / group_bytes));
        }
        // The batch in flight counts until it is durable.
        assert!(matches!(append_bytes(&queue, 100), Err(AppendError::Unavailable)));
        let mut batch = Batch::new(0, 1, Clock::system().now());
        batch.bytes = 100;
        queue.written(&batch);
        assert!(append_bytes(&queue, 101).is_err() && append_bytes(&queue, 100).is_ok());
    }

    #[test]
    fn first_batch_of_incarnation_follows_on_fork() {
        let queue = queue(7, 1 << 20);
        queue.begin(1_000);
        append(&queue, 2);
        assert_eq!(queue.appended(), 1_001);
        let WriterCommand::Write(batch) = taken_batch(&queue) else { panic!("there is work") };
        assert_eq!((batch.before, batch.first, batch.last()), (7, 1_000, 1_001));
        append(&queue, 1);
        let WriterCommand::Write(batch) = taken_batch(&queue) else { panic!("there is work") };
        assert_eq!((batch.before, batch.first, batch.last()), (1_001, 1_002, 1_002));
    }

    fn taken_batch(queue: &Queue) -> WriterCommand {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
        runtime.block_on(queue.take(LONG, CommitDelay::default()))
    }

    #[test]
    fn empty_queue_accepts_group_of_any_size() {
        let queue = queue(0, 2 * QUEUE_BYTES);
        queue.begin(1);
        assert!(append_bytes(&queue, QUEUE_BYTES + 1).is_ok());
        assert!(matches!(append_bytes(&queue, 100), Err(AppendError::Unavailable)));
    }

    #[test]
    fn appends_resume_after_full_disk_when_batch_is_written() {
        let queue = queue(0, 1 << 20);
        queue.begin(1);
        queue.set_full();
        assert!(matches!(append_bytes(&queue, 100), Err(AppendError::InsufficientStorage)));
        queue.written(&Batch::new(0, 1, Clock::system().now()));
        assert!(append_bytes(&queue, 100).is_ok());
    }

    #[test]
    fn ended_queue_rejects_appends_as_unavailable() {
        for end in [End::Closed, End::Failed, End::ReadOnly] {
            let queue = queue(0, 1 << 20);
            queue.begin(1);
            queue.end(end);
            let refused = queue.append(&Breaker::new("database", Clock::system()), 0, &[Event::Delete("a".into())]);
            assert!(matches!(refused, Err(AppendError::Unavailable)), "{end:?}: {refused:?}");
        }
    }

    #[test]
    fn commit_delay_is_half_of_last_commit_within_range() {
        let after = |milliseconds| CommitDelay::after(64, Duration::from_millis(milliseconds));
        assert_eq!((after(0), after(1)), (CommitDelay::default(), CommitDelay::default()));
        let waits = |milliseconds| CommitDelay { siblings: 64, delay: Duration::from_millis(milliseconds) };
        assert_eq!((after(2), after(6), after(1_000)), (waits(1), waits(3), waits(5)));
    }
}
