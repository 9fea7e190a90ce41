//! `kvs read-only`: has a running server reject writes, for maintenance.

use std::io;

use anyhow::{Context, Result};
use clap::ValueEnum;
use kvs_client::ApiRequest;
use serde_json::json;

use super::client::{AdminArgs, OutputArgs, READ_TIMEOUT};

#[derive(Debug, clap::Args)]
pub struct ReadOnly {
    /// Reject writes, or accept them again
    state: State,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    admin: AdminArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum State {
    On,
    Off,
}

pub fn run(args: &ReadOnly) -> Result<()> {
    let (method, state) = match args.state {
        State::On => ("PUT", "on"),
        State::Off => ("DELETE", "off"),
    };
    let server = args.admin.server(Some(READ_TIMEOUT))?;
    let request = ApiRequest { method, target: "/read-only", headers: &[], body: None };
    server.send(&request).with_context(|| format!("read-only was not turned {state}"))?;
    args.output.output().print(Some(state), || json!({ "read_only": state == "on" }), &mut io::stdout())?;
    Ok(())
}
