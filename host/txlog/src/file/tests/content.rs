//! What a log must hold after a crash: the model of what was appended, and the comparison with what is there.

use std::collections::BTreeMap;

use super::disk::Promise;
use super::*;
use crate::Incarnation;
use crate::file::Home;

pub type Outcome<T> = Result<T, String>;

/// One entry as it was appended.
#[derive(Clone)]
pub struct Appended {
    pub sequence: u64,
    pub time: u64,
    pub event: Event,
    pub ends_group: bool,
}

/// What was appended to the log, and what compaction may drop.
#[derive(Clone, Default)]
pub struct Model {
    pub entries: Vec<Appended>,
    /// At which operation compaction ran, and when that was to the store.
    pub compactions: Vec<(usize, u64)>,
    /// Those that had begun when the log was opened last.
    pub incarnations: Vec<Incarnation>,
}

impl Model {
    /// The entries up to a sequence.
    pub fn until(&self, sequence: u64) -> &[Appended] {
        &self.entries[..self.entries.partition_point(|entry| entry.sequence <= sequence)]
    }

    pub fn newest(&self) -> u64 {
        self.entries.last().map_or(0, |entry| entry.sequence)
    }

    /// As it is for a history that begins where this one was at some operation.
    pub fn at_the_begin(&self, at: usize) -> Self {
        let mut model = self.clone();
        model.compactions.retain(|(begun, _)| *begun <= at);
        model.compactions.iter_mut().for_each(|(begun, _)| *begun = 0);
        model
    }
}

/// A log that a former version wrote, in format 1.
pub fn former(name: &str) -> (FakeDisk, Model) {
    let disk = formats::load(&formats::directory(1, name));
    let mut model = Model::default();
    let shared = Shared::read(
        Home { disk: Arc::new(disk.clone()), data: "data".into(), env: kvs_runtime::Env::real() },
        &options(),
    )
    .unwrap();
    replay::replay(&shared, 0, &mut |entries| {
        model.entries.extend(entries.iter().map(|entry| Appended {
            sequence: entry.sequence,
            time: entry.time,
            event: owned(&entry.event),
            ends_group: true,
        }));
        Ok(())
    })
    .unwrap();
    (disk, model)
}

fn owned(event: &EventRef<'_>) -> Event {
    match event {
        EventRef::Delete(key) => Event::Delete((*key).into()),
        EventRef::Put(put) => {
            let metadata = put.metadata.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
            Event::Put(Put { key: put.key.into(), value: put.value.into(), metadata, expires: put.expires })
        }
    }
}

/// Every promised entry is there, whole groups may follow, nothing is wrong, and what is missing the store does not need.
pub fn check_content(shared: &Shared, model: &Model, at: usize, promised: Promise) -> Outcome<()> {
    let newest = shared.watermark.durable();
    let (appended, durable) = (model.newest(), promised.durable);
    if newest < durable || newest > appended {
        return Err(format!("it ends with {newest}, of {appended} appended and {durable} promised"));
    }
    let known = model.until(newest);
    if known.last().is_some_and(|last| !last.ends_group) {
        return Err(format!("it ends with {newest}, in the middle of a group"));
    }
    check_sequences(shared, model, newest, promised.seen)?;
    let mut found = Vec::with_capacity(known.len());
    replay::replay(shared, 0, &mut |entries| {
        for entry in entries {
            let right = find(known, entry.sequence);
            if !right.is_some_and(|right| right.time == entry.time && same(&right.event, &entry.event)) {
                anyhow::bail!("entry {} is wrong: {}", entry.sequence, describe(&entry.event));
            }
            if found.last().is_some_and(|last| *last >= entry.sequence) {
                anyhow::bail!("entry {} is out of order", entry.sequence);
            }
            found.push(entry.sequence);
        }
        Ok(())
    })
    .map_err(|error| format!("it cannot be replayed: {error:#}"))?;
    let now = model.compactions.iter().filter(|(begun, _)| *begun <= at).map(|(_, now)| *now).max();
    let Some(now) = now else {
        let (left, all) = (found.len(), known.len());
        return if left == all { Ok(()) } else { Err(format!("{left} of {all} entries are left")) };
    };
    let (expected, left) = (store(known, known.iter().map(|entry| entry.sequence)), store(known, found));
    for (key, sequence) in &expected {
        let Some(Event::Put(put)) = find(known, *sequence).map(|entry| &entry.event) else { continue };
        match left.get(key) {
            Some(left) if left == sequence => {}
            None if put.expires.is_some_and(|expires| expires <= now) => {}
            left => return Err(format!("{key:?} should be that of {sequence} and is that of {left:?}")),
        }
    }
    match left.keys().find(|key| !expected.contains_key(*key)) {
        Some(key) => Err(format!("{key:?} rose from the dead")),
        None => Ok(()),
    }
}

fn find(known: &[Appended], sequence: u64) -> Option<&Appended> {
    known.binary_search_by_key(&sequence, |entry| entry.sequence).ok().map(|at| &known[at])
}

/// No sequence that a client has seen is given again, what is there is in the history, and what is not there is not.
fn check_sequences(shared: &Shared, model: &Model, newest: u64, seen: u64) -> Outcome<()> {
    let history = &shared.history;
    // An empty group takes no sequence.
    let next = shared.queue.append(0, &[]).map_err(|error| format!("{error:?}"))?;
    if next <= seen {
        return Err(format!("it gives {next} next, and {seen} was seen"));
    }
    if let Some(entry) = model.until(newest).iter().find(|entry| !history.contains(entry.sequence)) {
        return Err(format!("{} is not in its own history", entry.sequence));
    }
    // The jumps in between are too large to go over.
    let begin = newest.max(seen.saturating_sub(1_000)) + 1;
    if seen > newest && (begin..=seen).chain([newest + 1]).any(|lost| history.contains(lost)) {
        return Err(format!("what was lost after {newest} is in the history"));
    }
    let left = history.incarnations();
    let is_left = |one: &Incarnation| left.contains(one);
    let horizon = shared.catalog.horizon();
    if let Some(gone) = model.incarnations.iter().find(|one| !is_left(one) && one.first > horizon) {
        return Err(format!("the incarnation with {} is gone", gone.first));
    }
    if let Some(newest) = model.incarnations.last().filter(|newest| !is_left(newest)) {
        return Err(format!("the newest incarnation, with {}, is gone", newest.first));
    }
    match left.windows(2).find(|pair| pair[1].parent != pair[0].id) {
        Some(pair) => Err(format!("the incarnation with {} continues another", pair[1].first)),
        None => Ok(()),
    }
}

fn same(ours: &Event, theirs: &EventRef<'_>) -> bool {
    match (ours, theirs) {
        (Event::Delete(ours), EventRef::Delete(theirs)) => ours == theirs,
        (Event::Put(ours), EventRef::Put(theirs)) => {
            let pairs = ours.metadata.iter().map(|(name, value)| (&name[..], &value[..]));
            ours.key == theirs.key
                && ours.value == theirs.value
                && ours.expires == theirs.expires
                && pairs.eq(theirs.metadata.iter().copied())
        }
        _ => false,
    }
}

/// The sequence of the put that each key has after some of the entries.
fn store(known: &[Appended], sequences: impl IntoIterator<Item = u64>) -> BTreeMap<&str, u64> {
    let mut store = BTreeMap::new();
    for sequence in sequences {
        match find(known, sequence).map(|entry| &entry.event) {
            Some(Event::Put(put)) => drop(store.insert(&put.key[..], sequence)),
            Some(Event::Delete(key)) => drop(store.remove(&key[..])),
            None => {}
        }
    }
    store
}
