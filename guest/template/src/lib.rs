//! A store in one file: `PUT`, `GET` and `DELETE` on `/v1/{key}`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::slice;

use exports::kvs::store::lifecycle::{Batch, Description, Statistics};
use exports::kvs::store::sharding::Target;
use exports::kvs::store::{handler, lifecycle, sharding};
use kvs::store::http::{Header, Request, Response};
use kvs::store::transaction_log::{AppendError, Event, Put, append};

wit_bindgen::generate!({
    path: "../../wit",
    world: "sharded-store",
    generate_all,
});

#[derive(Default)]
pub struct Store {
    items: BTreeMap<String, Item>,
}

struct Item {
    /// Of the entry that put it: the read sequence of an answer with it.
    sequence: u64,
    value: Vec<u8>,
    /// From this moment on it is gone.
    expires: Option<u64>,
}

impl Store {
    /// What an entry of the log does: on replay, and right after it was appended.
    fn apply(&mut self, sequence: u64, event: Event) {
        match event {
            Event::Put(Put { key, value, expires_at_ms: expires, .. }) => {
                self.items.insert(key, Item { sequence, value, expires })
            }
            Event::Delete(key) => self.items.remove(&key),
        };
    }

    /// Appends first, then changes. `append` is the log's, or a test's.
    pub fn handle(&mut self, request: Request, append: impl FnOnce(&[Event]) -> Result<u64, AppendError>) -> Response {
        let key = match request.target.strip_prefix("/v1/") {
            Some("") | None => return answer(404, "keys live at /v1/{key}\n"),
            Some(key) if key.contains(['%', '?', '/']) => return answer(400, "a key is letters, digits, - _ . ~\n"),
            Some(key) => key.to_owned(),
        };
        let event = match request.method.as_str() {
            "PUT" => Event::Put(Put { key, value: request.body, metadata: Vec::new(), expires_at_ms: None }),
            "DELETE" => Event::Delete(key),
            "GET" | "HEAD" => {
                let there = |item: &&Item| item.expires.is_none_or(|expires| expires > request.time_ms);
                return match self.items.get(&key).filter(there) {
                    Some(item) => Response { read_sequence: Some(item.sequence), ..answer(200, item.value.clone()) },
                    None => answer(404, "no such key\n"),
                };
            }
            _ => return answer(405, "a key has GET, HEAD, PUT and DELETE\n"),
        };
        match append(slice::from_ref(&event)) {
            Ok(sequence) => {
                self.apply(sequence, event);
                answer(if request.method == "PUT" { 201 } else { 200 }, "")
            }
            Err(AppendError::InsufficientStorage) => answer(507, "no room is left; nothing was stored\n"),
            Err(AppendError::Unavailable) => answer(503, "the log takes no writes at the moment; nothing was stored\n"),
            Err(AppendError::ReadOnly) => answer(403, "writes are not allowed here; nothing was stored\n"),
            Err(AppendError::TooLarge(_)) => answer(413, "too large for the log; nothing was stored\n"),
            Err(AppendError::InvalidKey) => answer(400, "not a valid key; nothing was stored\n"),
        }
    }
}

fn answer(status: u16, body: impl Into<Vec<u8>>) -> Response {
    let kind = if status == 200 { "application/octet-stream" } else { "text/plain" };
    let kind = Header { name: "content-type".to_owned(), value: kind.into() };
    Response { status, headers: vec![kind], body: body.into(), read_sequence: None }
}

/// Sequences and events of a batch.
fn events(batch: Batch) -> impl Iterator<Item = (u64, Event)> {
    let Batch { entries, bytes, metadata } = batch;
    let mut start = 0;
    entries.into_iter().map(move |entry| {
        let mut take = |length: u32| {
            let end = start + length as usize;
            let taken = bytes[start..end].to_vec();
            start = end;
            taken
        };
        let key = String::from_utf8(take(entry.key_bytes)).expect("keys are UTF-8");
        let event = match entry.put {
            None => Event::Delete(key),
            Some(put) => Event::Put(Put {
                key,
                value: take(put.value_bytes),
                metadata: put.metadata.map(|index| metadata[index as usize].clone()).unwrap_or_default(),
                expires_at_ms: put.expires_at_ms,
            }),
        };
        (entry.sequence, event)
    })
}

