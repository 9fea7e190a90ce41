//! Subscribers of the change feed, each with a queue of pending changes.
//!
//! Owns: the matching of keys to subscribers, and the limit of a queue, beyond which a slow consumer is disconnected. Must
//! never know: when a change may be published.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::Notify;

use super::change::Change;
use super::sync::{Mutex, MutexGuard, PoisonError};
use crate::Event;

/// First character of the keys that belong to guests. A prefix that does not begin with it selects none of them.
pub const GUEST_KEY: char = '\u{1}';

/// Selector of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keys {
    /// All keys with this prefix.
    Begin(Box<str>),
    One(Box<str>),
}

/// The changes that a subscriber watches: those of keys that match any selector. Each is delivered once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    pub keys: Box<[Keys]>,
    /// Only puts, no deletes.
    pub puts_only: bool,
}

type Queues = HashMap<Box<str>, HashMap<u64, Arc<Queue>>>;

/// The subscribers, indexed by what they watch.
#[derive(Default)]
pub struct Subscribers {
    ended: bool,
    next: u64,
    /// Indexes, so that a change is matched with its subscribers only.
    by_prefix: Queues,
    by_key: Queues,
    /// Subscribers without keys, which only get the end of the feed.
    idle: HashMap<u64, Arc<Queue>>,
    /// Number of prefixes of each length.
    lengths: BTreeMap<usize, usize>,
}

/// Pending changes of one subscriber.
#[derive(Default)]
pub struct Queue {
    puts_only: bool,
    waiting: Mutex<Waiting>,
    ready: Notify,
}

#[derive(Default)]
struct Waiting {
    changes: VecDeque<Arc<Change>>,
    bytes: usize,
    /// Sequence of the last queued change, at first that of the newest change before the subscription. Changes up to it are
    /// skipped: several selectors can match one, and earlier ones come from the log.
    last: u64,
    /// The consumer was too slow, or the feed ended: no more changes follow.
    over: bool,
    /// Changes are missing: the consumer was too slow, or they were not published.
    dropped: bool,
}

impl Keys {
    pub fn begin(prefix: &str) -> Self {
        Self::Begin(prefix.into())
    }

    fn select(&self, key: &str) -> bool {
        match self {
            Self::Begin(prefix) => key.starts_with(&**prefix) && !(prefix.is_empty() && key.starts_with(GUEST_KEY)),
            Self::One(one) => key == &**one,
        }
    }
}

impl Selection {
    /// Selects puts and deletes of keys.
    pub fn of(keys: impl IntoIterator<Item = Keys>) -> Self {
        Self { keys: keys.into_iter().collect(), puts_only: false }
    }

    pub fn selects(&self, event: &Event) -> bool {
        let key = event.key();
        !(self.puts_only && is_delete(event)) && self.keys.iter().any(|keys| keys.select(key))
    }
}

fn is_delete(event: &Event) -> bool {
    matches!(event, Event::Delete(_))
}

impl Subscribers {
    /// Adds a subscriber to the changes after this sequence. Returns None after the end of the feed.
    pub fn enter(&mut self, selection: &Selection, after: u64) -> Option<(u64, Arc<Queue>)> {
        if self.ended {
            return None;
        }
        let number = self.next;
        let waiting = Mutex::new(Waiting { last: after, ..Waiting::default() });
        let queue = Arc::new(Queue { puts_only: selection.puts_only, waiting, ready: Notify::new() });
        self.next += 1;
        if selection.keys.is_empty() {
            self.idle.insert(number, Arc::clone(&queue));
        }
        for keys in &selection.keys {
            let (queues, text) = self.queues(keys);
            let same = queues.entry(text.into()).or_default();
            let is_first = same.is_empty();
            same.insert(number, Arc::clone(&queue));
            if let (true, Keys::Begin(prefix)) = (is_first, keys) {
                *self.lengths.entry(prefix.len()).or_default() += 1;
            }
        }
        Some((number, queue))
    }

    pub fn leave(&mut self, selection: &Selection, number: u64) {
        self.idle.remove(&number);
        for keys in &selection.keys {
            self.leave_keys(keys, number);
        }
    }

    fn leave_keys(&mut self, keys: &Keys, number: u64) {
        let (queues, text) = self.queues(keys);
        let Some(same) = queues.get_mut(text) else { return };
        same.remove(&number);
        if !same.is_empty() {
            return;
        }
        queues.remove(text);
        if let Keys::Begin(prefix) = keys
            && let Some(count) = self.lengths.get_mut(&prefix.len())
        {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&prefix.len());
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.by_prefix.is_empty() && self.by_key.is_empty()
    }

