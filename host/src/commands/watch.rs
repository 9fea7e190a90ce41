//! `kvs watch`: prints changes as they happen.

use std::io;

use super::client::ReadArgs;
use crate::lines::notice;

#[derive(Debug, clap::Args)]
pub struct Watch {
    #[arg(default_value = "", hide_default_value = true)]
    prefix: String,

    /// Sequence to resume after; by default the watch begins now
    #[arg(long, value_name = "SEQUENCE")]
    since: Option<u64>,

    /// Print an object per line; a value that is not UTF-8 is `value_base64`
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    server: ReadArgs,
}

pub fn run(args: &Watch) -> anyhow::Result<()> {
    let Watch { prefix, since, json, server } = args;
    let report = |line: &str| notice(format_args!("kvs: {line}"));
    kvs_client::watch(&server.server()?, prefix, *since, *json, &mut io::stdout().lock(), report)
}
