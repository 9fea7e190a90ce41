//! `kvs inspect`: describes a component, and checks whether this host can run it.

use std::io;

use bytesize::ByteSize;

use super::client::OutputArgs;
use crate::guest;
use crate::settings::Guest;

#[derive(Debug, clap::Args)]
pub struct Inspect {
    #[command(flatten)]
    guest: Guest,

    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: &Inspect) -> anyhow::Result<()> {
    // The maximum size of a value is irrelevant for the check.
    let limits = args.guest.limits(ByteSize(0), 1)?;
    let (output, config) = (args.output.output(), args.guest.guest_config.clone());
    guest::inspect(&args.guest.source(), limits, config, output, &mut io::stdout().lock())
}
