//! Quotas: how many keys a client may have, and how many bytes, of those with its key prefix.
//!
//! What there is with a prefix is counted in the log once, when a client with a quota first writes, and kept from there on by what
//! is appended. So it needs no storage of its own, and is right after a restart, an expiry, a swap or a compaction. Must never
//! know: tokens, or what a guest makes of a refused append.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use kvs_runtime::{Env, Random};
use kvs_txlog::{AppendError, Event, EventRef, TransactionLog};
use siphasher::sip128::{Hasher128, SipHasher13};
use tokio::sync::watch;
use tokio::task;
use tracing::warn;

/// Prefixes that are counted at a time, at most; the oldest makes room for another, and is counted again when it is used.
const MAX_COUNTS: usize = 1_000;

/// What the keys with the prefix of a client may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    pub keys: Option<u64>,
    /// Of keys and values.
    pub bytes: Option<u64>,
}

/// The counts of all prefixes that a quota is for.
pub struct Quotas {
    /// Whether anything is counted: without quotas, an append takes no lock.
    is_used: AtomicBool,
    counts: Mutex<Counts>,
    /// Nobody outside can choose keys with one hash.
    hasher: SipHasher13,
}

#[derive(Default)]
struct Counts {
    each: Vec<Count>,
    /// Identifies a count that was begun again.
    begun: u64,
}

/// The keys with one prefix.
struct Count {
    prefix: Arc<str>,
    number: u64,
    /// Bytes of each key and its value, by the hash of the key.
    sizes: HashMap<u128, u64>,
    bytes: u64,
    /// Keys that were changed while the log is counted, in which older entries of them are found. None when all is counted.
    changed: Option<HashSet<u128>>,
    done: watch::Sender<bool>,
}

/// Why an append is refused. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The quota would be exceeded.
    Exceeded,
    /// By the log, or since the keys are not counted yet.
    Append(AppendError),
}

impl Quotas {
    pub fn new(random: &Random) -> Result<Arc<Self>> {
        let mut seed = [0; 16];
        random.fill(&mut seed)?;
        let hasher = SipHasher13::new_with_key(&seed);
        Ok(Arc::new(Self { is_used: AtomicBool::default(), counts: Mutex::default(), hasher }))
    }

    /// Appends events, and counts them. `client` is the prefix and the quota of the client, if it has one.
    pub fn append(
        &self,
        client: Option<(&str, Quota)>,
        events: &[Event],
        append: impl FnOnce() -> Result<u64, AppendError>,
    ) -> Result<u64, Refused> {
        if client.is_none() && !self.is_used.load(Ordering::SeqCst) {
            let first = append().map_err(Refused::Append)?;
            // A count that has begun meanwhile may read the log without these events.
            if self.is_used.load(Ordering::SeqCst) {
                self.counts().apply(events, &self.hasher);
            }
            return Ok(first);
        }
        // Held until the events are counted: what another shard appends is checked against them.
        let mut counts = self.counts();
        if let Some((prefix, quota)) = client {
            counts.check(prefix, quota, events, &self.hasher)?;
        }
        let first = append().map_err(Refused::Append)?;
        counts.apply(events, &self.hasher);
        Ok(first)
    }

    /// Waits until the keys with a prefix are counted, which this begins if necessary. Returns whether they are.
    pub async fn counted(self: &Arc<Self>, prefix: &Arc<str>, log: &Arc<dyn TransactionLog>, env: &Env) -> bool {
        let mut done = {
            let mut counts = self.counts();
            match counts.each.iter().find(|count| count.prefix == *prefix) {
                Some(Count { changed: None, .. }) => return true,
                Some(count) => count.done.subscribe(),
                None => {
                    let (number, done) = counts.begin(prefix);
                    self.is_used.store(true, Ordering::SeqCst);
                    drop(counts);
                    let (quotas, log) = (Arc::clone(self), Arc::clone(log));
                    env.tasks.detach("quota count", async move {
                        if let Err(error) = quotas.count(number, log).await {
                            warn!("the keys of a quota cannot be counted: {error:#}");
                            quotas.counts().each.retain(|count| count.number != number);
                        }
                    });
                    done
                }
            }
        };
        // An error when the count was given up.
        done.wait_for(|done| *done).await.is_ok()
    }

