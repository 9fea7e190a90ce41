//! `POST /v1`: several operations, all or nothing.
//!
//! Owns: in which order operations happen, and what each gives. They happen one after the
//! other: each sees what those before it did. Nothing is appended when one of them cannot be done.
//! Must never know: how items are kept, or how many instances there are.

use std::collections::HashMap;

use serde::Serialize;

use crate::answer::{json, line, not_stored};
use crate::conditions::tag_of;
use crate::content_type;
use crate::item::Item;
use crate::kvs::store::http::{Request, Response};
use crate::kvs::store::transaction_log::{AppendError, Event, Put};
use crate::operation::{Expected, Op, Operation, Refused, operations};
use crate::query;
use crate::store::Store;
use crate::text;
use crate::unkept;

/// Bytes of all values that are got, at most.
const MAX_GOT_BYTES: usize = 1 << 20;

/// What an operation gives: the key as it is after it.
#[derive(Serialize)]
struct Given<'o> {
    op: Op,
    key: &'o str,
    /// Null when there is no such key.
    etag: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    /// The event whose sequence is to be the tag.
    #[serde(skip)]
    event: Option<usize>,
}

pub fn post(
    store: &mut Store,
    query: &str,
    request: Request,
    append: impl FnOnce(&[Event]) -> Result<u64, AppendError>,
) -> Response {
    if let Err(bad) = query::nothing(query) {
        return line(400, &bad.to_string());
    }
    if let Some(refusal) = unkept::refusal(&request.headers) {
        return refusal;
    }
    let operations = match operations(&request.body, request.time_ms) {
        Ok(operations) => operations,
        Err((status, reason)) => return line(status, &reason),
    };
    let (mut given, events) = match play(store, &operations, request.time_ms) {
        Ok(played) => played,
        // What it saw may not be durable yet.
        Err((status, reason)) => return Response { read_sequence: None, ..line(status, &reason) },
    };
    if !events.is_empty() {
        let first = match append(&events) {
            Ok(first) => first,
            Err(error) => return not_stored(error),
        };
        for (sequence, event) in (first..).zip(&events) {
            store.apply(sequence, event);
        }
        for given in &mut given {
            given.etag = given.event.map(|event| tag_of(first + event as u64)).or(given.etag.take());
        }
    }
    json(&given)
}

/// The keys of a transaction; none when it is malformed.
pub fn keys(body: &[u8]) -> Vec<String> {
    operations(body, 0).unwrap_or_default().into_iter().map(|(key, _)| key).collect()
}

/// The answer to a transaction whose keys lie in different instances.
pub fn scattered() -> Response {
    line(
        422,
        "the keys lie in different shards; those that share a {tag}, like {cart7}:items and {cart7}:total, share a shard",
    )
}

/// Does the operations one after the other, without changing the store. Gives what they give, and the events that make it
/// so.
fn play<'o>(
    store: &Store,
    operations: &'o [(String, Operation)],
    now: u64,
) -> Result<(Vec<Given<'o>>, Vec<Event>), Refused> {
    let (mut given, mut events) = (Vec::with_capacity(operations.len()), Vec::new());
    // The newest event of each key that has one.
    let mut changed: HashMap<&str, usize> = HashMap::new();
    let mut got = 0;
    for (at, (key, operation)) in operations.iter().enumerate() {
        let event = changed.get(key.as_str()).copied();
        let there = match event.map(|event| (event, &events[event])) {
            Some((event, Event::Put(put))) => There::Put(event, put),
            Some((_, Event::Delete(_))) => There::Nothing,
            None => store.get(key, now).map_or(There::Nothing, There::Item),
        };
        match operation {
            Operation::Check(expected) => {
                if !there.is(expected) {
                    return Err((409, format!("operation {at}: the check of `{key}` failed: {}", there.found())));
                }
                given.push(Given::of(Op::Check, key, &there));
            }
            Operation::Get => {
                let mut result = Given::of(Op::Get, key, &there);
                if let Some((value, content_type)) = there.content() {
                    got += value.len();
                    if got > MAX_GOT_BYTES {
                        return Err((
                            413,
                            format!("operation {at}: the values to get are together more than {MAX_GOT_BYTES} bytes"),
                        ));
                    }
                    (result.value, result.value_base64) = text::fields(value);
                    result.content_type = content_type.map(str::to_owned);
                }
                given.push(result);
            }
            Operation::Put(put) => {
                changed.insert(key, events.len());
                given.push(Given::of(Op::Put, key, &There::Put(events.len(), put)));
                events.push(Event::Put(put.clone()));
            }
            Operation::Delete => {
                given.push(Given::of(Op::Delete, key, &There::Nothing));
                if !matches!(there, There::Nothing) {
                    changed.insert(key, events.len());
                    events.push(Event::Delete(key.clone()));
                }
            }
        }
    }
    Ok((given, events))
}

