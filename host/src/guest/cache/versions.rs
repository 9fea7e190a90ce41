//! Validity of kept responses: a counter of changes for each key, and the generation of the serving guest.
//!
//! A response is right for as long as both stand where they stood when it was made. A counter is raised *before* the change
//! it announces is appended or applied, so that no client that has received the change is given the state before it. It is
//! enough that the counters are read after the lookup that is judged by them: they only grow, so those that are equal then
//! were equal at any time since the response was made.
//!
//! Must never know: requests, responses, how keys are hashed.

use super::sync::atomic::{AtomicU64, Ordering};
use super::sync::{Arc, ArcSwap, Guard};

/// Counters. Keys that share one are invalidated together, which is a call too many and nothing worse.
const COUNTERS: usize = 1 << 16;

pub struct Versions<T> {
    counters: Box<[AtomicU64]>,
    generation: ArcSwap<Generation<T>>,
}

/// A guest that serves, from a swap, rollback, promotion or rebuild to the next.
pub struct Generation<T> {
    number: u64,
    /// The property of the guest by which requests are compared.
    pub of: T,
}

/// State of the keys that a response depends on, when it was made.
pub struct Stamp {
    generation: u64,
    /// Place and value of each counter.
    counters: Box<[(usize, u64)]>,
}

impl<T: Clone> Versions<T> {
    pub fn new(of: T) -> Self {
        Self::with(COUNTERS, of)
    }

    pub(super) fn with(counters: usize, of: T) -> Self {
        let counters = (0..counters).map(|_| AtomicU64::new(0)).collect();
        Self { counters, generation: ArcSwap::from_pointee(Generation { number: 0, of }) }
    }

    /// The generation in which a call begins.
    pub fn generation(&self) -> Arc<Generation<T>> {
        self.generation.load_full()
    }

    /// The same for a lookup, without a count of references that all lookups would share.
    pub fn current(&self) -> Guard<Arc<Generation<T>>> {
        self.generation.load()
    }

    /// Begins another generation: what was made before is not given any more, and what is being made is not kept.
    pub fn next_generation(&self, of: T) {
        self.begin(|_| of.clone());
    }

    /// The same, of the guest that serves. Another can begin to serve beside this.
    pub fn renew(&self) {
        self.begin(T::clone);
    }

    fn begin(&self, of: impl Fn(&T) -> T) {
        self.generation.rcu(|current| Generation { number: current.number + 1, of: of(&current.of) });
    }

    /// Announces a change of a key, by the hash of the key. To be called before the change can be seen anywhere.
    pub fn announce(&self, hash: u64) {
        self.counters[self.place(hash)].fetch_add(1, Ordering::SeqCst);
    }

    /// Stamp of a response that depends on keys, by their hashes. To be called in the turn of the call that makes it, in which
    /// nobody else changes them, with the generation that was read in that turn.
    pub fn stamp(&self, generation: &Generation<T>, hashes: impl Iterator<Item = u64>) -> Stamp {
        let counters = hashes.map(|hash| {
            let place = self.place(hash);
            (place, self.counters[place].load(Ordering::SeqCst))
        });
        Stamp { generation: generation.number, counters: counters.collect() }
    }

    /// Whether what was stamped is right for a request that was looked up in this generation.
    pub fn is_current(&self, stamp: &Stamp, generation: &Generation<T>) -> bool {
        stamp.generation == generation.number
            && stamp.counters.iter().all(|(place, value)| self.counters[*place].load(Ordering::SeqCst) == *value)
    }

    fn place(&self, hash: u64) -> usize {
        // As evenly as the hashes, without a division.
        ((u128::from(hash) * self.counters.len() as u128) >> 64) as usize
    }
}

impl Stamp {
    /// Bytes that it takes beside itself.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.counters)
    }
}
