//! Quotas: how many keys a client may have, and how many bytes, of those with its key prefix.
//!
//! What there is with a prefix is counted in the log once, when a client with a quota first writes, and kept from there on by what
//! is appended. So it needs no storage of its own, and is right after a restart, an expiry, a swap or a compaction. Must never
//! know: tokens, or what a guest makes of a refused append.

use std::collections::{BTreeMap, HashMap, HashSet};
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

/// Prefixes that are counted at a time, at most; the one that is unused for longest makes room for another, and is counted again
/// when it is used.
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
    /// Held by the pass over the log, of which there is one at a time, for all prefixes that wait.
    counting: tokio::sync::Mutex<()>,
    /// Nobody outside can choose keys with one hash.
    hasher: SipHasher13,
}

#[derive(Default)]
struct Counts {
    each: HashMap<Arc<str>, Count>,
    /// Lengths of their prefixes, and how many have each.
    lengths: BTreeMap<usize, usize>,
    /// Identifies a count that was begun again.
    begun: u64,
    /// Number of uses so far.
    uses: u64,
}

/// The keys with one prefix.
struct Count {
    number: u64,
    /// The last use.
    used: u64,
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
        Ok(Arc::new(Self {
            is_used: AtomicBool::default(),
            counts: Mutex::default(),
            counting: tokio::sync::Mutex::default(),
            hasher,
        }))
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
        // What is stored already can always be deleted.
        let client = client.filter(|_| events.iter().any(|event| matches!(event, Event::Put(_))));
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
            match counts.each.get(prefix) {
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
            let mut counts = self.counts();
            (counts.each, counts.lengths) = Default::default();
            self.is_used.store(false, Ordering::SeqCst);
        }
    }

    /// Counts what the log has, for all prefixes that wait. Changes since their counts began are known already. Nothing is done if
    /// the pass of another one has included this one.
    async fn count(self: &Arc<Self>, number: u64, log: Arc<dyn TransactionLog>) -> Result<()> {
        let _alone = self.counting.lock().await;
        let waiting: HashSet<u64> = self.counts().waiting().map(|count| count.number).collect();
        if !waiting.contains(&number) {
            return Ok(());
        }
        let counted = self.count_all(&waiting, log).await;
        let mut counts = self.counts();
        if counted.is_err() {
            counts.retain(|count| !waiting.contains(&count.number));
        }
        for count in counts.waiting().filter(|count| waiting.contains(&count.number)) {
            count.changed = None;
            count.done.send_replace(true);
        }
        counted
    }

    async fn count_all(self: &Arc<Self>, waiting: &HashSet<u64>, log: Arc<dyn TransactionLog>) -> Result<()> {
        // A replay has durable entries only.
        log.watermark().reached(log.appended()).await?;
        let (quotas, waiting) = (Arc::clone(self), waiting.clone());
        task::spawn_blocking(move || {
            log.replay(0, &mut |entries| {
                let mut counts = quotas.counts();
                for entry in entries {
                    let key = entry.event.key();
                    counts.of(key, |count| {
                        if waiting.contains(&count.number) {
                            count.replay(&entry.event, &quotas.hasher);
                        }
                    });
                }
                Ok(())
            })
        })
        .await??;
        Ok(())
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        // Every change under this lock is whole.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    fn begin(&mut self, prefix: &Arc<str>) -> (u64, watch::Receiver<bool>) {
        if self.each.len() >= MAX_COUNTS
            && let Some(unused) = self.each.values().map(|count| count.used).min()
        {
            self.retain(|count| count.used != unused);
        }
        self.begun += 1;
        self.uses += 1;
        let (done, receiver) = watch::channel(false);
        let count = Count {
            number: self.begun,
            used: self.uses,
            sizes: HashMap::new(),
            bytes: 0,
            changed: Some(HashSet::new()),
            done,
        };
        self.each.insert(Arc::clone(prefix), count);
        *self.lengths.entry(prefix.len()).or_default() += 1;
        (self.begun, receiver)
    }

    fn retain(&mut self, is_kept: impl Fn(&Count) -> bool) {
        let lengths = &mut self.lengths;
        self.each.retain(|prefix, count| {
            let keeps = is_kept(count);
            if !keeps && let Some(prefixes) = lengths.get_mut(&prefix.len()) {
                *prefixes -= 1;
            }
            keeps
        });
        lengths.retain(|_, prefixes| *prefixes > 0);
    }

    /// The counts that are in progress.
    fn waiting(&mut self) -> impl Iterator<Item = &mut Count> {
        self.each.values_mut().filter(|count| count.changed.is_some())
    }

    /// Calls `change` with the count of each prefix that a key has.
    fn of(&mut self, key: &str, mut change: impl FnMut(&mut Count)) {
        for (length, _) in self.lengths.range(..=key.len()) {
            if let Some(count) = key.get(..*length).and_then(|prefix| self.each.get_mut(prefix)) {
                change(count);
            }
        }
    }

    fn check(&mut self, prefix: &str, quota: Quota, events: &[Event], hasher: &SipHasher13) -> Result<(), Refused> {
        self.uses += 1;
        match self.each.get_mut(prefix) {
            Some(count) if count.changed.is_none() => {
                count.used = self.uses;
                count.check(prefix, quota, events, hasher)
            }
            _ => Err(Refused::Append(AppendError::Unavailable)),
        }
    }

    fn apply(&mut self, events: &[Event], hasher: &SipHasher13) {
        for event in events {
            self.of(event.key(), |count| {
                let key = hash(event.key(), hasher);
                count.set(key, size(event));
                if let Some(changed) = &mut count.changed {
                    changed.insert(key);
                }
            });
        }
    }
}

