use kvs_kit::host::Host;

use super::*;
use crate::kvs::store::transaction_log::Put;
use crate::kvs::store::watch::Selector;

fn put(key: &str, value: &str, expires: Option<u64>) -> Event {
    Event::Put(Put { key: key.to_owned(), value: value.into(), metadata: Vec::new(), expires_at_ms: expires })
}

fn delete(key: &str) -> Event {
    Event::Delete(key.to_owned())
}

fn tick(store: &mut Store, now: u64, mut append: impl FnMut(&[Event]) -> Result<u64, AppendError>) -> Option<u64> {
    State::tick(&mut Logged::new(store, &mut append), now)
}

fn store_of(entries: impl IntoIterator<Item = (u64, Event)>) -> Store {
    let mut store = Store::default();
    entries.into_iter().for_each(|(sequence, event)| {
        store.replace(sequence, &event);
    });
    store
}

fn value<'s>(store: &'s Store, key: &str, now: u64) -> Result<&'s [u8], u64> {
    store.get(key, now).map(Item::value)
}

/// An `append` that gives out sequences from 101 on and keeps what it was given.
fn log(appended: &mut Vec<Event>) -> impl FnMut(&[Event]) -> Result<u64, AppendError> {
    |events| {
        let first = 101 + appended.len() as u64;
        appended.extend_from_slice(events);
        Ok(first)
    }
}

#[test]
fn the_newest_entry_of_a_key_is_what_it_has() {
    let store = store_of([(1, put("a", "old", None)), (4, put("a", "new", None)), (5, put("b", "b", None))]);
    assert_eq!(value(&store, "a", 0), Ok(&b"new"[..]));
    assert_eq!(store.get("a", 0).map(Item::sequence), Ok(4));
    assert_eq!((store.keys(), store.bytes()), (2, 6));
}

#[test]
fn nothing_of_an_overwritten_item_stays() {
    let old =
        Put { key: "a".into(), value: vec![1], metadata: vec![("x".into(), "y".into())], expires_at_ms: Some(10) };
    let mut store = store_of([(1, Event::Put(old)), (2, put("a", "new", None))]);
    assert_eq!(store.get("a", 10).map(|item| item.metadata().count()), Ok(0));
    tick(&mut store, 10, |_| panic!("nothing has expired"));
}

#[test]
fn counts_return_to_nothing() {
    let store = store_of([(1, put("a", "1", Some(9))), (2, put("a", "22", Some(8))), (3, delete("a"))]);
    assert_eq!(store, Store { newest_delete: 3, ..Store::default() });
}

#[test]
fn absence_depends_on_newest_delete_of_a_key() {
    let store = store_of([(1, put("a", "", None)), (2, delete("a")), (3, put("b", "", None)), (4, delete("a"))]);
    assert_eq!(value(&store, "a", 0), Err(2));
    assert_eq!(value(&store, "never", 0), Err(2));
}

#[test]
fn absence_of_expired_item_depends_on_its_put() {
    let mut store = store_of([(1, put("a", "", None)), (2, delete("a")), (3, put("b", "", Some(10)))]);
    assert_eq!(value(&store, "b", 9), Ok(&b""[..]));
    assert_eq!(value(&store, "b", 10), Err(3));
    store.replace(4, &put("a", "", None));
    store.replace(5, &delete("a"));
    assert_eq!(value(&store, "b", 10), Err(5));
}

#[test]
fn a_tick_deletes_what_has_expired_through_the_log() {
    let mut store = store_of([(1, put("a", "", Some(10))), (2, put("b", "", Some(11))), (3, put("c", "", Some(10)))]);
    let mut appended = Vec::new();
    tick(&mut store, 10, log(&mut appended));
    assert_eq!(appended, [delete("a"), delete("c")]);
    assert_eq!((store.keys(), value(&store, "a", 10)), (1, Err(102)));
}

#[test]
fn a_tick_does_a_bounded_amount_and_the_next_ones_the_rest() {
    let mut store = store_of((1..=2_500).map(|n| (n, put(&format!("{n}"), "", Some(n)))));
    for (left, next) in [(1_500, Some(2_500)), (500, Some(2_500)), (0, None), (0, None)] {
        assert_eq!((tick(&mut store, 2_500, log(&mut Vec::new())), store.keys()), (next, left));
    }
}

