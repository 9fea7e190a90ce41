//! Description of a component, and whether it could serve here.

use std::fmt::Write as _;
use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result};
use bytesize::ByteSize;
use kvs_client::Output;
use kvs_runtime::Env;
use kvs_txlog::{AppendError, Event, Receive, TransactionLog, Watermark};
use serde_json::json;

use super::engine::Engine;
use super::limits::Limits;
use super::owner::Owners;
use super::source::{Digest, Source};
use crate::contract::Description;

/// Prints the description of a component, and fails when it does not fit.
pub fn inspect(
    source: &Source,
    limits: Limits,
    config: Vec<(String, String)>,
    output: Output,
    out: &mut dyn Write,
) -> Result<()> {
    let env = Env::real();
    let engine = Engine::new(limits, config, None, 0, &env)?;
    let bytes = source.read().with_context(|| format!("cannot read {source}"))?;
    let component = engine.component(&bytes).with_context(|| source.cannot_be_run())?;
    let world = engine.world(&component);
    let digest = Digest::of(&bytes);
    let mut object = json!({
        "source": source.to_string(),
        "bytes": bytes.len(),
        "sha256": digest.to_string(),
        "contract": world.contracts(),
        "uses": world.used(),
        "imports": world.imports,
        "exports": world.exports,
        "memory_limit_bytes": limits.memory_bytes,
        "call_limit_ms": u64::try_from(limits.call.as_millis()).unwrap_or(u64::MAX),
    });
    let mut text = String::new();
    writeln!(text, "source   {source}, {} bytes", bytes.len())?;
    writeln!(text, "sha256   {digest}")?;
    writeln!(text, "contract {}", list(&world.contracts()))?;
    writeln!(text, "uses     {}", list(&world.used()))?;
    writeln!(text, "imports  {}", list(&world.imports))?;
    writeln!(text, "exports  {}", list(&world.exports))?;
    let described = engine.compile(source.clone(), &bytes).and_then(|guest| {
        let instance = guest.instantiate(Arc::new(NoLog(Watermark::new(0))), Owners::new(1, &env.random)?.part(0))?;
        let Description { name, version, headers, capabilities } = instance.description();
        for (field, value) in [
            ("name", json!(name)),
            ("version", json!(version)),
            ("headers", json!(headers)),
            ("capabilities", json!(capabilities)),
            ("sharded", json!(guest.is_sharded())),
            ("memory_bytes", json!(instance.memory_bytes())),
        ] {
            object[field] = value;
        }
        writeln!(text, "name     {name} {version}")?;
        writeln!(text, "headers  {}", list(headers))?;
        writeln!(text, "can      {}", list(capabilities))?;
        writeln!(
            text,
            "shards   {}",
            if guest.is_sharded() { "any number" } else { "one: it does not export sharding" }
        )?;
        writeln!(text, "memory   {} KiB before the first entry", instance.memory_bytes() >> 10)?;
        Ok(())
    });
    writeln!(text, "limits   {} of memory, {:?} a call", ByteSize(limits.memory_bytes as u64), limits.call)?;
    if described.is_ok() {
        text += "fits     yes\n";
    }
    object["fits"] = described.is_ok().into();
    output.print(Some(text.trim_end()), || object, out)?;
    described.with_context(|| source.cannot_be_run())
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join("\n         ") }
}

/// A guest that is only looked at finds nothing in its log and can add nothing.
struct NoLog(Watermark);

impl TransactionLog for NoLog {
    fn append(&self, _: u64, _: &[Event]) -> Result<u64, AppendError> {
        Err(AppendError::ReadOnly)
    }
    fn appended(&self) -> u64 {
        0
    }
    fn watermark(&self) -> &Watermark {
        &self.0
    }
    fn replay(&self, _: u64, _: &mut Receive<'_>) -> Result<u64> {
        Ok(0)
    }
    fn close(&self) -> Result<()> {
        Ok(())
    }
}