    /// Gives up all counts: another process has written to the log, or this one has lost what it appended.
    pub fn forget(&self) {
        if self.is_used.load(Ordering::SeqCst) {
            self.counts().each.clear();
        }
    }

    /// Counts what the log has. Changes since the count began are known already.
    async fn count(self: &Arc<Self>, number: u64, log: Arc<dyn TransactionLog>) -> Result<()> {
        // A replay has durable entries only.
        log.watermark().reached(log.appended()).await?;
        let quotas = Arc::clone(self);
        task::spawn_blocking(move || {
            log.replay(0, &mut |entries| {
                let mut counts = quotas.counts();
                let count = counts.each.iter_mut().find(|count| count.number == number);
                // Forgotten, so nobody waits for it any more.
                let Some(count) = count else { return Ok(()) };
                for entry in entries {
                    count.replay(&entry.event, &quotas.hasher);
                }
                Ok(())
            })
        })
        .await??;
        let mut counts = self.counts();
        if let Some(count) = counts.each.iter_mut().find(|count| count.number == number) {
            count.changed = None;
            count.done.send_replace(true);
        }
        Ok(())
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        // Every change under this lock is whole.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    fn begin(&mut self, prefix: &Arc<str>) -> (u64, watch::Receiver<bool>) {
        if self.each.len() >= MAX_COUNTS {
            self.each.remove(0);
        }
        self.begun += 1;
        let (done, receiver) = watch::channel(false);
        self.each.push(Count {
            prefix: Arc::clone(prefix),
            number: self.begun,
            sizes: HashMap::new(),
            bytes: 0,
            changed: Some(HashSet::new()),
            done,
        });
        (self.begun, receiver)
    }

    fn check(&self, prefix: &str, quota: Quota, events: &[Event], hasher: &SipHasher13) -> Result<(), Refused> {
        match self.each.iter().find(|count| *count.prefix == *prefix) {
            Some(count) if count.changed.is_none() => count.check(quota, events, hasher),
            _ => Err(Refused::Append(AppendError::Unavailable)),
        }
    }

    fn apply(&mut self, events: &[Event], hasher: &SipHasher13) {
        for event in events {
            for count in self.each.iter_mut().filter(|count| event.key().starts_with(&*count.prefix)) {
                let key = hash(event.key(), hasher);
                count.set(key, size(event));
                if let Some(changed) = &mut count.changed {
                    changed.insert(key);
                }
            }
        }
    }
}

impl Count {
    /// Checks that events do not increase what there is beyond a quota. What is beyond it already can become less.
    fn check(&self, quota: Quota, events: &[Event], hasher: &SipHasher13) -> Result<(), Refused> {
        let (mut keys, mut bytes) = (self.sizes.len() as u64, self.bytes);
        let mut after = HashMap::new();
        for event in events.iter().filter(|event| event.key().starts_with(&*self.prefix)) {
            let (key, now) = (hash(event.key(), hasher), size(event));
            let before = after.insert(key, now).unwrap_or_else(|| self.sizes.get(&key).copied());
            keys = keys + u64::from(now.is_some()) - u64::from(before.is_some());
            bytes = bytes + now.unwrap_or(0) - before.unwrap_or(0);
        }
        let is_beyond =
            |most: Option<u64>, before: u64, after: u64| after > before && most.is_some_and(|most| after > most);
        if is_beyond(quota.keys, self.sizes.len() as u64, keys) || is_beyond(quota.bytes, self.bytes, bytes) {
            return Err(Refused::Exceeded);
        }
        Ok(())
    }

