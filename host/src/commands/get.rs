//! `kvs get`: prints the value of a key.

use std::io;

use super::client::ReadArgs;

#[derive(Debug, clap::Args)]
pub struct Get {
    key: String,
    #[command(flatten)]
    server: ReadArgs,
}

pub fn run(args: &Get) -> anyhow::Result<()> {
    kvs_client::get(&args.server.server()?, &args.key, &mut io::stdout().lock())
}
