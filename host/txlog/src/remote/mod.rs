//! Shared parts of the logs that another service stores: the write queue, the circuit breaker and the read lease.
//!
//! Must never know: which service it is.

pub mod breaker;
pub mod lease;
pub mod queue;

use anyhow::Result;
use tokio::sync::SetOnce;

use crate::Closed;

/// Reads from a log until that is closed: the runtime of the log ends then, in which nothing must wait any more.
pub async fn until_closed<T>(closed: &SetOnce<()>, read: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        biased;
        _ = closed.wait() => Err(Closed.into()),
        read = read => read,
    }
}
