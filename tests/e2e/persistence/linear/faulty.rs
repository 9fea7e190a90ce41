//! A small server to test the checker: correct, or with one fault.
//!
//! It serves clients over real sockets. Its disk is a list of which only the beginning is synced; a kill loses the rest, as
//! a power cut does with files and a kill of a process does not.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

/// Duration of a sync.
const SYNC: Duration = Duration::from_millis(3);

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    None,
    /// Acknowledges a write before it is durable.
    AnswersEarly,
    /// Responds to a read before the returned value is durable.
    ReadsWithoutWaiting,
    /// Loses some acknowledged writes: the value before stays.
    LosesUpdates,
}

/// A value and its tag.
type Item = (String, u64);

#[derive(Default)]
struct Store {
    items: HashMap<String, Item>,
    /// The writes: a key, and its new item.
    log: Vec<(String, Option<Item>)>,
    safe: usize,
    connections: Vec<TcpStream>,
    /// Number of kills.
    kills: u64,
    over: bool,
}

pub struct Faulty {
    shared: Arc<(Mutex<Store>, Condvar)>,
    pub address: SocketAddr,
}

impl Faulty {
    pub fn start(fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::<(Mutex<Store>, Condvar)>::default();
        let (disk, acceptor) = (Arc::clone(&shared), Arc::clone(&shared));
        thread::spawn(move || {
            while !lock(&disk.0).over {
                thread::sleep(SYNC);
                let mut store = lock(&disk.0);
                store.safe = store.log.len();
                disk.1.notify_all();
            }
        });
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = Arc::clone(&acceptor);
                let mut store = lock(&acceptor.0);
                if store.over {
                    return;
                }
                store.connections.push(stream.try_clone().expect("a socket can be shared"));
                let life = store.kills;
                // The client gets no response, however the connection ends.
                thread::spawn(move || serve(&shared, stream, life, fault));
            }
        });
        Self { shared, address }
    }

    /// Drops unsynced writes and all connections.
    pub fn kill(&self) {
        let mut store = lock(&self.shared.0);
        store.kills += 1;
        let safe = store.safe;
        store.log.truncate(safe);
        store.items.clear();
        for (key, item) in store.log.clone() {
            match item {
                Some(item) => store.items.insert(key, item),
                None => store.items.remove(&key),
            };
        }
        for connection in store.connections.drain(..) {
            // Fails only when the client has disconnected.
            let _ = connection.shutdown(Shutdown::Both);
        }
        self.shared.1.notify_all();
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        lock(&self.shared.0).over = true;
        self.kill();
        // Wakes the acceptor.
        let _ = TcpStream::connect(self.address);
    }
}

fn lock(store: &Mutex<Store>) -> MutexGuard<'_, Store> {
    store.lock().expect("nobody panics with it")
}

struct Request {
    method: String,
    target: String,
    condition: Option<String>,
    /// The tag that the client has.
    known: Option<String>,
    body: String,
}

fn serve(shared: &(Mutex<Store>, Condvar), stream: TcpStream, life: u64, fault: Fault) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let request = read(&mut stream)?;
        let mut store = lock(&shared.0);
        if store.kills != life {
            return Ok(());
        }
        let before = store.log.len();
        let answer = answer(&mut store, &request, fault);
        let written = store.log.len() > before;
        let waits = match fault {
            Fault::AnswersEarly => !written,
            Fault::ReadsWithoutWaiting => written,
            Fault::None | Fault::LosesUpdates => true,
        };
        // All writes so far, which include those that were read.
        let rests_on = store.log.len();
        while waits && store.safe < rests_on && store.kills == life {
            store = shared.1.wait(store).expect("nobody panics with it");
        }
        if store.kills != life {
            return Ok(());
        }
        drop(store);
        stream.get_mut().write_all(answer.as_bytes())?;
    }
}

