//! A guest of the world `store`: it exports no `sharding`, so it runs in one shard. `PUT` and `GET` on any target.

use std::collections::BTreeMap;

use kvs_kit::state::{Entry, State, Statistics};
use kvs_kit::{Event, Guest, Logged, Put, Request, Response, answer};

pub struct Single;

kvs_kit::export!(Single);

#[derive(Default)]
pub struct Store(BTreeMap<String, Vec<u8>>);

impl State for Store {
    fn apply(&mut self, entry: Entry<'_>) {
        match entry.put {
            Some(put) => self.0.insert(entry.key().to_owned(), put.bytes.to_vec()),
            None => self.0.remove(entry.key()),
        };
    }

    fn statistics(&self) -> Statistics {
        Statistics { keys: self.0.len() as u64, bytes: 0 }
    }
}

impl Guest for Single {
    type State = Store;

    const NAME: &'static str = "single";

    fn handle(store: &mut Logged<'_, Store>, Request { method, target, body, .. }: Request) -> answer::Result {
        let (status, body) = if method == "PUT" {
            let put = Put { key: target, value: body, metadata: Vec::new(), expires_at_ms: None };
            store.append(&[Event::Put(put)])?;
            (201, Vec::new())
        } else {
            store.0.get(&target).map_or((404, Vec::new()), |value| (200, value.clone()))
        };
        Ok(Response { status, headers: Vec::new(), body, read_sequence: None })
    }
}
