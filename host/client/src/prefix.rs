//! Deletes by prefix: page by page, and none without being asked twice.

use std::io::Write;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::json;

use super::output::Output;
use super::server::{ApiRequest, Server, add};

#[derive(Deserialize)]
struct Count {
    count: u64,
}

#[derive(Deserialize)]
struct Page {
    deleted: u64,
    #[serde(default)]
    cursor: Option<String>,
}

/// Prints how many keys begin so, and deletes none.
pub fn count_prefix(server: &Server, prefix: &str, output: Output, out: &mut dyn Write) -> Result<()> {
    let mut target = "/v1?count=true".to_owned();
    add(&mut target, "prefix", prefix);
    let request = ApiRequest { method: "GET", target: &target, headers: &[], body: None };
    let Count { count } = server.send_for(&request).with_context(|| format!("count {prefix}"))?;
    let line = format!("{count} keys begin with {prefix:?}; none was deleted, --yes deletes them");
    output.print(Some(&line), || json!({"prefix": prefix, "count": count, "deleted": 0}), out)?;
    Ok(())
}

/// Deletes the keys that begin so, and prints how many they were. `report` is called after each page with their number so
/// far.
pub fn delete_prefix(
    server: &Server,
    prefix: &str,
    output: Output,
    out: &mut dyn Write,
    report: fn(u64),
) -> Result<()> {
    let mut deleted = 0;
    let mut cursor: Option<String> = None;
    loop {
        let mut target = "/v1".to_owned();
        add(&mut target, "prefix", prefix);
        if let Some(cursor) = &cursor {
            add(&mut target, "cursor", cursor);
        }
        let request = ApiRequest { method: "DELETE", target: &target, headers: &[], body: None };
        let page: Page =
            server.send_for(&request).with_context(|| format!("delete --prefix {prefix}, after {deleted} keys"))?;
        deleted += page.deleted;
        if page.cursor.is_none() {
            let line = format!("{deleted} keys deleted");
            output.print(Some(&line), || json!({"prefix": prefix, "deleted": deleted}), out)?;
            return Ok(());
        }
        // The same cursor would loop forever. With several shards a page is asked for again when only some could delete.
        if page.deleted == 0 && page.cursor == cursor {
            bail!("{} returned a page without a new cursor", server.base());
        }
        report(deleted);
        cursor = page.cursor;
    }
}