    /// Returns the queues of the subscribers of an event, once for each matching selector.
    pub fn concerned(&self, event: &Event) -> impl Iterator<Item = &Arc<Queue>> {
        let key = event.key();
        let prefixes = self.prefixes_of(key).filter_map(|prefix| self.by_prefix.get(prefix));
        let is_delete = is_delete(event);
        let queues = prefixes.chain(self.by_key.get(key)).flat_map(HashMap::values);
        queues.filter(move |queue| !(queue.puts_only && is_delete))
    }

    /// Returns the prefixes of a key that have the length of a watched one. There can be any number of longer ones.
    fn prefixes_of<'k>(&self, key: &'k str) -> impl Iterator<Item = &'k str> + use<'_, 'k> {
        // The empty prefix selects no keys of guests.
        let least = usize::from(key.starts_with(GUEST_KEY));
        self.lengths.range(least..=key.len()).filter_map(|(length, _)| key.get(..*length))
    }

    /// Ends the feed: cancels all subscribers, and accepts no new ones.
    pub fn end(&mut self) {
        self.ended = true;
        self.cancel(false);
    }

    /// Cancels all subscribers, which would miss changes.
    pub fn dismiss(&self) {
        self.cancel(true);
    }

    /// Ends the queues after the pending changes. `dropped` is whether later changes were not published.
    fn cancel(&self, dropped: bool) {
        let watching = self.by_prefix.values().chain(self.by_key.values()).flat_map(HashMap::values);
        for queue in watching.chain(self.idle.values()) {
            let mut waiting = lock(&queue.waiting);
            waiting.over = true;
            waiting.dropped |= dropped;
            queue.ready.notify_one();
        }
    }

    fn queues<'k>(&mut self, keys: &'k Keys) -> (&mut Queues, &'k str) {
        match keys {
            Keys::Begin(prefix) => (&mut self.by_prefix, prefix),
            Keys::One(key) => (&mut self.by_key, key),
        }
    }
}

impl Queue {
    /// Returns the next change. None if the consumer was too slow, or the feed ended.
    pub async fn next(&self) -> Option<Arc<Change>> {
        loop {
            {
                let mut waiting = lock(&self.waiting);
                if let Some(change) = waiting.changes.pop_front() {
                    waiting.bytes -= change.bytes();
                    return Some(change);
                }
                if waiting.over {
                    return None;
                }
            }
            self.ready.notified().await;
        }
    }

    /// Returns the bytes of keys and values of pending changes.
    pub fn bytes(&self) -> usize {
        lock(&self.waiting).bytes
    }

    /// Returns whether there was nothing to deliver but what [`Queue::next`] has returned.
    pub fn has_delivered_all(&self) -> bool {
        let waiting = lock(&self.waiting);
        waiting.changes.is_empty() && !waiting.dropped
    }

    /// Waits until a change is queued, or the feed ends.
    pub async fn changed(&self) {
        self.ready.notified().await;
    }

    pub fn push(&self, change: &Arc<Change>, lag_bytes: usize) {
        let mut waiting = lock(&self.waiting);
        if change.sequence <= waiting.last {
            return;
        }
        if waiting.over {
            waiting.dropped = true;
            return;
        }
        waiting.last = change.sequence;
        waiting.bytes += change.bytes();
        // A single change may exceed the limit.
        if waiting.bytes > lag_bytes && !waiting.changes.is_empty() {
            *waiting = Waiting { over: true, dropped: true, ..Waiting::default() };
        } else {
            waiting.changes.push_back(Arc::clone(change));
        }
        self.ready.notify_one();
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code under these locks can panic in the middle of a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_prefixes_up_to_the_key_are_looked_up() {
        let mut subscribers = Subscribers::default();
        for prefix in ["", "\u{1}", "a", "ab", "xyz", &"a".repeat(5), &"a".repeat(2_000)] {
            subscribers.enter(&Selection::of([Keys::begin(prefix)]), 0).expect("the feed has not ended");
        }
        for (key, prefixes) in [("abc", vec!["", "a", "ab", "abc"]), ("\u{1}", vec!["\u{1}"]), ("ä", vec!["", "ä"])] {
            assert_eq!(subscribers.prefixes_of(key).collect::<Vec<_>>(), prefixes, "{key:?}");
        }
        assert_eq!(subscribers.lengths.len(), 6);
    }
}
