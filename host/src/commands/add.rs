//! `kvs add`: adds to the number at a key.

use std::io;
use std::time::Duration;

use kvs_client::Condition;

use super::client::{OutputArgs, ServerArgs};
use super::complete::keys;
use crate::parse::duration;

#[derive(Debug, clap::Args)]
pub struct Add {
    #[arg(add = keys())]
    key: String,

    /// Number to add, of 64 bits
    #[arg(default_value = "1", allow_negative_numbers = true)]
    delta: i64,

    /// Time to live: 90s, 12h, 30days; without it the expiry stays
    #[arg(long, value_name = "TIME", value_parser = duration)]
    ttl: Option<Duration>,

    /// Add only if the key has this entity tag; * for any
    #[arg(long, value_name = "ETAG")]
    if_match: Option<String>,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub fn run(args: &Add) -> anyhow::Result<()> {
    let condition = args.if_match.clone().map_or(Condition::Always, Condition::Matches);
    let add = kvs_client::Add { delta: args.delta, ttl: args.ttl, condition };
    kvs_client::add(&args.server.server()?, &args.key, &add, args.output.output(), &mut io::stdout().lock())
}
