//! Clients that ask this and that of a few keys they share, and record what they were told.
//!
//! Owns: how steps are asked over HTTP and what an answer says of them. Must never know: what becomes of the server.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use serde_json::{Value, json};

use super::history::{Item, Key, Operation, Outcome, Step, resolve};
use crate::server::PATIENCE;
use crate::wire::{Connection, Response, Stream, Way};

const CLIENTS: usize = 8;
pub const OPERATIONS: u64 = 500;

/// Keys that a transaction can have together. Few, so that clients meet.
const GROUPS: [&[Key]; 3] = [&[0], &[1, 2], &[3, 4, 5]];
const KEYS: usize = 6;

/// Where the server is that is to be asked, and how much was asked of it: what clients and those who trouble the server
/// know of each other.
#[derive(Default)]
pub struct Stage {
    state: Mutex<(Option<SocketAddr>, u64)>,
    changed: Condvar,
    /// Something failed: clients would ask for ever what nobody answers any more.
    given_up: AtomicBool,
    clock: AtomicU64,
    values: AtomicU64,
    way: Way,
}

impl Stage {
    /// One that clients come to in this way.
    pub fn by(way: Way) -> Self {
        Self { way, ..Self::default() }
    }

    /// A connection to the server that is there, or will be.
    pub fn open(&self) -> io::Result<Connection<Box<dyn Stream>>> {
        self.way.try_open(self.address())
    }

    /// The server is there, or is about to go. Clients wait for it to come back.
    pub fn set(&self, address: Option<SocketAddr>) {
        self.state.lock().unwrap().0 = address;
        self.changed.notify_all();
    }

    /// Waits until so many operations were recorded.
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

    /// Whether the server is somewhere else by now.
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

/// Has all clients end when there is a panic where this is.
pub struct GivenUp<'s>(pub &'s Stage);

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        self.0.given_up.store(thread::panicking(), Ordering::Relaxed);
    }
}

/// Lets clients loose on keys of their own, and gives their history.
pub fn record(stage: &Stage, name: &str, rng: &mut Rng) -> Vec<Operation> {
    let left = AtomicU64::new(OPERATIONS);
    let mut history: Vec<Operation> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let client = Client { stage, name, number, rng: rng.fork(), seen: [None; KEYS] };
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
    /// What it last saw of each key, for its conditions.
    seen: [Option<Item>; KEYS],
}

/// How steps are asked.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Plain,
    Transaction,
}

impl Client<'_> {
    fn run(mut self, left: &AtomicU64) -> Vec<Operation> {
        let mut operations = Vec::new();
        let mut connection = None;
        while left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            operations.push(loop {
                assert!(!self.stage.given_up.load(Ordering::Relaxed), "something else failed");
                if let Some(operation) = self.ask(&mut connection) {
                    break operation;
                }
            });
            self.stage.recorded();
        }
        operations
    }

    /// None when nothing can have happened.
    fn ask(&mut self, kept: &mut Option<(SocketAddr, Connection<Box<dyn Stream>>)>) -> Option<Operation> {
        let (address, mut connection) = match kept.take() {
            Some(kept) => kept,
            None => {
                let address = self.stage.address();
                (address, self.stage.way.try_open(address).ok()?)
            }
        };
        let (form, mut steps) = self.plan();
        let asked = self.stage.now();
        // After that moment: who is asked was the right one when the operation began.
        if self.stage.has_left(address) {
            return None;
        }
        let answer = self.exchange(&mut connection, form, &steps);
        let answered = self.stage.now();
        let outcome = match answer {
            // It may have arrived, and may be in the middle of what is done.
            Err(_) => Outcome::Unknown,
            Ok(answer) => {
                // What is asked where nobody listens any more would have an outcome that is unknown for no reason.
                if answer.header("connection") != Some("close") {
                    *kept = Some((address, connection));
                }
                outcome(&answer, form, &mut steps)?
            }
        };
        if outcome == Outcome::Done {
            for step in &steps {
                match *step {
                    Step::Get(key, seen) => self.seen[key] = seen,
                    Step::Put(key, item) => self.seen[key] = Some(item),
                    Step::Delete(key) => self.seen[key] = None,
                    Step::Check(..) => {}
                }
            }
        }
        let operation = Operation { client: self.number, asked, answered, steps, outcome };
        (!operation.is_unknown() || !operation.changes_nothing()).then_some(operation)
    }

    fn plan(&mut self) -> (Form, Vec<Step>) {
        let group = self.rng.choice(GROUPS).expect("there are some");
        let key = self.rng.choice(group.iter().copied()).expect("there are some");
        let seen = self.seen[key].map(|item| item.tag);
        match self.rng.u8(0..20) {
            0..6 => (Form::Plain, vec![Step::Get(key, None)]),
            6..10 => (Form::Plain, vec![self.put(key)]),
            10..12 => (Form::Plain, vec![Step::Delete(key)]),
            12..15 => (Form::Plain, vec![Step::Check(key, seen), self.put(key)]),
            15 if seen.is_some() => (Form::Plain, vec![Step::Check(key, seen), Step::Delete(key)]),
            _ => {
                let mut steps = Vec::new();
                for key in group.iter().copied() {
                    if self.rng.u8(0..3) == 0 {
                        steps.push(Step::Check(key, self.seen[key].map(|item| item.tag)));
                    }
                    steps.push(match self.rng.u8(0..4) {
                        0 => Step::Get(key, None),
                        1 => Step::Delete(key),
                        _ => self.put(key),
                    });
                    if self.rng.u8(0..3) == 0 {
                        steps.push(Step::Get(key, None));
                    }
                }
                (Form::Transaction, steps)
            }
        }
    }

    fn put(&self, key: Key) -> Step {
        // Which tag it gets is told by the answer.
        Step::Put(key, Item { value: self.stage.values.fetch_add(1, Ordering::Relaxed), tag: 0 })
    }

    fn exchange(
        &mut self,
        connection: &mut Connection<Box<dyn Stream>>,
        form: Form,
        steps: &[Step],
    ) -> io::Result<Response> {
        let (method, mut target, condition, body) = match form {
            Form::Plain => self.plain(steps),
            Form::Transaction => ("POST", "/v1".to_owned(), String::new(), self.transaction(steps)),
        };
        // A guest that knows this path traps there, after it has done what was asked.
        if method != "GET" && self.rng.u8(..) == 0 {
            target.insert_str(0, "/trap");
        }
        connection.try_ask_with(method, &target, &condition, body.as_bytes())
    }

    fn name_of(&self, key: Key) -> String {
        name_of(self.name, key)
    }

    fn plain(&self, steps: &[Step]) -> (&'static str, String, String, String) {
        let (condition, last) = match steps {
            [Step::Check(_, None), last] => ("if-none-match: *\r\n".to_owned(), last),
            [Step::Check(_, Some(tag)), last] => (format!("if-match: \"{tag}\"\r\n"), last),
            [last] => (String::new(), last),
            _ => panic!("{steps:?} is more than one request can say"),
        };
        let (method, body) = match last {
            Step::Put(_, item) => ("PUT", item.value.to_string()),
            Step::Delete(_) => ("DELETE", String::new()),
            _ => ("GET", String::new()),
        };
        (method, format!("/v1/{}", self.name_of(last.key())), condition, body)
    }

    fn transaction(&self, steps: &[Step]) -> String {
        let operations = steps.iter().map(|step| {
            let key = self.name_of(step.key());
            match step {
                Step::Check(_, tag) => json!({"op": "check", "key": key, "etag": tag.map(quoted)}),
                Step::Get(..) => json!({"op": "get", "key": key}),
                Step::Put(_, item) => json!({"op": "put", "key": key, "value": item.value.to_string()}),
                Step::Delete(_) => json!({"op": "delete", "key": key}),
            }
        });
        Value::Array(operations.collect()).to_string()
    }
}

