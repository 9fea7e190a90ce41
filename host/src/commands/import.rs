//! `kvs import`: puts the keys and values of JSON lines.

use std::path::PathBuf;

use super::client::ServerArgs;
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
    server: ServerArgs,
}

pub fn run(args: &Import) -> anyhow::Result<()> {
    let lines = kvs_client::import(&args.server.server()?, &args.file, args.resume, bar)?;
    notice(format_args!("imported {lines} lines"));
    Ok(())
}
