//! Compiles a component ahead of time, for a binary without a compiler.

use anyhow::{Context, Result, bail, ensure};

use super::compiled;
use super::compiler::Compiler;
use super::engine::{Cpu, World, component, settings};
use super::source::Source;

/// Compiles a component for any CPU of this architecture, or for this machine's.
pub fn compile(source: &Source, native: bool) -> Result<Vec<u8>> {
    let engine = wasmtime::Engine::new(&settings(if native { Cpu::This } else { Cpu::Any })?)?;
    let make = || {
        let bytes = source.read()?;
        ensure!(!bytes.starts_with(compiled::MARK), "it is compiled already");
        let (component, _) = component(&Compiler::new(None), &engine, &bytes)?;
        match World::of(&engine, &component).misfit() {
            Some(misfit) => bail!(misfit),
            None => compiled::seal(&component),
        }
    };
    make().with_context(|| format!("cannot compile {source}"))
}
