//! `kvs history`: prints the entries of one key, as far as the log of a running server has them.

use std::io;

use anyhow::{Context, Result};
use kvs_client::{ApiRequest, add_parameter};

use super::client::AdminArgs;
use super::complete::keys;

#[derive(Debug, clap::Args)]
pub struct History {
    #[arg(add = keys())]
    key: String,

    /// Only the entry that the key had at this sequence
    #[arg(long, value_name = "SEQUENCE")]
    at: Option<u64>,

    #[command(flatten)]
    admin: AdminArgs,
}

pub fn run(args: &History) -> Result<()> {
    // No read timeout: the server may read its whole log before it responds.
    let server = args.admin.server(None)?;
    let mut target = "/history".to_owned();
    add_parameter(&mut target, "key", &args.key);
    if let Some(at) = args.at {
        add_parameter(&mut target, "at", &at.to_string());
    }
    let request = ApiRequest { method: "GET", target: &target, headers: &[], body: None };
    let response = server.send(&request).context("no history")?;
    io::copy(&mut response.into_body().into_reader(), &mut io::stdout().lock())?;
    Ok(())
}
