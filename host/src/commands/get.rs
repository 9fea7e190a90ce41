//! `kvs get`: prints the value of a key.

use std::io;
use std::time::Duration;

use super::client::{OutputArgs, ReadArgs};
use super::complete::keys;
use crate::parse::duration;

#[derive(Debug, clap::Args)]
pub struct Get {
    #[arg(add = keys())]
    key: String,

    /// Print entity tag, content type and expiry before the value
    #[arg(short, long)]
    include: bool,

    /// Wait until the key exists, at most this long and at most 5m
    #[arg(long, value_name = "TIME", value_parser = duration)]
    wait: Option<Duration>,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    server: ReadArgs,
}

pub fn run(args: &Get) -> anyhow::Result<()> {
    let &Get { ref key, include, wait, ref output, ref server } = args;
    let server = server.server_after(wait.unwrap_or_default())?;
    let get = kvs_client::Get { include, wait, output: output.output() };
    kvs_client::get(&server, key, &get, &mut io::stdout().lock())
}
