//! Open files: how many the process may have, and how many of them connections leave to everything else.

use anyhow::{Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// Files that connections never take: those of the transaction log and its compaction, of guests that are rebuilt from it,
/// of a database, of reloaded files, and the connections of the admin listener.
const RESERVE: u64 = 192;
/// Fewer connections than this are no service.
const LEAST: u64 = 64;

/// Raises the soft limit as far as so many connections need it and the hard limit allows. Returns how many there can be.
pub fn connections(wanted: usize) -> Result<usize> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let needed = (wanted as u64).saturating_add(RESERVE);
    // Without a number there is no limit.
    let mut limit = current.unwrap_or(u64::MAX);
    let raised = needed.min(maximum.unwrap_or(u64::MAX));
    if raised > limit {
        match setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum }) {
            Ok(()) => limit = raised,
            Err(error) => warn!("the limit of {limit} open files cannot be raised to {raised}: {error}"),
        }
    }
    let room = limit.saturating_sub(RESERVE);
    ensure!(
        room >= LEAST.min(wanted as u64),
        "the process may have {limit} open files, at least {} are needed; raise the limit (ulimit -n, LimitNOFILE)",
        RESERVE + LEAST
    );
    if needed > limit {
        warn!(
            "--max-connections {wanted} needs {needed} open files, of which the process may have {limit}: at most {room} \
             connections; raise the limit (ulimit -n, LimitNOFILE)"
        );
    }
    Ok(wanted.min(usize::try_from(room).unwrap_or(usize::MAX)))
}