#[test]
fn tick_returns_the_next_expiry_after_a_pause() {
    let expiring = |(sequence, expires): (u64, u64)| (sequence, put(&format!("{expires}"), "", Some(expires)));
    let mut store = store_of([(1, 1_000), (2, 1_050), (3, 2_000)].map(expiring));
    assert_eq!(tick(&mut store, 500, log(&mut Vec::new())), Some(1_000));
    assert_eq!(tick(&mut store, 1_000, log(&mut Vec::new())), Some(1_000 + EXPIRY_PAUSE_MS));
    assert_eq!(tick(&mut store, 1_100, log(&mut Vec::new())), Some(2_000));
    assert_eq!((tick(&mut store, 2_000, log(&mut Vec::new())), store.keys()), (None, 0));
    // A key that expires never, and one that cannot be deleted.
    let mut store = store_of([(1, put("a", "", None)), expiring((2, 10))]);
    assert_eq!(tick(&mut store, 10, |_| Err(AppendError::TooLarge(3))), None);
}

/// What the timer was set to, by a log that accepts everything.
#[derive(Default)]
struct Timed(Vec<Option<u64>>);

impl Host for Timed {
    fn append(&mut self, _events: &[Event]) -> Result<u64, AppendError> {
        Ok(100)
    }
    fn subscribe(&mut self, _selectors: &[Selector], _after: Option<&str>, _puts_only: bool) {}
    fn wait_for_change(&mut self, _key: &str, _timeout_ms: u64) {}
    fn reuse(&mut self, _key: &str, _until_ms: Option<u64>) {}
    fn set_timer(&mut self, at_ms: Option<u64>) {
        self.0.push(at_ms);
    }
}

#[test]
fn timer_is_set_to_the_next_expiry() {
    let (mut store, mut host) = (store_of([(1, put("a", "", Some(5_000)))]), Timed::default());
    let mut logged = Logged::new(&mut store, &mut host);
    // The first tick follows soon.
    logged.append(&[put("b", "", Some(4_000))]).unwrap();
    State::tick(&mut logged, 1_000);
    // Later, never, earlier, and so early that others are waited for.
    for expires in [Some(6_000), None, Some(3_000), Some(1_001), Some(1_002)] {
        logged.append(&[put("c", "", expires)]).unwrap();
    }
    State::tick(&mut logged, 6_000);
    assert_eq!(host.0, [Some(4_000), Some(3_000), Some(1_000 + EXPIRY_PAUSE_MS), None]);
}

#[test]
fn what_was_not_appended_is_not_deleted() {
    let entries = || [(1, put("a", "", Some(10))), (2, put("b", "", Some(10)))];
    for error in [AppendError::InsufficientStorage, AppendError::Unavailable, AppendError::ReadOnly] {
        let (mut store, mut calls) = (store_of(entries()), 0);
        tick(&mut store, 10, |_| {
            calls += 1;
            Err(error)
        });
        assert_eq!((store, calls), (store_of(entries()), 1), "{error:?}: no use in trying the others");
    }
}

#[test]
fn a_delete_that_is_too_large_does_not_hold_up_the_others() {
    let mut store = store_of([(1, put("long", "", Some(10))), (2, put("b", "", Some(10)))]);
    tick(&mut store, 10, |events| if events.contains(&delete("long")) { Err(AppendError::TooLarge(3)) } else { Ok(3) });
    assert_eq!((store.keys(), value(&store, "long", 10)), (1, Err(3)));
}

#[test]
fn tick_deletes_in_as_few_groups_as_the_log_accepts() {
    let expiring = || (1..=1_000).map(|n| (n, put(&format!("{n}"), "", Some(n))));
    for (most, appends) in [(1_000, 1), (300, 4), (1, 1_000)] {
        let (mut store, mut groups) = (store_of(expiring()), Vec::new());
        tick(&mut store, 1_000, |events| {
            if events.len() > most {
                return Err(AppendError::TooLarge(9));
            }
            groups.push(events.len());
            Ok(2_000)
        });
        assert_eq!((store.keys(), groups.len(), groups.iter().sum()), (0, appends, 1_000), "{most}");
    }
}

#[test]
fn a_tick_that_can_delete_nothing_asks_for_no_other() {
    let mut store = store_of((1..=1_000).map(|n| (n, put(&format!("{n}"), "", Some(n)))));
    assert_eq!(tick(&mut store, 1_000, |_| Err(AppendError::TooLarge(3))), None);
}

#[test]
fn stores_are_equal_only_when_all_they_hold_is() {
    let store = |value: &str, expires, last| store_of([(1, put("a", value, expires)), (2, last)]);
    let one = store("1", Some(9), put("b", "", None));
    assert_eq!(one, store("1", Some(9), put("b", "", None)));
    for other in [
        store("2", Some(9), put("b", "", None)),
        store("1", Some(8), put("b", "", None)),
        store("1", Some(9), put("c", "", None)),
        store("1", Some(9), delete("b")),
    ] {
        assert_ne!(one, other);
    }
    // Only the time of the last delete distinguishes these.
    let with_deletes = |last| store_of([(1, put("a", "", None)), (last, delete("a"))]);
    assert_ne!(with_deletes(2), with_deletes(3));
}
