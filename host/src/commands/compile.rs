//! `kvs compile`: compiles a component for a binary without a compiler.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::guest::{self, Source};

#[derive(Debug, clap::Args)]
pub struct Compile {
    /// Component file; without it, the built-in store
    #[arg(value_name = "GUEST.wasm")]
    guest: Option<PathBuf>,

    /// Output file
    #[arg(long, short, value_name = "GUEST.cwasm")]
    output: PathBuf,

    /// Use all CPU features of this machine; the result may not run on other CPUs
    #[arg(long)]
    native: bool,
}

pub fn run(args: &Compile) -> Result<()> {
    let source = args.guest.clone().map_or(Source::BuiltIn, Source::File);
    let compiled = guest::compile(&source, args.native)?;
    fs::write(&args.output, compiled).with_context(|| format!("cannot write {}", args.output.display()))
}
