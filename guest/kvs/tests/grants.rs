//! The key prefix of a grant: whatever a client asks for, it gets what a store without the other keys would respond, and changes
//! no other keys.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kvs_guest::{Kvs, Store, rest};
use kvs_kit::bindings::kvs::store::http::{Grant, Scope};
use kvs_kit::bindings::kvs::store::watch::Selector;
use kvs_kit::host::Host;
use kvs_kit::sharding::Sharding;
use kvs_kit::state::{Entry, Logged, State};
use kvs_kit::{AppendError, Event, Header, Put, Request, Response, Target};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proptest::prelude::*;
use serde_json::{Value, json};

const NOW: u64 = 1_000;

/// Keys in and around the prefixes.
const KEYS: [&str; 12] = ["A", "a", "a/", "a/1", "a/1/x", "a/2", "a/2/x", "a/ä", "a0", "b", "b/1", "ä/1"];
const PREFIXES: [&str; 7] = ["a", "a/", "a/1", "a/2/", "b", "ä", "c"];

/// A host that records what it is asked for.
#[derive(Debug, Default, PartialEq)]
struct Recorder {
    appended: Vec<Event>,
    selectors: Vec<Selector>,
    /// Keys that are waited for, or that a kept response depends on.
    keys: Vec<String>,
}

impl Host for Recorder {
    fn append(&mut self, events: &[Event]) -> Result<u64, AppendError> {
        self.appended.extend_from_slice(events);
        Ok(100 + self.appended.len() as u64)
    }

    fn subscribe(&mut self, selectors: &[Selector], _after: Option<&str>, _puts_only: bool) {
        self.selectors.extend_from_slice(selectors);
    }

    fn wait_for_change(&mut self, key: &str, _timeout_ms: u64) {
        self.keys.push(key.to_owned());
    }

    fn reuse(&mut self, key: &str, _until_ms: Option<u64>) {
        self.keys.push(key.to_owned());
    }
}

/// Some of the keys, by their numbers, of which every third has expired or will.
fn events(chosen: u32) -> Vec<(u64, Event)> {
    let put = |(number, key): (usize, &&str)| {
        let expires_at_ms = [None, Some(NOW - 1), Some(NOW + 1)][number % 3];
        let value = format!("{number}").into_bytes();
        let put = Put { key: (*key).to_owned(), value, metadata: Vec::new(), expires_at_ms };
        (number as u64 + 1, Event::Put(put))
    };
    // A key of a guest too.
    let guests = (50, Event::Put(Put { key: "\u{1}a/1".into(), value: vec![], metadata: vec![], expires_at_ms: None }));
    let chosen = KEYS.iter().enumerate().filter(|(number, _)| chosen >> number & 1 == 1).map(put);
    chosen.chain([guests]).collect()
}

/// The stores of this number of shards, and what they ask of their host.
fn respond(shards: usize, events: &[(u64, Event)], request: &Request) -> (Response, Recorder) {
    let owner = |key: &str| key.len() % shards;
    let mut stores: Vec<_> = (0..shards).map(|_| Store::default()).collect();
    for (sequence, event) in events {
        let Event::Put(put) = event else { continue };
        stores[owner(&put.key)].apply(Entry::new(*sequence, event));
    }
    let mut host = Recorder::default();
    let asked = match (shards, Kvs::route(&request.method, &request.target)) {
        (1, _) | (_, Target::AnyShard) => vec![0],
        (_, Target::Key(key)) => vec![owner(&key)],
        (_, Target::AllShards) => (0..shards).collect(),
        (_, Target::KeysInBody) => {
            let mut owners: Vec<_> = Kvs::extract_keys(&request.body).iter().map(|key| owner(key)).collect();
            owners.dedup();
            match &owners[..] {
                [] => vec![0],
                [one] => vec![*one],
                _ => vec![],
            }
        }
    };
    let answer = |shard: &usize| rest::respond(&mut Logged::new(&mut stores[*shard], &mut host), request.clone());
    let mut responses: Vec<_> = asked.iter().map(answer).collect();
    let response = if asked.len() == 1 { responses.remove(0) } else { rest::merge(request, responses) };
    // Durability is the host's, and no client sees it.
    (Response { read_sequence: None, ..response }, host)
}

