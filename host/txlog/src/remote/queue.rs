//! The write queue: batches of appended events that wait for the writer.
//!
//! Owns: the sequences, hence the order of the service, and every reason for which an append is rejected. Events in the
//! queue were accepted: they will be written, or no later event ever will. Must never know: where they are written.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvs_runtime::Clock;
use tokio::sync::Notify;

use super::breaker::Breaker;
use crate::group_commit::GroupCommit;
use crate::{AppendError, Event};

/// Maximum size of the queue. A service this far behind does not catch up within the deadline of a request.
const QUEUE_BYTES: u64 = 32 << 20;

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
    /// Number of appends as group commit counts them, once it is taken.
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
    group_commit: GroupCommit,
    clock: Clock,
}

struct State<C> {
    /// Batches to write, of which the last is still open.
    batches: VecDeque<Batch<C>>,
    /// Bytes of all batches here and of those in flight.
    bytes: u64,
    /// The writer delays the open batch, and not every append ends that.
    delayed: bool,
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
    /// Closed for another process. The only end that is not final.
    HandedOver,
}

/// Next step of the writer.
pub enum WriterCommand<C> {
    Write(Batch<C>),
    /// No append within the idle time.
    Idle,
    /// The queue is closed, and every batch was taken.
    Closed,
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
        Self { batches: VecDeque::new(), bytes: 0, delayed: false, next: 0, begun: false, full: false, end: None }
    }
}

