//! `kvs txn`: several operations, all or nothing.

use std::io;

use super::client::{OutputArgs, ServerArgs};

#[derive(Debug, clap::Args)]
pub struct Txn {
    /// File with a list of operations in JSON: [{"op": "add", "key": "a", "delta": 1}]; - for standard input
    #[arg(value_name = "FILE")]
    file: String,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub fn run(args: &Txn) -> anyhow::Result<()> {
    kvs_client::transact(&args.server.server()?, &args.file, args.output.output(), &mut io::stdout().lock())
}
