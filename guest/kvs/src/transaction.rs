//! `POST /v1`: several operations, all or nothing.
//!
//! Owns: in which order operations happen, and what each gives. They happen one after the
//! other: each sees what those before it did. Nothing is appended when one of them cannot be done.
//! Must never know: how items are kept, or how many instances there are.

use std::collections::HashMap;

use kvs_kit::state::Logged;
use serde::Serialize;

use crate::answer::{json, line, problem};
use crate::conditions::tag_of;
use crate::content_type;
use crate::grant;
use crate::item::Item;
use crate::kvs::store::http::{Request, Response};
use crate::kvs::store::transaction_log::{Event, Put};
use crate::number;
use crate::operation::{Expected, Op, Operation, operations};
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

pub fn post(store: &mut Logged<'_, Store>, query: &str, request: Request) -> Response {
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
    for (at, (key, _)) in operations.iter().enumerate() {
        if let Err(reason) = grant::check(&request.grant, key) {
            return line(403, &format!("operation {at}: {reason}"));
        }
    }
    let (mut given, events) = match play(store, &operations, request.time_ms) {
        Ok(played) => played,
        // What it saw may not be durable yet.
        Err(rejected) => return Response { read_sequence: None, ..rejected },
    };
    if !events.is_empty() {
        let first = match store.append(&events) {
            Ok(first) => first,
            Err(error) => return error.into(),
        };
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

/// Does the operations one after the other, without changing the store. Gives what they give, and the events that make it
/// so.
fn play<'o>(
    store: &Store,
    operations: &'o [(String, Operation)],
    now: u64,
) -> Result<(Vec<Given<'o>>, Vec<Event>), Response> {
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
                    let reason = format!("operation {at}: the check of `{key}` failed: {}", there.found(expected));
                    return Err(problem(409, &format!("check_failed;operation={at}"), &reason));
                }
                given.push(Given::of(Op::Check, key, &there));
            }
            Operation::Get => {
                let mut result = Given::of(Op::Get, key, &there);
                if let Some((value, content_type)) = there.content() {
                    got += value.len();
                    if got > MAX_GOT_BYTES {
                        let reason = format!("the values to get are together more than {MAX_GOT_BYTES} bytes");
                        return Err(line(413, &format!("operation {at}: {reason}")));
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
            Operation::Add { delta, expires } => {
                let sum = number::add(there.content().map(|(value, _)| value), *delta).map_err(|error| {
                    let code = format!("{};operation={at}", error.code());
                    problem(409, &code, &format!("operation {at}: nothing was added to `{key}`: {error}"))
                })?;
                let (metadata, kept) = match there {
                    There::Nothing => (Vec::new(), None),
                    There::Item(item) => (item.owned_metadata(), item.expires()),
                    There::Put(_, put) => (put.metadata.clone(), put.expires_at_ms),
                };
                let expires_at_ms = expires.or(kept);
                let put = Put { key: key.clone(), value: sum.clone().into_bytes(), metadata, expires_at_ms };
                changed.insert(key, events.len());
                let result = Given::of(Op::Add, key, &There::Put(events.len(), &put));
                given.push(Given { value: Some(sum), ..result });
                events.push(Event::Put(put));
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
            (Expected::Value(value), there) => there.content().is_some_and(|(found, _)| found == value),
        }
    }

    /// What a failed check reports.
    fn found(&self, expected: &Expected) -> String {
        match self {
            Self::Item(item) if matches!(expected, Expected::Value(_)) => {
                format!("the key has another value, with the etag {}", tag_of(item.sequence()))
            }
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
mod tests;
