//! The store and its REST interface against a model: a map that knows nothing of logs, batches or indexes.

use std::collections::BTreeMap;

use kvs_guest::{Kvs, Store, rest};
use kvs_kit::bindings::kvs::store::http::{Grant, Scope};
use kvs_kit::guest::{apply, stats, tick};
use kvs_kit::testing::batch;
use kvs_kit::text::json_bytes;
use kvs_kit::{AppendError, Event, Header, Put, Request, Response};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proptest::prelude::*;
use serde_json::{Value, json};

/// What can happen to a guest.
#[derive(Clone, Debug)]
enum Step {
    Put {
        key: String,
        value: Vec<u8>,
        content_type: Option<String>,
        /// In seconds.
        ttl: Option<u64>,
        condition: Option<Condition>,
    },
    Delete {
        key: String,
        condition: Option<Condition>,
    },
    Get {
        key: String,
        condition: Option<Condition>,
    },
    /// Several at once, of which each sees those before it.
    Transaction {
        operations: Vec<Operation>,
    },
    List,
    /// A put whose append fails, and a delete.
    Refused {
        key: String,
    },
    /// Another guest's entry, with what this one does not write itself.
    Foreign {
        put: Put,
    },
    /// A delete by another guest, which may not have looked whether anything was there.
    ForeignDelete {
        key: String,
    },
    /// Entries of other shards, or lost ones.
    Gap,
    Wait {
        milliseconds: u64,
    },
    Tick,
}

#[derive(Clone, Debug)]
enum Operation {
    /// Whether there is something.
    Check(String, bool),
    /// Whether it has the tag it had before, or another.
    CheckTag(String, bool),
    Put(String, String, Option<u64>),
    Delete(String),
    Get(String),
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        1 => (key(), any::<bool>()).prop_map(|(key, there)| Operation::Check(key, there)),
        1 => (key(), prop::bool::weighted(0.8)).prop_map(|(key, same)| Operation::CheckTag(key, same)),
        4 => (key(), ".{0,9}", prop::option::of(1..3_u64)).prop_map(|(key, value, ttl)| Operation::Put(key, value, ttl)),
        2 => key().prop_map(Operation::Delete),
        2 => key().prop_map(Operation::Get),
    ]
}

/// What a request depends on.
#[derive(Clone, Debug)]
struct Condition {
    /// `If-Match`, or else `If-None-Match`.
    positive: bool,
    /// `*`, or else the tag of what is there, less this.
    older: Option<u64>,
    weak: bool,
}

impl Condition {
    fn header(&self, there: Option<u64>) -> Header {
        let name = if self.positive { "if-match" } else { "if-none-match" };
        let value = match self.older {
            None => "*".to_owned(),
            Some(older) => {
                let tag = there.unwrap_or(7).wrapping_sub(older);
                format!("\"x\", {}\"{tag}\"", if self.weak { "W/" } else { "" })
            }
        };
        Header { name: name.to_owned(), value: value.into() }
    }

    fn holds(&self, there: Option<u64>) -> bool {
        let matches = there.is_some() && self.older.is_none_or(|older| older == 0 && !(self.positive && self.weak));
        matches == self.positive
    }
}

fn condition() -> impl Strategy<Value = Option<Condition>> {
    let condition = (any::<bool>(), prop::option::of(0..2_u64), prop::bool::weighted(0.2));
    prop::option::of(condition.prop_map(|(positive, older, weak)| Condition { positive, older, weak }))
}

/// Few keys, so that steps meet; with what keys may hold in all of them.
fn key() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => prop::sample::select(vec!["a", "key", "a/b", "//", "%2F", "ä 🦀", "..."]).prop_map(str::to_owned),
        1 => r"[^.\pC]{1,64}",
    ]
}

