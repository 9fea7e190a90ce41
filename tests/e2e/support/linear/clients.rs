//! Clients that send random operations on a few shared keys, and record the responses.
//!
//! Owns: the requests for steps, and the outcomes that responses mean. Must never know: faults of the server.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use serde_json::{Value, json};

use super::history::{Item, Key, Operation, Outcome, Step, resolve};
use super::plan::{CLIENTS, Form, GROUPS, KEYS, OPERATIONS, Seen, plan, remember};
use crate::support::server::PATIENCE;
use crate::support::wire::{Connection, Response, STALE, Stream, Way};

/// The address of the server, and the number of operations recorded: all that clients and the faults of a test share.
#[derive(Default)]
pub struct Stage {
    state: Mutex<(Option<SocketAddr>, u64)>,
    changed: Condvar,
    /// Something failed: clients would send requests for ever.
    given_up: AtomicBool,
    clock: AtomicU64,
    values: AtomicU64,
    way: Way,
}

impl Stage {
    /// A stage whose clients connect in this way.
    pub fn by(way: Way) -> Self {
        Self { way, ..Self::default() }
    }

    /// Opens a connection to the server, once there is one.
    pub fn open(&self) -> io::Result<Connection<Box<dyn Stream>>> {
        self.way.try_open(self.address())
    }

    /// Sets the address of the server. Without one, clients wait.
    pub fn set(&self, address: Option<SocketAddr>) {
        self.state.lock().unwrap().0 = address;
        self.changed.notify_all();
    }

    /// Waits until this number of operations is recorded.
    pub fn wait_for(&self, operations: u64) {
        self.wait(|(_, recorded)| (*recorded >= operations).then_some(()));
    }

    fn address(&self) -> SocketAddr {
        self.wait(|(address, _)| *address)
    }

    fn wait<T>(&self, wanted: impl Fn(&(Option<SocketAddr>, u64)) -> Option<T>) -> T {
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(found) = wanted(&state) {
                return found;
            }
            let waited = self.changed.wait_timeout(state, PATIENCE).unwrap();
            assert!(!waited.1.timed_out(), "nothing happened for {PATIENCE:?}");
            state = waited.0;
        }
    }

    /// Returns whether the server has another address by now.
    fn has_left(&self, address: SocketAddr) -> bool {
        self.state.lock().unwrap().0.is_some_and(|there| there != address)
    }

    fn recorded(&self) {
        self.state.lock().unwrap().1 += 1;
        self.changed.notify_all();
    }

    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }
}

/// Guard that ends all clients when its thread panics.
pub struct GivenUp<'s>(pub &'s Stage);

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        self.0.given_up.store(thread::panicking(), Ordering::Relaxed);
    }
}

/// Runs the clients of one history, on keys of its own, and returns the history.
pub fn record(stage: &Stage, name: &str, rng: &mut Rng) -> Vec<Operation> {
    let left = AtomicU64::new(OPERATIONS);
    let mut history: Vec<Operation> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let client = Client { stage, name, number, rng: rng.fork(), seen: Seen::default() };
                scope.spawn(|| client.run(&left))
            })
            .collect();
        clients.into_iter().flat_map(|client| client.join().expect("a client does not panic")).collect()
    });
    resolve(&mut history);
    history
}

struct Client<'s> {
    stage: &'s Stage,
    name: &'s str,
    number: usize,
    rng: Rng,
    seen: Seen,
}

