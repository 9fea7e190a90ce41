//! Clients that write, delete and read until the server ends, and know the possible values of every key afterwards.
//!
//! Each client is the only one that writes its keys, so it knows their possible values: what the server acknowledged, or, for the
//! one request whose outcome is unknown, the value before or the whole new one. A value names its client and write, so that
//! anything else is recognised as corruption. Clients also read each other's keys: what one of them has seen must not
//! disappear.
//!
//! Must never know: how the server ends.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;

use fastrand::Rng;
use rustix::process::Signal;

use super::server::{PATIENCE, Server};
use super::wire::{Connection, Response};

const CLIENTS: usize = 8;
const KEYS_PER_CLIENT: u64 = 50;

/// Small segments, so that faults also occur during rotation.
pub const SMALL_SEGMENTS: [&str; 4] = ["--segment-bytes", "128KiB", "--max-value-bytes", "16KiB"];

/// Statuses of an unknown outcome: the log failed, or the write took too long. No other failure in these tests has them.
const OUTCOME_UNKNOWN: [u16; 2] = [500, 504];

/// Returns the number of repetitions of a test: its own, or that of a variable.
pub fn count(variable: &str, count: u64) -> u64 {
    std::env::var(variable).map_or(count, |count| count.parse().expect("the variable is a number"))
}

/// Guard that sets a flag when it is dropped, also by a panic, so that threads which run until then end and the failure is
/// reported.
pub struct SaysOver<'b>(pub &'b AtomicBool);

impl Drop for SaysOver<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Key: its client, and a number.
type Key = (usize, u64);
/// Value and its sequence.
type Item = (String, u64);
/// State of a key.
type Held = Option<Item>;

/// All clients, over all runs of a server.
pub struct Clients(Vec<Client>);

struct Client {
    number: usize,
    rng: Rng,
    /// Number of writes, so that no two have the same value.
    writes: u64,
    /// Newest sequence that the client got.
    newest: u64,
    model: HashMap<u64, Held>,
    /// Write with an unknown outcome: its key, and its value, or `None` for a delete.
    unknown: Option<(u64, Option<String>)>,
    /// Last seen state of other clients' keys.
    seen: HashMap<Key, Item>,
}

impl Clients {
    pub fn new(rng: &mut Rng) -> Self {
        Self((0..CLIENTS).map(|number| Client::new(number, rng.fork())).collect())
    }

    /// Runs all clients until there is no response. Calls `answered` for each response, and runs `meanwhile` concurrently.
    pub fn run(&mut self, address: SocketAddr, answered: impl Fn(u16) + Sync, meanwhile: impl FnOnce()) {
        let go_on = |status| {
            answered(status);
            true
        };
        self.run_while(address, go_on, meanwhile);
    }

    /// As `run`, while `answered` returns true.
    pub fn run_while(&mut self, address: SocketAddr, answered: impl Fn(u16) -> bool + Sync, meanwhile: impl FnOnce()) {
        let answered = &answered;
        thread::scope(|scope| {
            for client in &mut self.0 {
                scope.spawn(move || client.run(address, answered));
            }
            meanwhile();
        });
    }

    /// Returns the number of clients with a write of unknown outcome.
    pub fn unknown(&self) -> usize {
        self.0.iter().filter(|client| client.unknown.is_some()).count()
    }

    /// Checks what survived, and adopts it as the state of the keys.
    pub fn settle(&mut self, address: SocketAddr) {
        let survived = read_everything(address);
        let seen: Vec<_> = self.0.iter_mut().flat_map(|client| client.seen.drain()).collect();
        for client in &mut self.0 {
            client.settle(&survived, &seen);
        }
    }
}

/// Reads the state of all keys.
fn read_everything(address: SocketAddr) -> HashMap<Key, Held> {
    let mut connection = Connection::open(address);
    let all = (0..CLIENTS).flat_map(|client| (0..KEYS_PER_CLIENT).map(move |key| (client, key)));
    all.map(|(client, key)| ((client, key), held(&connection.ask("GET", &path(client, key), b"")))).collect()
}

fn held(response: &Response) -> Held {
    match response.status {
        200 => Some((response.text().to_owned(), response.etag().expect("a value has its sequence"))),
        404 => None,
        status => panic!("GET got {status}: {}", response.text()),
    }
}

fn path(client: usize, key: u64) -> String {
    format!("/v1/client-{client}-key-{key}")
}

impl Client {
    fn new(number: usize, rng: Rng) -> Self {
        Self { number, rng, writes: 0, newest: 0, model: HashMap::new(), unknown: None, seen: HashMap::new() }
    }

    /// Sends random requests until there is no response, or one of an unknown outcome.
    fn run(&mut self, address: SocketAddr, answered: &impl Fn(u16) -> bool) {
        let Ok(mut connection) = Connection::try_open(address) else { return };
        while let Some(status) = self.ask_something(&mut connection) {
            if !answered(status) || OUTCOME_UNKNOWN.contains(&status) {
                return;
            }
        }
    }