impl<C: Content> Queue<C> {
    /// Creates a queue that rejects appends until [`begin`](Self::begin).
    pub fn new(appended: u64, group_bytes: u64, batch_bytes: u64, clock: Clock) -> Self {
        let (state, ready, appended) = (Mutex::default(), Notify::new(), AtomicU64::new(appended));
        let group_commit = GroupCommit::new();
        Self { state, ready, appended, group_bytes, batch_bytes, group_commit, clock }
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
        // It was taken back.
        state.end.take_if(|end| *end == End::HandedOver);
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
        let open = batch.bytes;
        state.bytes += size;
        state.next += events.len() as u64;
        self.appended.store(state.next - 1, Ordering::Release);
        let is_due = self.group_commit.append(open) || state.batches.len() > 1;
        let is_awaited = !state.delayed || is_due;
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
    /// size of a batch, and those that group commit waits for. The caller may drop the call and make it again.
    pub async fn take(&self, idle: Duration) -> WriterCommand<C> {
        let arrival = async {
            while self.is_empty() {
                // An append in between has left a permit.
                self.ready.notified().await;
            }
        };
        tokio::select! {
            biased;
            () = arrival => {}
            () = self.clock.sleep(idle) => return WriterCommand::Idle,
        }
        while let Some(delay) = self.delay() {
            tokio::select! {
                // A permit from before only ends this one wait.
                () = self.ready.notified() => {}
                () = self.clock.sleep(delay) => {}
            }
        }
        let mut state = self.lock();
        state.delayed = false;
        // The queue is empty here only if it is closed.
        let Some(mut batch) = state.batches.pop_front() else { return WriterCommand::Closed };
        batch.appends = self.group_commit.taken();
        WriterCommand::Write(batch)
    }

    fn is_empty(&self) -> bool {
        let state = self.lock();
        state.batches.is_empty() && state.end.is_none()
    }

    /// Returns for how long to delay the batch, if it is the open one.
    fn delay(&self) -> Option<Duration> {
        let mut state = self.lock();
        let (begun, bytes) = match state.batches.front() {
            Some(batch) if state.end.is_none() && state.batches.len() == 1 => (batch.begun, batch.bytes),
            _ => return None,
        };
        let delay = self.group_commit.delay(self.clock.elapsed(begun), bytes);
        state.delayed = delay.is_some();
        delay
    }

    /// Notes whether the threads that append are idle, and ends the delay of a batch if they are.
    pub fn set_idle(&self, idle: bool) {
        if self.group_commit.set_idle(idle) {
            self.ready.notify_one();
        }
    }

    /// Releases the limits of a batch that is durable. Its commit took this long.
    pub fn written(&self, batch: &Batch<C>, took: Duration) {
        let mut state = self.lock();
        self.group_commit.committed(batch.appends, took);
        state.bytes -= batch.bytes;
        state.full = false;
    }

    /// Notes whether the service has no space left.
    pub fn set_full(&self, is_full: bool) {
        self.lock().full = is_full;
    }

    /// Rejects appends from now on. Queued batches are still written if it is closed or handed over, and dropped otherwise.
    pub fn end(&self, end: End) {
        let mut state = self.lock();
        // A failure after a handover does not hide it: another process may have the log.
        if state.end.is_none_or(|known| known == End::HandedOver && end != End::Failed) {
            state.end = Some(end);
        }
        if !matches!(end, End::Closed | End::HandedOver) {
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
    use std::future::pending;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::time::{Instant, SystemTime, UNIX_EPOCH};

    use kvs_runtime::Time;
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
        Queue::new(appended, group_bytes, BATCH_BYTES, Clock::given(Arc::new(Standing(Instant::now()))))
    }

    /// A clock that stands still, so that no delay ends by itself.
    struct Standing(Instant);

    impl Time for Standing {
        fn now(&self) -> Instant {
            self.0
        }

        fn wall(&self) -> SystemTime {
            UNIX_EPOCH
        }

        fn sleep(&self, _time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
            Box::pin(pending())
        }
    }

    /// Returns the next batch, when `meanwhile` runs once the writer waits for it.
    fn taken(queue: &Queue, meanwhile: impl FnOnce()) -> Option<Batch> {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
        runtime.block_on(async {
            let later = async {
                task::yield_now().await;
                meanwhile();
            };
            match join!(queue.take(LONG), later).0 {
                WriterCommand::Write(batch) => Some(batch),
                WriterCommand::Idle | WriterCommand::Closed => None,
            }
        })
    }

    /// Commits the next batch, and returns its number of entries.
    fn committed(queue: &Queue, took: Duration, meanwhile: impl FnOnce()) -> Option<u64> {
        let batch = taken(queue, meanwhile)?;
        queue.written(&batch, took);
        Some(batch.len)
    }

    fn append(queue: &Queue, entries: usize) {
        let event = Event::Delete("a".into());
        queue
            .append(&Breaker::new("database", Clock::system()), 0, &vec![event; entries])
            .expect("the append is accepted");
    }

    #[test]
    fn batch_is_delayed_for_clients_and_busy_threads() {
        let (slow, fast) = (Duration::from_secs(1), Duration::from_micros(100));
        let queue = queue(0, 1 << 20);
        queue.begin(1);
        (0..3).for_each(|_| append(&queue, 1));
        assert_eq!(committed(&queue, slow, || ()), Some(3));
        // The three clients that it answered, though the threads are idle.
        append(&queue, 1);
        assert_eq!(committed(&queue, slow, || (0..2).for_each(|_| append(&queue, 5))), Some(11));
        let queue = super::tests::queue(0, 1 << 20);
        queue.begin(1);
        (0..3).for_each(|_| append(&queue, 1));
        assert_eq!(committed(&queue, fast, || ()), Some(3));
        queue.set_idle(false);
        append(&queue, 1);
        assert_eq!(committed(&queue, fast, || queue.set_idle(true)), Some(1));
        // A closed queue does not wait.
        (0..3).for_each(|_| append(&queue, 1));
        assert_eq!(committed(&queue, slow, || ()), Some(3));
        append(&queue, 1);
        assert_eq!(committed(&queue, slow, || queue.end(End::Closed)), Some(1));
        assert_eq!(committed(&queue, slow, || ()), None);
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
            assert_eq!(taken(&queue, || ()).map(|batch| batch.len), Some(BATCH_BYTES / group_bytes));
        }
        // The batch in flight counts until it is durable.
        assert!(matches!(append_bytes(&queue, 100), Err(AppendError::Unavailable)));
        let mut batch = Batch::new(0, 1, Clock::system().now());
        batch.bytes = 100;
        queue.written(&batch, Duration::ZERO);
        assert!(append_bytes(&queue, 101).is_err() && append_bytes(&queue, 100).is_ok());
    }

    #[test]
    fn first_batch_of_incarnation_follows_on_fork() {
        let queue = queue(7, 1 << 20);
        queue.begin(1_000);
        append(&queue, 2);
        assert_eq!(queue.appended(), 1_001);
        let batch = taken(&queue, || ()).expect("there is work");
        assert_eq!((batch.before, batch.first, batch.last()), (7, 1_000, 1_001));
        append(&queue, 1);
        let batch = taken(&queue, || ()).expect("there is work");
        assert_eq!((batch.before, batch.first, batch.last()), (1_001, 1_002, 1_002));
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
        queue.set_full(true);
        assert!(matches!(append_bytes(&queue, 100), Err(AppendError::InsufficientStorage)));
        queue.written(&Batch::new(0, 1, Clock::system().now()), Duration::ZERO);
        assert!(append_bytes(&queue, 100).is_ok());
    }

    #[test]
    fn ended_queue_rejects_appends_as_unavailable() {
        for end in [End::Closed, End::Failed, End::ReadOnly, End::HandedOver] {
            let queue = queue(0, 1 << 20);
            queue.begin(1);
            queue.end(end);
            let refused = queue.append(&Breaker::new("database", Clock::system()), 0, &[Event::Delete("a".into())]);
            assert!(matches!(refused, Err(AppendError::Unavailable)), "{end:?}: {refused:?}");
            queue.begin(2);
            assert_eq!(append_bytes(&queue, 100).ok(), (end == End::HandedOver).then_some(2), "{end:?}");
        }
    }

    #[test]
    fn failure_after_handover_does_not_hide_it() {
        let queue = queue(0, 1 << 20);
        queue.begin(1);
        for (end, known) in [
            (End::HandedOver, End::HandedOver),
            (End::Failed, End::HandedOver),
            (End::ReadOnly, End::ReadOnly),
            (End::Failed, End::ReadOnly),
        ] {
            queue.end(end);
            assert_eq!(queue.ended(), Some(known));
        }
    }
}
