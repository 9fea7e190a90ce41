//! `kvs inspect`: describes a component, and checks whether this host can run it.

use std::io;

use bytesize::ByteSize;

use crate::guest;
use crate::settings::Guest;

#[derive(Debug, clap::Args)]
pub struct Inspect {
    #[command(flatten)]
    guest: Guest,
}

pub fn run(args: &Inspect) -> anyhow::Result<()> {
    // The maximum size of a value is irrelevant for the check.
    let limits = args.guest.limits(ByteSize(0), 1)?;
    guest::inspect(&args.guest.source(), limits, args.guest.guest_config.clone(), &mut io::stdout().lock())
}
