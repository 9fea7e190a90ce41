//! A store in one file: `PUT`, `GET` and `DELETE` on `/v1/{key}`.

use std::collections::BTreeMap;

use kvs_kit::answer::{self, CONTENT_TYPE, NO_SUCH_KEY, header, not_allowed, problem};
use kvs_kit::guest::Guest;
use kvs_kit::state::{Entry, Logged, State, Statistics};
use kvs_kit::{Event, Put, Request, Response, key, path, query};

pub struct MyGuest;

kvs_kit::export!(MyGuest, sharding = kvs_kit::sharding::KeyInPath);

/// What the log makes: each entry changes it, and nothing else does.
#[derive(Default)]
pub struct Store {
    items: BTreeMap<String, Item>,
}

struct Item {
    /// Of the entry that put it: the read sequence of a response with it.
    sequence: u64,
    value: Vec<u8>,
    /// From this time on it is gone.
    expires_at_ms: Option<u64>,
}

impl State for Store {
    fn apply(&mut self, entry: Entry<'_>) {
        match entry.put {
            Some(put) => {
                let item =
                    Item { sequence: entry.sequence, value: put.bytes.to_vec(), expires_at_ms: put.expires_at_ms };
                self.items.insert(entry.key().to_owned(), item)
            }
            None => self.items.remove(entry.key()),
        };
    }

    fn statistics(&self) -> Statistics {
        let bytes = |(key, item): (&String, &Item)| (key.len() + item.value.len()) as u64;
        Statistics { keys: self.items.len() as u64, bytes: self.items.iter().map(bytes).sum() }
    }
}

impl Guest for MyGuest {
    type State = Store;

    const NAME: &'static str = "template";

    fn handle(store: &mut Logged<'_, Store>, request: Request) -> answer::Result {
        let (path, query) = path::split(&request.target);
        let key = key::in_path(path)?.into_owned();
        query::nothing(query)?;
        let (status, event) = match request.method.as_str() {
            "PUT" => {
                let put = Put { key, value: request.body, metadata: Vec::new(), expires_at_ms: None };
                (201, Event::Put(put))
            }
            "DELETE" => (200, Event::Delete(key)),
            "GET" | "HEAD" => {
                let item =
                    store.items.get(&key).filter(|item| item.expires_at_ms.is_none_or(|at| at > request.time_ms));
                let item = item.ok_or_else(|| problem(404, NO_SUCH_KEY, "no such key"))?;
                let headers = vec![header(CONTENT_TYPE, "application/octet-stream")];
                let body = item.value.clone();
                return Ok(Response { status: 200, headers, body, read_sequence: Some(item.sequence) });
            }
            _ => return Err(not_allowed("a key has", "GET, HEAD, PUT, DELETE")),
        };
        let sequence = store.append(&[event])?;
        Ok(Response { status, headers: Vec::new(), body: Vec::new(), read_sequence: Some(sequence) })
    }
}

#[cfg(test)]
mod tests {
    use kvs_kit::AppendError;
    use kvs_kit::testing::Served;

    use super::*;

    #[test]
    fn value_is_there_until_it_is_deleted_and_after_a_rebuild() {
        let mut guest = Served::<MyGuest>::default();
        assert_eq!(guest.ask("GET", "/v1/a", "").0, 404);
        assert_eq!(guest.ask("PUT", "/v1/a", "value").0, 201);
        assert_eq!(guest.ask("GET", "/v1/a", ""), (200, "value".to_owned()));
        assert_eq!(guest.rebuilt().ask("GET", "/v1/a", ""), (200, "value".to_owned()));
        assert_eq!(guest.ask("DELETE", "/v1/a", "").0, 200);
        assert_eq!(guest.ask("GET", "/v1/a", "").0, 404);
    }

    #[test]
    fn value_of_another_guest_expires() {
        let mut guest = Served::<MyGuest>::default();
        let put = Put { key: "a".to_owned(), value: vec![], metadata: vec![], expires_at_ms: Some(10) };
        guest.append(&[Event::Put(put)]);
        for (now_ms, status) in [(9, 200), (10, 404)] {
            guest.now_ms = now_ms;
            assert_eq!(guest.ask("GET", "/v1/a", "").0, status);
        }
    }

    #[test]
    fn value_that_was_not_appended_is_not_there() {
        let mut guest = Served::<MyGuest>::default();
        guest.log.error = Some(AppendError::InsufficientStorage);
        assert_eq!(guest.ask("PUT", "/v1/a", "value").0, 507);
        assert_eq!(guest.ask("GET", "/v1/a", "").0, 404);
    }
}
