//! `kvs put`: puts the value of a key.

use std::io;
use std::time::Duration;

use kvs_client::Condition;

use super::client::{OutputArgs, ServerArgs};
use super::complete::keys;
use crate::parse::duration;

#[derive(Debug, clap::Args)]
pub struct Put {
    #[arg(add = keys())]
    key: String,

    /// Value; @FILE for the content of a file; standard input if omitted
    value: Option<String>,

    /// Put only if the key does not exist
    #[arg(long, conflicts_with = "if_match")]
    create: bool,

    /// Put only if the key has this entity tag; * for any
    #[arg(long, value_name = "ETAG")]
    if_match: Option<String>,

    /// Time to live: 90s, 12h, 30days
    #[arg(long, value_name = "TIME", value_parser = duration)]
    ttl: Option<Duration>,

    /// Media type of the value, which GET returns: application/json
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub fn run(args: Put) -> anyhow::Result<()> {
    let server = args.server.server()?;
    let condition = match args.if_match {
        Some(tag) => Condition::Matches(tag),
        None if args.create => Condition::IsNew,
        None => Condition::Always,
    };
    let put = kvs_client::Put { value: args.value, condition, ttl: args.ttl, content_type: args.content_type };
    kvs_client::put(&server, &args.key, &put, args.output.output(), &mut io::stdout().lock())
}
