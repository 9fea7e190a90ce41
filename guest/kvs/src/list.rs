//! `GET /v1`: keys in order, a page at a time.
//!
//! Owns: what a list may ask for, where a page ends, and the cursor by which the next one goes on. A page costs what it
//! holds, whatever else the store does. Must never know: how items are kept.

use std::borrow::Cow;
use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use crate::answer::{json, line};
use crate::conditions::tag_of;
use crate::content_type;
use crate::item::Item;
use crate::key;
use crate::kvs::store::http::Response;
use crate::query::{self, BadQuery, Parameter};
use crate::store::Store;
use crate::text;

/// Keys and prefixes in a page, at most.
const MAX_LIMIT: u64 = 1_000;
/// Items looked at for a page, at most. Those that have expired are looked at and not shown.
const MAX_STEPS: usize = 10_000;
/// Bytes of keys and values after which a page ends.
const PAGE_BYTES: usize = 1 << 20;
/// The first byte of the keys that belong to guests, which no list shows.
const GUEST_KEY: u8 = key::GUEST_KEY as u8;
/// The first byte of a cursor: which kind of cursor it is.
const CURSOR_KIND: u8 = 1;

/// What a list asks for.
struct Asked<'q> {
    prefix: Cow<'q, str>,
    limit: usize,
    /// The least key that can be in the page.
    from: Vec<u8>,
    values: bool,
    delimiter: Option<Cow<'q, str>>,
}

/// A page of a list, as it is answered.
#[derive(Default, Serialize, Deserialize)]
struct Page {
    keys: Vec<Entry>,
    /// What keys begin with that are not listed one by one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    prefixes: Option<Vec<String>>,
    list_complete: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    key: String,
    etag: String,
    size: usize,
    /// In milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    content_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
}

/// GET, and HEAD: the host drops the body.
pub fn get(store: &mut Store, query: &str, now: u64) -> Response {
    let store = store.in_order();
    match asked(query) {
        Ok(asked) => json(&page(&asked, now, |from| store.range(from))),
        Err(bad) => line(400, &bad.to_string()),
    }
}

/// The page of a list whose keys lie in several instances, each of which gave a page of its own.
pub fn merge(query: &str, mut responses: Vec<Response>) -> Response {
    if let Some(refused) = responses.iter().position(|response| response.status != 200) {
        return responses.swap_remove(refused);
    }
    let pages: Result<Vec<Page>, _> = responses.iter().map(|response| serde_json::from_slice(&response.body)).collect();
    match (asked(query), pages) {
        (Ok(asked), Ok(pages)) => json(&merged(&asked, pages)),
        _ => line(500, "the instances of the store disagree on what a list is"),
    }
}

fn asked(query: &str) -> Result<Asked<'_>, BadQuery> {
    let [prefix, limit, cursor, values, delimiter] =
        query::parameters(query, ["prefix", "limit", "cursor", "values", "delimiter"])?;
    let prefix = prefix.map_or(Cow::Borrowed(""), |prefix| prefix.value);
    let limit = limit.map_or(Ok(MAX_LIMIT), |limit| limit.number(1..=MAX_LIMIT))?;
    let cursor = cursor.map(|cursor| position(&cursor.value).ok_or_else(|| cursor.unfit("one that a list has given")));
    let from = cursor.transpose()?.unwrap_or_default().max(prefix.as_bytes().to_vec());
    let values = values.map_or(Ok(false), |values| match &*values.value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(values.unfit("true or false")),
    })?;
    let delimiter = delimiter.map(|Parameter { name, value }| match &*value {
        "" => Err(Parameter { name, value }.unfit("at least one character")),
        _ => Ok(value),
    });
    Ok(Asked { prefix, limit: limit as usize, from, values, delimiter: delimiter.transpose()? })
}

