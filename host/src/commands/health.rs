//! `kvs health`: checks whether a server is alive and ready.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use kvs_client::{ApiRequest, ClientError};

use super::client::AdminAddress;

/// Read timeout of the admin listener.
pub const READ_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub struct Health {
    #[command(flatten)]
    admin: AdminAddress,

    /// Check liveness, not readiness
    #[arg(long)]
    live: bool,
}

pub fn run(args: &Health) -> Result<()> {
    let server = args.admin.server(None, Some(READ_TIMEOUT))?;
    let (target, state) = if args.live { ("/livez", "alive") } else { ("/readyz", "ready") };
    match server.send(&ApiRequest { method: "GET", target, headers: &[], body: None }) {
        Err(rejected @ ClientError::Status { .. }) => Err(rejected).context(format!("not {state}")),
        response => {
            response?;
            writeln!(io::stdout(), "{state}")?;
            Ok(())
        }
    }
}
