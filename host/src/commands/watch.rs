//! `kvs watch`: prints changes as they happen.

use std::io;

use super::client::{OutputArgs, ReadArgs};
use super::complete::keys;
use crate::lines::notice;

#[derive(Debug, clap::Args)]
pub struct Watch {
    #[arg(value_name = "PREFIX", add = keys())]
    prefixes: Vec<String>,

    /// Sequence to resume after; by default the watch begins now
    #[arg(long, value_name = "SEQUENCE")]
    since: Option<u64>,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    server: ReadArgs,
}

pub fn run(args: &Watch) -> anyhow::Result<()> {
    let Watch { prefixes, since, output, server } = args;
    let report = |line: &str| notice(format_args!("kvs: {line}"));
    kvs_client::watch(&server.server()?, prefixes, *since, output.output(), &mut io::stdout().lock(), report)
}
