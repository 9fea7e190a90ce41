//! Operations on one key: get, put, add, touch, delete.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use httpdate::parse_http_date;
use serde_json::{Map, Value, json};
use ureq::Body;
use ureq::http::Response;

use super::output::Output;
use super::server::{ApiRequest, ClientError, Server, add as add_parameter, path_of, shown};

/// Maximum size of a value, above that of any server.
const MAX_VALUE_BYTES: u64 = 1 << 30;

/// Precondition of a change.
#[derive(Clone, Debug, Default)]
pub enum Condition {
    #[default]
    Always,
    /// The key exists and has this entity tag; `*` is any.
    Matches(String),
    /// The key does not exist.
    IsNew,
}

impl Condition {
    fn header(&self) -> Option<(&'static str, String)> {
        match self {
            Self::Always => None,
            Self::IsNew => Some(("if-none-match", "*".to_owned())),
            Self::Matches(tag) if tag != "*" && !tag.contains('"') => Some(("if-match", format!("\"{tag}\""))),
            Self::Matches(tag) => Some(("if-match", tag.clone())),
        }
    }
}

/// Options of a get.
#[derive(Debug)]
pub struct Get {
    /// Prints entity tag, content type and expiry before the value.
    pub include: bool,
    /// Waits until there is a value, at most this long.
    pub wait: Option<Duration>,
    pub output: Output,
}

/// Prints the value unchanged. On a terminal a missing newline at its end is added. As JSON, prints it as an entry of a list, with
/// the expiry in whole seconds.
pub fn get(server: &Server, key: &str, get: &Get, out: &mut (impl Write + IsTerminal)) -> Result<()> {
    let mut target = path_of(key);
    if let Some(wait) = get.wait {
        add_duration(&mut target, "wait", wait);
    }
    let request = ApiRequest { method: "GET", target: &target, headers: &[], body: None };
    let response = server.send(&request).with_context(|| format!("get {}", shown(key)))?;
    if get.output == Output::Json {
        writeln!(out, "{}", Value::Object(entry(server, key, response)?))?;
        return Ok(());
    }
    if get.include {
        for name in ["etag", "content-type", "expires"] {
            if let Some(value) = header_of(&response, name) {
                writeln!(out, "{name}: {}", value.trim_matches('"'))?;
            }
        }
        writeln!(out)?;
    }
    let mut value = response.into_body().into_reader();
    let (mut buffer, mut last) = ([0; 1 << 16], b'\n');
    loop {
        let read = value.read(&mut buffer).map_err(|error| server.transport_error(&error))?;
        let Some(end) = buffer[..read].last() else { break };
        last = *end;
        out.write_all(&buffer[..read])?;
    }
    if last != b'\n' && out.is_terminal() {
        out.write_all(b"\n")?;
    }
    out.flush()?;
    Ok(())
}

/// The entry of a list for a key, of the response to its get: a list has a limit of bytes, and is not for every token.
fn entry(server: &Server, key: &str, response: Response<Body>) -> Result<Map<String, Value>> {
    let (etag, content_type) = (header_of(&response, "etag"), header_of(&response, "content-type"));
    let fields = [("key", Some(key)), ("etag", etag), ("content_type", content_type)];
    let mut entry: Map<_, _> = fields.into_iter().map(|(name, value)| (name.to_owned(), json!(value))).collect();
    let expires = header_of(&response, "expires").and_then(|date| parse_http_date(date).ok());
    if let Some(expires) = expires.and_then(|expires| expires.duration_since(UNIX_EPOCH).ok()) {
        entry.insert("expires".to_owned(), json!(expires.as_secs() * 1_000));
    }
    let mut value = Vec::new();
    response.into_body().into_reader().read_to_end(&mut value).map_err(|error| server.transport_error(&error))?;
    entry.insert("size".to_owned(), value.len().into());
    let (name, value) = match String::from_utf8(value) {
        Ok(text) => ("value", text),
        Err(error) => ("value_base64", STANDARD.encode(error.as_bytes())),
    };
    entry.insert(name.to_owned(), value.into());
    Ok(entry)
}

/// The same, of a key that may not exist.
pub fn entry_of(server: &Server, key: &str) -> Result<Option<Map<String, Value>>> {
    let request = ApiRequest { method: "GET", target: &path_of(key), headers: &[], body: None };
    match server.send(&request) {
        Ok(response) => entry(server, key, response).map(Some),
        Err(ClientError::Status { status: 404, .. }) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("get {}", shown(key))),
    }
}

fn header_of<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

/// The entity tag in a response, without its quotes.
fn tag_of(response: &Response<Body>) -> Option<&str> {
    header_of(response, "etag").map(|tag| tag.trim_matches('"'))
}

fn add_duration(target: &mut String, name: &str, duration: Duration) {
    add_parameter(target, name, &format!("{}ms", duration.as_millis()));
}

/// Value and options of a put.
#[derive(Debug)]
pub struct Put {
    /// The value; `@FILE` is the content of a file, `None` standard input.
    pub value: Option<String>,
    pub condition: Condition,
    pub ttl: Option<Duration>,
    pub content_type: Option<String>,
}