fn page<'s, I: Iterator<Item = &'s Item>>(asked: &Asked<'_>, now: u64, range: impl Fn(&[u8]) -> I) -> Page {
    let mut page = Page { prefixes: asked.delimiter.as_ref().map(|_| Vec::new()), ..Page::default() };
    let (mut from, mut rows, mut steps, mut bytes) = (asked.from.clone(), 0, 0, 0);
    'seek: loop {
        for item in range(&from) {
            let Some(rest) = item.key().strip_prefix(asked.prefix.as_bytes()) else { break };
            steps += 1;
            if rows == asked.limit || steps > MAX_STEPS || bytes > PAGE_BYTES {
                page.cursor = Some(cursor(&from));
                return page;
            }
            if item.key().first() == Some(&GUEST_KEY) {
                // However many there are, they are passed over in one step.
                from = after_all(&[GUEST_KEY]);
                continue 'seek;
            }
            if item.is_expired(now) {
                from = after(item.key());
                continue;
            }
            rows += 1;
            bytes += item.key().len();
            let delimiter = asked.delimiter.as_deref();
            if let Some(end) = delimiter.and_then(|delimiter| end_of(delimiter.as_bytes(), rest)) {
                let group = &item.key()[..asked.prefix.len() + end];
                page.prefixes.get_or_insert_default().push(String::from_utf8_lossy(group).into_owned());
                // However many keys begin so, they are passed over in one step.
                from = after_all(group);
                continue 'seek;
            }
            bytes += if asked.values { item.value().len() } else { 0 };
            page.keys.push(Entry::of(item, asked.values));
            from = after(item.key());
        }
        page.list_complete = true;
        return page;
    }
}

/// Where the first `delimiter` ends.
fn end_of(delimiter: &[u8], text: &[u8]) -> Option<usize> {
    let at = text.windows(delimiter.len()).position(|window| window == delimiter)?;
    Some(at + delimiter.len())
}

fn merged(asked: &Asked<'_>, pages: Vec<Page>) -> Page {
    // Up to here, every instance has said all it has. A cursor of its own making can be read.
    let cursors = pages.iter().filter_map(|page| page.cursor.as_deref());
    let end = cursors.filter_map(position).min();
    let mut rows: BTreeMap<String, Option<Entry>> = BTreeMap::new();
    for page in pages {
        rows.extend(page.prefixes.into_iter().flatten().map(|prefix| (prefix, None)));
        rows.extend(page.keys.into_iter().map(|entry| (entry.key.clone(), Some(entry))));
    }
    let mut page = Page { prefixes: asked.delimiter.as_ref().map(|_| Vec::new()), ..Page::default() };
    let (mut from, mut cut) = (asked.from.clone(), false);
    for (count, (name, entry)) in rows.into_iter().enumerate() {
        cut = count == asked.limit || end.as_ref().is_some_and(|end| name.as_bytes() >= end.as_slice());
        if cut {
            break;
        }
        match entry {
            Some(entry) => {
                from = after(name.as_bytes());
                page.keys.push(entry);
            }
            None => {
                from = after_all(name.as_bytes());
                page.prefixes.get_or_insert_default().push(name);
            }
        }
    }
    let next = if cut { Some(from) } else { end.map(|end| end.max(from)) };
    page.list_complete = next.is_none();
    page.cursor = next.map(|next| cursor(&next));
    page
}