fn foreign_put() -> impl Strategy<Value = Put> {
    let metadata = prop::collection::vec((prop_oneof![Just("content-type".to_owned()), ".*"], ".*"), 0..3);
    let expires = prop::option::of(0..5_000_u64);
    let put = |(key, value, metadata, expires)| Put { key, value, metadata, expires_at_ms: expires };
    (prop_oneof![6 => key(), 1 => ".*", 1 => "\u{1}[ab/]{0,2}"], any::<Vec<u8>>(), metadata, expires).prop_map(put)
}

fn step() -> impl Strategy<Value = Step> {
    let content_type =
        prop::option::of(r#"[a-z]{1,9}/[a-z0-9.+-]{1,9}(; ?[a-z]{1,9}=([a-z0-9!]{1,9}|"[ a-z,;=/]{0,9}"))?"#);
    prop_oneof![
        4 => (key(), any::<Vec<u8>>(), content_type, prop::option::of(1..3_u64), condition())
            .prop_map(|(key, value, content_type, ttl, condition)| Step::Put { key, value, content_type, ttl, condition }),
        3 => (key(), condition()).prop_map(|(key, condition)| Step::Delete { key, condition }),
        4 => (key(), condition()).prop_map(|(key, condition)| Step::Get { key, condition }),
        2 => prop::collection::vec(operation(), 0..6).prop_map(|operations| Step::Transaction { operations }),
        1 => Just(Step::List),
        1 => key().prop_map(|key| Step::Refused { key }),
        3 => foreign_put().prop_map(|put| Step::Foreign { put }),
        1 => key().prop_map(|key| Step::ForeignDelete { key }),
        1 => Just(Step::Gap),
        3 => (0..1_500_u64).prop_map(|milliseconds| Step::Wait { milliseconds }),
        2 => Just(Step::Tick),
    ]
}

/// A guest, the log it appends to, and the model of what its clients should see.
#[derive(Default)]
struct Run {
    store: Store,
    log: Vec<(u64, Event)>,
    sequence: u64,
    now: u64,
    /// What every key was last put with, and when.
    model: BTreeMap<String, (u64, Put)>,
}

impl Run {
    fn ask(&mut self, request: Request) -> Response {
        rest::handle(&mut self.store, request, |events| Ok(append(&mut self.log, &mut self.sequence, events)))
    }

    /// What another guest appended reaches this one by `apply`.
    fn apply(&mut self, event: Event) {
        let sequence = append(&mut self.log, &mut self.sequence, std::slice::from_ref(&event));
        self.store.replace(sequence, &event);
    }

    /// What the model has at a key that has not expired.
    fn expected(&self, key: &str) -> Option<&(u64, Put)> {
        self.model.get(key).filter(|(_, put)| put.expires_at_ms.is_none_or(|expires| expires > self.now))
    }

    fn take(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Put { key, value, content_type, ttl, condition } => {
                let there = self.expected(&key).map(|(sequence, _)| *sequence);
                let mut request = Request { body: value.clone(), ..request("PUT", &key, self.now) };
                request.target.extend(ttl.map(|ttl| format!("?ttl={ttl}")));
                request.headers.extend(condition.as_ref().map(|condition| condition.header(there)));
                let sent = content_type.as_ref();
                request
                    .headers
                    .extend(sent.map(|value| Header { name: "content-type".to_owned(), value: value.clone().into() }));
                let response = self.ask(request);
                if condition.is_some_and(|condition| !condition.holds(there)) {
                    prop_assert_eq!(response.status, 412);
                    return self.get(&key, None);
                }
                prop_assert_eq!((response.status, response.read_sequence), (201, Some(self.sequence)));
                let metadata = content_type.map(|value| ("content-type".to_owned(), value)).into_iter().collect();
                let expires = ttl.map(|ttl| self.now + 1_000 * ttl);
                let put = Put { key: key.clone(), value, metadata, expires_at_ms: expires };
                prop_assert_eq!(self.log.last(), Some(&(self.sequence, Event::Put(put.clone()))));
                self.model.insert(key, (self.sequence, put));
            }
            Step::Delete { key, condition } => {
                let (there, entries) = (self.expected(&key).map(|(sequence, _)| *sequence), self.log.len());
                let mut request = request("DELETE", &key, self.now);
                request.headers.extend(condition.as_ref().map(|condition| condition.header(there)));
                let holds = condition.is_none_or(|condition| condition.holds(there));
                prop_assert_eq!(self.ask(request).status, if holds { 200 } else { 412 });
                prop_assert_eq!(self.log.len(), entries + usize::from(holds && there.is_some()));
                if holds && there.is_some() {
                    self.model.remove(&key);
                }
            }
            Step::Get { key, condition } => self.get(&key, condition)?,
            Step::Transaction { operations } => self.transact(operations)?,
            Step::List => {
                let response =
                    self.ask(Request { target: "/v1?values=true".to_owned(), ..request("GET", "", self.now) });
                let page: Value = serde_json::from_slice(&response.body).expect("JSON");
                let listed = page["keys"].as_array().expect("a list").iter().map(|entry| {
                    let size = entry["size"].as_u64().expect("a number");
                    (entry["key"].as_str().expect("text").to_owned(), entry["etag"].clone(), size)
                });
                // Keys of guests are kept and not listed.
                let there = self.model.iter().filter(|(key, _)| !key.starts_with('\u{1}'));
                let there = there.filter(|(key, _)| self.expected(key).is_some());
                let expected =
                    there.map(|(key, (sequence, put))| (key.clone(), json!(tag(*sequence)), put.value.len() as u64));
                prop_assert_eq!(listed.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
            }
            Step::Refused { key } => {
                for method in ["PUT", "DELETE"] {
                    let request = request(method, &key, self.now);
                    rest::handle(&mut self.store, request, |_| Err(AppendError::Unavailable));
                }
                self.get(&key, None)?;
            }
            Step::Foreign { put } => {
                self.apply(Event::Put(put.clone()));
                self.model.insert(put.key.clone(), (self.sequence, put));
            }
            Step::ForeignDelete { key } => {
                self.apply(Event::Delete(key.clone()));
                self.model.remove(&key);
            }
            Step::Gap => self.sequence += 3,
            Step::Wait { milliseconds } => self.now += milliseconds,
            Step::Tick => {
                tick::<Kvs>(&mut self.store, self.now, &mut |events: &[Event]| {
                    Ok(append(&mut self.log, &mut self.sequence, events))
                });
                let now = self.now;
                self.model.retain(|_, (_, put)| put.expires_at_ms.is_none_or(|expires| expires > now));
            }
        }
        let (keys, bytes) =
            (self.model.len() as u64, self.model.iter().map(|(key, (_, put))| key.len() + put.value.len()));
        prop_assert_eq!((self.store.keys(), self.store.bytes()), (keys, bytes.sum::<usize>() as u64));
        Ok(())
    }

    /// Plays the operations on the model, one after the other, with the sequences they will get.
    fn transact(&mut self, operations: Vec<Operation>) -> Result<(), TestCaseError> {
        let (mut model, mut expected, mut fails) = (self.model.clone(), Vec::new(), None);
        let (mut sent, mut next) = (Vec::new(), self.sequence + 1);
        let first = next;
        for (at, operation) in operations.into_iter().enumerate() {
            let there = |model: &BTreeMap<String, (u64, Put)>, key: &str| {
                let found =
                    model.get(key).filter(|(_, put)| put.expires_at_ms.is_none_or(|expires| expires > self.now));
                found.map(|(sequence, put)| (*sequence, put.value.clone()))
            };
            let (op, key) = match operation {
                Operation::Check(key, wanted) => {
                    sent.push(json!({"op": "check", "key": key, "etag": wanted.then_some("*")}));
                    if there(&model, &key).is_some() != wanted {
                        fails.get_or_insert(at);
                    }
                    ("check", key)
                }
                Operation::CheckTag(key, same) => {
                    let sequence = there(&self.model, &key).map_or(0, |(sequence, _)| sequence);
                    let wanted = if same { sequence } else { sequence + 1 };
                    sent.push(json!({"op": "check", "key": key, "etag": tag(wanted)}));
                    // A tag that the transaction itself gives cannot be known when it is sent.
                    if there(&model, &key).is_none_or(|(sequence, _)| sequence != wanted || sequence >= first) {
                        fails.get_or_insert(at);
                    }
                    ("check", key)
                }
                Operation::Put(key, value, ttl) => {
                    let mut put = json!({"op": "put", "key": key, "value": value});
                    ttl.into_iter().for_each(|ttl| put["ttl"] = json!(ttl));
                    sent.push(put);
                    let expires = ttl.map(|ttl| self.now + 1_000 * ttl);
                    let put =
                        Put { key: key.clone(), value: value.into_bytes(), metadata: vec![], expires_at_ms: expires };
                    model.insert(key.clone(), (next, put));
                    next += 1;
                    ("put", key)
                }
                Operation::Delete(key) => {
                    sent.push(json!({"op": "delete", "key": key}));
                    if there(&model, &key).is_some() {
                        model.remove(&key);
                        next += 1;
                    }
                    ("delete", key)
                }
                Operation::Get(key) => {
                    sent.push(json!({"op": "get", "key": key}));
                    ("get", key)
                }
            };
            let tag = there(&model, &key).map(|(sequence, _)| tag(sequence));
            let value = there(&model, &key).filter(|_| op == "get").map(|(_, value)| value);
            expected.push((op, key, tag, value));
        }
        let body = Value::Array(sent).to_string().into_bytes();
        let response = self.ask(Request { target: "/v1".to_owned(), body, ..request("POST", "", self.now) });
        let text = String::from_utf8_lossy(&response.body).into_owned();
        if let Some(at) = fails {
            prop_assert_eq!(response.status, 409);
            prop_assert!(text.starts_with(&format!("operation {at}: ")), "{}", text);
            prop_assert_eq!(self.sequence + 1, first);
            return Ok(());
        }
        prop_assert_eq!((response.status, self.sequence + 1), (200, next), "{}", text);
        self.model = model;
        let given: Vec<Value> = serde_json::from_str(&text).expect("JSON");
        prop_assert_eq!(given.len(), expected.len());
        for (given, (op, key, tag, value)) in given.iter().zip(expected) {
            prop_assert_eq!((&given["op"], &given["key"], &given["etag"]), (&json!(op), &json!(key), &json!(tag)));
            let text = value.as_ref().and_then(|value| str::from_utf8(value).ok());
            let text = text.filter(|text| json_bytes(text) <= 2 * text.len());
            prop_assert_eq!(given.get("value").and_then(Value::as_str), text);
            prop_assert_eq!(given.get("value_base64").is_some(), value.is_some() && text.is_none());
        }
        Ok(())
    }

    /// The answer is the model's, and depends on no more of the log than it says: a guest that has seen only the entries
    /// up to `read-sequence` gives the same one.
    fn get(&mut self, key: &str, condition: Option<Condition>) -> Result<(), TestCaseError> {
        let expected = self.expected(key);
        let there = expected.map(|(sequence, _)| *sequence);
        let mut request = request("GET", key, self.now);
        request.headers.extend(condition.as_ref().map(|condition| condition.header(there)));
        let mut store = replayed(self.log.iter());
        let response = rest::handle(&mut store, request.clone(), |_| panic!("appended"));
        match expected {
            Some((sequence, put)) => {
                let holds = condition.as_ref().is_none_or(|condition| condition.holds(there));
                let positive = condition.is_some_and(|condition| condition.positive);
                let status = if holds {
                    200
                } else if positive {
                    412
                } else {
                    304
                };
                prop_assert_eq!(response.status, status);
                if status == 200 {
                    prop_assert_eq!(&response.body, &put.value);
                }
                let etag = Header { name: "etag".to_owned(), value: format!("\"{sequence}\"").into() };
                prop_assert!(response.headers.contains(&etag));
            }
            None => prop_assert_eq!((response.status, response.body.as_slice()), (404, &b"no such key\n"[..])),
        }
        prop_assert_eq!(&self.ask(request.clone()), &response);
        let durable = response.read_sequence.expect("said by every answer");
        let mut store = replayed(self.log.iter().filter(|(sequence, _)| *sequence <= durable));
        let again = rest::handle(&mut store, request, |_| panic!("appended"));
        prop_assert_eq!(again, response);
        Ok(())
    }
}

fn tag(sequence: u64) -> String {
    format!("\"{sequence}\"")
}

const EVERYTHING: Grant = Grant { scope: Scope::Admin, key_prefix: None };

fn request(method: &str, key: &str, time_ms: u64) -> Request {
    Request {
        method: method.to_owned(),
        target: format!("/v1/{}", utf8_percent_encode(key, NON_ALPHANUMERIC)),
        headers: Vec::new(),
        body: Vec::new(),
        principal: None,
        grant: EVERYTHING,
        time_ms,
    }
}

fn append(log: &mut Vec<(u64, Event)>, sequence: &mut u64, events: &[Event]) -> u64 {
    let first = *sequence + 1;
    for event in events {
        *sequence += 1;
        log.push((*sequence, event.clone()));
    }
    first
}

fn replayed<'e>(entries: impl Iterator<Item = &'e (u64, Event)>) -> Store {
    let entries: Vec<_> = entries.map(|(sequence, event)| (*sequence, 0, event.clone())).collect();
    let mut store = Store::default();
    apply::<Kvs>(&mut store, &batch(&entries));
    stats::<Kvs>(&mut store);
    store
}

