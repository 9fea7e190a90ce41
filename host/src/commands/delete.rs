//! `kvs delete`: deletes a key.

use kvs_client::Condition;

use super::client::ServerArgs;

#[derive(Debug, clap::Args)]
pub struct Delete {
    key: String,

    /// Delete only if the key has this entity tag; * for any
    #[arg(long, value_name = "ETAG")]
    if_match: Option<String>,

    #[command(flatten)]
    server: ServerArgs,
}

pub fn run(args: &Delete) -> anyhow::Result<()> {
    let condition = args.if_match.clone().map_or(Condition::Always, Condition::Matches);
    kvs_client::delete(&args.server.server()?, &args.key, &condition)
}
