//! `kvs health`: checks whether a server is alive and ready.

use std::io;
use std::time::Duration;

use anyhow::{Context, Result};
use kvs_client::{ApiRequest, ClientError};
use serde_json::json;

use super::client::{AdminAddress, OutputArgs};

/// Read timeout of the admin listener.
pub const READ_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub struct Health {
    #[command(flatten)]
    admin: AdminAddress,

    /// Check liveness, not readiness
    #[arg(long)]
    live: bool,

    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: &Health) -> Result<()> {
    let server = args.admin.server(None, Some(READ_TIMEOUT))?;
    let (target, state) = if args.live { ("/livez", "alive") } else { ("/readyz", "ready") };
    let (output, out) = (args.output.output(), &mut io::stdout());
    match server.send(&ApiRequest { method: "GET", target, headers: &[], body: None }) {
        Err(rejected @ ClientError::Status { .. }) => {
            // The failure is reported in any case.
            let _ = output.print(None, || json!({ state: false }), out);
            Err(rejected).context(format!("not {state}"))
        }
        response => {
            response?;
            output.print(Some(state), || json!({ state: true }), out)?;
            Ok(())
        }
    }
}
