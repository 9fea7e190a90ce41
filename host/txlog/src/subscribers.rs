//! Those who watch for changes, each with a queue of what it has yet to be told.
//!
//! Owns: which keys concern whom, and how far behind a watcher may fall. Must never know: when a change may be told.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::change::Change;

/// Which keys somebody watches.
#[derive(Clone, Debug)]
pub enum Keys {
    /// All that begin so.
    Begin(Box<str>),
    One(Box<str>),
}

type Queues = HashMap<Box<str>, HashMap<u64, Arc<Queue>>>;

#[derive(Default)]
pub struct Subscribers {
    ended: bool,
    next: u64,
    /// By what they watch, so that a change looks at those only that it concerns.
    by_prefix: Queues,
    by_key: Queues,
    /// How many prefixes there are of each length.
    lengths: BTreeMap<usize, usize>,
}

#[derive(Default)]
pub struct Queue {
    waiting: Mutex<Waiting>,
    ready: Notify,
}

#[derive(Default)]
struct Waiting {
    changes: VecDeque<Arc<Change>>,
    bytes: usize,
    /// It fell too far behind, or the log ended: nothing more comes.
    over: bool,
}

impl Keys {
    pub fn begin(prefix: &str) -> Self {
        Self::Begin(prefix.into())
    }
}

impl Subscribers {
    /// None after the end.
    pub fn enter(&mut self, keys: &Keys) -> Option<(u64, Arc<Queue>)> {
        if self.ended {
            return None;
        }
        let (number, queue) = (self.next, Arc::<Queue>::default());
        self.next += 1;
        let (queues, text) = self.queues(keys);
        let same = queues.entry(text.into()).or_default();
        same.insert(number, Arc::clone(&queue));
        if let (1, Keys::Begin(prefix)) = (same.len(), keys) {
            *self.lengths.entry(prefix.len()).or_default() += 1;
        }
        Some((number, queue))
    }

    pub fn leave(&mut self, keys: &Keys, number: u64) {
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

    /// The queues of all who watch this key.
    pub fn concerned(&self, key: &str) -> impl Iterator<Item = &Arc<Queue>> {
        let prefixes = self.lengths.keys().filter_map(|length| self.by_prefix.get(key.get(..*length)?));
        prefixes.chain(self.by_key.get(key)).flat_map(HashMap::values)
    }

    /// Nobody watches any more, and nobody begins to.
    pub fn end(&mut self) {
        self.ended = true;
        self.dismiss();
    }

    /// Nothing more comes for those who watch.
    pub fn dismiss(&self) {
        for queue in self.by_prefix.values().chain(self.by_key.values()).flat_map(HashMap::values) {
            lock(&queue.waiting).over = true;
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
    /// The next change. None when the watcher fell too far behind, or the end has come.
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

    pub fn push(&self, change: &Arc<Change>, lag_bytes: usize) {
        let mut waiting = lock(&self.waiting);
        if waiting.over {
            return;
        }
        waiting.bytes += change.bytes();
        // A single large change is no reason.
        if waiting.bytes > lag_bytes && !waiting.changes.is_empty() {
            *waiting = Waiting { over: true, ..Waiting::default() };
        } else {
            waiting.changes.push_back(Arc::clone(change));
        }
        self.ready.notify_one();
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is called under these locks that could panic and leave something half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Event, Put};

    #[test]
    fn a_watcher_may_fall_behind_by_so_many_bytes_of_keys_and_values() {
        let queue = Queue::default();
        let is_over = |sequence| {
            let put = Put { key: "ab".into(), value: b"cde".into(), metadata: Vec::new(), expires: None };
            queue.push(&Arc::new(Change::new(sequence, 0, Event::Put(put))), 10);
            lock(&queue.waiting).over
        };
        assert_eq!([1, 2, 3].map(is_over), [false, false, true]);
    }
}