    fn replay(&mut self, event: &EventRef<'_>, hasher: &SipHasher13) {
        if !event.key().starts_with(&*self.prefix) {
            return;
        }
        let key = hash(event.key(), hasher);
        if self.changed.as_ref().is_some_and(|changed| changed.contains(&key)) {
            return;
        }
        self.set(
            key,
            match event {
                EventRef::Put(put) => Some((put.key.len() + put.value.len()) as u64),
                EventRef::Delete(_) => None,
            },
        );
    }

    fn set(&mut self, key: u128, size: Option<u64>) {
        let before = match size {
            Some(size) => self.sizes.insert(key, size),
            None => self.sizes.remove(&key),
        };
        self.bytes = self.bytes + size.unwrap_or(0) - before.unwrap_or(0);
    }
}

/// Bytes that an event leaves at its key; none after a delete.
fn size(event: &Event) -> Option<u64> {
    match event {
        Event::Put(put) => Some((put.key.len() + put.value.len()) as u64),
        Event::Delete(_) => None,
    }
}

fn hash(key: &str, hasher: &SipHasher13) -> u128 {
    let mut hasher = *hasher;
    key.hash(&mut hasher);
    hasher.finish128().as_u128()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::thread;
    use std::time::Duration;

    use kvs_txlog::Put;
    use kvs_txlog::file::{DEFAULT_SEGMENT_BYTES, Durability, FileLog, Options};
    use tempfile::TempDir;

    use super::*;

    const BYTES: Quota = Quota { keys: None, bytes: Some(20) };
    const KEYS: Quota = Quota { keys: Some(2), bytes: None };

    fn log() -> (TempDir, Arc<dyn TransactionLog>) {
        let data = TempDir::new().unwrap();
        let options = Options {
            data: data.path().to_owned(),
            segment_bytes: DEFAULT_SEGMENT_BYTES,
            group_bytes: 1 << 20,
            durability: Durability::Os,
            retain: Duration::ZERO,
            advertise: None,
            env: Env::real(),
        };
        (data, Arc::new(FileLog::open(options).unwrap()))
    }

    fn put(key: &str, bytes: usize) -> Event {
        Event::Put(Put { key: key.to_owned(), value: vec![0; bytes], metadata: Vec::new(), expires: None })
    }

    fn delete(key: &str) -> Event {
        Event::Delete(key.to_owned())
    }

    async fn counted(quotas: &Arc<Quotas>, prefix: &str, log: &Arc<dyn TransactionLog>) {
        assert!(quotas.counted(&prefix.into(), log, &Env::real()).await, "it cannot be counted");
    }

    /// Appends without a quota.
    fn append(quotas: &Quotas, log: &Arc<dyn TransactionLog>, events: &[Event]) {
        quotas.append(None, events, || log.append(0, events)).unwrap();
    }

    /// Keys and bytes with a prefix, as they are counted.
    fn now(quotas: &Quotas, prefix: &str) -> (usize, u64) {
        let counts = quotas.counts();
        let count = counts.each.iter().find(|count| *count.prefix == *prefix).expect("it is counted");
        assert!(count.changed.is_none());
        (count.sizes.len(), count.bytes)
    }

    /// The same, as they are in the log.
    async fn in_log(log: &Arc<dyn TransactionLog>, prefix: &str) -> (usize, u64) {
        log.watermark().reached(log.appended()).await.unwrap();
        let mut sizes = BTreeMap::new();
        let receive = &mut |entries: &[kvs_txlog::Entry<'_>]| {
            for entry in entries.iter().filter(|entry| entry.event.key().starts_with(prefix)) {
                match &entry.event {
                    EventRef::Put(put) => {
                        drop(sizes.insert(put.key.to_owned(), (put.key.len() + put.value.len()) as u64))
                    }
                    EventRef::Delete(key) => drop(sizes.remove(*key)),
                }
            }
            Ok(())
        };
        log.replay(0, receive).unwrap();
        (sizes.len(), sizes.values().sum())
    }

    #[tokio::test]
    async fn count_is_that_of_log() {
        let (_data, log) = log();
        let quotas = Quotas::new(&Random::system()).unwrap();
        // Few keys, so that they are overwritten and deleted before, during and after the count.
        let event = |number: usize| {
            let key = format!("{}{}", ["a/", "a/b/", "c/"][number % 3], number % 50);
            if number % 7 == 0 { delete(&key) } else { put(&key, number % 100) }
        };
        (0..10_000).for_each(|number| append(&quotas, &log, &[event(number), event(number / 2)]));
        let appending = thread::spawn({
            let (quotas, log) = (Arc::clone(&quotas), Arc::clone(&log));
            move || (0..20_000).for_each(|number| append(&quotas, &log, &[event(number)]))
        });
        for prefix in ["a/", "a/b/", "c/", "d/"] {
            counted(&quotas, prefix, &log).await;
        }
        appending.join().unwrap();
        for prefix in ["a/", "a/b/", "c/", "d/"] {
            assert_eq!(now(&quotas, prefix), in_log(&log, prefix).await, "{prefix}");
        }
        // As it is counted again.
        quotas.forget();
        counted(&quotas, "a/", &log).await;
        assert_eq!(now(&quotas, "a/"), in_log(&log, "a/").await);
    }

    #[tokio::test]
    async fn quota_refuses_what_increases_beyond_it() {
        let (_data, log) = log();
        let quotas = Quotas::new(&Random::system()).unwrap();
        let try_append =
            |quota: Quota, events: &[Event]| quotas.append(Some(("a", quota)), events, || log.append(0, events));
        // Not counted yet.
        assert_eq!(try_append(KEYS, &[put("a1", 8)]), Err(Refused::Append(AppendError::Unavailable)));
        append(&quotas, &log, &[put("a1", 8), put("b", 100)]);
        counted(&quotas, "a", &log).await;
        assert_eq!(now(&quotas, "a"), (1, 10));
        assert_eq!(try_append(BYTES, &[put("a2", 9)]), Err(Refused::Exceeded));
        assert_eq!(try_append(KEYS, &[put("a2", 0), put("a3", 0)]), Err(Refused::Exceeded));
        assert!(try_append(BYTES, &[put("a2", 8)]).is_ok());
        assert_eq!(try_append(KEYS, &[put("a3", 0)]), Err(Refused::Exceeded));
        // A group that leaves no more than there was, and keys of others.
        assert!(try_append(KEYS, &[delete("a1"), put("a3", 0)]).is_ok());
        assert!(try_append(BYTES, &[put("a3", 100), put("a3", 8), put("b", 100)]).is_ok());
        // Others are not limited. What is beyond the quota then can become less.
        append(&quotas, &log, &[put("a4", 50)]);
        assert_eq!(now(&quotas, "a"), (3, 72));
        assert_eq!(try_append(BYTES, &[put("a4", 51)]), Err(Refused::Exceeded));
        assert!(try_append(BYTES, &[put("a4", 49)]).is_ok() && try_append(KEYS, &[put("a4", 51)]).is_ok());
        assert!(try_append(Quota { keys: Some(0), bytes: Some(0) }, &[delete("a4")]).is_ok());
        assert_eq!(now(&quotas, "a"), (2, 20));
        assert_eq!(now(&quotas, "a"), in_log(&log, "a").await);
    }

    #[tokio::test]
    async fn refused_append_is_not_counted() {
        let (_data, log) = log();
        let quotas = Quotas::new(&Random::system()).unwrap();
        counted(&quotas, "a", &log).await;
        let refused = quotas.append(Some(("a", KEYS)), &[put("a", 1)], || Err(AppendError::Unavailable));
        assert_eq!((refused, now(&quotas, "a")), (Err(Refused::Append(AppendError::Unavailable)), (0, 0)));
    }

    #[tokio::test]
    async fn oldest_count_makes_room() {
        let (_data, log) = log();
        let quotas = Quotas::new(&Random::system()).unwrap();
        for number in 0..=MAX_COUNTS {
            counted(&quotas, &format!("{number}/"), &log).await;
        }
        let counts = quotas.counts();
        assert_eq!((counts.each.len(), &*counts.each[0].prefix), (MAX_COUNTS, "1/"));
    }
}