/// What is at a key when its turn has come.
enum There<'s> {
    Nothing,
    Item(&'s Item),
    /// Put by an operation before, with the event of this number.
    Put(usize, &'s Put),
}

impl There<'_> {
    fn is(&self, expected: &Expected) -> bool {
        match (expected, self) {
            (Expected::Nothing, there) => matches!(there, Self::Nothing),
            (Expected::Something, there) => !matches!(there, Self::Nothing),
            (Expected::Tag(tag), Self::Item(item)) => *tag == tag_of(item.sequence()),
            // What this transaction puts has a tag that nobody can know yet.
            (Expected::Tag(_), _) => false,
        }
    }

    /// What a failed check tells.
    fn found(&self) -> String {
        match self {
            Self::Nothing => "there is no such key".to_owned(),
            Self::Item(item) => format!("the key has the etag {}", tag_of(item.sequence())),
            Self::Put(..) => "the key was put by an operation before".to_owned(),
        }
    }

    fn content(&self) -> Option<(&[u8], Option<&str>)> {
        match self {
            Self::Nothing => None,
            Self::Item(item) => Some((item.value(), content_type::of(item.metadata()))),
            Self::Put(_, put) => {
                let metadata = put.metadata.iter().map(|(name, value)| (name.as_str(), value.as_str()));
                Some((&put.value, content_type::of(metadata)))
            }
        }
    }
}