    fn ask_something(&mut self, connection: &mut Connection) -> Option<u16> {
        let key = self.rng.u64(..KEYS_PER_CLIENT);
        let response = match self.rng.u8(0..10) {
            0..6 => {
                self.writes += 1;
                // Mostly padded, up to several sectors of a disk.
                let padding = self.rng.usize(0..3_000);
                let value = format!("client {} write {} {}", self.number, self.writes, "=".repeat(padding));
                self.unknown = Some((key, Some(value.clone())));
                let response = connection.try_ask("PUT", &path(self.number, key), value.as_bytes()).ok()?;
                if response.status == 201 {
                    let etag = response.etag().expect("a PUT is answered with its sequence");
                    assert!(etag > self.newest, "{etag} was given after {}", self.newest);
                    self.newest = etag;
                    self.model.insert(key, Some((value, etag)));
                }
                response
            }
            6..8 => {
                self.unknown = Some((key, None));
                let response = connection.try_ask("DELETE", &path(self.number, key), b"").ok()?;
                if response.status == 200 {
                    self.model.insert(key, None);
                }
                response
            }
            8 => {
                let response = connection.try_ask("GET", &path(self.number, key), b"").ok()?;
                if response.status < 500 {
                    assert_eq!(held(&response), self.known(key), "key {key} of client {}", self.number);
                }
                response
            }
            _ => {
                let other = self.rng.usize(..CLIENTS);
                let response = connection.try_ask("GET", &path(other, key), b"").ok()?;
                if response.status < 500 {
                    match held(&response) {
                        Some(seen) => self.seen.insert((other, key), seen),
                        None => self.seen.remove(&(other, key)),
                    };
                }
                response
            }
        };
        match response.status {
            500 | 504 => assert!(response.text().starts_with("outcome unknown: "), "{}", response.text()),
            // Done, or rejected without effect.
            200 | 201 | 403 | 404 | 503 | 507 => self.unknown = None,
            status => panic!("{status}: {}", response.text()),
        }
        Some(response.status)
    }

    fn known(&self, key: u64) -> Held {
        self.model.get(&key).cloned().flatten()
    }

    /// Checks what survived of the client's keys, and adopts it as their state.
    fn settle(&mut self, survived: &HashMap<Key, Held>, seen: &[(Key, Item)]) {
        for key in 0..KEYS_PER_CLIENT {
            let (before, now) = (self.known(key), &survived[&(self.number, key)]);
            let after = self.unknown.as_ref().filter(|(unknown, _)| *unknown == key).map(|(_, value)| value);
            // A write without a response has a sequence that no client knows, which must be a new one.
            let happened = after.is_some_and(|after| match (after, now) {
                (Some(value), Some((survived, etag))) => value == survived && *etag > self.newest,
                (None, None) => true,
                _ => false,
            });
            let name = path(self.number, key);
            assert!(happened || *now == before, "{name}: {now:.60?} is neither {before:.60?} nor {after:.60?}");

            let of_this = seen.iter().filter(|(name, _)| *name == (self.number, key));
            for (_, (value, etag)) in of_this {
                let taken_back = match now {
                    Some((_, survived)) => survived < etag,
                    // Deleted after it was seen, unless what was seen is the write of unknown outcome.
                    None => after.is_some_and(|after| after.as_ref() == Some(value)),
                };
                assert!(!taken_back, "{name}: {value:.60} with {etag} was seen, but now it is {now:.60?}");
            }
            self.newest = now.as_ref().map_or(0, |(_, etag)| *etag).max(self.newest);
            self.model.insert(key, now.clone());
        }
        self.unknown = None;
    }
}

/// Runs all clients and kills the server after this number of responses.
pub fn run_until_killed(server: &Server, clients: &mut Clients, answers: u64) {
    let count = AtomicU64::new(0);
    // Room for one, so that sending never blocks.
    let (enough, awaited) = sync_channel(1);
    let answered = |status| {
        assert!(status < 500, "{status} from a server in good health");
        if count.fetch_add(1, Ordering::Relaxed) + 1 == answers {
            enough.send(()).expect("it is awaited");
        }
    };
    clients.run(server.address(), answered, || {
        awaited.recv_timeout(PATIENCE).expect("the server keeps answering");
        server.signal(Signal::KILL);
    });
}

/// Runs clients until this many responses were received, then `trouble` concurrently; they end at the first write of unknown
/// outcome, or when `trouble` is over.
pub fn under_load(server: &Server, clients: &mut Clients, answers: u64, trouble: impl FnOnce()) {
    let count = AtomicU64::new(0);
    let (enough, awaited) = sync_channel(1);
    let over = AtomicBool::new(false);
    clients.run_while(
        server.address(),
        |_| {
            if count.fetch_add(1, Ordering::Relaxed) + 1 == answers {
                enough.send(()).expect("it is awaited");
            }
            !over.load(Ordering::Relaxed)
        },
        || {
            let _over = SaysOver(&over);
            awaited.recv_timeout(PATIENCE).expect("the server keeps answering");
            trouble();
        },
    );
}
