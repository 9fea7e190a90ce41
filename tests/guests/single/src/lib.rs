//! A guest of the world `store`: it exports no `sharding`, so it runs in one shard. `PUT` and `GET` on any target.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::slice;

use exports::kvs::store::lifecycle::{Batch, Description, Statistics};
use exports::kvs::store::{handler, lifecycle};
use kvs::store::http::{Request, Response};
use kvs::store::transaction_log::{Event, Put, append};

wit_bindgen::generate!({ path: "../../../wit", world: "store", generate_all });

thread_local! {
    static STORE: RefCell<BTreeMap<String, Vec<u8>>> = RefCell::default();
}

/// What the host instantiates.
pub struct Component;

impl lifecycle::Guest for Component {
    fn describe() -> Description {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Description { name: "single".to_owned(), version, headers: Vec::new(), capabilities: Vec::new() }
    }

    fn apply(Batch { entries, bytes, .. }: Batch) {
        let mut rest = &bytes[..];
        let mut take = |length: u32| rest.split_off(..length as usize).expect("the batch has it").to_vec();
        for entry in entries {
            let key = String::from_utf8(take(entry.key_bytes)).expect("keys are UTF-8");
            change(match entry.put {
                Some(put) => {
                    let value = take(put.value_bytes);
                    Event::Put(Put { key, value, metadata: Vec::new(), expires_at_ms: put.expires_at_ms })
                }
                None => Event::Delete(key),
            });
        }
    }

    fn tick(_now_ms: u64) -> Option<u64> {
        None
    }

    fn stats() -> Statistics {
        STORE.with_borrow(|store| Statistics { keys: store.len() as u64, bytes: 0 })
    }
}

impl handler::Guest for Component {
    fn handle(Request { method, target, body, .. }: Request) -> Response {
        if method == "PUT" {
            let event = Event::Put(Put { key: target, value: body, metadata: Vec::new(), expires_at_ms: None });
            append(slice::from_ref(&event)).expect("the log takes this");
            change(event);
            return answer(201, Vec::new());
        }
        STORE.with_borrow(|store| match store.get(&target) {
            Some(value) => answer(200, value.clone()),
            None => answer(404, Vec::new()),
        })
    }
}

fn change(event: Event) {
    STORE.with_borrow_mut(|store| match event {
        Event::Put(put) => store.insert(put.key, put.value),
        Event::Delete(key) => store.remove(&key),
    });
}

fn answer(status: u16, body: Vec<u8>) -> Response {
    Response { status, headers: Vec::new(), body, read_sequence: None }
}

// The names under which a component exports its calls are none that a native linker takes.
#[cfg(target_arch = "wasm32")]
export!(Component);