impl<'o> Given<'o> {
    fn of(op: Op, key: &'o str, there: &There<'_>) -> Self {
        let (etag, expires, event) = match there {
            There::Nothing => (None, None, None),
            There::Item(item) => (Some(tag_of(item.sequence())), item.expires(), None),
            There::Put(event, put) => (None, put.expires_at_ms, Some(*event)),
        };
        Self { op, key, etag, expires, content_type: None, value: None, value_base64: None, event }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::EVERYTHING;

    const NOW: u64 = 1_000;

    /// `a` and `b`, put at sequences 1 and 2; `old`, expired; `bytes`, which is not text.
    fn store() -> Store {
        let mut store = Store::default();
        let puts =
            [("a", &b"1"[..], None), ("b", b"2", Some(9_000)), ("old", b"3", Some(NOW)), ("bytes", b"\xff", None)];
        for (sequence, (key, value, expires)) in (1..).zip(puts) {
            let metadata = vec![("content-type".to_owned(), "text/plain".to_owned())];
            store.apply(
                sequence,
                &Event::Put(Put { key: key.to_owned(), value: value.into(), metadata, expires_at_ms: expires }),
            );
        }
        store
    }

    fn request(body: &str) -> Request {
        let (method, target) = ("POST".to_owned(), String::new());
        Request { method, target, headers: vec![], body: body.into(), principal: None, grant: EVERYTHING, time_ms: NOW }
    }

    fn text(response: &Response) -> &str {
        str::from_utf8(&response.body).expect("text")
    }

    /// Posts what must change nothing.
    fn refused(body: &str) -> (u16, String) {
        let mut store = store();
        let response = post(&mut store, "", request(body), |_| panic!("appended"));
        assert_eq!(store, self::store());
        (response.status, text(&response).to_owned())
    }

    #[test]
    fn operations_happen_in_order_and_each_sees_those_before_it() {
        let mut store = store();
        let body = r#"[
            {"op": "check", "key": "a", "etag": "\"1\""}, {"op": "check", "key": "b", "etag": "*"},
            {"op": "check", "key": "new", "etag": null}, {"op": "check", "key": "old", "etag": null},
            {"op": "get", "key": "a"}, {"op": "put", "key": "a", "value": "new", "ttl": 5, "content_type": "a/b"},
            {"op": "get", "key": "a"}, {"op": "delete", "key": "b"}, {"op": "get", "key": "b"},
            {"op": "check", "key": "b", "etag": null}, {"op": "delete", "key": "b"}, {"op": "delete", "key": "old"},
            {"op": "put", "key": "b", "value_base64": "/w=="}, {"op": "check", "key": "b", "etag": "*"},
            {"op": "get", "key": "bytes"}, {"op": "put", "key": "a", "value": ""}
        ]"#;
        let put = |key: &str, value: &[u8], content_type: &[&str], expires| {
            let metadata = content_type.iter().map(|value| ("content-type".to_owned(), value.to_string())).collect();
            Event::Put(Put { key: key.to_owned(), value: value.into(), metadata, expires_at_ms: expires })
        };
        let expected = [
            put("a", b"new", &["a/b"], Some(NOW + 5_000)),
            Event::Delete("b".to_owned()),
            put("b", b"\xff", &[], None),
            put("a", b"", &[], None),
        ];
        let response = post(&mut store, "", request(body), |events| {
            assert_eq!(events, expected);
            Ok(10)
        });
        let given = r#"[
            {"op":"check","key":"a","etag":"\"1\""}, {"op":"check","key":"b","etag":"\"2\"","expires":9000},
            {"op":"check","key":"new","etag":null}, {"op":"check","key":"old","etag":null},
            {"op":"get","key":"a","etag":"\"1\"","content_type":"text/plain","value":"1"},
            {"op":"put","key":"a","etag":"\"10\"","expires":6000},
            {"op":"get","key":"a","etag":"\"10\"","expires":6000,"content_type":"a/b","value":"new"},
            {"op":"delete","key":"b","etag":null}, {"op":"get","key":"b","etag":null},
            {"op":"check","key":"b","etag":null}, {"op":"delete","key":"b","etag":null},
            {"op":"delete","key":"old","etag":null}, {"op":"put","key":"b","etag":"\"12\""},
            {"op":"check","key":"b","etag":"\"12\""},
            {"op":"get","key":"bytes","etag":"\"4\"","content_type":"text/plain","value_base64":"/w=="},
            {"op":"put","key":"a","etag":"\"13\""}
        ]"#;
        assert_eq!((response.status, response.read_sequence), (200, None), "{}", text(&response));
        let read = |text| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
        assert_eq!(read(text(&response)), read(given));
        let mut replayed = self::store();
        (10..).zip(&expected).for_each(|(sequence, event)| replayed.apply(sequence, event));
        assert_eq!(store, replayed);
    }

    #[test]
    fn the_first_check_that_fails_undoes_all() {
        for (check, told) in [
            (r#""key": "a", "etag": "\"2\"""#, "operation 1: the check of `a` failed: the key has the etag \"1\"\n"),
            (r#""key": "a", "etag": null"#, "operation 1: the check of `a` failed: the key has the etag \"1\"\n"),
            (r#""key": "old", "etag": "*""#, "operation 1: the check of `old` failed: there is no such key\n"),
            (
                r#""key": "new", "etag": "\"9\"""#,
                "operation 1: the check of `new` failed: the key was put by an operation before\n",
            ),
        ] {
            let body = format!(
                r#"[{{"op": "put", "key": "new", "value": ""}}, {{"op": "check", {check}}}, {{"op": "check", "key": "a", "etag": "\"7\""}}]"#
            );
            assert_eq!(refused(&body), (409, told.to_owned()));
            let response = post(&mut store(), "", request(&body), |_| panic!("appended"));
            assert_eq!(response.read_sequence, None, "on all that there is");
        }
    }

    #[test]
    fn what_is_malformed_is_refused_with_its_place() {
        let deep = "[".repeat(100_000);
        let deep_value = format!(r#"[{{"op": {deep}"#);
        let (many, long) = (format!("[{}]", vec![r#"{"op":"get","key":"a"}"#; 1_001].join(",")), "k".repeat(1_025));
        let long = format!(r#"[{{"op": "get", "key": "{long}"}}]"#);
        let get = |more: &str| format!(r#"[{{"op":"get","key":"a"}},{{"op":"get","key":"a"{more}}}]"#);
        let put = |more: &str| format!(r#"[{{"op":"put","key":"a"{more}}}]"#);
        let check = |more: &str| format!(r#"[{{"op":"check","key":"a"{more}}}]"#);
        for (body, told) in [
            ("", "EOF while parsing a value at line 1 column 0"),
            ("{}", "invalid type: map, expected a list of operations at line 1 column 0"),
            ("[1]", "operation 0: invalid type: integer `1`, expected an operation at line 1 column 2"),
            ("[] x", "trailing characters at line 1 column 4"),
            ("[", "operation 0: EOF while parsing a list at line 1 column 1"),
            (&deep, "operation 0: invalid type: sequence, expected"),
            (&deep_value, "operation 0: "),
            (r#"[["get", "a", null, null, null, null]]"#, "operation 0: invalid type: sequence, expected an operation"),
            (&many, "at most 1000 operations are allowed"),
            (r#"[{"op":"get"}]"#, "operation 0: missing field `key`"),
            (r#"[{"key":"a"}]"#, "operation 0: missing field `op`"),
            (
                r#"[{"op":"GET","key":"a"}]"#,
                "operation 0: unknown variant `GET`, expected one of `check`, `put`, `delete`, `get` at line 1 column 12",
            ),
            (r#"[{"op":"get","key":""}]"#, "operation 0: key is empty"),
            (r#"[{"op":"get","key":"a\u0000"}]"#, "operation 0: key holds the control character U+0000"),
            (r#"[{"op":"get","key":"\ud800"}]"#, "operation 0: "),
            (&long, "operation 0: key is 1025 bytes long, at most 1024 are allowed"),
            (&get(r#","key":"b""#), "operation 1: duplicate field `key` at line 1 column 51"),
            (&get(r#","wert":"b""#), "operation 1: unknown field `wert`, expected one of"),
            (&get(r#","we\nrt":"b""#), "operation 1: unknown field `wert`, expected one of"),
            (&get(r#","value":"b""#), "operation 1: `value` does not belong to it"),
            (&get(r#","value_base64":"b""#), "operation 1: `value_base64` does not belong to it"),
            (&get(r#","content_type":"b""#), "operation 1: `content_type` does not belong to it"),
            (&get(r#","ttl":1"#), "operation 1: `ttl` does not belong to it"),
            (&get(r#","etag":null"#), "operation 1: `etag` does not belong to it"),
            (&put(r#","value":"","etag":"*""#), "operation 0: `etag` does not belong to it"),
            (&put(""), "operation 0: `value` or `value_base64` is missing"),
            (&put(r#","value":1"#), "operation 0: invalid type: integer `1`, expected a string at line 1 column 32"),
            (&put(r#","value":"","value_base64":"""#), "operation 0: `value` and `value_base64` are both there"),
            (&put(r#","value_base64":"?""#), "operation 0: `value_base64` is not base64"),
            (&put(r#","value":null"#), "operation 0: invalid type: null, expected a string"),
            (&put(r#","value":"","ttl":null"#), "operation 0: invalid type: null, expected u64"),
            (&put(r#","value":"","ttl":0"#), "operation 0: `ttl` must be a whole number from 1 to 3153600000"),
            (&put(r#","value":"","ttl":-1"#), "operation 0: invalid value: integer `-1`, expected u64"),
            (&put(r#","value":"","ttl":1.5"#), "operation 0: invalid type: floating point `1.5`, expected u64"),
            (&put(r#","value":"","content_type":"a\n""#), "operation 0: content-type holds a character that is not"),
            (&check(""), "operation 0: `etag` is missing"),
            (&check(r#","etag":5"#), "operation 0: invalid type: integer `5`, expected a string"),
            (&check(r#","etag":"5""#), r#"operation 0: `etag` must be null, "*", or an entity tag like "\"5\"""#),
        ] {
            let (status, line) = refused(body);
            assert_eq!(status, 400, "{line}");
            assert!(line.starts_with(told), "{line} instead of {told}");
            assert_eq!(line.find('\n'), Some(line.len() - 1), "{line} is not one line");
        }
        let unknown = format!(r#"[{{"{}": 1}}]"#, "x".repeat(1 << 16));
        assert!(refused(&unknown).1.len() < 1_000);
    }

    #[test]
    fn what_is_too_large_is_refused() {
        let mut store = store();
        let get = r#"[{"op":"get","key":"a"}]"#;
        let sized = |bytes: usize| get.to_owned() + &" ".repeat(bytes - get.len());
        assert_eq!(refused(&sized((1 << 20) + 1)).0, 413);
        assert_eq!(post(&mut store, "", request(&sized(1 << 20)), |_| panic!("appended")).status, 200);
        let put =
            Put { key: "large".to_owned(), value: vec![b'x'; (1 << 20) - 1], metadata: vec![], expires_at_ms: None };
        store.apply(9, &Event::Put(put));
        for (body, status) in [
            (r#"[{"op":"get","key":"large"},{"op":"get","key":"a"}]"#, 200),
            (r#"[{"op":"get","key":"large"},{"op":"get","key":"a"},{"op":"get","key":"a"}]"#, 413),
        ] {
            let response = post(&mut store, "", request(body), |_| panic!("appended"));
            assert_eq!(response.status, status, "{}", text(&response));
        }
    }

    #[test]
    fn what_was_not_appended_did_not_happen() {
        for (error, status) in [
            (AppendError::InsufficientStorage, 507),
            (AppendError::Unavailable, 503),
            (AppendError::ReadOnly, 403),
            (AppendError::TooLarge(1), 413),
        ] {
            let mut store = store();
            let response = post(&mut store, "", request(r#"[{"op":"put","key":"a","value":""}]"#), |_| Err(error));
            assert_eq!((response.status, &store), (status, &self::store()));
        }
    }

    #[test]
    fn nothing_is_a_transaction_too() {
        assert_eq!(refused("[]"), (200, "[]".to_owned()));
        assert_eq!(
            refused(r#"[{"op":"delete","key":"old"}]"#),
            (200, r#"[{"op":"delete","key":"old","etag":null}]"#.to_owned())
        );
    }

    #[test]
    fn it_is_placed_by_its_keys() {
        let body = br#"[{"op":"get","key":"{cart7}:items"},{"op":"delete","key":"x"}]"#;
        assert_eq!(keys(body), ["{cart7}:items", "x"]);
        assert_eq!(keys(b"nonsense"), [""; 0]);
        assert_eq!(scattered().status, 422);
    }
}