impl Count {
    /// Checks that events do not increase what there is beyond a quota. What is beyond it already can become less.
    fn check(&self, prefix: &str, quota: Quota, events: &[Event], hasher: &SipHasher13) -> Result<(), Refused> {
        let (mut keys, mut bytes) = (self.sizes.len() as u64, self.bytes);
        let mut after = HashMap::new();
        for event in events.iter().filter(|event| event.key().starts_with(prefix)) {
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
        let count = counts.each.get(prefix).expect("it is counted");
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
                    EventRef::Put(put) => sizes.insert(put.key.to_owned(), (put.key.len() + put.value.len()) as u64),
                    EventRef::Delete(key) => sizes.remove(*key),
                };
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
            if number.is_multiple_of(7) { delete(&key) } else { put(&key, number % 100) }
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
    async fn unused_count_makes_room() {
        let (_data, log) = log();
        let quotas = Quotas::new(&Random::system()).unwrap();
        let number = |number: usize| format!("{number}/");
        for count in 0..MAX_COUNTS {
            counted(&quotas, &number(count), &log).await;
        }
        quotas.append(Some(("0/", KEYS)), &[put("0/a", 1)], || log.append(0, &[put("0/a", 1)])).unwrap();
        counted(&quotas, "another/", &log).await;
        let counts = quotas.counts();
        let is_there = |prefix: &str| counts.each.contains_key(prefix);
        assert_eq!((counts.each.len(), counts.lengths.values().sum::<usize>()), (MAX_COUNTS, MAX_COUNTS));
        assert!(is_there("another/") && is_there("0/") && !is_there("1/"));
    }

    /// Prefixes that begin to be counted at the same time are counted by one pass over the log.
    #[tokio::test]
    async fn prefixes_are_counted_together() {
        let (_data, log) = log();
        let quotas = Quotas::new(&Random::system()).unwrap();
        append(&quotas, &log, &[put("a1", 1), put("b1", 2), put("ab", 3)]);
        let begun: Vec<_> = ["a", "b", "ab"].map(|prefix| quotas.counts().begin(&prefix.into()).0).into();
        quotas.count(begun[2], Arc::clone(&log)).await.unwrap();
        assert_eq!((now(&quotas, "a"), now(&quotas, "b"), now(&quotas, "ab")), ((2, 8), (1, 4), (1, 5)));
    }
}
