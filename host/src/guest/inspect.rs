//! Description of a component, and whether it could serve here.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use kvs_runtime::Env;
use kvs_txlog::{AppendError, Event, Receive, TransactionLog, Watermark};

use super::engine::Engine;
use super::limits::Limits;
use super::owner::Owners;
use super::source::{Digest, Source};
use crate::contract::Description;

/// Prints the description of a component, and fails when it does not fit.
pub fn inspect(source: &Source, limits: Limits, config: Vec<(String, String)>, out: &mut dyn Write) -> Result<()> {
    let env = Env::real();
    let engine = Engine::new(limits, config, None, 0, &env)?;
    let bytes = source.read().with_context(|| format!("cannot read {source}"))?;
    let component = engine.component(&bytes).with_context(|| source.cannot_be_run())?;
    let world = engine.world(&component);
    writeln!(out, "source   {source}, {} bytes", bytes.len())?;
    writeln!(out, "sha256   {}", Digest::of(&bytes))?;
    writeln!(out, "contract {}", list(&world.contracts()))?;
    writeln!(out, "uses     {}", list(&world.used()))?;
    writeln!(out, "imports  {}", list(&world.imports))?;
    writeln!(out, "exports  {}", list(&world.exports))?;
    let described = engine.compile(source.clone(), &bytes).and_then(|guest| {
        let instance = guest.instantiate(Arc::new(NoLog(Watermark::new(0))), Owners::new(1, &env.random)?.part(0))?;
        let Description { name, version, headers, capabilities } = instance.description();
        writeln!(out, "name     {name} {version}")?;
        writeln!(out, "headers  {}", list(headers))?;
        writeln!(out, "can      {}", list(capabilities))?;
        writeln!(
            out,
            "shards   {}",
            if guest.is_sharded() { "any number" } else { "one: it does not export sharding" }
        )?;
        writeln!(out, "memory   {} KiB before the first entry", instance.memory_bytes() >> 10)?;
        Ok(())
    });
    writeln!(out, "limits   {} of memory, {:?} a call", ByteSize(limits.memory_bytes as u64), limits.call)?;
    match described {
        Ok(()) => writeln!(out, "fits     yes")?,
        Err(error) => bail!("{}: {error:#}", source.cannot_be_run()),
    }
    Ok(())
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
