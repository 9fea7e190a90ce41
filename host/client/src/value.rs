//! Operations on one key: get, put, delete.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};

use anyhow::{Context, Result, bail};

use super::server::{ApiRequest, Server, add, path_of, shown};

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

/// Prints the value unchanged. On a terminal a missing newline at its end is added.
pub fn get(server: &Server, key: &str, out: &mut (impl Write + IsTerminal)) -> Result<()> {
    let request = ApiRequest { method: "GET", target: &path_of(key), headers: &[], body: None };
    let mut value = server.send(&request).with_context(|| format!("get {}", shown(key)))?.into_body().into_reader();
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

/// Value and options of a put.
#[derive(Debug)]
pub struct Put {
    /// The value; `@FILE` is the content of a file, `None` standard input.
    pub value: Option<String>,
    pub condition: Condition,
    pub ttl_seconds: Option<u64>,
    pub content_type: Option<String>,
}

/// Puts a value and prints its entity tag, for [`Condition::Matches`].
pub fn put(server: &Server, key: &str, put: &Put, out: &mut impl Write) -> Result<()> {
    let value = read_value(put.value.as_deref())?;
    let mut target = path_of(key);
    if let Some(ttl) = put.ttl_seconds {
        add(&mut target, "ttl", &ttl.to_string());
    }
    let condition = put.condition.header();
    let kind = put.content_type.as_ref().map(|kind| ("content-type", kind.clone()));
    let headers: Vec<_> = [&condition, &kind].into_iter().flatten().map(|(name, value)| (*name, &value[..])).collect();
    let request = ApiRequest { method: "PUT", target: &target, headers: &headers, body: Some(&value) };
    let response = server.send(&request).with_context(|| format!("put {}", shown(key)))?;
    if let Some(tag) = response.headers().get("etag").and_then(|tag| tag.to_str().ok()) {
        writeln!(out, "{}", tag.trim_matches('"'))?;
    }
    Ok(())
}

/// Deletes a key.
pub fn delete(server: &Server, key: &str, condition: &Condition) -> Result<()> {
    let condition = condition.header();
    let headers: Vec<_> = condition.iter().map(|(name, value)| (*name, &value[..])).collect();
    let request = ApiRequest { method: "DELETE", target: &path_of(key), headers: &headers, body: None };
    server.send(&request).with_context(|| format!("delete {}", shown(key)))?;
    Ok(())
}

fn read_value(argument: Option<&str>) -> Result<Vec<u8>> {
    let (name, mut from): (String, Box<dyn Read>) = match argument {
        None | Some("@-") => ("standard input".to_owned(), Box::new(io::stdin())),
        Some(text) => match text.strip_prefix('@') {
            None => return Ok(text.as_bytes().to_vec()),
            Some(name) => {
                let file = File::open(name).with_context(|| format!("cannot read {name}"))?;
                (name.to_owned(), Box::new(file))
            }
        },
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