/// The least key that comes after this one.
fn after(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

/// The least key that comes after all that begin so.
fn after_all(prefix: &[u8]) -> Vec<u8> {
    let mut next = prefix.to_vec();
    // No byte of a text is 255.
    if let Some(last) = next.last_mut() {
        *last = last.saturating_add(1);
    }
    next
}

fn cursor(from: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode([&[CURSOR_KIND], from].concat())
}

fn position(cursor: &str) -> Option<Vec<u8>> {
    let mut position = URL_SAFE_NO_PAD.decode(cursor).ok()?;
    (position.first() == Some(&CURSOR_KIND)).then(|| position.split_off(1))
}

impl Entry {
    fn of(item: &Item, values: bool) -> Self {
        let (value, value_base64) = if values { text::fields(item.value()) } else { (None, None) };
        Self {
            key: String::from_utf8_lossy(item.key()).into_owned(),
            etag: tag_of(item.sequence()),
            size: item.value().len(),
            expires: item.expires(),
            content_type: content_type::of(item.metadata()).filter(|_| values).map(str::to_owned),
            value,
            value_base64,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeSet;
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::kvs::store::transaction_log::{Event, Put};

    const NOW: u64 = 1_000;

    fn put(key: &str, value: &[u8], expires: Option<u64>) -> Event {
        Event::Put(Put { key: key.to_owned(), value: value.into(), metadata: vec![], expires_at_ms: expires })
    }

    fn store_of<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> Store {
        let mut store = Store::default();
        (1..).zip(keys).for_each(|(sequence, key)| store.apply(sequence, &put(key.as_ref(), b"value", None)));
        store
    }

    fn read(response: &Response) -> Page {
        assert_eq!(response.status, 200, "{}", String::from_utf8_lossy(&response.body));
        serde_json::from_slice(&response.body).expect("a page")
    }

    /// Keys and prefixes of a page.
    fn rows(page: &Page) -> (Vec<&str>, Vec<&str>) {
        let prefixes = page.prefixes.iter().flatten().map(String::as_str);
        (page.keys.iter().map(|entry| entry.key.as_str()).collect(), prefixes.collect())
    }

    /// All pages of a list, by their cursors.
    fn pages(store: &mut Store, query: &str) -> Vec<Page> {
        let mut pages = vec![read(&get(store, query, NOW))];
        while let Some(cursor) = &pages[pages.len() - 1].cursor {
            pages.push(read(&get(store, &format!("{query}&cursor={cursor}"), NOW)));
        }
        pages
    }

    #[test]
    fn a_list_is_sorted_by_bytes_and_tells_what_is_there() {
        let mut store = store_of(["b", "ä", "a/", "a", "Z", "a b"]);
        store.apply(7, &put("z", b"\xff", Some(NOW + 1)));
        store.apply(8, &put("gone", b"", Some(NOW)));
        let response = get(&mut store, "", NOW);
        let expected = r#"{"keys":[{"key":"Z","etag":"\"5\"","size":5},{"key":"a","etag":"\"4\"","size":5},{"key":"a b","etag":"\"6\"","size":5},{"key":"a/","etag":"\"3\"","size":5},{"key":"b","etag":"\"1\"","size":5},{"key":"z","etag":"\"7\"","size":1,"expires":1001},{"key":"ä","etag":"\"2\"","size":5}],"list_complete":true}"#;
        assert_eq!(String::from_utf8_lossy(&response.body), expected);
        assert_eq!(response.read_sequence, None);
        assert_eq!(rows(&read(&get(&mut store, "prefix=a", NOW))).0, ["a", "a b", "a/"]);
        assert_eq!(rows(&read(&get(&mut store, "prefix=a+", NOW))).0, ["a b"]);
        assert_eq!(rows(&read(&get(&mut store, "prefix=nothing", NOW))).0, [""; 0]);
    }

    #[test]
    fn values_come_when_asked_for() {
        let mut store = Store::default();
        store.apply(1, &put("bytes", b"\xff", None));
        let metadata = vec![("content-type".to_owned(), "a/b".to_owned())];
        let text = Put { key: "text".to_owned(), value: b"value".into(), metadata, expires_at_ms: None };
        store.apply(2, &Event::Put(text));
        let page = read(&get(&mut store, "values=true", NOW));
        assert_eq!(page.keys[0].value_base64.as_deref(), Some("/w=="));
        assert_eq!((page.keys[1].value.as_deref(), page.keys[1].content_type.as_deref()), (Some("value"), Some("a/b")));
        let page = read(&get(&mut store, "values=false", NOW));
        assert!(page.keys.iter().all(|entry| entry.value.is_none() && entry.content_type.is_none()));
    }

    #[test]
    fn a_page_ends_at_its_limit_its_bytes_and_its_steps() {
        let mut store = store_of((0..2_500).map(|n| format!("{n:04}")));
        let lengths = |pages: Vec<Page>| pages.iter().map(|page| page.keys.len()).collect::<Vec<_>>();
        assert_eq!(lengths(pages(&mut store, "")), [1_000, 1_000, 500]);
        assert_eq!(lengths(pages(&mut store, "limit=1000&prefix=1")), [1_000]);
        assert_eq!(lengths(pages(&mut store, "limit=999&prefix=1")), [999, 1]);

        let mut store = Store::default();
        (1..=5).for_each(|n| store.apply(n, &put(&format!("{n}"), &[b'x'; 600_000], None)));
        assert_eq!(lengths(pages(&mut store, "values=true")), [2, 2, 1]);
        assert_eq!(lengths(pages(&mut store, "")), [5]);

        let mut store = store_of(["a", "z"]);
        (3..25_003).for_each(|n| store.apply(n, &put(&format!("b{n}"), b"", Some(NOW))));
        assert_eq!(lengths(pages(&mut store, "")), [1, 0, 1]);
    }

    #[test]
    fn a_page_costs_the_same_however_many_keys_there_are() {
        let page = |count: usize| {
            let mut store = store_of((0..count).map(|n| format!("{n:07}")));
            let query = format!("cursor={}", cursor(format!("{:07}", count - 1_000).as_bytes()));
            let mut times: Vec<_> = (0..101)
                .map(|_| {
                    let begun = Instant::now();
                    assert_eq!(read(&get(&mut store, &query, NOW)).keys.len(), 1_000);
                    begun.elapsed()
                })
                .collect();
            times.sort();
            times[times.len() / 2]
        };
        let (few, many) = (page(1_000), page(1_000_000));
        println!("a page of 1,000 keys takes {few:?} among 1,000, {many:?} among 1,000,000");
        // A walk over all would be hundreds of times as long.
        assert!(many < 20 * few);
    }

    #[test]
    fn a_delimiter_groups_what_begins_alike() {
        let mut store = store_of(["a", "a/1", "a/2", "a/b/3", "b/", "c/1", "c0", "d"]);
        let page = read(&get(&mut store, "delimiter=/", NOW));
        assert_eq!(rows(&page), (vec!["a", "c0", "d"], vec!["a/", "b/", "c/"]));
        let page = read(&get(&mut store, "delimiter=/&prefix=a/", NOW));
        assert_eq!(rows(&page), (vec!["a/1", "a/2"], vec!["a/b/"]));
        let page = read(&get(&mut store, "delimiter=/1&prefix=a", NOW));
        assert_eq!(rows(&page), (vec!["a", "a/2", "a/b/3"], vec!["a/1"]));
        let pages = pages(&mut store, "delimiter=/&limit=2");
        let rows: Vec<_> = pages.iter().map(rows).collect();
        assert_eq!(rows, [(vec!["a"], vec!["a/"]), (vec![], vec!["b/", "c/"]), (vec!["c0", "d"], vec![])]);
    }

    #[test]
    fn keys_of_guests_are_not_listed() {
        let mut store = store_of(["\0", "\u{1}", "\u{1}a/b", "\u{1}z", "\u{2}", "a"]);
        assert_eq!(rows(&read(&get(&mut store, "", NOW))), (vec!["\0", "\u{2}", "a"], vec![]));
        assert_eq!(rows(&read(&get(&mut store, "delimiter=/", NOW))), (vec!["\0", "\u{2}", "a"], vec![]));
        let pages = pages(&mut store, "limit=1");
        assert_eq!(pages.iter().map(|page| rows(page).0).collect::<Vec<_>>(), [["\0"], ["\u{2}"], ["a"]]);
        let page = read(&get(&mut store, "prefix=%01", NOW));
        assert_eq!((rows(&page), page.list_complete), ((vec![], vec![]), true));
    }

    #[test]
    fn a_cursor_goes_on_where_it_was_while_keys_change() {
        let mut store = store_of(["a", "b", "c", "d"]);
        let page = read(&get(&mut store, "limit=2", NOW));
        store.apply(5, &Event::Delete("b".to_owned()));
        store.apply(6, &put("aa", b"", None));
        store.apply(7, &put("bb", b"", None));
        let cursor = page.cursor.expect("there is more");
        assert_eq!(rows(&read(&get(&mut store, &format!("cursor={cursor}"), NOW))).0, ["bb", "c", "d"]);
        assert_eq!(rows(&read(&get(&mut store, &format!("prefix=d&cursor={cursor}"), NOW))).0, ["d"]);
    }

    #[test]
    fn what_is_malformed_is_refused_by_name() {
        for (query, told) in [
            ("limit=0", "query parameter `limit` must be a whole number from 1 to 1000\n"),
            ("limit=1001", "query parameter `limit` must be a whole number from 1 to 1000\n"),
            ("limit=", "query parameter `limit` must be a whole number from 1 to 1000\n"),
            ("cursor=", "query parameter `cursor` must be one that a list has given\n"),
            ("cursor=YQ", "query parameter `cursor` must be one that a list has given\n"),
            ("cursor=AWE=", "query parameter `cursor` must be one that a list has given\n"),
            ("values=yes", "query parameter `values` must be true or false\n"),
            ("values", "query parameter `values` must be true or false\n"),
            ("delimiter=", "query parameter `delimiter` must be at least one character\n"),
            ("prefix=a&prefix=a", "query parameter `prefix` was given twice\n"),
            ("prefix=%ff", "query parameter `prefix` is not valid UTF-8\n"),
            ("Prefix=a", "unknown query parameter `Prefix`\n"),
        ] {
            let response = get(&mut Store::default(), query, NOW);
            assert_eq!((response.status, String::from_utf8_lossy(&response.body).as_ref()), (400, told), "{query}");
        }
    }

    #[test]
    fn a_page_costs_what_it_holds_whatever_else_there_is() {
        let looked_at = |store: &mut Store, query: &str| {
            let store = store.in_order();
            let (seeks, items) = (Cell::new(0), Cell::new(0));
            let page = page(&asked(query).expect("well-formed"), NOW, |from| {
                seeks.set(seeks.get() + 1);
                store.range(from).inspect(|_| items.set(items.get() + 1))
            });
            assert_eq!(page.keys.len() + page.prefixes.map_or(0, |prefixes| prefixes.len()), 10);
            (seeks.get(), items.get())
        };
        // How many steps one seek takes is shown in `order`.
        for count in [1_000, 1_000_000] {
            let mut store = store_of((0..count).map(|n| format!("{:02}/{n}", n % 10)));
            assert_eq!(looked_at(&mut store, "limit=10"), (1, 11));
            assert_eq!(looked_at(&mut store, "prefix=05/&limit=10"), (1, 11));
            assert_eq!(looked_at(&mut store, "delimiter=/"), (11, 10));
        }
    }

    fn keys() -> impl Strategy<Value = BTreeSet<String>> {
        prop::collection::btree_set("[ab/]{1,4}", 0..40)
    }

    proptest! {
        /// Whatever the limit, the pages together are what the model has.
        #[test]
        fn pages_are_the_list(keys in keys(), prefix in "[ab/]{0,2}", limit in 1..7_usize, grouped: bool) {
            let mut store = store_of(&keys);
            let query = format!("prefix={prefix}&limit={limit}{}", if grouped { "&delimiter=/" } else { "" });
            let pages = pages(&mut store, &query);
            let mut expected = BTreeSet::new();
            for key in keys.iter().filter(|key| key.starts_with(&prefix)) {
                let group = key[prefix.len()..].find('/').filter(|_| grouped);
                expected.insert(group.map_or(key.as_str(), |at| &key[..prefix.len() + at + 1]));
            }
            let (last, full) = pages.split_last().expect("there is one");
            prop_assert!(full.iter().all(|page| !page.list_complete && rows(page).0.len() + rows(page).1.len() == limit));
            prop_assert!(last.list_complete);
            // There can be none, which is not the same as not to have asked.
            prop_assert!(pages.iter().all(|page| page.prefixes.is_some() == grouped));
            let mut all: Vec<_> = pages.iter().flat_map(|page| [rows(page).0, rows(page).1].concat()).collect();
            // Each is there once.
            all.sort_unstable();
            prop_assert_eq!(all, expected.into_iter().collect::<Vec<_>>());
        }

        /// Several instances, merged, answer as one that has it all.
        #[test]
        fn merged_pages_are_the_page_of_all(keys in keys(), parts in 1..4_usize, limit in 1..7_usize, grouped: bool) {
            let mut whole = store_of(&keys);
            let part = |part| keys.iter().enumerate().filter(move |(n, _)| n % parts == part).map(|(_, key)| key);
            let mut stores: Vec<_> = (0..parts).map(|n| store_of(part(n))).collect();
            let mut query = format!("limit={limit}{}", if grouped { "&delimiter=/" } else { "" });
            loop {
                let (one, many) = (
                    read(&get(&mut whole, &query, NOW)),
                    read(&merge(&query, stores.iter_mut().map(|store| get(store, &query, NOW)).collect())),
                );
                prop_assert_eq!((rows(&one), one.prefixes.is_some()), (rows(&many), many.prefixes.is_some()));
                prop_assert_eq!((one.list_complete, &one.cursor), (many.list_complete, &many.cursor));
                let Some(cursor) = one.cursor else { break };
                query = format!("limit={limit}{}&cursor={cursor}", if grouped { "&delimiter=/" } else { "" });
            }
        }
    }

    #[test]
    fn a_page_that_one_instance_refuses_is_refused() {
        let refusal = line(503, "not now");
        assert_eq!(merge("", vec![get(&mut Store::default(), "", NOW), refusal.clone()]), refusal);
    }
}
