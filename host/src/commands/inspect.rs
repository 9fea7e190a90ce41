//! `kvs inspect`: describes a component, and checks whether it could serve here.

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
    // The largest value makes no difference to whether it fits.
    let limits = args.guest.limits(ByteSize(0))?;
    guest::inspect(&args.guest.source(), limits, args.guest.guest_config.clone(), &mut io::stdout().lock())
}