impl Client<'_> {
    fn run(mut self, left: &AtomicU64) -> Vec<Operation> {
        let mut operations = Vec::new();
        let mut connection = None;
        while left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            operations.push(loop {
                assert!(!self.stage.given_up.load(Ordering::Relaxed), "something else failed");
                if let Some(operation) = self.send(&mut connection) {
                    break operation;
                }
            });
            self.stage.recorded();
        }
        operations
    }

    /// None for an operation that certainly had no effect and has no response to check.
    fn send(&mut self, kept: &mut Option<(SocketAddr, Connection<Box<dyn Stream>>)>) -> Option<Operation> {
        let (address, mut connection) = match kept.take() {
            Some(kept) => kept,
            None => {
                let address = self.stage.address();
                (address, self.stage.way.try_open(address).ok()?)
            }
        };
        let next_value = || self.stage.values.fetch_add(1, Ordering::Relaxed);
        let (form, mut steps) = plan(&mut self.rng, &mut self.seen, next_value);
        let invoked = self.stage.now();
        // After that moment: the operation goes to the server of the time of its invocation.
        if self.stage.has_left(address) {
            return None;
        }
        let response = self.exchange(&mut connection, form, &steps);
        let returned = self.stage.now();
        let outcome = match response {
            // The request may have arrived, and may take effect later.
            Err(_) => Outcome::Unknown,
            Ok(response) => {
                // On a closed connection the next outcome would be unknown for no reason.
                if response.header("connection") != Some("close") {
                    *kept = Some((address, connection));
                }
                outcome(&response, self.name, form, &mut steps)?
            }
        };
        if outcome == Outcome::Done {
            remember(&mut self.seen, &steps);
        }
        let operation = Operation { client: self.number, invoked, returned, steps, outcome };
        (!operation.is_unknown() || !operation.is_read_only()).then_some(operation)
    }

    fn exchange(
        &mut self,
        connection: &mut Connection<Box<dyn Stream>>,
        form: Form,
        steps: &[Step],
    ) -> io::Result<Response> {
        let (method, mut target, mut condition, body) = match form {
            Form::Plain => self.plain(steps),
            Form::Head => ("HEAD", self.path_of(steps[0].key()), String::new(), String::new()),
            Form::Changed(tag) => self.changed(steps, tag),
            Form::List => {
                ("GET", format!("/v1?values=true&prefix={}", self.prefix(steps)), String::new(), String::new())
            }
            Form::Many => self.many(steps),
            Form::Add(delta) => self.add(steps, delta),
            Form::Touch => self.touch(steps),
            Form::DeletePrefix => {
                ("DELETE", format!("/v1?prefix={}", self.prefix(steps)), String::new(), String::new())
            }
            Form::Transaction => ("POST", "/v1".to_owned(), String::new(), self.transaction(steps)),
        };
        // A guest that knows this path traps there, after the operation. Only in the shard of the keys.
        let may_trap = !matches!(method, "GET" | "HEAD" | "QUERY") && form != Form::DeletePrefix;
        if may_trap && self.rng.u8(..) == 0 {
            target.insert_str(0, "/trap");
        }
        // What a guest reads of a request distinguishes it from others, so that no response to those is reused. Without
        // `Range` this one means nothing.
        if method == "GET" && self.rng.bool() {
            condition.push_str(&format!("if-range: \"{}\"\r\n", self.rng.u64(..)));
        }
        connection.try_ask_with(method, &target, &condition, body.as_bytes())
    }

    fn name_of(&self, key: Key) -> String {
        name_of(self.name, key)
    }

    fn path_of(&self, key: Key) -> String {
        format!("/v1/{}", self.name_of(key))
    }

    /// Prefix of the names of the keys of the steps, which are those of a group.
    fn prefix(&self, steps: &[Step]) -> String {
        prefix_of(self.name, steps[0].key())
    }

    fn plain(&self, steps: &[Step]) -> Parts {
        let (condition, last) = match steps {
            [Step::Check(_, None), last] => ("if-none-match: *\r\n".to_owned(), last),
            [Step::Check(_, Some(tag)), last] => (format!("if-match: \"{tag}\"\r\n"), last),
            [Step::Found(..), last] | [last] => (String::new(), last),
            _ => panic!("{steps:?} do not fit into one plain request"),
        };
        let (method, body) = match last {
            Step::Put(_, item) => ("PUT", item.value.to_string()),
            Step::Delete(_) => ("DELETE", String::new()),
            _ => ("GET", String::new()),
        };
        (method, self.path_of(last.key()), condition, body)
    }

    /// Some wait for the change.
    fn changed(&mut self, steps: &[Step], tag: u64) -> Parts {
        let wait = if self.rng.bool() { "?wait=5ms" } else { "" };
        let target = self.path_of(steps[0].key()) + wait;
        ("GET", target, format!("if-none-match: \"{tag}\"\r\n"), String::new())
    }

    /// All keys are in one shard, so they are read at one moment.
    fn many(&mut self, steps: &[Step]) -> Parts {
        let names: Vec<_> = steps.iter().map(|step| self.name_of(step.key())).collect();
        if self.rng.bool() {
            return ("QUERY", "/v1".to_owned(), String::new(), json!(names).to_string());
        }
        ("GET", format!("/v1?key={}", names.join("&key=")), String::new(), String::new())
    }

    fn touch(&self, steps: &[Step]) -> Parts {
        let [Step::Check(key, Some(tag)), Step::Put(..)] = steps else { panic!("{steps:?} is no touch") };
        let target = self.path_of(*key) + "?op=touch&ttl=1h";
        ("POST", target, format!("if-match: \"{tag}\"\r\n"), String::new())
    }

    /// As a request of its own, or in a transaction.
    fn add(&mut self, steps: &[Step], delta: u64) -> Parts {
        let [Step::Check(key, Some(tag)), Step::Put(..)] = steps else { panic!("{steps:?} is no addition") };
        let name = self.name_of(*key);
        if self.rng.bool() {
            let condition = format!("if-match: \"{tag}\"\r\n");
            return ("POST", format!("/v1/{name}?op=add&delta={delta}"), condition, String::new());
        }
        let check = json!({"op": "check", "key": name, "etag": quoted(*tag)});
        let operations = json!([check, {"op": "add", "key": name, "delta": delta}]);
        ("POST", "/v1".to_owned(), String::new(), operations.to_string())
    }

    fn transaction(&self, steps: &[Step]) -> String {
        let operations = steps.iter().map(|step| {
            let key = self.name_of(step.key());
            match step {
                Step::Check(_, tag) => json!({"op": "check", "key": key, "etag": tag.map(quoted)}),
                Step::Compare(_, value) => json!({"op": "check", "key": key, "value": value.to_string()}),
                Step::Get(..) | Step::Found(..) => json!({"op": "get", "key": key}),
                Step::Put(_, item) => json!({"op": "put", "key": key, "value": item.value.to_string()}),
                Step::Delete(_) => json!({"op": "delete", "key": key}),
            }
        });
        Value::Array(operations.collect()).to_string()
    }
}

