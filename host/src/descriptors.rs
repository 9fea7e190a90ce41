//! Limit of open files, and the share of it for connections.

use anyhow::{Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// File descriptors reserved for other uses than connections: the transaction log and its compaction, rebuilds of guests,
/// a database, reloaded files, and the admin listener, which has two for a connection.
const RESERVE: u64 = 256;
/// Minimum number of connections.
const MIN_CONNECTIONS: u64 = 64;

/// Raises the soft limit to the hard limit: a replay of the log of another process holds as many segments open as it may.
/// Returns the possible number of connections.
pub fn connections(wanted: usize) -> Result<usize> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let needed = (wanted as u64).saturating_add(RESERVE);
    // None means unlimited.
    let mut limit = current.unwrap_or(u64::MAX);
    let raised = maximum.unwrap_or(needed);
    if raised > limit {
        match setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum }) {
            Ok(()) => limit = raised,
            Err(error) => warn!("cannot raise the limit of {limit} open files to {raised}: {error}"),
        }
    }
    let room = limit.saturating_sub(RESERVE);
    ensure!(
        room >= MIN_CONNECTIONS.min(wanted as u64),
        "the process may have {limit} open files, at least {} are needed; raise the limit (ulimit -n, LimitNOFILE)",
        RESERVE + MIN_CONNECTIONS
    );
    if needed > limit {
        warn!(
            "--max-connections {wanted} needs {needed} open files, of which the process may have {limit}: at most {room} \
             connections; raise the limit (ulimit -n, LimitNOFILE)"
        );
    }
    Ok(wanted.min(usize::try_from(room).unwrap_or(usize::MAX)))
}