/// JSON, more or less.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let json = r#"\[(\{("(op|key|value|value_base64|content_type|etag|ttl)":("(put|get|check|delete|a|b|\*)"|null|[0-9]{1,20}|\[)(,|\}))*,?){0,4}\]?"#;
    prop_oneof![any::<Vec<u8>>(), json.prop_map(String::into_bytes)]
}

fn header_value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![any::<Vec<u8>>(), r#"(\*|W/|"[0-9]*"|[, ]|bytes=|[0-9]+|-){0,9}"#.prop_map(String::into_bytes)]
}

proptest! {
    #[test]
    fn a_guest_agrees_with_the_model_and_with_its_own_replay(steps in prop::collection::vec(step(), 0..100)) {
        let mut run = Run::default();
        for step in steps {
            run.take(step)?;
        }
        let replayed = replayed(run.log.iter());
        prop_assert_eq!(&replayed, &run.store);
        prop_assert!(replayed.in_order().range(b"").eq(run.store.in_order().range(b"")));
    }

    #[test]
    fn any_request_gets_an_answer(
        method in "GET|HEAD|PUT|DELETE|POST|.*",
        target in r"(/v1|/openapi.json)?(\?(prefix|limit|cursor|values|delimiter|watch|since)=[a-z0-9%/]*&?)*|(/v1/)?(key/)?.{0,9}[%?/&=.]*((ttl|wait)=[0-9]{0,30}s?&?)*.*",
        headers in prop::collection::vec((prop::sample::select(rest::HEADERS.map(str::to_owned).to_vec()), header_value()), 0..4),
        body in body(),
    ) {
        let header = |(name, value)| Header { name, value };
        let headers = headers.into_iter().map(header).collect();
        let request = Request { method, target, headers, body, principal: None, grant: EVERYTHING, time_ms: 0 };
        let response = rest::handle(&mut Store::default(), request, |_| Ok(1));
        let carried = |byte: &u8| matches!(byte, b' '..=b'~');
        prop_assert!(response.headers.iter().all(|header| header.value.iter().all(carried)));
        prop_assert!((200..600).contains(&response.status));
    }
}