/// Method, target, header lines and body of a request.
type Parts = (&'static str, String, String, String);

/// Name of a key of a history.
fn name_of(history: &str, key: Key) -> String {
    format!("{}{key}", prefix_of(history, key))
}

/// Prefix of the names of the keys of a group.
fn prefix_of(history: &str, key: Key) -> String {
    let group = GROUPS.iter().position(|group| group.contains(&key)).expect("each key is in a group");
    // One tag, since transactions are of keys that share a shard.
    format!("{{{history}}}-{group}-")
}

/// Names of all keys of a history.
pub fn keys_of(history: &str) -> impl Iterator<Item = String> {
    (0..KEYS).map(move |key| name_of(history, key))
}

/// Reads the keys of a history from a server that may return stale items, as long as `go_on` returns true, and panics when a
/// key goes back to an older item. Returns the number of items read.
pub fn read_on(address: SocketAddr, history: &str, go_on: impl Fn() -> bool) -> usize {
    let mut connection = Connection::open(address);
    let mut newest = [0; KEYS];
    let mut shown = 0;
    while go_on() {
        for (key, newest) in newest.iter_mut().enumerate() {
            let response = connection.ask_with("GET", &format!("/v1/{}", name_of(history, key)), &STALE, b"");
            if let (200, Some(tag)) = (response.status, response.etag()) {
                assert!(tag >= *newest, "key {key} of {history} went back from {newest} to {tag}");
                *newest = tag;
                shown += 1;
            }
        }
        // Changes arrive ten times a second, and others need the processor.
        thread::sleep(Duration::from_millis(5));
    }
    shown
}

fn quoted(tag: u64) -> String {
    format!("\"{tag}\"")
}

/// Returns the outcome that a response means, and adds its items and tags to the steps. None when it means that nothing
/// happened.
fn outcome(response: &Response, history: &str, form: Form, steps: &mut [Step]) -> Option<Outcome> {
    match response.status {
        200 if matches!(form, Form::Add(_) | Form::Touch) && response.header("etag").is_some() => {
            let Some(Step::Put(_, item)) = steps.last_mut() else { panic!("{steps:?} has no put") };
            if form != Form::Touch {
                assert_eq!(number(response.text()), item.value, "the sum of what was seen");
            }
            item.tag = response.etag().expect("the response to a put has its tag");
            Some(Outcome::Done)
        }
        200 | 404 if form == Form::Head => {
            steps[0] = Step::Check(steps[0].key(), response.etag());
            Some(Outcome::Done)
        }
        304 => {
            steps[0] = Step::Check(steps[0].key(), response.etag());
            Some(Outcome::Done)
        }
        200 | 201 | 404 if matches!(form, Form::Plain | Form::Changed(_)) => {
            let tag = response.etag();
            let key = steps[0].key();
            match steps {
                [.., Step::Get(_, seen)] => *seen = tag.map(|tag| Item { value: number(response.text()), tag }),
                // A guest that does not know the path of the trap.
                _ if response.status == 404 => return None,
                [first, Step::Put(_, item)] => {
                    item.tag = tag.expect("the response to a put has its tag");
                    if let Step::Found(_, exists) = first {
                        *exists = Some(response.header("kvs-created") == Some("false"));
                    }
                }
                [first @ Step::Found(..), Step::Delete(_)] => {
                    let deleted = response.header("kvs-deleted").expect("the response to a delete has a tag or none");
                    *first = Step::Check(key, (deleted != "none").then(|| number(deleted.trim_matches('"'))));
                }
                _ => {}
            }
            Some(Outcome::Done)
        }
        200 if form == Form::DeletePrefix => {
            let page: Value = serde_json::from_slice(&response.body).expect("a page in JSON");
            assert_eq!(page["complete"], true, "{page}");
            let deletes = steps.len() as u64 / 2;
            let all = page["deleted"].as_u64().expect("a number");
            assert!(all <= deletes, "{page}");
            for step in steps {
                // Of some, the response does not show which.
                if let Step::Found(_, exists) = step {
                    *exists = (all == 0 || all == deletes).then_some(all > 0);
                }
            }
            Some(Outcome::Done)
        }
        200 if matches!(form, Form::List | Form::Many) => {
            let page: Value = serde_json::from_slice(&response.body).expect("a page in JSON");
            let entries = page["keys"].as_array().expect("a list");
            assert!(page["list_complete"] != false, "{page}");
            for step in steps {
                let Step::Get(key, seen) = step else { panic!("{step:?} is no read") };
                let name = name_of(history, *key);
                *seen = entries.iter().find(|entry| entry["key"] == name.as_str()).and_then(item);
            }
            Some(Outcome::Done)
        }
        200 => {
            let results: Vec<Value> = serde_json::from_slice(&response.body).expect("a list in JSON");
            assert_eq!(results.len(), steps.len(), "{}", response.text());
            for (result, step) in results.iter().zip(steps) {
                match step {
                    Step::Get(_, seen) => *seen = item(result),
                    Step::Put(_, item) => item.tag = tag(result).expect("the response to a put has its tag"),
                    Step::Delete(_) | Step::Check(..) | Step::Compare(..) | Step::Found(..) => {}
                }
            }
            Some(Outcome::Done)
        }
        412 => Some(Outcome::Failed(0)),
        409 => {
            let at = response.text().strip_prefix("operation ").and_then(|text| text.split_once(':')?.0.parse().ok());
            Some(Outcome::Failed(at.unwrap_or_else(|| panic!("no index of the check in {:?}", response.text()))))
        }
        404 | 429 | 503 => None,
        500 | 504 => Some(Outcome::Unknown),
        status => panic!("{status}: {}", response.text()),
    }
}

/// The item of a key, in a list or in the results of a transaction.
fn item(entry: &Value) -> Option<Item> {
    let value = entry["value"].as_str().map(number)?;
    Some(Item { value, tag: tag(entry)? })
}

fn tag(entry: &Value) -> Option<u64> {
    entry["etag"].as_str().map(|tag| number(tag.trim_matches('"')))
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("{text:?} was never put"))
}
