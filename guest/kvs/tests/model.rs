//! The store and its REST interface against a model: a map that knows nothing of logs, batches or indexes.

use std::collections::BTreeMap;

use kvs_guest::kvs::store::http::{Header, Request, Response};
use kvs_guest::kvs::store::transaction_log::{AppendError, Event, Put};
use kvs_guest::rest;
use kvs_guest::store::Store;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proptest::prelude::*;

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
    let put = |(key, value, metadata, expires)| Put { key, value, metadata, expires };
    (prop_oneof![3 => key(), 1 => ".*"], any::<Vec<u8>>(), metadata, expires).prop_map(put)
}

fn step() -> impl Strategy<Value = Step> {
    let content_type = prop::option::of("[a-z]{1,9}/[ -~]{0,9}[!-~]");
    prop_oneof![
        4 => (key(), any::<Vec<u8>>(), content_type, prop::option::of(1..3_u64), condition())
            .prop_map(|(key, value, content_type, ttl, condition)| Step::Put { key, value, content_type, ttl, condition }),
        3 => (key(), condition()).prop_map(|(key, condition)| Step::Delete { key, condition }),
        4 => (key(), condition()).prop_map(|(key, condition)| Step::Get { key, condition }),
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
        self.store.apply(sequence, &event);
    }

    /// What the model has at a key that has not expired.
    fn expected(&self, key: &str) -> Option<&(u64, Put)> {
        self.model.get(key).filter(|(_, put)| put.expires.is_none_or(|expires| expires > self.now))
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
                prop_assert_eq!((response.status, response.depends_on), (201, Some(self.sequence)));
                let metadata = content_type.map(|value| ("content-type".to_owned(), value)).into_iter().collect();
                let expires = ttl.map(|ttl| self.now + 1_000 * ttl);
                let put = Put { key: key.clone(), value, metadata, expires };
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
                self.store.tick(self.now, |events| Ok(append(&mut self.log, &mut self.sequence, events)));
                let now = self.now;
                self.model.retain(|_, (_, put)| put.expires.is_none_or(|expires| expires > now));
            }
        }
        let (keys, bytes) =
            (self.model.len() as u64, self.model.iter().map(|(key, (_, put))| key.len() + put.value.len()));
        prop_assert_eq!((self.store.keys(), self.store.bytes()), (keys, bytes.sum::<usize>() as u64));
        Ok(())
    }

    /// The answer is the model's, and rests on no more of the log than it says: a guest that has seen only the entries
    /// up to `depends-on` gives the same one.
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
        let durable = response.depends_on.expect("said by every answer");
        let mut store = replayed(self.log.iter().filter(|(sequence, _)| *sequence <= durable));
        let again = rest::handle(&mut store, request, |_| panic!("appended"));
        prop_assert_eq!(again, response);
        Ok(())
    }
}

fn request(method: &str, key: &str, time: u64) -> Request {
    Request {
        method: method.to_owned(),
        target: format!("/v1/{}", utf8_percent_encode(key, NON_ALPHANUMERIC)),
        headers: Vec::new(),
        body: Vec::new(),
        principal: None,
        time,
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
    let mut store = Store::default();
    entries.for_each(|(sequence, event)| store.apply(*sequence, event));
    store
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
        prop_assert_eq!(replayed(run.log.iter()), run.store);
    }

    #[test]
    fn any_request_gets_an_answer(
        method in "GET|HEAD|PUT|DELETE|.*",
        target in r"(/v1/)?(key/)?.{0,9}[%?/&=.]*(ttl=[0-9]{0,30}&?)*.*",
        headers in prop::collection::vec((prop::sample::select(rest::HEADERS.map(str::to_owned).to_vec()), header_value()), 0..4),
        body: Vec<u8>,
    ) {
        let header = |(name, value)| Header { name, value };
        let headers = headers.into_iter().map(header).collect();
        let request = Request { method, target, headers, body, principal: None, time: 0 };
        let response = rest::handle(&mut Store::default(), request, |_| Ok(1));
        let carried = |byte: &u8| matches!(byte, b' '..=b'~');
        prop_assert!(response.headers.iter().all(|header| header.value.iter().all(carried)));
        prop_assert!((200..600).contains(&response.status));
    }
}
