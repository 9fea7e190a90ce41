//! `kvs delete`: deletes a key, or the keys that begin with a prefix.

use std::io;

use kvs_client::Condition;

use super::client::{OutputArgs, ServerArgs};
use super::complete::keys;
use crate::lines::notice;

#[derive(Debug, clap::Args)]
pub struct Delete {
    #[arg(required_unless_present = "prefix", conflicts_with = "prefix", add = keys())]
    key: Option<String>,

    /// Delete only if the key has this entity tag; * for any
    #[arg(long, value_name = "ETAG", conflicts_with = "prefix")]
    if_match: Option<String>,

    /// Count the keys that begin so, or delete them with --yes, page by page
    #[arg(long, value_name = "PREFIX", add = keys())]
    prefix: Option<String>,

    /// Delete the keys that --prefix counts
    #[arg(long, requires = "prefix")]
    yes: bool,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub fn run(args: &Delete) -> anyhow::Result<()> {
    let (server, output, out) = (args.server.server()?, args.output.output(), &mut io::stdout().lock());
    match (&args.prefix, &args.key) {
        (Some(prefix), _) if args.yes => {
            let report = |deleted| notice(format_args!("kvs: {deleted} keys deleted so far"));
            kvs_client::delete_prefix(&server, prefix, output, out, report)
        }
        (Some(prefix), _) => kvs_client::count_prefix(&server, prefix, output, out),
        (None, key) => {
            let condition = args.if_match.clone().map_or(Condition::Always, Condition::Matches);
            kvs_client::delete(&server, key.as_deref().unwrap_or_default(), &condition, output, out)
        }
    }
}
