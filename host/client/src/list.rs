//! Lists and exports: all keys, or those with a prefix, page by page.

use std::io::{BufWriter, Write};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::output::Output;
use super::server::{ApiRequest, Server, add, prefix_shown};
use super::value::entry_of;

/// Keys of a page, at most.
const MAX_PAGE: u64 = 1_000;

/// A list entry: a key and attributes, which depend on the guest.
type Entry = Map<String, Value>;

#[derive(Deserialize)]
struct Page {
    keys: Vec<Entry>,
    list_complete: bool,
    #[serde(default)]
    cursor: Option<String>,
}

/// Keys that a list prints, and their form.
pub struct ListOptions<'o> {
    pub prefix: &'o str,
    /// Maximum number of keys.
    pub limit: Option<u64>,
    /// From the last key to the first.
    pub reverse: bool,
    /// Prints also entity tag, size and expiry.
    pub long: bool,
    pub output: Output,
}

/// Prints keys, or, as JSON, the whole list entry of each.
pub fn list(server: &Server, options: &ListOptions<'_>, out: &mut dyn Write) -> Result<()> {
    let pages = Pages { prefix: options.prefix, values: false, reverse: options.reverse, limit: options.limit };
    pages.each(server, out, &mut |entry, out| {
        let printed = match (options.output, entry.get("key")) {
            // One line each: keys have no line breaks.
            (Output::Text, Some(Value::String(key))) if options.long => {
                let text = |name: &str| entry.get(name).map_or("-".to_owned(), Value::to_string);
                let tag = entry.get("etag").and_then(Value::as_str).map_or("-", |tag| tag.trim_matches('"'));
                writeln!(out, "{tag}\t{}\t{}\t{key}", text("size"), text("expires"))
            }
            (Output::Text, Some(Value::String(key))) => writeln!(out, "{key}"),
            _ => writeln!(out, "{}", Value::Object(entry)),
        };
        Ok(printed?)
    })
}

/// Prints keys with their values, as [`import`](super::import()) reads them.
pub fn export(server: &Server, prefix: &str, out: &mut dyn Write) -> Result<()> {
    let pages = Pages { prefix, values: true, reverse: false, limit: None };
    pages.each(server, out, &mut |mut entry, out| {
        // A list leaves out large values.
        if !entry.contains_key("value") && !entry.contains_key("value_base64") {
            let Some(Value::String(key)) = entry.get("key") else { bail!("{} listed no key", server.base()) };
            match entry_of(server, key)? {
                Some(whole) => entry = whole,
                // Deleted since.
                None => return Ok(()),
            }
        }
        entry.remove("size");
        Ok(writeln!(out, "{}", Value::Object(entry))?)
    })
}

type Print<'p> = &'p mut dyn FnMut(Entry, &mut dyn Write) -> Result<()>;

/// The pages of a list.
struct Pages<'p> {
    prefix: &'p str,
    values: bool,
    reverse: bool,
    limit: Option<u64>,
}

impl Pages<'_> {
    fn each(&self, server: &Server, out: &mut dyn Write, print: Print<'_>) -> Result<()> {
        let mut out = BufWriter::new(out);
        let mut left = self.limit.unwrap_or(u64::MAX);
        let mut cursor: Option<String> = None;
        loop {
            let mut target = "/v1".to_owned();
            // A full page needs no limit.
            let limit = (left < MAX_PAGE).then(|| left.to_string());
            for (name, value) in [
                ("prefix", Some(self.prefix)),
                ("cursor", cursor.as_deref()),
                ("values", self.values.then_some("true")),
                ("reverse", self.reverse.then_some("true")),
                ("limit", limit.as_deref()),
            ] {
                if let Some(value) = value.filter(|value| !value.is_empty()) {
                    add(&mut target, name, value);
                }
            }
            let request = ApiRequest { method: "GET", target: &target, headers: &[], body: None };
            let page: Page =
                server.send_for(&request).with_context(|| format!("list {}", prefix_shown(self.prefix)))?;
            left = left.saturating_sub(page.keys.len() as u64);
            for entry in page.keys {
                print(entry, &mut out)?;
            }
            if page.list_complete || left == 0 {
                out.flush()?;
                return Ok(());
            }
            // The same cursor would loop forever.
            if page.cursor.is_none() || page.cursor == cursor {
                bail!("{} returned a page without a new cursor", server.base());
            }
            cursor = page.cursor;
        }
    }
}
