//! Statistics, compared with those of a plain map.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::subscribers::lock;
use crate::{AppendError, Event, Put, PutRef, Receive, Watermark};

const NOW: u64 = 1_000;

/// In-memory log, from which a test drops entries.
struct Memory {
    /// None where an entry was compacted away.
    entries: Mutex<Vec<Option<Event>>>,
    retained: AtomicU64,
    watermark: Watermark,
}

impl Memory {
    fn of(events: impl IntoIterator<Item = Event>) -> Self {
        let entries: Vec<_> = events.into_iter().map(Some).collect();
        let watermark = Watermark::new(entries.len() as u64);
        Self { entries: Mutex::new(entries), retained: AtomicU64::new(0), watermark }
    }
}

impl TransactionLog for Memory {
    fn append(&self, _time: u64, events: &[Event]) -> Result<u64, AppendError> {
        let mut entries = lock(&self.entries);
        let first = entries.len() as u64 + 1;
        entries.extend(events.iter().cloned().map(Some));
        Ok(first)
    }

    fn appended(&self) -> u64 {
        lock(&self.entries).len() as u64
    }

    fn watermark(&self) -> &Watermark {
        &self.watermark
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> anyhow::Result<u64> {
        let entries = lock(&self.entries).clone();
        for (event, sequence) in entries.iter().zip(1..).skip(after as usize) {
            let metadata: Vec<_>;
            let event = match event {
                None => continue,
                Some(Event::Delete(key)) => EventRef::Delete(key),
                Some(Event::Put(Put { key, value, metadata: pairs, expires })) => {
                    metadata = pairs.iter().map(|(name, value)| (&**name, &**value)).collect();
                    EventRef::Put(PutRef { key, value, metadata: &metadata, expires: *expires })
                }
            };
            receive(&[Entry { sequence, time: 0, event }])?;
        }
        Ok(entries.len() as u64)
    }

    fn retained(&self) -> u64 {
        self.retained.load(Ordering::Relaxed)
    }

    fn close(&self) -> anyhow::Result<()> {
        Ok(())
    }
}

fn put(key: &str, bytes: usize) -> Event {
    Event::Put(Put { key: key.into(), value: vec![b'v'; bytes], metadata: Vec::new(), expires: None })
}

fn query(prefix: &str, delimiter: &str, top: usize) -> Query {
    Query { prefix: prefix.into(), delimiter: delimiter.into(), top, now: NOW }
}

fn stats(log: &Memory, query: &Query, table_bytes: usize) -> Stats {
    measure(log, query, table_bytes, &mut |_, _| Ok(())).unwrap()
}

/// The same statistics, by the shortest code.
fn expected(events: &[Event], query: &Query) -> Stats {
    let (mut live, mut entries) = (BTreeMap::new(), Sum::default());
    for (event, sequence) in events.iter().zip(1..) {
        if !event.key().starts_with(&query.prefix) {
            continue;
        }
        let mut bytes = event.key().len();
        live.remove(event.key());
        if let Event::Put(put) = event {
            bytes += put.value.len() + put.metadata.iter().flat_map(|(a, b)| [a.len(), b.len()]).sum::<usize>();
            if put.expires.is_none_or(|expires| expires > NOW) {
                live.insert(put.key.as_str(), (bytes as u64, sequence, put.expires.is_some()));
            }
        }
        entries.add(bytes as u64);
    }
    let mut keys: Vec<_> = live.iter().map(|(key, &(bytes, sequence, _))| (Reverse(bytes), *key, sequence)).collect();
    keys.sort();
    let mut prefixes = BTreeMap::<String, Sum>::new();
    for (key, (bytes, ..)) in &live {
        if let Some((begin, _)) = key[query.prefix.len()..].split_once(&query.delimiter) {
            prefixes.entry([&query.prefix, begin, &query.delimiter].concat()).or_default().add(*bytes);
        }
    }
    let sum = |sums: &mut dyn Iterator<Item = Sum>| {
        sums.fold(Sum::default(), |all, sum| Sum { count: all.count + sum.count, bytes: all.bytes + sum.bytes })
    };
    let key = |&(bytes, _, _): &(u64, u64, bool)| Sum { count: 1, bytes };
    let mut largest: Vec<_> = prefixes.iter().collect();
    largest.sort_by_key(|(prefix, keys)| (Reverse(keys.bytes), *prefix));
    Stats {
        sequence: events.len() as u64,
        is_exact: true,
        passes: 0,
        live: sum(&mut live.values().map(key)),
        expiring: sum(&mut live.values().filter(|(.., expires)| *expires).map(key)),
        entries,
        largest_keys: keys
            .iter()
            .take(query.top)
            .map(|&(Reverse(bytes), key, sequence)| LargeKey { key: key.into(), bytes, sequence })
            .collect(),
        largest_prefixes: largest
            .iter()
            .take(query.top)
            .map(|&(prefix, keys)| LargePrefix { prefix: prefix.as_str().into(), keys: *keys })
            .collect(),
        prefixes: prefixes.len() as u64,
        prefixed: sum(&mut prefixes.values().copied()),
    }
}

fn event() -> impl Strategy<Value = Event> {
    // Few keys, so that they repeat, and with many delimiters.
    let key = || "[ab/é]{0,4}";
    let metadata = proptest::collection::vec(("[a-z]{0,3}", "[a-z]{0,3}"), 0..3);
    let expires = proptest::option::of(NOW - 1..NOW + 2);
    let put = (key(), proptest::collection::vec(any::<u8>(), 0..40), metadata, expires);
    prop_oneof![
        3 => put.prop_map(|(key, value, metadata, expires)| Event::Put(Put { key, value, metadata, expires })),
        1 => key().prop_map(Event::Delete),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn statistics_equal_those_of_a_map(
        events in proptest::collection::vec(event(), 0..120),
        prefix in "[ab/é]{0,2}",
        delimiter in prop_oneof![Just("/"), Just("//"), Just("é"), Just("ab")],
        top in 1..8_usize,
        keys in 0..30_usize,
    ) {
        let query = query(&prefix, delimiter, top);
        let found = stats(&Memory::of(events.clone()), &query, keys * KEY_BYTES);
        let expected = Stats { passes: found.passes, ..expected(&events, &query) };
        prop_assert_eq!(&found, &expected);
        // Each pass but the last leaves a key behind.
        prop_assert!(found.passes <= found.entries.count.max(1));
        let parts = found.other_prefixed().bytes + found.unprefixed().bytes;
        let listed: u64 = found.largest_prefixes.iter().map(|large| large.keys.bytes).sum();
        prop_assert_eq!(parts + listed, found.live.bytes);
        prop_assert_eq!(found.garbage().count, found.entries.count - found.live.count);
    }
}

#[test]
fn full_table_leaves_keys_to_more_passes() {
    let log = Memory::of((0..1_000).map(|number| put(&format!("{}/{number:03}", number % 7), number)));
    let query = query("", "/", 3);
    let whole = stats(&log, &query, usize::MAX);
    assert_eq!((whole.passes, whole.prefixes, whole.live.count), (1, 7, 1_000));
    let keys: Vec<_> = whole.largest_keys.iter().map(|large| &*large.key).collect();
    assert_eq!(keys, ["5/999", "4/998", "3/997"]);
    for (table_bytes, passes) in [(100 * cost("0/000"), 10..=20), (0, 1_000..=1_000)] {
        let in_parts = stats(&log, &query, table_bytes);
        assert!(passes.contains(&in_parts.passes), "{}", in_parts.passes);
        assert_eq!(Stats { passes: 1, ..in_parts }, whole);
    }
}

#[test]
fn table_size_is_bounded() {
    let keys: Vec<_> = (0..500).map(|number| format!("{:03}", number * 7 % 500)).collect();
    let limit = 20 * cost("000");
    let mut pass = Pass { table: BTreeMap::new(), bytes: 0, limit, low: "".into(), high: None };
    for (key, sequence) in keys.iter().zip(1..) {
        let event = EventRef::Put(PutRef { key, value: b"", metadata: &[], expires: None });
        pass.visit(&Entry { sequence, time: 0, event }, NOW);
        assert!(pass.bytes <= limit, "{}", pass.bytes);
        assert_eq!(pass.bytes, pass.table.len() * cost("000"));
    }
    let kept: Vec<_> = pass.table.keys().map(|key| key.to_string()).collect();
    let high = pass.high.expect("the table was full");
    assert_eq!(kept, (0..kept.len()).map(|number| format!("{number:03}")).collect::<Vec<_>>());
    assert_eq!(*high, *format!("{:03}", kept.len()));
}

#[test]
fn entries_since_first_pass_are_not_counted() {
    let events: Vec<_> = (0..40).map(|number| put(&format!("{number:02}"), 10)).collect();
    let log = Memory::of(events.clone());
    let query = query("", "/", 3);
    let mut appended = 0;
    let found = measure(&log, &query, 10 * cost("00"), &mut |pass, _| {
        if pass == 2 && appended == 0 {
            log.append(0, &[put("39", 1_000), put("new", 1), Event::Delete("38".into())])?;
            appended = log.appended();
        }
        Ok(())
    });
    let found = found.unwrap();
    assert!(found.passes > 2 && appended == 43, "{} passes", found.passes);
    assert_eq!(found, Stats { passes: found.passes, ..expected(&events, &query) });
}

#[test]
fn compaction_between_passes_makes_the_result_inexact() {
    for (retained, is_exact) in [(39, true), (40, true), (41, false)] {
        let log = Memory::of((0..40).map(|number| put(&format!("{number:02}"), 10)));
        let found = measure(&log, &query("", "/", 3), 10 * cost("00"), &mut |pass, _| {
            if pass == 2 && log.appended() == 40 {
                log.append(0, &[put("39", 10)])?;
                if retained > 40 {
                    lock(&log.entries)[39] = None;
                }
                log.retained.store(retained, Ordering::Relaxed);
            }
            Ok(())
        });
        let found = found.unwrap();
        assert_eq!((found.is_exact, found.live.count), (is_exact, if is_exact { 40 } else { 39 }), "{retained}");
    }
}

#[test]
fn error_of_progress_stops_the_run() {
    let log = Memory::of([put("a", 1), put("b", 1)]);
    let mut calls = 0;
    let stopped = measure(&log, &query("", "/", 1), usize::MAX, &mut |_, _| {
        calls += 1;
        anyhow::bail!("the client disconnected")
    });
    assert_eq!((stopped.unwrap_err().to_string().as_str(), calls), ("the client disconnected", 1));
}
