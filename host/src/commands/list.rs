//! `kvs list`: prints keys.

use std::io;

use kvs_client::ListOptions;

use super::client::{OutputArgs, ReadArgs};
use super::complete::keys;

#[derive(Debug, clap::Args)]
pub struct List {
    #[arg(default_value = "", hide_default_value = true, add = keys())]
    prefix: String,

    /// Maximum number of keys
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,

    /// Print the last keys first
    #[arg(long)]
    reverse: bool,

    /// Print entity tag, size, expiry in milliseconds since 1970, and key, separated by tabs
    #[arg(long)]
    long: bool,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    server: ReadArgs,
}

pub fn run(args: &List) -> anyhow::Result<()> {
    let &List { ref prefix, limit, reverse, long, ref output, ref server } = args;
    let options = ListOptions { prefix, limit, reverse, long, output: output.output() };
    kvs_client::list(&server.server()?, &options, &mut io::stdout().lock())
}
