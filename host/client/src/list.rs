//! Lists and exports: all keys, or those with a prefix, page by page.

use std::io::{self, BufWriter, Read, Write};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::server::{ApiRequest, Server, add};

/// Maximum size of a page: more than a server sends, which ends a page after a mebibyte or the first value beyond it.
const PAGE_BYTES: u64 = 8 << 30;

/// A list entry: a key and attributes, which depend on the guest.
type Entry = Map<String, Value>;

#[derive(Deserialize)]
struct Page {
    keys: Vec<Entry>,
    list_complete: bool,
    #[serde(default)]
    cursor: Option<String>,
}

/// Prints keys, or, as JSON, the whole list entry of each.
pub fn list(server: &Server, prefix: &str, json: bool, out: &mut dyn Write) -> Result<()> {
    each(server, prefix, false, out, &mut |entry, out| match (json, entry.get("key")) {
        // One line each: keys have no line breaks.
        (false, Some(Value::String(key))) => writeln!(out, "{key}"),
        _ => writeln!(out, "{}", Value::Object(entry)),
    })
}

/// Prints keys with their values, as [`import`](super::import()) reads them.
pub fn export(server: &Server, prefix: &str, out: &mut dyn Write) -> Result<()> {
    each(server, prefix, true, out, &mut |mut entry, out| {
        entry.remove("size");
        writeln!(out, "{}", Value::Object(entry))
    })
}

type Print<'p> = &'p mut dyn FnMut(Entry, &mut dyn Write) -> io::Result<()>;

fn each(server: &Server, prefix: &str, values: bool, out: &mut dyn Write, print: Print<'_>) -> Result<()> {
    let mut out = BufWriter::new(out);
    let mut cursor: Option<String> = None;
    loop {
        let mut target = "/v1".to_owned();
        for (name, value) in
            [("prefix", Some(prefix)), ("cursor", cursor.as_deref()), ("values", values.then_some("true"))]
        {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                add(&mut target, name, value);
            }
        }
        let request = ApiRequest { method: "GET", target: &target, headers: &[], body: None };
        let response = server.send(&request).with_context(|| format!("list {prefix}"))?;
        let mut text = Vec::new();
        let reader = response.into_body().into_reader();
        reader.take(PAGE_BYTES).read_to_end(&mut text).map_err(|error| server.transport_error(&error))?;
        let page: Page =
            serde_json::from_slice(&text).with_context(|| format!("{} returned no list of keys", server.base()))?;
        for entry in page.keys {
            print(entry, &mut out)?;
        }
        if page.list_complete {
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
