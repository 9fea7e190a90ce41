//! `kvs touch`: gives the value of a key another time to live.

use std::io;
use std::time::Duration;

use super::client::{OutputArgs, ServerArgs};
use super::complete::keys;
use crate::parse::duration;

#[derive(Debug, clap::Args)]
pub struct Touch {
    #[arg(add = keys())]
    key: String,

    /// Time to live, from now on: 90s, 12h, 30days
    #[arg(value_parser = duration)]
    ttl: Duration,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub fn run(args: &Touch) -> anyhow::Result<()> {
    kvs_client::touch(&args.server.server()?, &args.key, args.ttl, args.output.output(), &mut io::stdout().lock())
}