fn key() -> impl Strategy<Value = &'static str> {
    prop::sample::select(&KEYS[..])
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// A parameter that may be there.
fn parameter(name: &'static str, value: impl Strategy<Value = String>) -> impl Strategy<Value = String> {
    let given = move |value: Option<String>| value.map_or_else(String::new, |value| format!("{name}={value}&"));
    prop::option::weighted(0.4, value).prop_map(given)
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => prop::sample::select(&PREFIXES[..]).prop_map(encoded),
        2 => key().prop_map(encoded),
        1 => Just(String::new()),
        1 => Just("%01".to_owned()),
    ]
}

/// Cursors, also such as no list has given.
fn cursor() -> impl Strategy<Value = String> {
    (1..=2_u8, key()).prop_map(|(kind, key)| URL_SAFE_NO_PAD.encode([&[kind], key.as_bytes()].concat()))
}

fn flag() -> impl Strategy<Value = String> {
    any::<bool>().prop_map(|flag| flag.to_string())
}

fn limit() -> impl Strategy<Value = String> {
    (1..4_u8).prop_map(|limit| limit.to_string())
}

fn list() -> impl Strategy<Value = String> {
    let bounds = (parameter("prefix", text()), parameter("start", text()), parameter("end", text()));
    let form =
        (parameter("values", flag()), parameter("delimiter", Just("/".to_owned())), parameter("reverse", flag()));
    let rest = (parameter("limit", limit()), parameter("cursor", cursor()));
    let page = (bounds, form, rest).prop_map(|((a, b, c), (d, e, f), (g, h))| [a, b, c, d, e, f, g, h].concat());
    let bounds = (parameter("prefix", text()), parameter("start", text()), parameter("end", text()));
    prop_oneof![3 => page, 1 => bounds.prop_map(|(a, b, c)| format!("{a}{b}{c}count=true"))]
}

fn operation() -> impl Strategy<Value = Value> {
    (key(), 0..6).prop_map(|(key, kind)| match kind {
        0 => json!({"op": "check", "key": key, "etag": "*"}),
        1 => json!({"op": "check", "key": key, "value": "3"}),
        2 => json!({"op": "put", "key": key, "value": "new"}),
        3 => json!({"op": "delete", "key": key}),
        4 => json!({"op": "add", "key": key, "delta": 1}),
        _ => json!({"op": "get", "key": key}),
    })
}

/// Method, target and body.
fn request() -> impl Strategy<Value = (&'static str, String, String)> {
    let methods = prop::sample::select(vec!["GET", "HEAD", "PUT", "DELETE", "POST", "BREW"]);
    let query = prop::sample::select(vec!["", "?wait=1s", "?ttl=5", "?op=add&delta=1", "?op=touch&ttl=5"]);
    let of_key = (methods, key(), query)
        .prop_map(|(method, key, query)| (method, format!("/v1/{}{query}", encoded(key)), String::new()));
    let keys = prop::collection::vec(key(), 0..4);
    let many = keys.prop_map(|keys| {
        let keys: String = keys.into_iter().map(|key| format!("&key={}", encoded(key))).collect();
        ("GET", format!("/v1?{keys}"), String::new())
    });
    let keys = prop::collection::vec(key(), 0..4);
    let in_body = keys.prop_map(|keys| ("QUERY", "/v1".to_owned(), json!(keys).to_string()));
    let operations = prop::collection::vec(operation(), 0..4);
    let transaction = operations.prop_map(|operations| ("POST", "/v1".to_owned(), json!(operations).to_string()));
    let selected = (prop::collection::vec(text(), 0..3), prop::collection::vec(key(), 0..2));
    let watch = selected.prop_map(|(prefixes, keys)| {
        let prefixes: String = prefixes.into_iter().map(|prefix| format!("&prefix={prefix}")).collect();
        let keys: String = keys.into_iter().map(|key| format!("&key={}", encoded(key))).collect();
        ("GET", format!("/v1?watch{prefixes}{keys}"), String::new())
    });
    let delete = (parameter("limit", limit()), parameter("cursor", cursor()), text());
    let delete = delete
        .prop_map(|(limit, cursor, prefix)| ("DELETE", format!("/v1?{limit}{cursor}prefix={prefix}"), String::new()));
    prop_oneof![
        4 => of_key,
        4 => list().prop_map(|query| ("GET", format!("/v1?{query}"), String::new())),
        2 => many,
        2 => in_body,
        3 => transaction,
        2 => watch,
        2 => delete,
        1 => Just(("GET", "/openapi.json".to_owned(), String::new())),
    ]
}

