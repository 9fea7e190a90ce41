//! State of a guest that extends the default store: values in JSON, at keys that begin with U+0001. Every guest keeps these
//! keys, and none shows them to clients.
//!
//! Must never know: what a guest keeps.

use kvs_kit::key::GUEST_KEY;
use kvs_kit::{Event, Put};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::item::Item;
use crate::store::Store;

/// A value that is there.
#[derive(Debug, PartialEq, Eq)]
pub struct Own<T> {
    pub key: String,
    /// What follows the prefix in the key.
    pub name: String,
    pub value: T,
    /// Of the entry that put it.
    pub sequence: u64,
    pub expires_at_ms: Option<u64>,
}

/// The key `name` of `group`. All keys of a group are in one shard, whatever `kind` they are, unless the group is empty: then
/// its keys are spread over all shards.
pub fn key(kind: &str, group: &str, name: &str) -> String {
    // The hash tag ends with the first closing brace, and an empty one is none.
    let group = group.replace('%', "%25").replace('}', "%7D");
    format!("{GUEST_KEY}{kind}/{{{group}}}{name}")
}

/// An event that puts a value.
pub fn put(key: String, value: &impl Serialize, expires_at_ms: Option<u64>) -> Event {
    let value = serde_json::to_vec(value).expect("a state of Rust's types is JSON");
    Event::Put(Put { key, value, metadata: Vec::new(), expires_at_ms })
}

/// The value at a key, unless it is none of this type.
pub fn get<T: DeserializeOwned>(store: &Store, key: &str, now_ms: u64) -> Option<Own<T>> {
    read(store.get(key, now_ms).ok()?, key)
}

/// The values whose keys begin with `prefix`, in the order in which they were put.
pub fn list<T: DeserializeOwned>(store: &Store, prefix: &str, now_ms: u64) -> Vec<Own<T>> {
    let items = store.in_order().range(prefix.as_bytes()).take_while(|item| item.key().starts_with(prefix.as_bytes()));
    let mut found: Vec<_> =
        items.filter(|item| !item.is_expired(now_ms)).filter_map(|item| read(item, prefix)).collect();
    found.sort_unstable_by_key(|own: &Own<T>| own.sequence);
    found
}

fn read<T: DeserializeOwned>(item: &Item, prefix: &str) -> Option<Own<T>> {
    let key = str::from_utf8(item.key()).ok()?;
    Some(Own {
        key: key.to_owned(),
        name: key.strip_prefix(prefix)?.to_owned(),
        value: serde_json::from_slice(item.value()).ok()?,
        sequence: item.sequence(),
        expires_at_ms: item.expires(),
    })
}

#[cfg(test)]
mod tests {
    use kvs_kit::state::{Entry, State};

    use super::*;

    #[test]
    fn values_come_back_in_the_order_of_their_puts() {
        let mut store = Store::default();
        let puts = [("b", "2", None), ("a", "1", Some(20)), ("c", "3", Some(10))];
        for (sequence, (name, value, expires)) in (1..).zip(puts) {
            store.apply(Entry::new(sequence, &put(key("kind", "group", name), &value, expires)));
        }
        store.apply(Entry::new(4, &put(key("kind", "group2", "d"), &"4", None)));
        store.settle();
        let own = |name: &str, value: &str, sequence, expires_at_ms| Own {
            key: key("kind", "group", name),
            name: name.to_owned(),
            value: value.to_owned(),
            sequence,
            expires_at_ms,
        };
        let all = list::<String>(&store, &key("kind", "group", ""), 10);
        assert_eq!(all, [own("b", "2", 1, None), own("a", "1", 2, Some(20))]);
        let a = get::<String>(&store, &key("kind", "group", "a"), 19).expect("it has not expired");
        assert_eq!((a.name.as_str(), a.value.as_str(), a.sequence), ("", "1", 2));
        assert_eq!(get::<String>(&store, &key("kind", "group", "a"), 20), None);
        assert_eq!(get::<u64>(&store, &key("kind", "group", "b"), 0), None);
    }

    #[test]
    fn group_is_a_hash_tag_whatever_it_holds() {
        assert_eq!(key("k", "}a%{", "n}"), "\u{1}k/{%7Da%25{}n}");
        assert_eq!(key("k", "", ""), "\u{1}k/{}");
    }
}
