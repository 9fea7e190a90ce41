//! The recipes in Rust, `docs/recipes-rust.md`, which includes the parts between the anchors.

// ANCHOR: client
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use ureq::http::{Request, Response};
use ureq::{Agent, Body};

pub struct Kvs {
    agent: Agent,
    server: String,
}

/// The write may have been applied or not.
#[derive(Debug, thiserror::Error)]
#[error("outcome unknown")]
pub struct OutcomeUnknown;

/// An entity tag; none is that of a missing key.
pub type Tag = Option<String>;

pub fn encode(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

pub fn key(name: &str) -> String {
    format!("/v1/{}", encode(name))
}

fn header(response: &Response<Body>, name: &str) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.to_owned())
}

impl Kvs {
    pub fn new(server: &str) -> Self {
        let config = Agent::config_builder().http_status_as_error(false).proxy(None);
        Self {
            agent: config.timeout_recv_response(Some(Duration::from_secs(75))).build().into(),
            server: server.into(),
        }
    }

    /// Sends a request, and repeats it only if it was certainly not applied.
    pub fn send(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &str) -> Result<Response<Body>> {
        for attempt in 0..5 {
            if attempt > 0 {
                sleep(Duration::from_millis(100) * 2_u32.pow(attempt));
            }
            let mut request = Request::builder().method(method).uri(format!("{}{target}", self.server));
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let response = match method {
                "GET" | "DELETE" => self.agent.run(request.body(())?),
                _ => self.agent.run(request.body(body)?),
            };
            match response {
                Err(ureq::Error::Io(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
                Err(_) if method == "GET" => {}
                Err(error) => return Err(error).context(OutcomeUnknown),
                Ok(response) if header(&response, "kvs-error").as_deref() == Some("outcome_unknown") => {
                    bail!(OutcomeUnknown)
                }
                Ok(response) if matches!(response.status().as_u16(), 429 | 503) => {}
                Ok(response) => return Ok(response),
            }
        }
        bail!("{method} {target}: no response in 5 attempts")
    }

    /// The value and its tag.
    pub fn read(&self, name: &str) -> Result<(Option<String>, Tag)> {
        let mut found = self.send("GET", &key(name), &[], "")?;
        match found.status().as_u16() {
            200 => Ok((Some(found.body_mut().read_to_string()?), header(&found, "etag"))),
            _ => Ok((None, None)),
        }
    }

    /// Writes if the value still has this tag. Returns the new tag, or none if another client has written.
    pub fn write(&self, name: &str, value: &str, tag: &Tag, ttl: Option<&str>) -> Result<Tag> {
        let target = key(name) + &ttl.map(|ttl| format!("?ttl={ttl}")).unwrap_or_default();
        let condition = tag.as_deref().map_or(("if-none-match", "*"), |tag| ("if-match", tag));
        let mut is_unknown = false;
        loop {
            match self.send("PUT", &target, &[condition], value) {
                Ok(written) if written.status() == 201 => return Ok(header(&written, "etag")),
                Ok(_) if !is_unknown => return Ok(None),
                Err(error) if !error.is::<OutcomeUnknown>() => return Err(error),
                _ => is_unknown = true,
            }
            // It was applied if the value is this one, and may be applied later while the tag is the former.
            let (found, found_tag) = self.read(name)?;
            if found.as_deref() == Some(value) {
                return Ok(found_tag);
            }
            if found_tag != *tag {
                return Ok(None);
            }
        }
    }
}
// ANCHOR_END: client

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::{Value, json};

use crate::support::lossy::Lossy;
use crate::support::server::Server;

// ANCHOR: update
pub fn update(kvs: &Kvs, name: &str, change: impl Fn(Option<Value>) -> Value) -> Result<Value> {
    loop {
        let (found, tag) = kvs.read(name)?;
        let after = change(found.map(|found| serde_json::from_str(&found)).transpose()?);
        let done = format!("{{{name}}}/done/{:032x}", fastrand::u128(..));
        let operations = json!([
            {"op": "check", "key": name, "etag": tag},
            {"op": "put", "key": name, "json": after},
            {"op": "put", "key": done, "value": "", "ttl": "1h"},
        ]);
        if transact(kvs, &operations.to_string(), &done)? {
            return Ok(after);
        }
    }
}

/// Runs a transaction with a check. Returns whether it was applied, which the key `done` shows that it puts.
pub fn transact(kvs: &Kvs, operations: &str, done: &str) -> Result<bool> {
    let mut is_unknown = false;
    loop {
        match kvs.send("POST", "/v1", &[], operations) {
            Ok(response) if response.status() == 200 => return Ok(true),
            // The check fails after the transaction, and after another client's; in both cases it cannot be applied any more.
            Ok(response) if response.status() == 409 => return Ok(is_unknown && kvs.read(done)?.0.is_some()),
            Ok(response) => bail!("the transaction got {}", response.status()),
            Err(error) if !error.is::<OutcomeUnknown>() => return Err(error),
            Err(_) => is_unknown = true,
        }
    }
}

pub fn sell(kvs: &Kvs) -> Result<Value> {
    update(kvs, "item7", |item| json!({ "stock": item.map_or(5, |item| item["stock"].as_i64().unwrap_or(0) - 1) }))
}
// ANCHOR_END: update

// ANCHOR: lock
/// Works while no other client does, with a fencing token.
pub fn locked<T>(kvs: &Kvs, name: &str, work: impl FnOnce(u64) -> T) -> Result<T> {
    let owner = fastrand::u64(..).to_string();
    let tag = loop {
        if let Some(tag) = kvs.write(name, &owner, &None, Some("30s"))? {
            break tag;
        }
        if let (Some(_), Some(tag)) = kvs.read(name)? {
            kvs.send("GET", &(key(name) + "?wait=60s"), &[("if-none-match", &tag)], "")?;
        }
    };
    let done = work(tag.trim_matches('"').parse()?);
    kvs.send("DELETE", &key(name), &[("if-match", &tag)], "")?;
    Ok(done)
}
// ANCHOR_END: lock

// ANCHOR: session
/// Begins a session. Its id is a secret.
pub fn begin(kvs: &Kvs, user: &str) -> Result<String> {
    let id = format!("session/{:032x}", fastrand::u128(..));
    kvs.write(&id, &json!({ "user": user }).to_string(), &None, Some("30m"))?.context("the id is taken")?;
    Ok(id)
}

/// The session, which is extended by it.
pub fn session(kvs: &Kvs, id: &str) -> Result<Option<String>> {
    kvs.send("POST", &(key(id) + "?op=touch&ttl=30m"), &[], "")?;
    Ok(kvs.read(id)?.0)
}
// ANCHOR_END: session

// ANCHOR: list
/// All keys with a prefix and their values, and the position to watch from.
pub fn list(kvs: &Kvs, prefix: &str) -> Result<(BTreeMap<String, String>, String)> {
    let (mut found, mut position, mut cursor) = (BTreeMap::new(), None, String::new());
    loop {
        let target = format!("/v1?prefix={}&values=true&limit=2{cursor}", encode(prefix));
        let mut page = kvs.send("GET", &target, &[], "")?;
        position = position.or(header(&page, "kvs-position"));
        let page: Value = serde_json::from_reader(page.body_mut().as_reader())?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        found.extend(
            page["keys"].as_array().into_iter().flatten().map(|item| (text(&item["key"]), text(&item["value"]))),
        );
        let Some(next) = page["cursor"].as_str() else { break };
        cursor = format!("&cursor={}", encode(next));
    }
    Ok((found, position.context("the first page has a position")?))
}
// ANCHOR_END: list

// ANCHOR: copies
/// Keeps a copy of all keys with a prefix up to date, for as long as `each` returns true.
pub fn copies(kvs: &Kvs, prefix: &str, mut each: impl FnMut(&BTreeMap<String, String>) -> bool) -> Result<()> {
    loop {
        let (mut copy, mut position) = list(kvs, prefix)?;
        if !each(&copy) {
            return Ok(());
        }
        loop {
            let target = format!("/v1?watch&prefix={}&since={position}", encode(prefix));
            let events = kvs.send("GET", &target, &[], "")?;
            // After a 410 the position is no longer in the log, and the copy is made again.
            if events.status() != 200 {
                break;
            }
            let (mut kind, mut data) = (String::new(), Value::Null);
            for line in BufReader::new(events.into_body().into_reader()).lines().map_while(Result::ok) {
                match line.split_once(": ") {
                    Some(("id", id)) => position = id.to_owned(),
                    Some(("event", event)) => kind = event.to_owned(),
                    Some(("data", text)) => data = serde_json::from_str(text)?,
                    // The end of an event.
                    _ if line.is_empty() && !data.is_null() => {
                        let event = std::mem::take(&mut data);
                        let name = event["key"].as_str().unwrap_or_default().to_owned();
                        match &*kind {
                            "put" => drop(copy.insert(name, event["value"].as_str().unwrap_or_default().to_owned())),
                            _ => drop(copy.remove(&name)),
                        }
                        if !each(&copy) {
                            return Ok(());
                        }
                    }
                    _ => {}
                }
            }
        }
    }
}
// ANCHOR_END: copies

/// A client whose conditional writes are applied, and of whose responses every second is lost.
fn client() -> (Server, Lossy, Kvs) {
    let server = Server::start(&[]);
    let proxy = Lossy::start(server.address());
    let kvs = Kvs::new(&format!("http://{}", proxy.address));
    (server, proxy, kvs)
}

#[test]
fn updates_in_rust_all_count() {
    let (_server, proxy, kvs) = client();
    sell(&kvs).expect("it is put");
    thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(|| sell(&kvs).expect("it is sold")))));
    let (found, _) = kvs.read("item7").expect("it is there");
    let found: Value = serde_json::from_str(&found.expect("it is there")).expect("JSON");
    assert_eq!(found["stock"], 1);
    assert!(proxy.lost() > 1);
}

