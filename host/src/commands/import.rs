//! `kvs import`: puts the keys and values of JSON lines.

use std::io::{self, Write};
use std::path::PathBuf;

use kvs_client::{ImportHooks, Output};
use serde_json::json;

use super::client::{OutputArgs, ServerArgs};
use crate::guest::is_valid_key;
use crate::lines::notice;
use crate::terminal::bar;

#[derive(Debug, clap::Args)]
pub struct Import {
    /// File to read; - is standard input
    #[arg(default_value = "-", hide_default_value = true)]
    file: PathBuf,

    /// Resume an interrupted import of this file, if there was one
    #[arg(long)]
    resume: bool,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub fn run(args: &Import) -> anyhow::Result<()> {
    let report = |line: &str| notice(format_args!("kvs: {line}"));
    let hooks = ImportHooks { bar, is_valid_key, report };
    let lines = kvs_client::import(&args.server.server()?, &args.file, args.resume, hooks)?;
    match args.output.output() {
        Output::Text => notice(format_args!("imported {lines} lines")),
        Output::Json => writeln!(io::stdout(), "{}", json!({ "imported": lines }))?,
    }
    Ok(())
}