/// Puts a value and prints its entity tag, for [`Condition::Matches`].
pub fn put(server: &Server, key: &str, put: &Put, output: Output, out: &mut impl Write) -> Result<()> {
    let value = match put.value.as_deref() {
        None => read_input("-")?,
        Some(text) => match text.strip_prefix('@') {
            None => text.as_bytes().to_vec(),
            Some(name) => read_input(name)?,
        },
    };
    let mut target = path_of(key);
    if let Some(ttl) = put.ttl {
        add_duration(&mut target, "ttl", ttl);
    }
    let condition = put.condition.header();
    let kind = put.content_type.as_ref().map(|kind| ("content-type", kind.clone()));
    let headers: Vec<_> = [&condition, &kind].into_iter().flatten().map(|(name, value)| (*name, &value[..])).collect();
    let request = ApiRequest { method: "PUT", target: &target, headers: &headers, body: Some(&value) };
    let response = server.send(&request).with_context(|| format!("put {}", shown(key)))?;
    let created = header_of(&response, "kvs-created").map(|created| created == "true");
    let tag = tag_of(&response);
    output.print(tag, || json!({"key": key, "etag": header_of(&response, "etag"), "created": created}), out)?;
    Ok(())
}

/// Number to add, and options.
#[derive(Debug)]
pub struct Add {
    pub delta: i64,
    pub ttl: Option<Duration>,
    pub condition: Condition,
}

/// Adds to the number at a key, and prints the sum.
pub fn add(server: &Server, key: &str, add: &Add, output: Output, out: &mut impl Write) -> Result<()> {
    let mut target = path_of(key);
    add_parameter(&mut target, "op", "add");
    add_parameter(&mut target, "delta", &add.delta.to_string());
    if let Some(ttl) = add.ttl {
        add_duration(&mut target, "ttl", ttl);
    }
    let condition = add.condition.header();
    let headers: Vec<_> = condition.iter().map(|(name, value)| (*name, &value[..])).collect();
    let request = ApiRequest { method: "POST", target: &target, headers: &headers, body: Some(b"") };
    let response = server.send(&request).with_context(|| format!("add to {}", shown(key)))?;
    let tag = header_of(&response, "etag").map(str::to_owned);
    let mut sum = String::new();
    response.into_body().into_reader().read_to_string(&mut sum).map_err(|error| server.transport_error(&error))?;
    output.print(Some(&sum), || json!({"key": key, "etag": tag, "value": sum}), out)?;
    Ok(())
}

/// Gives the value of a key another time to live, and prints its entity tag.
pub fn touch(server: &Server, key: &str, ttl: Duration, output: Output, out: &mut impl Write) -> Result<()> {
    let mut target = path_of(key);
    add_parameter(&mut target, "op", "touch");
    add_duration(&mut target, "ttl", ttl);
    let request = ApiRequest { method: "POST", target: &target, headers: &[], body: Some(b"") };
    let response = server.send(&request).with_context(|| format!("touch {}", shown(key)))?;
    let tag = tag_of(&response);
    output.print(tag, || json!({"key": key, "etag": header_of(&response, "etag")}), out)?;
    Ok(())
}

/// Deletes a key. As JSON, prints the entity tag of the value that it had.
pub fn delete(server: &Server, key: &str, condition: &Condition, output: Output, out: &mut impl Write) -> Result<()> {
    let condition = condition.header();
    let headers: Vec<_> = condition.iter().map(|(name, value)| (*name, &value[..])).collect();
    let request = ApiRequest { method: "DELETE", target: &path_of(key), headers: &headers, body: None };
    let response = server.send(&request).with_context(|| format!("delete {}", shown(key)))?;
    let deleted = header_of(&response, "kvs-deleted").filter(|tag| *tag != "none");
    let sequence = header_of(&response, "kvs-sequence");
    output.print(None, || json!({"key": key, "deleted": deleted, "sequence": sequence}), out)?;
    Ok(())
}

/// Reads a file, or standard input: `-`.
pub fn read_input(name: &str) -> Result<Vec<u8>> {
    let (name, mut from): (_, Box<dyn Read>) = match name {
        "-" => ("standard input", Box::new(io::stdin())),
        name => (name, Box::new(File::open(name).with_context(|| format!("cannot read {name}"))?)),
    };
    let mut value = Vec::new();
    let limited = from.by_ref().take(MAX_VALUE_BYTES + 1).read_to_end(&mut value);
    if limited.with_context(|| format!("cannot read {name}"))? as u64 > MAX_VALUE_BYTES {
        bail!("{name} exceeds the maximum size of a value");
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entity_tag_without_quotes_is_quoted() {
        for (tag, sent) in [("5", "\"5\""), ("\"5\"", "\"5\""), ("*", "*"), ("\"5\", \"6\"", "\"5\", \"6\"")] {
            assert_eq!(Condition::Matches(tag.to_owned()).header(), Some(("if-match", sent.to_owned())));
        }
        assert_eq!(Condition::Always.header(), None);
    }
}
