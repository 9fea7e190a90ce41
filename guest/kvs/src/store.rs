//! The state: an ordered map from keys to items, made of the log's entries and of nothing else.
//!
//! Owns: what an entry does, which items have expired, and what the absence of a key depends on.
//! Must never know: HTTP, or who wrote an entry. Keys and metadata are taken as they come, since any guest may have
//! written them.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::mem;

use kvs_kit::state::{Entry, Logged, State, Statistics, Value};

use crate::item::Item;
use crate::kvs::store::transaction_log::{AppendError, Event};
use crate::order::{Order, Place};
use crate::table::Table;

/// Expired keys that one tick deletes, at most: a few milliseconds' work, during which no request is served.
const DELETES_PER_TICK: usize = 1_000;

/// Pause between ticks for keys that expire one after the other, so that one append takes several of them.
const EXPIRY_PAUSE_MS: u64 = 100;

/// Slots that a replay fills before it puts them in order: many, so that it costs little, and few enough for one call.
const DISORDER: usize = 1 << 17;

/// Items lie in slots, which are found by key and walked in order. A slot keeps its number when its item is overwritten.
#[derive(Debug, Default)]
pub struct Store {
    /// Empty ones are listed in `free`.
    slots: Vec<Item>,
    free: Vec<u32>,
    table: Table,
    order: Order,
    /// Slots from here on are not in the order yet.
    ordered: usize,
    /// The slots of items that expire, by that moment and the item's sequence, which makes it unique.
    expiries: BTreeMap<(u64, u64), u32>,
    /// Of all keys and values.
    bytes: u64,
    /// The sequence of the newest entry that took a key away.
    newest_delete: u64,
    timer: Timer,
}

/// The next tick of this instance, as the host was asked for it.
#[derive(Debug, Default)]
struct Timer {
    /// 0 before the first tick.
    at: Cell<u64>,
    /// Ticks for keys that expire before it wait for this.
    earliest: Cell<u64>,
    /// Whether an item that was put moved it forward.
    is_earlier: Cell<bool>,
}

impl Timer {
    /// It is set to this, after a tick.
    fn set(&self, now: u64, next: Option<u64>) {
        self.at.set(next.unwrap_or(u64::MAX));
        self.earliest.set(now.saturating_add(EXPIRY_PAUSE_MS));
        self.is_earlier.set(false);
    }

    /// An item expires at this time.
    fn expires(&self, at: u64) {
        let at = at.max(self.earliest.get());
        if at < self.at.get() {
            self.at.set(at);
            self.is_earlier.set(true);
        }
    }
}

impl Store {
    /// What is at the key, or else the newest sequence that its absence depends on.
    ///
    /// Which delete took this key away is not kept, so its absence depends on the newest of all; and that of an expired
    /// item on its put too, since without it the key might still have an older item that has not expired.
    pub fn get(&self, key: &str, now: u64) -> Result<&Item, u64> {
        match self.slot(key.as_bytes()).map(|slot| &self.slots[slot as usize]) {
            Some(item) if item.is_expired(now) => Err(item.sequence().max(self.newest_delete)),
            Some(item) => Ok(item),
            None => Err(self.newest_delete),
        }
    }