fn header() -> impl Strategy<Value = Header> {
    let names = prop::sample::select(vec!["if-match", "if-none-match", "range", "last-event-id"]);
    let values = prop::sample::select(vec!["*", "\"3\"", "\"4\"", "bytes=0-0", "7"]);
    (names, values).prop_map(|(name, value)| Header { name: name.to_owned(), value: value.into() })
}

fn key_of(event: &Event) -> &str {
    match event {
        Event::Put(put) => &put.key,
        Event::Delete(key) => key,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_096))]

    #[test]
    fn nothing_outside_of_prefix_is_shown_or_changed(
        (chosen, shards) in (any::<u32>(), 1..3_usize),
        prefix in prop::sample::select(&PREFIXES[..]),
        (method, target, body) in request(),
        headers in prop::collection::vec(header(), 0..2),
    ) {
        let request = |key_prefix: Option<&str>| Request {
            method: method.to_owned(),
            target: target.clone(),
            headers: headers.clone(),
            body: body.clone().into_bytes(),
            principal: None,
            grant: Grant { scope: Scope::Write, key_prefix: key_prefix.map(str::to_owned) },
            time_ms: NOW,
        };
        let all = events(chosen);
        let within: Vec<_> = all.iter().filter(|(_, event)| key_of(event).starts_with(prefix)).cloned().collect();
        let (response, host) = respond(shards, &all, &request(Some(prefix)));
        let selected = host.selectors.iter().map(|selector| match selector {
            Selector::Key(key) => key,
            Selector::Prefix(prefix) => prefix,
        });
        let mut touched = host.appended.iter().map(key_of).chain(selected.chain(&host.keys).map(String::as_str));
        prop_assert!(touched.all(|key| key.starts_with(prefix)), "{:?}", host);
        prop_assert_eq!(&(response.clone(), host), &respond(shards, &within, &request(Some(prefix))));
        // What is not rejected is what it would be without a grant, where there are no other keys.
        if response.status != 403 {
            let (open, host) = respond(shards, &within, &request(None));
            prop_assert_eq!(&response, &open);
            prop_assert!(host.selectors.is_empty() || response.status == 200);
        }
    }
}

#[test]
fn request_is_rejected_only_where_it_names_other_keys() {
    let status = |method: &str, target: &str, body: &str| {
        let (method, target, body) = (method.to_owned(), target.to_owned(), body.into());
        let grant = Grant { scope: Scope::Write, key_prefix: Some("a/".to_owned()) };
        let request = Request { method, target, headers: vec![], body, principal: None, grant, time_ms: NOW };
        respond(1, &events(u32::MAX), &request).0.status
    };
    for (method, inside, outside) in [
        ("GET", "/v1/key/a/1", "/v1/a"),
        ("PUT", "/v1/key/a/9", "/v1/b"),
        ("GET", "/v1", "/v1?prefix=b"),
        ("GET", "/v1?prefix=a", "/v1?prefix=a0"),
        ("GET", "/v1?count=true", "/v1?count=true&prefix=b"),
        ("GET", "/v1?key=a/1", "/v1?key=a/1&key=b"),
        ("GET", "/v1?watch", "/v1?watch&prefix=b"),
        ("GET", "/v1?watch&key=a/1", "/v1?watch&key=a/1&key=b"),
        ("DELETE", "/v1?prefix=", "/v1?prefix=b"),
    ] {
        assert!(matches!(status(method, inside, ""), 200 | 201), "{method} {inside}");
        assert_eq!(status(method, outside, ""), 403, "{method} {outside}");
    }
    for (method, inside, outside) in [
        ("QUERY", r#"["a/1"]"#, r#"["a/1", "b"]"#),
        ("POST", r#"[{"op":"get","key":"a/1"}]"#, r#"[{"op":"put","key":"a/1","value":""},{"op":"get","key":"b"}]"#),
    ] {
        assert_eq!((status(method, "/v1", inside), status(method, "/v1", outside)), (200, 403), "{method}");
    }
}
