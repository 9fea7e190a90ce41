//! `kvs compile`: makes of a component what a binary without a compiler runs.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use super::compiled;
use super::compiler::Compiler;
use super::engine::{Cpu, World, component, settings};
use super::source::Source;

#[derive(Debug, clap::Args)]
pub struct Compile {
    /// The component; without it, the store that came with this binary
    #[arg(value_name = "GUEST.wasm")]
    guest: Option<PathBuf>,

    /// The file to write
    #[arg(long, short, value_name = "GUEST.cwasm")]
    output: PathBuf,

    /// Use all that this machine's CPU can do; CPUs that cannot will refuse it
    #[arg(long)]
    native: bool,
}

pub fn compile(args: &Compile) -> Result<()> {
    let source = args.guest.clone().map_or(Source::BuiltIn, Source::File);
    let engine = wasmtime::Engine::new(&settings(if args.native { Cpu::This } else { Cpu::Any })?)?;
    let make = || {
        let bytes = source.read()?;
        ensure!(!bytes.starts_with(compiled::MARK), "it is compiled already");
        let (component, _) = component(&Compiler::new(None), &engine, &bytes)?;
        match World::of(&engine, &component).misfit() {
            Some(misfit) => bail!(misfit),
            None => compiled::seal(&component),
        }
    };
    let sealed = make().with_context(|| format!("cannot compile {source}"))?;
    fs::write(&args.output, sealed).with_context(|| format!("cannot write {}", args.output.display()))
}