    /// The store, which has settled, for those who read in order.
    pub fn in_order(&self) -> InOrder<'_> {
        InOrder(self)
    }

    /// Takes in what was just appended. Returns the item that was at the key before.
    pub fn replace(&mut self, sequence: u64, event: &Event) -> Option<Item> {
        let before = match event {
            Event::Put(put) => self.take_in(Item::new(sequence, put)),
            Event::Delete(key) => self.take_away(sequence, key.as_bytes()),
        };
        self.settle();
        before
    }

    fn take_in(&mut self, item: Item) -> Option<Item> {
        let (sequence, expires, bytes) = (item.sequence(), item.expires(), item.bytes());
        let (slot, before) = self.put(item);
        self.bytes += bytes;
        if let Some(expires) = expires {
            self.expiries.insert((expires, sequence), slot);
            self.timer.expires(expires);
        }
        before
    }

    fn take_away(&mut self, sequence: u64, key: &[u8]) -> Option<Item> {
        let before = self.remove(key)?;
        self.forget(&before);
        self.newest_delete = sequence;
        Some(before)
    }

    fn slot(&self, key: &[u8]) -> Option<u32> {
        self.table.find(key, |slot| self.slots[slot as usize].key() == key)
    }

    /// Puts an item into the slot of its key, or into one that is empty. Returns also the item that was there before.
    fn put(&mut self, item: Item) -> (u32, Option<Item>) {
        let free = self.free.last().copied();
        let slot = free.unwrap_or(self.slots.len() as u32);
        let key = item.key();
        if let Some(slot) = self.table.find_or_insert(key, slot, |slot| self.slots[slot as usize].key() == key) {
            let old = mem::replace(&mut self.slots[slot as usize], item);
            self.forget(&old);
            return (slot, Some(old));
        }
        if free.is_some() {
            self.free.pop();
            self.slots[slot as usize] = item;
        } else {
            self.slots.push(item);
        }
        if (slot as usize) < self.ordered {
            self.order.insert(slot, |slot| self.slots[slot as usize].key());
        } else if self.slots.len() - self.ordered >= DISORDER {
            self.settle();
        }
        (slot, None)
    }

    fn remove(&mut self, key: &[u8]) -> Option<Item> {
        let slot = self.table.remove(key, |slot| self.slots[slot as usize].key() == key)?;
        if (slot as usize) < self.ordered {
            self.order.remove(key, |slot| self.slots[slot as usize].key());
        }
        self.free.push(slot);
        Some(mem::take(&mut self.slots[slot as usize]))
    }

    /// Undoes the traces of an item that is no longer in its slot.
    fn forget(&mut self, item: &Item) {
        self.bytes -= item.bytes();
        if let Some(expires) = item.expires() {
            self.expiries.remove(&(expires, item.sequence()));
        }
    }

    /// How many keys are held, with those that have expired and wait for a tick.
    pub fn keys(&self) -> u64 {
        (self.slots.len() - self.free.len()) as u64
    }

    /// The bytes of all keys and values held.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl State for Store {
    fn apply(&mut self, Entry { sequence, key, put }: Entry<'_>) {
        match put {
            Some(Value { bytes, metadata, expires_at_ms }) => {
                self.take_in(Item::of(sequence, key, bytes, metadata, expires_at_ms));
            }
            None => {
                self.take_away(sequence, key);
            }
        }
    }

    /// Puts what came since the last time in order.
    fn settle(&mut self) {
        let slots = self.ordered..self.slots.len();
        if slots.is_empty() {
            return;
        }
        self.ordered = slots.end;
        let key = |slot: u32| self.slots[slot as usize].key();
        let filled = slots.filter(|slot| !self.slots[*slot].is_none()).map(|slot| slot as u32);
        self.order.insert_all(filled.collect(), key);
    }

    fn statistics(&self) -> Statistics {
        Statistics { keys: self.keys(), bytes: self.bytes() }
    }

    /// Deletes keys that have expired, through the log, so that every copy of the state loses them alike. Returns the time
    /// at which the next expires; `now` when there are more than one tick deletes. The timer is set to it, too.
    ///
    /// They are appended in as few groups as the host accepts: each append counts as that of a client, whom the log may wait
    /// for. One that is too large on its own does not hold up the others. Readers miss an expired key whether it is deleted or
    /// not.
    fn tick(store: &mut Logged<'_, Self>, now: u64) -> Option<u64> {
        let expired = store.expiries.range(..=(now, u64::MAX)).take(DELETES_PER_TICK);
        let key = |slot: u32| String::from_utf8_lossy(store.slots[slot as usize].key()).into_owned();
        let deletes: Vec<Event> = expired.map(|(_, slot)| Event::Delete(key(*slot))).collect();
        let (mut deleted, mut rest, mut most) = (0, &deletes[..], deletes.len());
        while !rest.is_empty() {
            let (group, others) = rest.split_at(most.min(rest.len()));
            match store.append(group) {
                Ok(_) => (deleted, rest) = (deleted + group.len(), others),
                Err(AppendError::TooLarge(_)) if group.len() > 1 => most = group.len() / 2,
                Err(AppendError::TooLarge(_) | AppendError::InvalidKey) => rest = others,
                Err(AppendError::InsufficientStorage | AppendError::Unavailable | AppendError::ReadOnly) => {
                    return None;
                }
            }
        }
        // Were none deleted, the next tick would not get further.
        let next = if deletes.len() == DELETES_PER_TICK && deleted > 0 {
            Some(now)
        } else {
            let next = store.expiries.range((now.saturating_add(1), 0)..).next();
            next.map(|((expires, _), _)| *expires.max(&now.saturating_add(EXPIRY_PAUSE_MS)))
        };
        store.timer.set(now, next);
        store.set_timer(next);
        next
    }

    fn earlier_tick(&self) -> Option<u64> {
        self.timer.is_earlier.take().then(|| self.timer.at.get())
    }
}

