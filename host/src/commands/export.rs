//! `kvs export`: prints keys and values as JSON lines.

use std::io;

use super::client::ReadArgs;
use super::complete::keys;

#[derive(Debug, clap::Args)]
pub struct Export {
    #[arg(default_value = "", hide_default_value = true, add = keys())]
    prefix: String,

    #[command(flatten)]
    server: ReadArgs,
}

pub fn run(args: &Export) -> anyhow::Result<()> {
    kvs_client::export(&args.server.server()?, &args.prefix, &mut io::stdout().lock())
}
