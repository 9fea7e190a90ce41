//! Clients that write, delete and read until nobody answers, and know what every key may hold afterwards.
//!
//! Each client owns its keys and is the only one that writes them, so it knows what they may hold: what it was told, or,
//! for the one request whose outcome is unknown, what was there before or what was asked for, whole. Values say which
//! client wrote them and in which of its writes; anything else would be an invention. Clients also read each other's
//! keys: what one of them has seen must not be taken back.
//!
//! Must never know: how the server comes to its end.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use fastrand::Rng;

use crate::wire::{Connection, Response};

const CLIENTS: usize = 8;
const KEYS_PER_CLIENT: u64 = 50;

/// Small segments, so that what happens to the server also meets the change from one to the next.
pub const SMALL_SEGMENTS: [&str; 4] = ["--segment-bytes", "128KiB", "--max-value-bytes", "16KiB"];

/// The statuses that say so: the log failed, or it took too long. No other failure of a request to the store itself has
/// them here.
const OUTCOME_UNKNOWN: [u16; 2] = [500, 504];

/// How often a test does what it does many times: its own count, or the one a variable asks for.
pub fn count(variable: &str, count: u64) -> u64 {
    std::env::var(variable).map_or(count, |count| count.parse().expect("the variable is a number"))
}

/// Says when it is dropped that something is over, also by a panic: those who go on until then would do so for ever, and a
/// failure would hang.
pub struct SaysOver<'b>(pub &'b AtomicBool);

impl Drop for SaysOver<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A key: its owner, and a number.
type Key = (usize, u64);
/// A value and its sequence.
type Item = (String, u64);
/// What a key holds.
type Held = Option<Item>;

/// All clients, over all lives of a server.
pub struct Clients(Vec<Client>);

struct Client {
    number: usize,
    rng: Rng,
    /// Writes begun, so that no two have the same value.
    writes: u64,
    /// The newest sequence it was told.
    newest: u64,
    model: HashMap<u64, Held>,
    /// The write whose outcome nobody told: its key, and its value or, for a delete, none.
    unknown: Option<(u64, Option<String>)>,
    /// What it last saw of keys of others.
    seen: HashMap<Key, Item>,
}

impl Clients {
    pub fn new(rng: &mut Rng) -> Self {
        Self((0..CLIENTS).map(|number| Client::new(number, rng.fork())).collect())
    }

    /// Lets all clients loose until there is no answer; `answered` hears of every answer, `meanwhile` runs beside them.
    pub fn run(&mut self, address: SocketAddr, answered: impl Fn(u16) + Sync, meanwhile: impl FnOnce()) {
        let go_on = |status| {
            answered(status);
            true
        };
        self.run_while(address, go_on, meanwhile);
    }

    /// As `run`, for as long as `answered` says.
    pub fn run_while(&mut self, address: SocketAddr, answered: impl Fn(u16) -> bool + Sync, meanwhile: impl FnOnce()) {
        let answered = &answered;
        thread::scope(|scope| {
            for client in &mut self.0 {
                scope.spawn(move || client.run(address, answered));
            }
            meanwhile();
        });
    }

    /// How many have a write whose outcome they do not know.
    pub fn unknown(&self) -> usize {
        self.0.iter().filter(|client| client.unknown.is_some()).count()
    }

    /// Checks what survived, and takes it for what the keys hold now.
    pub fn settle(&mut self, address: SocketAddr) {
        let survived = read_everything(address);
        let seen: Vec<_> = self.0.iter_mut().flat_map(|client| client.seen.drain()).collect();
        for client in &mut self.0 {
            client.settle(&survived, &seen);
        }
    }
}

/// What all keys hold.
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

    /// Asks this and that until there is no answer, or the answer is that nobody knows.
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
            // Done, or refused before anything happened.
            200 | 201 | 403 | 404 | 503 | 507 => self.unknown = None,
            status => panic!("{status}: {}", response.text()),
        }
        Some(response.status)
    }

    fn known(&self, key: u64) -> Held {
        self.model.get(&key).cloned().flatten()
    }

    /// Checks what survived of its keys, and takes it for what they hold now.
    fn settle(&mut self, survived: &HashMap<Key, Held>, seen: &[(Key, Item)]) {
        for key in 0..KEYS_PER_CLIENT {
            let (before, now) = (self.known(key), &survived[&(self.number, key)]);
            let after = self.unknown.as_ref().filter(|(unknown, _)| *unknown == key).map(|(_, value)| value);
            // A write that got no answer has a sequence that nobody was told, which must be a new one.
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
                    // Gone: by a delete after what was seen, unless what was seen is the very write that is in doubt.
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