/// A store with nothing put off.
pub struct InOrder<'s>(&'s Store);

/// Expired keys that a count passes over, at most: some milliseconds' work.
const MOST_EXPIRED: usize = 100_000;

impl<'s> InOrder<'s> {
    /// The items before a key, or all, from the last one back, with those that have expired and wait for a tick.
    pub fn range_back(&self, until: Option<&[u8]>) -> impl Iterator<Item = &'s Item> + use<'s> {
        let Store { slots, order, .. } = self.0;
        let place = until.map_or_else(|| order.end(), |until| self.place(until));
        order.walk_back(place).map(|slot| &slots[slot as usize])
    }

    /// How many keys from `least` on and before `most`, or to the end, have not expired. None when too many have that wait
    /// for a tick.
    pub fn count(&self, least: &[u8], most: Option<&[u8]>, now: u64) -> Option<usize> {
        let Store { slots, order, expiries, .. } = self.0;
        let end = most.map_or_else(|| order.end(), |most| self.place(most));
        let held = order.count_before(end).saturating_sub(order.count_before(self.place(least)));
        let mut expired = 0;
        for (passed, (_, slot)) in expiries.range(..=(now, u64::MAX)).enumerate() {
            if passed == MOST_EXPIRED {
                return None;
            }
            let key = slots[*slot as usize].key();
            expired += usize::from(key >= least && most.is_none_or(|most| key < most));
        }
        Some(held - expired)
    }

    fn place(&self, key: &[u8]) -> Place {
        self.0.order.place(key, |slot| self.0.slots[slot as usize].key())
    }

    /// The items from a key on, by the bytes of their keys, with those that have expired and wait for a tick.
    pub fn range(&self, from: &[u8]) -> impl Iterator<Item = &'s Item> + use<'s> {
        let Store { slots, order, .. } = self.0;
        order.walk(self.place(from)).map(|slot| &slots[slot as usize])
    }
}

/// Two stores are equal when they came from the same entries, however those were cut into batches.
impl PartialEq for Store {
    fn eq(&self, other: &Self) -> bool {
        let items = |store: &Self| {
            let mut items: Vec<_> = store.slots.iter().filter(|item| !item.is_none()).cloned().collect();
            items.sort_unstable_by(|one, other| one.key().cmp(other.key()));
            items
        };
        items(self) == items(other)
            && self.expiries.keys().eq(other.expiries.keys())
            && (self.keys(), self.bytes, self.newest_delete) == (other.keys(), other.bytes, other.newest_delete)
    }
}

#[cfg(test)]
mod tests;
