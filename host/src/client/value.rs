//! `kvs get`, `kvs put` and `kvs delete`: one key.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::server::{Ask, Server, add, path_of};

/// More than any server takes.
const MAX_VALUE_BYTES: u64 = 1 << 30;

/// What is to hold, else nothing is changed.
#[derive(Debug, Default, clap::Args)]
pub struct Condition {
    /// Only when the key has this entity tag; * for any
    #[arg(long, value_name = "ETAG")]
    pub if_match: Option<String>,
}

impl Condition {
    fn header(&self) -> Option<(&'static str, String)> {
        let tag = self.if_match.as_ref()?;
        let plain = tag != "*" && !tag.contains('"');
        Some(("if-match", if plain { format!("\"{tag}\"") } else { tag.clone() }))
    }
}

/// Prints the value as it is. At a terminal its last line is ended, so that the prompt is not glued to it.
pub fn get(server: &Server, key: &str) -> Result<()> {
    let ask = Ask { method: "GET", target: &path_of(key), headers: &[], body: None };
    let mut value = server.ask(&ask).with_context(|| format!("get {key}"))?.into_body().into_reader();
    let mut out = io::stdout().lock();
    let (mut buffer, mut last) = ([0; 1 << 16], b'\n');
    loop {
        let read = value.read(&mut buffer).map_err(|error| server.unanswered(&error))?;
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

/// What `put` is told beside the key.
#[derive(Debug, clap::Args)]
pub struct Put {
    /// The value; @FILE for what is in a file, and without it what comes from standard input
    value: Option<String>,

    /// Only when there is no such key yet
    #[arg(long, conflicts_with = "if_match")]
    create: bool,

    #[command(flatten)]
    condition: Condition,

    /// How long the key is there: 90s, 12h, 30days
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    ttl: Option<u64>,

    /// What kind of value it is, which GET tells those who ask: application/json
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,
}

/// Prints the entity tag of what was put, for `--if-match`.
pub fn put(server: &Server, key: &str, put: &Put) -> Result<()> {
    let value = read_value(put.value.as_deref())?;
    let mut target = path_of(key);
    if let Some(ttl) = put.ttl {
        add(&mut target, "ttl", &ttl.to_string());
    }
    let condition = if put.create { Some(("if-none-match", "*".to_owned())) } else { put.condition.header() };
    let kind = put.content_type.as_ref().map(|kind| ("content-type", kind.clone()));
    let headers: Vec<_> = [&condition, &kind].into_iter().flatten().map(|(name, value)| (*name, &value[..])).collect();
    let ask = Ask { method: "PUT", target: &target, headers: &headers, body: Some(&value) };
    let response = server.ask(&ask).with_context(|| format!("put {key}"))?;
    if let Some(tag) = response.headers().get("etag").and_then(|tag| tag.to_str().ok()) {
        writeln!(io::stdout(), "{}", tag.trim_matches('"'))?;
    }
    Ok(())
}

pub fn delete(server: &Server, key: &str, condition: &Condition) -> Result<()> {
    let condition = condition.header();
    let headers: Vec<_> = condition.iter().map(|(name, value)| (*name, &value[..])).collect();
    let ask = Ask { method: "DELETE", target: &path_of(key), headers: &headers, body: None };
    server.ask(&ask).with_context(|| format!("delete {key}"))?;
    Ok(())
}

fn read_value(said: Option<&str>) -> Result<Vec<u8>> {
    let (name, mut from): (String, Box<dyn Read>) = match said {
        None | Some("@-") => ("standard input".to_owned(), Box::new(io::stdin())),
        Some(text) => match text.strip_prefix('@') {
            None => return Ok(text.as_bytes().to_vec()),
            Some(name) => {
                let file = File::open(name).with_context(|| format!("{name} cannot be read"))?;
                (name.to_owned(), Box::new(file))
            }
        },
    };
    let mut value = Vec::new();
    let limited = from.by_ref().take(MAX_VALUE_BYTES + 1).read_to_end(&mut value);
    if limited.with_context(|| format!("{name} cannot be read"))? as u64 > MAX_VALUE_BYTES {
        bail!("{name} is larger than any value can be");
    }
    Ok(value)
}

/// Whole seconds, which is what the interface has.
fn seconds(text: &str) -> Result<u64, String> {
    let time =
        humantime::parse_duration(text).map_err(|error| format!("{error}; a time looks like 90s, 12h or 30days"))?;
    if time < Duration::from_secs(1) || time.subsec_nanos() != 0 {
        return Err("a time of whole seconds, at least one".to_owned());
    }
    Ok(time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entity_tag_can_be_said_without_its_quotes() {
        for (said, sent) in [("5", "\"5\""), ("\"5\"", "\"5\""), ("*", "*"), ("\"5\", \"6\"", "\"5\", \"6\"")] {
            let condition = Condition { if_match: Some(said.to_owned()) };
            assert_eq!(condition.header(), Some(("if-match", sent.to_owned())));
        }
        assert_eq!(Condition::default().header(), None);
    }

    #[test]
    fn a_time_to_live_is_of_whole_seconds() {
        assert_eq!(seconds("90s"), Ok(90));
        assert_eq!(seconds("1h 1s"), Ok(3_601));
        for wrong in ["0s", "500ms", "1s 1ms", "90", "soon"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
