//! What an instance holds of the machine: linear memory and tables, counted as they grow.
//!
//! Owns: when a guest gets no more, and when it is so near that point that it must not take in more data. A guest that runs
//! out of memory traps, and one that traps is rebuilt from the log: were everything taken in that just fits, it would be
//! rebuilt into the same wall. Must never know: what the memory is used for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use wasmtime::{ResourceLimiter, Result};

use super::limits::Limits;
use kvs_txlog::REPLAY_BYTES;

pub struct Memory {
    limits: Limits,
    /// Bytes of all linear memories. They never shrink: what the guest frees is its own to use again.
    held: usize,
    /// Of all instances.
    total: Arc<AtomicU64>,
    /// Of all tables.
    table_elements: usize,
    /// The growth that was granted last, taken back when it fails.
    granted: usize,
    /// Whether a growth was denied.
    denied: bool,
    full: Option<Full>,
}

/// Once near the limit, data is taken in only for data that is gone.
struct Full {
    /// What the guest stored when it was refused for the first time.
    stored: u64,
    /// What was deleted since, by the last count, less what was taken in since that count.
    room: u64,
}

impl Memory {
    /// `total` counts the bytes of all instances that share it.
    pub fn new(limits: Limits, total: Arc<AtomicU64>) -> Self {
        Self { limits, held: 0, total, table_elements: 0, granted: 0, denied: false, full: None }
    }

    /// Whether the guest was ever denied memory.
    pub fn was_denied(&self) -> bool {
        self.denied
    }

    pub fn held(&self) -> usize {
        self.held
    }

    /// Whether the guest may take in this many bytes more of keys and values.
    pub fn takes(&mut self, bytes: u64) -> bool {
        if self.held <= self.limits.memory_bytes - reserve(&self.limits) {
            return true;
        }
        let room = self.full.as_mut().map(|full| (full.room.checked_sub(bytes), full));
        match room {
            Some((Some(left), full)) => {
                full.room = left;
                true
            }
            _ => false,
        }
    }

    pub fn is_full(&self) -> bool {
        self.full.is_some()
    }

    /// What the guest stores, counted when it was refused for the first time, and from then on now and again.
    pub fn count(&mut self, stored: u64) {
        let full = self.full.get_or_insert(Full { stored, room: 0 });
        full.room = full.stored.saturating_sub(stored);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.total.fetch_sub(self.held as u64, Ordering::Relaxed);
    }
}

/// Memory that data must leave free: for a request and its response on their way through, for a batch of entries on replay,
/// and for what grows in leaps.
fn reserve(limits: &Limits) -> usize {
    let passing = 2 * limits.value_bytes + REPLAY_BYTES;
    (limits.memory_bytes / 8).max(passing).min(limits.memory_bytes / 2)
}

impl ResourceLimiter for Memory {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> Result<bool> {
        self.granted = 0;
        let growth = desired.saturating_sub(current);
        let fits = maximum.is_none_or(|maximum| desired <= maximum)
            && growth <= self.limits.memory_bytes.saturating_sub(self.held);
        if fits {
            self.held += growth;
            self.total.fetch_add(growth as u64, Ordering::Relaxed);
            self.granted = growth;
        } else {
            self.denied = true;
        }
        Ok(fits)
    }

    fn memory_grow_failed(&mut self, _: wasmtime::Error) -> Result<()> {
        let granted = std::mem::take(&mut self.granted);
        self.held -= granted;
        self.total.fetch_sub(granted as u64, Ordering::Relaxed);
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> Result<bool> {
        let growth = desired.saturating_sub(current);
        let fits = growth <= self.limits.table_elements.saturating_sub(self.table_elements);
        if fits {
            self.table_elements += growth;
        }
        Ok(fits)
    }

    fn instances(&self) -> usize {
        self.limits.instances
    }

    fn tables(&self) -> usize {
        self.limits.instances
    }

    fn memories(&self) -> usize {
        self.limits.instances
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::limits;

    const MIB: usize = 1 << 20;

    fn memory() -> Memory {
        let limits = Limits {
            table_elements: 100,
            instances: 10,
            value_bytes: MIB,
            response_bytes: MIB,
            ..limits::tests::limits(64 * MIB, None)
        };
        Memory::new(limits, Arc::default())
    }

    #[test]
    fn memories_and_tables_are_limited_together() {
        let mut memory = memory();
        assert!(memory.memory_growing(0, 40 * MIB, None).unwrap());
        assert!(!memory.memory_growing(0, 25 * MIB, None).unwrap(), "a second memory has a limit of its own");
        assert!(memory.memory_growing(40 * MIB, 64 * MIB, None).unwrap());
        assert!(!memory.memory_growing(0, 1, None).unwrap());
        assert!(memory.table_growing(0, 60, None).unwrap());
        assert!(!memory.table_growing(0, 41, None).unwrap(), "a second table has a limit of its own");
        assert!(memory.table_growing(60, 100, None).unwrap());
    }

    #[test]
    fn growth_that_failed_is_not_held() {
        let mut memory = memory();
        assert!(memory.memory_growing(0, 40 * MIB, None).unwrap());
        memory.memory_grow_failed(wasmtime::format_err!("no memory")).unwrap();
        assert_eq!(memory.held(), 0);
        assert!(!memory.memory_growing(0, 10 * MIB, Some(5 * MIB)).unwrap());
        memory.memory_grow_failed(wasmtime::format_err!("more than its maximum")).unwrap();
        assert_eq!(memory.held(), 0);
    }

    #[test]
    fn total_is_that_of_all_instances() {
        let mut one = memory();
        let total = Arc::clone(&one.total);
        let mut other = Memory::new(one.limits, Arc::clone(&total));
        assert!(one.memory_growing(0, 10 * MIB, None).unwrap() && other.memory_growing(0, 20 * MIB, None).unwrap());
        assert!(other.memory_growing(20 * MIB, 25 * MIB, None).unwrap());
        other.memory_grow_failed(wasmtime::format_err!("no memory")).unwrap();
        assert_eq!(total.load(Ordering::Relaxed), 30 << 20);
        drop(one);
        assert_eq!(total.load(Ordering::Relaxed), 20 << 20);
    }

    #[test]
    fn near_the_limit_data_is_taken_in_only_for_data_that_is_gone() {
        let mut memory = memory();
        assert!(memory.memory_growing(0, 56 * MIB, None).unwrap());
        assert!(memory.takes(1_000), "an eighth is free");
        assert!(memory.memory_growing(56 * MIB, 57 * MIB, None).unwrap());
        assert!(!memory.takes(1));
        memory.count(50_000);
        assert!(!memory.takes(1), "nothing is gone yet");
        memory.count(49_000);
        assert!(!memory.takes(1_001));
        assert!(memory.takes(600) && memory.takes(400) && !memory.takes(1));
        memory.count(50_000);
        assert!(!memory.takes(1), "as much is stored as when it was full");
    }
}
