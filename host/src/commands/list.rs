//! `kvs list`: prints keys.

use std::io;

use super::client::ReadArgs;

#[derive(Debug, clap::Args)]
pub struct List {
    #[arg(default_value = "", hide_default_value = true)]
    prefix: String,

    /// Print an object per line, with entity tag, size, and expiry in milliseconds since 1970
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    server: ReadArgs,
}

pub fn run(args: &List) -> anyhow::Result<()> {
    kvs_client::list(&args.server.server()?, &args.prefix, args.json, &mut io::stdout().lock())
}
