use std::cell::Cell;
use std::collections::BTreeSet;
use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::kvs::store::transaction_log::{Event, Put};
use crate::testing::request;

const NOW: u64 = 1_000;

/// The response at a time.
fn get(store: &Store, query: &str, now: u64) -> Response {
    super::get(store, query, &Request { time_ms: now, ..request("GET") })
}

fn put(key: &str, value: &[u8], expires: Option<u64>) -> Event {
    Event::Put(Put { key: key.to_owned(), value: value.into(), metadata: vec![], expires_at_ms: expires })
}

fn store_of<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> Store {
    let mut store = Store::default();
    (1..).zip(keys).for_each(|(sequence, key)| {
        store.replace(sequence, &put(key.as_ref(), b"value", None));
    });
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
fn pages(store: &Store, query: &str) -> Vec<Page> {
    let mut pages = vec![read(&get(store, query, NOW))];
    while let Some(cursor) = &pages[pages.len() - 1].cursor {
        pages.push(read(&get(store, &format!("{query}&cursor={cursor}"), NOW)));
    }
    pages
}

#[test]
fn list_is_sorted_by_bytes_with_attributes() {
    let mut store = store_of(["b", "ä", "a/", "a", "Z", "a b"]);
    store.replace(7, &put("z", b"\xff", Some(NOW + 1)));
    store.replace(8, &put("gone", b"", Some(NOW)));
    let response = get(&store, "", NOW);
    let expected = r#"{"keys":[{"key":"Z","etag":"\"5\"","size":5},{"key":"a","etag":"\"4\"","size":5},{"key":"a b","etag":"\"6\"","size":5},{"key":"a/","etag":"\"3\"","size":5},{"key":"b","etag":"\"1\"","size":5},{"key":"z","etag":"\"7\"","size":1,"expires":1001},{"key":"ä","etag":"\"2\"","size":5}],"list_complete":true}"#;
    assert_eq!(String::from_utf8_lossy(&response.body), expected);
    assert_eq!(response.read_sequence, None);
    assert_eq!(rows(&read(&get(&store, "prefix=a", NOW))).0, ["a", "a b", "a/"]);
    assert_eq!(rows(&read(&get(&store, "prefix=a+", NOW))).0, ["a b"]);
    assert_eq!(rows(&read(&get(&store, "prefix=nothing", NOW))).0, [""; 0]);
}

#[test]
fn large_value_is_left_out_of_pages_and_merged_pages_have_a_limit() {
    let mut stores = [Store::default(), Store::default()];
    for (sequence, (key, bytes)) in
        (1..).zip([("a", PAGE_BYTES - 1), ("b", PAGE_BYTES + 1), ("c", 1), ("d", PAGE_BYTES)])
    {
        stores[sequence as usize % 2].replace(sequence, &put(key, &vec![b'x'; bytes], None));
    }
    let [even, odd] = stores.each_ref().map(|store| pages(store, "values=true"));
    let sizes = |page: &Page| page.keys.iter().map(|entry| (entry.size, entry.json_bytes())).collect::<Vec<_>>();
    assert_eq!(
        even.iter().map(sizes).collect::<Vec<_>>(),
        [[(Some(PAGE_BYTES + 1), 1)], [(Some(PAGE_BYTES), PAGE_BYTES + 1)]]
    );
    assert_eq!(odd.iter().map(sizes).collect::<Vec<_>>(), [[(Some(PAGE_BYTES - 1), PAGE_BYTES)], [(Some(1), 2)]]);
    let (mut listed, mut query) = (Vec::new(), "values=true".to_owned());
    loop {
        let responses = stores.each_ref().map(|store| get(store, &query, NOW));
        let merged = read(&merge(&query, &responses));
        listed.push(rows(&merged).0.concat());
        let Some(cursor) = merged.cursor else { break };
        query = format!("values=true&cursor={cursor}");
    }
    assert_eq!(listed, ["a", "b", "c", "d"], "none of them fits into a page with another");
}

#[test]
fn page_has_a_limit_as_it_is_sent() {
    for (byte, count, bytes) in [(1, 3, PAGE_BYTES), (b'"', 3, PAGE_BYTES), (1, 100, 50_000), (b'"', 100, 50_000)] {
        let mut store = Store::default();
        (1..=count).for_each(|n| {
            store.replace(n, &put(&format!("{n:03}"), &vec![byte; bytes], None));
        });
        let (mut listed, mut query) = (0, "values=true".to_owned());
        loop {
            let response = get(&store, &query, NOW);
            let page = read(&response);
            let most = if page.keys.len() == 1 { 2 * PAGE_BYTES } else { PAGE_BYTES };
            assert!(response.body.len() < most + 10_000, "{} bytes", response.body.len());
            listed += page.keys.len() as u64;
            let Some(cursor) = page.cursor else { break };
            query = format!("values=true&cursor={cursor}");
        }
        assert_eq!(listed, count);
    }
}

#[test]
fn values_come_when_asked_for() {
    let mut store = Store::default();
    store.replace(1, &put("bytes", b"\xff", None));
    let metadata = vec![("content-type".to_owned(), "a/b".to_owned())];
    let text = Put { key: "text".to_owned(), value: b"value".into(), metadata, expires_at_ms: None };
    store.replace(2, &Event::Put(text));
    let page = read(&get(&store, "values=true", NOW));
    assert_eq!(page.keys[0].value_base64.as_deref(), Some("/w=="));
    assert_eq!((page.keys[1].value.as_deref(), page.keys[1].content_type.as_deref()), (Some("value"), Some("a/b")));
    let page = read(&get(&store, "values=false", NOW));
    assert!(page.keys.iter().all(|entry| entry.value.is_none() && entry.content_type.is_none()));
}

#[test]
fn a_page_ends_at_its_limit_its_bytes_and_its_steps() {
    let store = store_of((0..2_500).map(|n| format!("{n:04}")));
    let lengths = |pages: Vec<Page>| pages.iter().map(|page| page.keys.len()).collect::<Vec<_>>();
    assert_eq!(lengths(pages(&store, "")), [1_000, 1_000, 500]);
    assert_eq!(lengths(pages(&store, "limit=1000&prefix=1")), [1_000]);
    assert_eq!(lengths(pages(&store, "limit=999&prefix=1")), [999, 1]);

    let mut store = Store::default();
    (1..=5).for_each(|n| {
        store.replace(n, &put(&format!("{n}"), &[b'x'; 600_000], None));
    });
    assert_eq!(lengths(pages(&store, "values=true")), [1; 5]);
    assert_eq!(lengths(pages(&store, "")), [5]);

    let mut store = store_of(["a", "z"]);
    (3..25_003).for_each(|n| {
        store.replace(n, &put(&format!("b{n}"), b"", Some(NOW)));
    });
    assert_eq!(lengths(pages(&store, "")), [1, 0, 1]);
}

#[test]
fn a_page_costs_the_same_however_many_keys_there_are() {
    let page = |count: usize| {
        let store = store_of((0..count).map(|n| format!("{n:07}")));
        let all = asked("").expect("it is well formed");
        let query = format!("cursor={}", all.cursor(format!("{:07}", count - 1_000).as_bytes()));
        let mut times: Vec<_> = (0..101)
            .map(|_| {
                let begun = Instant::now();
                assert_eq!(read(&get(&store, &query, NOW)).keys.len(), 1_000);
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
    let store = store_of(["a", "a/1", "a/2", "a/b/3", "b/", "c/1", "c0", "d"]);
    let page = read(&get(&store, "delimiter=/", NOW));
    assert_eq!(rows(&page), (vec!["a", "c0", "d"], vec!["a/", "b/", "c/"]));
    let page = read(&get(&store, "delimiter=/&prefix=a/", NOW));
    assert_eq!(rows(&page), (vec!["a/1", "a/2"], vec!["a/b/"]));
    let page = read(&get(&store, "delimiter=/1&prefix=a", NOW));
    assert_eq!(rows(&page), (vec!["a", "a/2", "a/b/3"], vec!["a/1"]));
    let pages = pages(&store, "delimiter=/&limit=2");
    let rows: Vec<_> = pages.iter().map(rows).collect();
    assert_eq!(rows, [(vec!["a"], vec!["a/"]), (vec![], vec!["b/", "c/"]), (vec!["c0", "d"], vec![])]);
}

#[test]
fn keys_of_guests_are_not_listed() {
    let store = store_of(["\0", "\u{1}", "\u{1}a/b", "\u{1}z", "\u{2}", "a"]);
    assert_eq!(rows(&read(&get(&store, "", NOW))), (vec!["\0", "\u{2}", "a"], vec![]));
    assert_eq!(rows(&read(&get(&store, "delimiter=/", NOW))), (vec!["\0", "\u{2}", "a"], vec![]));
    let pages = pages(&store, "limit=1");
    assert_eq!(pages.iter().map(|page| rows(page).0).collect::<Vec<_>>(), [["\0"], ["\u{2}"], ["a"]]);
    let page = read(&get(&store, "prefix=%01", NOW));
    assert_eq!((rows(&page), page.list_complete), ((vec![], vec![]), true));
}

#[test]
fn a_cursor_goes_on_where_it_was_while_keys_change() {
    let mut store = store_of(["a", "b", "c", "d"]);
    let page = read(&get(&store, "limit=2", NOW));
    store.replace(5, &Event::Delete("b".to_owned()));
    store.replace(6, &put("aa", b"", None));
    store.replace(7, &put("bb", b"", None));
    let cursor = page.cursor.expect("there is more");
    assert_eq!(rows(&read(&get(&store, &format!("cursor={cursor}"), NOW))).0, ["bb", "c", "d"]);
    assert_eq!(rows(&read(&get(&store, &format!("prefix=d&cursor={cursor}"), NOW))).0, ["d"]);
}

#[test]
fn what_is_malformed_is_refused_by_name() {
    for (query, reason) in [
        ("limit=0", "query parameter `limit` must be a whole number from 1 to 1000\n"),
        ("limit=1001", "query parameter `limit` must be a whole number from 1 to 1000\n"),
        ("limit=", "query parameter `limit` must be a whole number from 1 to 1000\n"),
        ("cursor=", "query parameter `cursor` must be one that such a list has given\n"),
        ("cursor=YQ", "query parameter `cursor` must be one that such a list has given\n"),
        ("cursor=AWE=", "query parameter `cursor` must be one that such a list has given\n"),
        ("values=yes", "query parameter `values` must be true or false\n"),
        ("values", "query parameter `values` must be true or false\n"),
        ("delimiter=", "query parameter `delimiter` must be at least one character\n"),
        ("prefix=a&prefix=a", "query parameter `prefix` was given twice\n"),
        ("prefix=%ff", "query parameter `prefix` is not valid UTF-8\n"),
        ("Prefix=a", "unknown query parameter `Prefix`\n"),
    ] {
        let response = get(&Store::default(), query, NOW);
        assert_eq!((response.status, String::from_utf8_lossy(&response.body).as_ref()), (400, reason), "{query}");
    }
}

#[test]
fn a_page_costs_what_it_holds_whatever_else_there_is() {
    let looked_at = |store: &Store, query: &str| {
        let store = store.in_order();
        let (seeks, items) = (Cell::new(0), Cell::new(0));
        let page = page_of(&asked(query).expect("well-formed"), NOW, |from| {
            seeks.set(seeks.get() + 1);
            store.range(from.unwrap_or_default()).inspect(|_| items.set(items.get() + 1))
        });
        assert_eq!(page.keys.len() + page.prefixes.map_or(0, |prefixes| prefixes.len()), 10);
        (seeks.get(), items.get())
    };
    // How many steps one seek takes is shown in `order`.
    for count in [1_000, 1_000_000] {
        let store = store_of((0..count).map(|n| format!("{:02}/{n}", n % 10)));
        assert_eq!(looked_at(&store, "limit=10"), (1, 11));
        assert_eq!(looked_at(&store, "prefix=05/&limit=10"), (1, 11));
        assert_eq!(looked_at(&store, "delimiter=/"), (11, 10));
    }
}

fn keys() -> impl Strategy<Value = BTreeSet<String>> {
    prop::collection::btree_set("[ab/]{1,4}", 0..40)
}

proptest! {
    /// Whatever the limit, the pages together are what the model has.
    #[test]
    fn pages_are_the_list(keys in keys(), prefix in "[ab/]{0,2}", limit in 1..7_usize, grouped: bool) {
        let store = store_of(&keys);
        let query = format!("prefix={prefix}&limit={limit}{}", if grouped { "&delimiter=/" } else { "" });
        let pages = pages(&store, &query);
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

    /// Several instances, merged, answer as one that has it all, which has each key once, in order, within the bounds.
    #[test]
    fn merged_pages_are_the_page_of_all(
        keys in keys(), parts in 1..4_usize, limit in 1..7_usize, grouped: bool, reverse: bool,
        start in prop::option::of("[ab/]{1,2}"), end in prop::option::of("[ab/]{1,2}"), prefix in "[ab/]{0,1}",
    ) {
        let whole = store_of(&keys);
        let mut stores: Vec<_> = (0..parts).map(|_| Store::default()).collect();
        for (n, key) in keys.iter().enumerate() {
            stores[n % parts].replace(n as u64 + 1, &put(key, b"value", None));
        }
        let mut bounds = format!("prefix={prefix}&reverse={reverse}");
        bounds.extend(start.iter().map(|start| format!("&start={start}")));
        bounds.extend(end.iter().map(|end| format!("&end={end}")));
        let answer = |query: &str| {
            let one = get(&whole, query, NOW);
            let parts: Vec<_> = stores.iter().map(|store| get(store, query, NOW)).collect();
            let many = merge(query, &parts);
            assert_eq!((one.status, &one.headers), (200, &many.headers));
            assert_eq!(String::from_utf8_lossy(&one.body), String::from_utf8_lossy(&many.body), "{query}");
            one
        };
        let within = |key: &&String| {
            let in_bounds = start.as_ref().is_none_or(|start| *key >= start) && end.as_ref().is_none_or(|end| *key < end);
            key.starts_with(&prefix) && !key.starts_with('\u{1}') && in_bounds
        };
        let mut expected: Vec<_> = keys.iter().filter(within).cloned().collect();
        let counted = answer(&format!("{}&count=true", bounds.replace(&format!("&reverse={reverse}"), "")));
        let count: Count = serde_json::from_slice(&counted.body).expect("a count");
        prop_assert_eq!(count.count, expected.len());
        if reverse {
            expected.reverse();
        }
        let (mut listed, mut groups, mut cursor) = (Vec::new(), Vec::new(), String::new());
        let delimiter = if grouped { "&delimiter=/" } else { "" };
        loop {
            let page = read(&answer(&format!("{bounds}&limit={limit}{delimiter}{cursor}")));
            listed.extend(page.keys.into_iter().map(|entry| entry.key));
            groups.extend(page.prefixes.into_iter().flatten());
            let Some(next) = page.cursor else { break };
            cursor = format!("&cursor={next}");
        }
        let is_grouped = |key: &&String| grouped && key[prefix.len()..].contains('/');
        let single: Vec<_> = expected.iter().filter(|key| !is_grouped(key)).cloned().collect();
        prop_assert_eq!(listed, single);
        let mut expected_groups: Vec<_> = expected.iter().filter(is_grouped).map(|key| {
            let end = prefix.len() + key[prefix.len()..].find('/').expect("a slash") + 1;
            key[..end].to_owned()
        }).collect();
        expected_groups.dedup();
        prop_assert_eq!(groups, expected_groups);
    }
}

#[test]
fn first_page_asks_for_a_position() {
    let store = store_of(["a", "b"]);
    let first = get(&store, "limit=1", NOW);
    assert!(first.headers.contains(&header(POSITION, "")));
    let cursor = read(&first).cursor.expect("there is more");
    let second = get(&store, &format!("cursor={cursor}"), NOW);
    assert!(second.headers.iter().all(|header| header.name != POSITION));
}

#[test]
fn count_passes_over_expired_keys_and_keys_of_guests() {
    let mut store = store_of(["\u{1}g", "a", "b", "c"]);
    store.replace(9, &put("bb", b"", Some(NOW)));
    for (query, count) in [("", 3), ("&prefix=b", 1), ("&start=b&end=c", 1), ("&start=c&end=a", 0), ("&end=a", 0)] {
        let counted = get(&store, &format!("count=true{query}"), NOW);
        assert_eq!(String::from_utf8_lossy(&counted.body), format!("{{\"count\":{count}}}"), "{query}");
    }
    for (query, reason) in [
        ("count=true&limit=1", "query parameter `limit` does not go with `count`\n"),
        ("count=true&reverse=true", "query parameter `reverse` does not go with `count`\n"),
        ("count=1", "query parameter `count` must be true or false\n"),
        ("reverse=yes", "query parameter `reverse` must be true or false\n"),
        ("start=a&start=b", "query parameter `start` was given twice\n"),
    ] {
        let refused = get(&store, query, NOW);
        assert_eq!((refused.status, &*String::from_utf8_lossy(&refused.body)), (400, reason), "{query}");
    }
}

#[test]
fn count_with_too_many_expired_keys_depends_on_the_state() {
    let expired = |n: u64| (n, put(&n.to_string(), b"", Some(NOW)));
    let mut store = Store::default();
    (1..=100_001).map(expired).for_each(|(sequence, event)| {
        store.replace(sequence, &event);
    });
    let refused = get(&store, "count=true", NOW);
    assert_eq!((refused.status, refused.read_sequence), (503, None));
}