fn read(stream: &mut impl BufRead) -> io::Result<Request> {
    let mut line = || {
        let mut line = String::new();
        match stream.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok::<_, io::Error>(line.trim_end().to_owned()),
        }
    };
    let first = line()?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, target) = words.next().zip(words.next()).ok_or(io::ErrorKind::InvalidData)?;
    let (mut condition, mut known, mut length) = (None, None, 0);
    loop {
        let header = line()?;
        match header.split_once(": ") {
            None => break,
            Some(("content-length", value)) => length = value.parse().map_err(io::Error::other)?,
            Some(("if-match", value)) => condition = Some(value.to_owned()),
            Some(("if-none-match", "*")) => condition = Some(String::new()),
            Some(("if-none-match", value)) => known = Some(value.to_owned()),
            Some(_) => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let body = String::from_utf8(body).map_err(io::Error::other)?;
    Ok(Request { method, target, condition, known, body })
}

fn answer(store: &mut Store, request: &Request, fault: Fault) -> String {
    let Request { method, target, condition, known, body } = request;
    let Some(key) = target.strip_prefix("/v1").map(|key| key.trim_start_matches('/')) else {
        return text(404, "", "unknown path\n");
    };
    if let Some(prefix) = key.strip_prefix("?prefix=") {
        return delete(store, prefix, fault);
    }
    if key.is_empty() && method == "QUERY" || key.starts_with('?') {
        return several(store, key, body);
    }
    if method == "POST" && key.is_empty() {
        let operations: Vec<Value> = serde_json::from_str(body).expect("clients write JSON");
        return match play(store, &operations, fault) {
            Ok(given) => text(200, "", &Value::Array(given).to_string()),
            Err(at) => text(409, "", &format!("operation {at}: the check failed\n")),
        };
    }
    let (key, query) = key.split_once('?').unwrap_or((key, ""));
    let delta = query.strip_prefix("op=add&delta=").unwrap_or("0");
    let mut operations = Vec::new();
    if let Some(tag) = condition {
        let tag = if tag.is_empty() { Value::Null } else { tag.as_str().into() };
        operations.push(json!({"op": "check", "key": key, "etag": tag}));
    }
    let op = match (method.as_str(), query) {
        ("POST", "op=touch&ttl=1h") => "touch".to_owned(),
        ("POST", _) => "add".to_owned(),
        _ => method.to_lowercase(),
    };
    let delta: u64 = delta.parse().expect("clients add numbers");
    operations.push(json!({"op": op, "key": key, "value": body, "delta": delta}));
    let before = store.items.get(key).map(|(_, tag)| format!("\"{tag}\""));
    let Ok(given) = play(store, &operations, fault) else { return text(412, "", "it does not hold\n") };
    let given = given.last().expect("there is one");
    let tag = given["etag"].as_str().map_or(String::new(), |tag| format!("etag: {tag}\r\n"));
    match (method.as_str(), given["value"].as_str()) {
        ("GET", Some(_)) if known.is_some() && known.as_deref() == given["etag"].as_str() => {
            format!("HTTP/1.1 304 Said\r\n{tag}\r\n")
        }
        ("HEAD", Some(value)) => format!("HTTP/1.1 200 Said\r\n{tag}content-length: {}\r\n\r\n", value.len()),
        ("HEAD", None) => "HTTP/1.1 404 Said\r\ncontent-length: 12\r\n\r\n".to_owned(),
        ("GET" | "POST", Some(value)) => text(200, &tag, value),
        ("GET", None) => text(404, "", "no such key\n"),
        ("PUT", _) => text(201, &format!("{tag}kvs-created: {}\r\n", before.is_none()), ""),
        _ => text(200, &format!("kvs-deleted: {}\r\n", before.as_deref().unwrap_or("none")), ""),
    }
}

/// Deletes the keys that begin so.
fn delete(store: &mut Store, prefix: &str, fault: Fault) -> String {
    let keys = store.items.keys().filter(|key| key.starts_with(prefix));
    let operations: Vec<_> = keys.map(|key| json!({"op": "delete", "key": key})).collect();
    play(store, &operations, fault).expect("nothing is checked");
    text(200, "", &json!({"deleted": operations.len(), "complete": true}).to_string())
}

/// The values of several keys: those that begin so, or those of the query or the body.
fn several(store: &Store, query: &str, body: &str) -> String {
    let is_wanted = |key: &str| match query.strip_prefix("?values=true&prefix=") {
        Some(prefix) => key.starts_with(prefix),
        None if query.is_empty() => body.contains(&format!("\"{key}\"")),
        None => query[1..].split('&').any(|parameter| parameter.strip_prefix("key=") == Some(key)),
    };
    let found = store.items.iter().filter(|(key, _)| is_wanted(key));
    let entries = found.map(|(key, (value, tag))| json!({"key": key, "value": value, "etag": format!("\"{tag}\"")}));
    text(200, "", &json!({"keys": entries.collect::<Vec<_>>()}).to_string())
}

fn text(status: u16, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status} Said\r\n{headers}content-length: {}\r\n\r\n{body}", body.len())
}

/// Runs all operations, or, when a check fails, none, and returns its index.
fn play(store: &mut Store, operations: &[Value], fault: Fault) -> Result<Vec<Value>, usize> {
    let (mut items, mut log) = (store.items.clone(), store.log.clone());
    let mut given = Vec::new();
    for (at, operation) in operations.iter().enumerate() {
        let key = operation["key"].as_str().expect("clients name keys").to_owned();
        let there = items.get(&key).cloned();
        let tag = there.as_ref().map(|(_, tag)| format!("\"{tag}\""));
        match operation["op"].as_str() {
            Some("check") if operation["value"].is_string() => {
                if operation["value"].as_str() != there.as_ref().map(|(value, _)| value.as_str()) {
                    return Err(at);
                }
                given.push(json!({}));
            }
            Some("check") if operation["etag"].as_str() != tag.as_deref() => return Err(at),
            Some(op @ ("put" | "add" | "touch")) => {
                let value = match op {
                    "put" => operation["value"].as_str().expect("it has one").to_owned(),
                    "touch" => there.expect("clients check that it is there").0,
                    _ => {
                        let number: u64 = there.map_or(0, |(value, _)| value.parse().expect("clients put numbers"));
                        (number + operation["delta"].as_u64().expect("it has one")).to_string()
                    }
                };
                let item = (value.clone(), log.len() as u64 + 1);
                log.push((key.clone(), Some(item.clone())));
                given.push(json!({"etag": format!("\"{}\"", item.1), "value": value}));
                if fault != Fault::LosesUpdates || item.1 % 61 != 0 {
                    items.insert(key, item);
                }
            }
            Some("delete") => {
                log.push((key.clone(), None));
                items.remove(&key);
                given.push(json!({}));
            }
            _ => given.push(json!({"etag": tag, "value": there.map(|(value, _)| value)})),
        }
    }
    (store.items, store.log) = (items, log);
    Ok(given)
}
