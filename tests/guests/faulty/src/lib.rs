//! A store with a mistake, which the setting `mistake` chooses (`--guest-config mistake=…`); without it, it has none.
//!
//! `PUT`, `GET` and `DELETE` on `/v1/{key}`, with the key as it is in the path; `GET /v1` lists the keys.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::hint::black_box;
use std::time::SystemTime;

use kvs_kit::bindings::exports::kvs::store::lifecycle::{Batch, Description, Statistics};
use kvs_kit::bindings::exports::kvs::store::{handler, lifecycle};
use kvs_kit::bindings::kvs::store::response_cache::reuse;
use kvs_kit::bindings::kvs::store::transaction_log::append;
use kvs_kit::metrics;
use kvs_kit::state::{Entry, entries};
use kvs_kit::{Event, Header, Put, Request, Response, config};

#[derive(Default)]
struct State {
    mistake: String,
    store: BTreeMap<String, Vec<u8>>,
    /// Calls of `apply`, and requests.
    batches: u64,
    handled: u64,
    hasher: RandomState,
}

thread_local! {
    static STATE: RefCell<State> = RefCell::default();
}

pub struct Component;

impl lifecycle::Guest for Component {
    fn describe() -> Description {
        STATE.with_borrow_mut(|state| state.mistake = config::get("mistake").ok().flatten().unwrap_or_default());
        Description {
            name: "faulty".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            headers: Vec::new(),
            capabilities: Vec::new(),
        }
    }

    fn apply(batch: Batch) {
        STATE.with_borrow_mut(|state| {
            state.batches += 1;
            entries(&batch).for_each(|entry| state.apply(entry));
        });
    }

    fn tick(_now_ms: u64) -> Option<u64> {
        None
    }

    fn stats() -> Statistics {
        STATE.with_borrow(|state| Statistics { keys: state.store.len() as u64, bytes: 0 })
    }
}

impl handler::Guest for Component {
    fn handle(request: Request) -> Response {
        STATE.with_borrow_mut(|state| {
            state.handled += 1;
            state.handle(request)
        })
    }
}

impl State {
    fn has(&self, mistake: &str) -> bool {
        self.mistake == mistake
    }

    fn apply(&mut self, entry: Entry<'_>) {
        let key = entry.key();
        if self.has("apply-traps") && key == "key-7" {
            panic!("an entry that it does not expect");
        }
        let Some(put) = entry.put else {
            self.store.remove(key);
            return;
        };
        let mut value = put.bytes.to_vec();
        match self.mistake.as_str() {
            "clock" => {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("it is after 1970");
                value.extend(now.as_secs().to_string().into_bytes());
            }
            // The seed was taken in `describe`.
            "randomness" => value.extend(self.hasher.hash_one(key).to_le_bytes()),
            "batches" => value.extend(self.batches.to_le_bytes()),
            _ => {}
        }
        self.store.insert(key.to_owned(), value);
    }

    fn handle(&mut self, request: Request) -> Response {
        let path = request.target.split('?').next().unwrap_or_default();
        let method = request.method.as_str();
        let Some(key) = path.strip_prefix("/v1/").map(str::to_owned) else {
            return if method == "GET" && path == "/v1" { self.list() } else { response(404, Vec::new()) };
        };
        match method {
            "GET" => match self.store.get(&key) {
                Some(value) => response(200, value.clone()),
                None => response(404, Vec::new()),
            },
            "PUT" => self.put(key, request.body),
            "DELETE" => self.change(Event::Delete(key)),
            _ => response(405, Vec::new()),
        }
    }

    fn list(&mut self) -> Response {
        match self.mistake.as_str() {
            // It changes with every key.
            "reuse" => reuse(&["key-1".to_owned()], None),
            "counter" => return response(200, self.handled.to_string()),
            "invalid" => return response(99, Vec::new()),
            _ => {}
        }
        response(200, self.store.keys().map(String::as_str).collect::<Vec<_>>().join(" "))
    }

    fn put(&mut self, key: String, value: Vec<u8>) -> Response {
        match self.mistake.as_str() {
            // Not appended.
            "forgets" if value == b"text" => {
                self.store.insert(key, value);
                response(201, Vec::new())
            }
            // One for each key.
            "metrics" => {
                metrics::add("puts", &[("key", key.get(..8).unwrap_or(&key))], 1);
                self.change(put(key, value))
            }
            "metric-name" => {
                metrics::set("puts-now", &[], 1.0);
                self.change(put(key, value))
            }
            "traps" if key == "key-7" => panic!("a key that it does not expect"),
            "slow" if key == "key-7" => loop {
                black_box(());
            },
            // The key of an entry is made of what the instance alone knows.
            "number" => self.change(put(format!("{key}-{}", self.handled), value)),
            _ => self.change(put(key, value)),
        }
    }

    /// Appends, then changes.
    fn change(&mut self, event: Event) -> Response {
        let appended = append(std::slice::from_ref(&event));
        if appended.is_ok() || self.has("changes-anyway") {
            self.apply(Entry::new(appended.unwrap_or_default(), &event));
        }
        match appended {
            Ok(_) => response(201, Vec::new()),
            Err(_) if self.has("acknowledges-anyway") => response(201, Vec::new()),
            Err(_) if self.has("traps-when-refused") => panic!("the log is always there"),
            Err(_) => response(503, Vec::new()),
        }
    }
}

fn put(key: String, value: Vec<u8>) -> Event {
    Event::Put(Put { key, value, metadata: Vec::new(), expires_at_ms: None })
}

fn response(status: u16, body: impl Into<Vec<u8>>) -> Response {
    let headers = vec![Header { name: "content-type".to_owned(), value: b"text/plain".to_vec() }];
    Response { status, headers, body: body.into(), read_sequence: None }
}

// The names under which a component exports its calls are none that a native linker takes.
#[cfg(target_arch = "wasm32")]
kvs_kit::bindings::export!(Component with_types_in kvs_kit::bindings);
