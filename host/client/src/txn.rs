//! Transactions: several operations of a file, all or nothing.

use std::io::Write;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use super::output::Output;
use super::server::{ApiRequest, Server};
use super::value::read_input;

/// Sends the operations of a file, a list in JSON, and prints the result of each.
pub fn transact(server: &Server, file: &str, output: Output, out: &mut dyn Write) -> Result<()> {
    let operations = read_input(file)?;
    let headers = [("content-type", "application/json")];
    let request = ApiRequest { method: "POST", target: "/v1", headers: &headers, body: Some(&operations) };
    let results: Vec<Map<String, Value>> = server.send_for(&request).with_context(|| format!("transaction {file}"))?;
    for result in results {
        let text = |name: &str| result.get(name).and_then(Value::as_str);
        let tag = text("etag").map_or("-", |tag| tag.trim_matches('"'));
        let mut line = format!("{} {:?} {tag}", text("op").unwrap_or_default(), text("key").unwrap_or_default());
        if let Some(value) = text("value") {
            line += &format!(" = {value:?}");
        } else if let Some(value) = text("value_base64") {
            line += &format!(" = base64 {value}");
        }
        output.print(Some(&line), || Value::Object(result.clone()), out)?;
    }
    Ok(())
}