#[test]
fn lock_in_rust_has_one_holder() {
    let (_server, _proxy, kvs) = client();
    let inside = AtomicUsize::new(0);
    let work = |token| {
        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
        sleep(Duration::from_millis(10));
        inside.fetch_sub(1, Ordering::SeqCst);
        token
    };
    let tokens: BTreeSet<_> = thread::scope(|scope| {
        let holders: Vec<_> = (0..3).map(|_| scope.spawn(|| locked(&kvs, "lock/report", work))).collect();
        holders.into_iter().map(|holder| holder.join().expect("no panic").expect("it is locked")).collect()
    });
    assert_eq!(tokens.len(), 3);
}

#[test]
fn sessions_and_pages_in_rust_are_complete() {
    let (_server, _proxy, kvs) = client();
    let id = begin(&kvs, "ann").expect("it begins");
    assert_eq!(session(&kvs, &id).expect("it is read").as_deref(), Some(r#"{"user":"ann"}"#));
    assert_eq!(session(&kvs, "session/expired").expect("it is read"), None);
    for number in 0..5 {
        kvs.write(&format!("page/{number}"), "", &None, None).expect("it is put");
    }
    let (found, _) = list(&kvs, "page/").expect("it is listed");
    assert_eq!(found.into_keys().collect::<Vec<_>>(), ["page/0", "page/1", "page/2", "page/3", "page/4"]);
}

#[test]
fn copy_in_rust_follows_changes() {
    let (_server, _proxy, kvs) = client();
    let copy = |pairs: &[(&str, &str)]| -> BTreeMap<_, _> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    kvs.write("color/sky", "blue", &None, None).expect("it is put");
    let mut seen = Vec::new();
    copies(&kvs, "color/", |now| {
        seen.push(now.clone());
        match seen.len() {
            1 => drop(kvs.write("color/sun", "yellow", &None, None).expect("it is put")),
            2 => drop(kvs.send("DELETE", &key("color/sky"), &[], "").expect("it is deleted")),
            _ => return false,
        }
        true
    })
    .expect("it follows");
    let both = copy(&[("color/sky", "blue"), ("color/sun", "yellow")]);
    assert_eq!(seen, [copy(&[("color/sky", "blue")]), both, copy(&[("color/sun", "yellow")])]);
}
