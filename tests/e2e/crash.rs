//! Clients at once, killed in mid-flight, again and again on one directory.
//!
//! Each client owns its keys and is the only one that writes them, so it knows what they may hold: what it was told, or,
//! for the one request that got no answer, what was there before or what was asked for, whole. Values say which client
//! wrote them and in which of its writes; anything else would be an invention. Clients also read each other's keys:
//! what one of them has seen must not be taken back.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::process::Signal;

use crate::server::{PATIENCE, Process, Server, Stopped, serve};
use crate::wire::{Connection, Response};
use crate::zoo;

const CLIENTS: usize = 8;
const CYCLES: usize = 20;
const KEYS_PER_CLIENT: u64 = 50;
/// The kill comes after this many answers, and somewhere up to three times as many.
const ANSWERS_BEFORE_KILL: u64 = 400;

/// Small segments, so that kills also meet the change from one to the next.
const ARGS: [&str; 4] = ["--segment-bytes", "256KiB", "--max-value-bytes", "64KiB"];

/// A key: its owner, and a number.
type Key = (usize, u64);
/// A value and its sequence.
type Item = (String, u64);
/// What a key holds.
type Held = Option<Item>;

/// A client, over all cycles.
struct Client {
    number: usize,
    rng: Rng,
    /// Writes begun, so that no two have the same value.
    writes: u64,
    /// The newest sequence it was told.
    newest: u64,
    model: HashMap<u64, Held>,
    /// The write that got no answer: its key, and its value or, for a delete, none.
    unanswered: Option<(u64, Option<String>)>,
    /// What it last saw of keys of others.
    seen: HashMap<Key, Item>,
}

#[test]
fn whatever_was_acknowledged_or_seen_survives_kills_in_mid_flight() {
    let mut rng = zoo::dice();
    let mut clients: Vec<_> = (0..CLIENTS).map(|number| Client::new(number, rng.fork())).collect();
    let mut server = Server::start(&ARGS);
    for cycle in 1..=CYCLES {
        run_until_killed(&server, &mut clients, rng.u64(ANSWERS_BEFORE_KILL..ANSWERS_BEFORE_KILL * 3));
        let (status, stopped) = server.ends();
        assert_eq!(status.code(), None, "in cycle {cycle} it ended by itself: {status}");
        if rng.bool() {
            kill_during_recovery(&stopped, Duration::from_micros(rng.u64(..30_000)));
        }
        server = stopped.restart(&ARGS);

        let survived = read_everything(server.address());
        let unanswered = clients.iter().filter(|client| client.unanswered.is_some()).count();
        assert!(unanswered > 0, "in cycle {cycle} the kill met no write in flight, and showed nothing");
        let seen: Vec<_> = clients.iter_mut().flat_map(|client| client.seen.drain()).collect();
        for client in &mut clients {
            client.settle(&survived, &seen);
        }
    }
}

/// Lets all clients loose and kills the server after so many answers.
fn run_until_killed(server: &Server, clients: &mut [Client], answers: u64) {
    let (count, address) = (AtomicU64::new(0), server.address());
    // Taken by the client with the last of them.
    let (enough, awaited) = sync_channel(1);
    let enough = Mutex::new(Some(enough));
    thread::scope(|scope| {
        for client in clients {
            let answered = || {
                if count.fetch_add(1, Ordering::Relaxed) + 1 == answers {
                    let enough: Option<SyncSender<()>> = enough.lock().unwrap().take();
                    enough.expect("only one client has the last").send(()).expect("it is awaited");
                }
            };
            scope.spawn(move || client.run(address, answered));
        }
        awaited.recv_timeout(PATIENCE).expect("the server goes on answering");
        server.signal(Signal::KILL);
    });
}

/// Starts a server on what the last one left, and kills it too. Nothing tells from outside how far it has come by then,
/// so this is left to the dice.
fn kill_during_recovery(stopped: &Stopped, after: Duration) {
    let mut command = serve(stopped.data());
    command.args(ARGS);
    let mut process = Process::spawn(command);
    thread::sleep(after);
    process.signal(Signal::KILL);
    process.wait();
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
        Self { number, rng, writes: 0, newest: 0, model: HashMap::new(), unanswered: None, seen: HashMap::new() }
    }

    /// Asks this and that until there is no answer.
    fn run(&mut self, address: SocketAddr, answered: impl Fn()) {
        let Ok(mut connection) = Connection::try_open(address) else { return };
        while self.ask_something(&mut connection).is_some() {
            answered();
        }
    }

    fn ask_something(&mut self, connection: &mut Connection) -> Option<()> {
        let key = self.rng.u64(..KEYS_PER_CLIENT);
        match self.rng.u8(0..10) {
            0..6 => {
                self.writes += 1;
                // Mostly padded, up to several sectors of a disk.
                let padding = self.rng.usize(0..3_000);
                let value = format!("client {} write {} {}", self.number, self.writes, "=".repeat(padding));
                self.unanswered = Some((key, Some(value.clone())));
                let response = connection.try_ask("PUT", &path(self.number, key), value.as_bytes()).ok()?;
                assert_eq!(response.status, 201, "{}", response.text());
                let etag = response.etag().expect("a PUT is answered with its sequence");
                assert!(etag > self.newest, "{etag} was given after {}", self.newest);
                self.newest = etag;
                self.model.insert(key, Some((value, etag)));
            }
            6..8 => {
                self.unanswered = Some((key, None));
                let response = connection.try_ask("DELETE", &path(self.number, key), b"").ok()?;
                assert_eq!(response.status, 200, "{}", response.text());
                self.model.insert(key, None);
            }
            8 => {
                let response = connection.try_ask("GET", &path(self.number, key), b"").ok()?;
                assert_eq!(held(&response), self.known(key), "key {key} of client {}", self.number);
            }
            _ => {
                let other = self.rng.usize(..CLIENTS);
                let response = connection.try_ask("GET", &path(other, key), b"").ok()?;
                match held(&response) {
                    Some(seen) => self.seen.insert((other, key), seen),
                    None => self.seen.remove(&(other, key)),
                };
            }
        }
        self.unanswered = None;
        Some(())
    }

    fn known(&self, key: u64) -> Held {
        self.model.get(&key).cloned().flatten()
    }

    /// Checks what survived of its keys, and takes it for what they hold now.
    fn settle(&mut self, survived: &HashMap<Key, Held>, seen: &[(Key, Item)]) {
        for key in 0..KEYS_PER_CLIENT {
            let (before, now) = (self.known(key), &survived[&(self.number, key)]);
            let after = self.unanswered.as_ref().filter(|(unanswered, _)| *unanswered == key).map(|(_, value)| value);
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
        self.unanswered = None;
    }
}