/// What a key of a history is called.
fn name_of(history: &str, key: Key) -> String {
    // One tag, since transactions are of keys that share a shard.
    format!("{{{history}}}-{key}")
}

/// All keys of a history.
pub fn keys_of(history: &str) -> impl Iterator<Item = String> {
    (0..KEYS).map(move |key| name_of(history, key))
}

/// Reads the keys of a history now and then from a server that need not have the newest, for as long as this says. What it
/// shows never goes back. Gives how often it showed something.
pub fn read_on(address: SocketAddr, history: &str, go_on: impl Fn() -> bool) -> usize {
    let mut connection = Connection::open(address);
    let (mut newest, mut shown) = ([0; KEYS], 0);
    while go_on() {
        for (key, newest) in newest.iter_mut().enumerate() {
            let answer = connection.ask("GET", &format!("/v1/{}", name_of(history, key)), b"");
            if let (200, Some(tag)) = (answer.status, answer.etag()) {
                assert!(tag >= *newest, "key {key} of {history} went back from {newest} to {tag}");
                (*newest, shown) = (tag, shown + 1);
            }
        }
        // News come ten times a second, and others need the processor.
        thread::sleep(Duration::from_millis(5));
    }
    shown
}

fn quoted(tag: u64) -> String {
    format!("\"{tag}\"")
}

/// What an answer says, also of what was seen. None when it says that nothing happened.
fn outcome(answer: &Response, form: Form, steps: &mut [Step]) -> Option<Outcome> {
    match answer.status {
        200 | 201 | 404 if form == Form::Plain => {
            let tag = answer.etag();
            match steps.last_mut().expect("there is one") {
                Step::Get(_, seen) => *seen = tag.map(|tag| Item { value: number(answer.text()), tag }),
                // The path that a guest does not know.
                _ if answer.status == 404 => return None,
                Step::Put(_, item) => item.tag = tag.expect("a put is answered with its tag"),
                Step::Delete(_) | Step::Check(..) => {}
            }
            Some(Outcome::Done)
        }
        200 => {
            let given: Vec<Value> = serde_json::from_slice(&answer.body).expect("a list in JSON");
            assert_eq!(given.len(), steps.len(), "{}", answer.text());
            for (given, step) in given.iter().zip(steps) {
                let tag = given["etag"].as_str().map(|tag| number(tag.trim_matches('"')));
                match step {
                    Step::Get(_, seen) => {
                        let value = given["value"].as_str().map(number);
                        *seen = tag.zip(value).map(|(tag, value)| Item { value, tag });
                    }
                    Step::Put(_, item) => item.tag = tag.expect("a put is answered with its tag"),
                    Step::Delete(_) | Step::Check(..) => {}
                }
            }
            Some(Outcome::Done)
        }
        412 => Some(Outcome::Failed(0)),
        409 => {
            let at = answer.text().strip_prefix("operation ").and_then(|text| text.split_once(':')?.0.parse().ok());
            Some(Outcome::Failed(at.unwrap_or_else(|| panic!("no place in {}", answer.text()))))
        }
        404 | 429 | 503 => None,
        500 | 504 => Some(Outcome::Unknown),
        status => panic!("{status}: {}", answer.text()),
    }
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("nobody put {text:?}"))
}
