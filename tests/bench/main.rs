//! `just bench`: what a request costs, and how late it is, what a call into the guest costs, what the group commit is worth, on a disk and in a database, how fast
//! the way back is, what a swap, a trap or an upgrade does to those who ask meanwhile, what shadow traffic and backups cost them, and for how long nobody answers.
//! `just bench commit` measures one of them. What was measured is written to `tests/bench/results.*`. `just bench-quick` is apart: it counts instructions.
//!
//! The machine is shared and noisy, so what is compared takes turns within each round, and what counts is the median of the
//! ratios of the rounds.

mod availability;
mod backup;
mod call;
mod commit;
mod latency;
mod load;
mod peers;
mod plain_map;
mod plot;
mod postgres;
mod process;
mod quick;
mod replay;
mod report;
mod requests;
mod shadow;
mod swap;
mod traps;
mod upgrade;
mod warm;

use std::env;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Result, anyhow, bail};

use report::Report;

type Benchmark = fn(&Path, &mut Report) -> Result<()>;

const ALL: [(&str, Benchmark); 12] = [
    ("requests", requests::run),
    ("latency", latency::run),
    ("call", call::run),
    ("commit", commit::run),
    ("postgres", postgres::run),
    ("replay", replay::run),
    ("swap", swap::run),
    ("traps", traps::run),
    ("upgrade", upgrade::run),
    ("shadow", shadow::run),
    ("availability", availability::run),
    ("backup", backup::run),
];

/// That of kvs, so that what the plain map is compared with is not its allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    // cargo adds a flag of its own.
    let args: Vec<_> = env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        // Parts that run apart are this binary, started again as a process of its own.
        [plain_map::NAME, keys, bytes] => return plain_map::serve(keys, bytes),
        [replay::SCAN, data] => return replay::scan(Path::new(data)),
        ["quick"] => return quick::run(tempfile::tempdir()?.path(), false),
        ["quick", "update"] => return quick::run(tempfile::tempdir()?.path(), true),
        [] => {}
        [name] if ALL.iter().any(|(known, _)| *known == name) => {}
        _ => bail!("there are {}", ALL.map(|(name, _)| name).join(", ")),
    }
    for (name, run) in ALL {
        if args.is_empty() || args[0] == name {
            let (data, mut report) = (tempfile::tempdir()?, Report::new(name));
            run(data.path(), &mut report)?;
            report.keep(name)?;
        }
    }
    Ok(())
}

/// A number from the environment, for benchmarks of another size.
fn setting<T: FromStr>(name: &str, default: T) -> Result<T> {
    let Ok(value) = env::var(name) else { return Ok(default) };
    value.parse().map_err(|_| anyhow!("{name} is no number"))
}