thread_local! {
    /// No two calls overlap, so a borrow of this never meets another.
    static STORE: RefCell<Store> = RefCell::default();
}

/// What the host instantiates.
pub struct Component;

impl lifecycle::Guest for Component {
    fn describe() -> Description {
        Description {
            name: "template".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            headers: Vec::new(),
            capabilities: Vec::new(),
        }
    }

    fn apply(batch: Batch) {
        STORE.with_borrow_mut(|store| events(batch).for_each(|(sequence, event)| store.apply(sequence, event)));
    }

    fn tick(_now_ms: u64) -> Option<u64> {
        None
    }

    fn stats() -> Statistics {
        STORE.with_borrow(|store| Statistics {
            keys: store.items.len() as u64,
            bytes: store.items.iter().map(|(key, item)| (key.len() + item.value.len()) as u64).sum(),
        })
    }
}

impl handler::Guest for Component {
    fn handle(request: Request) -> Response {
        STORE.with_borrow_mut(|store| store.handle(request, append))
    }
}

impl sharding::Guest for Component {
    fn route(_method: String, target: String) -> Target {
        target.strip_prefix("/v1/").map_or(Target::AnyShard, |key| Target::Key(key.to_owned()))
    }

    fn extract_keys(_body: Vec<u8>) -> Vec<String> {
        // Keys are in paths only.
        Vec::new()
    }

    fn merge_responses(_request: Request, responses: Vec<Response>) -> Response {
        responses.into_iter().next().unwrap_or_else(|| answer(500, "no instance answered\n"))
    }
}

// The names under which a component exports its calls are none that a native linker takes.
#[cfg(target_arch = "wasm32")]
export!(Component);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvs::store::http::{Grant, Scope};

    const EVERYTHING: Grant = Grant { scope: Scope::Admin, key_prefix: None };

    fn ask(store: &mut Store, log: &mut Vec<Event>, method: &str, body: &str) -> (u16, Vec<u8>) {
        let (method, target) = (method.to_owned(), "/v1/a".to_owned());
        let request = Request {
            method,
            target,
            headers: Vec::new(),
            body: body.into(),
            principal: None,
            grant: EVERYTHING,
            time_ms: 0,
        };
        let response = store.handle(request, |events| {
            log.extend_from_slice(events);
            Ok(log.len() as u64)
        });
        (response.status, response.body)
    }

    #[test]
    fn what_was_put_is_there_until_it_is_deleted_and_again_after_replay() {
        let (mut store, mut log) = (Store::default(), Vec::new());
        assert_eq!(ask(&mut store, &mut log, "GET", "").0, 404);
        assert_eq!(ask(&mut store, &mut log, "PUT", "value"), (201, Vec::new()));
        assert_eq!(ask(&mut store, &mut log, "GET", ""), (200, b"value".into()));

        let mut replayed = Store::default();
        (1..).zip(log.clone()).for_each(|(sequence, event)| replayed.apply(sequence, event));
        assert_eq!(ask(&mut replayed, &mut Vec::new(), "GET", ""), (200, b"value".into()));

        assert_eq!(ask(&mut store, &mut log, "DELETE", ""), (200, Vec::new()));
        assert_eq!(ask(&mut store, &mut log, "GET", "").0, 404);
    }

    #[test]
    fn what_another_guest_gave_an_end_is_gone_then() {
        let put = |expires| {
            Event::Put(Put { key: "a".to_owned(), value: vec![], metadata: vec![], expires_at_ms: Some(expires) })
        };
        for (expires, status) in [(1, 200), (0, 404)] {
            let mut store = Store::default();
            store.apply(1, put(expires));
            // It is asked at the time 0.
            assert_eq!(ask(&mut store, &mut Vec::new(), "GET", "").0, status);
        }
    }

    #[test]
    fn what_was_not_appended_is_not_stored() {
        let mut store = Store::default();
        let (method, target) = ("PUT".to_owned(), "/v1/a".to_owned());
        let request = Request {
            method,
            target,
            headers: Vec::new(),
            body: Vec::new(),
            principal: None,
            grant: EVERYTHING,
            time_ms: 0,
        };
        assert_eq!(store.handle(request, |_| Err(AppendError::InsufficientStorage)).status, 507);
        assert_eq!(ask(&mut store, &mut Vec::new(), "GET", "").0, 404);
    }
}
