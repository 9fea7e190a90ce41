//! The wait between the guest's answer and the response: until nothing that the answer shows can be taken back.

use std::time::Duration;

use hyper::StatusCode;
use kvs_txlog::TransactionLog;
use kvs_txlog::change_feed::ChangeFeed;
use tokio::time::{Instant, sleep, timeout_at};

use super::metrics::Limit;
use super::problem::OUTCOME_UNKNOWN;
use super::rejection::Rejection;
use crate::guest::Answer;

/// Maximum time for which a read waits for the renewal of an expired lease. That ends 8 s after the engine was lost, which takes
/// up to 9 s to elect a leader, and the breaker up to 2 s more to try again.
const LEASE_WAIT: Duration = Duration::from_secs(4);
const LEASE_POLL: Duration = Duration::from_millis(20);

/// Waits until nothing that the answer shows can be taken back by a crash.
pub async fn reached(changes: &ChangeFeed, answer: &Answer, deadline: Instant) -> Result<(), Rejection> {
    let watermark = changes.watermark();
    let reached = if answer.read_sequence <= watermark.durable() {
        Ok(Ok(()))
    } else {
        timeout_at(deadline, watermark.reached(answer.read_sequence)).await
    };
    match reached {
        // What was appended is durable, even if another process writes by now.
        Ok(Ok(())) if answer.appended => Ok(()),
        Ok(Ok(())) => has_lease(changes, deadline).await,
        Ok(Err(unknown)) => {
            let unknown = Rejection::new(StatusCode::INTERNAL_SERVER_ERROR, unknown.to_string());
            Err(unknown.with_code(OUTCOME_UNKNOWN))
        }
        Err(_) if answer.appended => {
            let unknown = "outcome unknown: this was not known to be durable in time";
            Err(Rejection::new(StatusCode::GATEWAY_TIMEOUT, unknown).of_limit(Limit::RequestTimeout))
        }
        Err(_) => {
            let late = "what this would show was not known to be durable in time";
            Err(Rejection::new(StatusCode::SERVICE_UNAVAILABLE, late).of_limit(Limit::RequestTimeout))
        }
    }
}

/// Checks the read lease. One that has expired may be renewed soon: then nobody has taken over since the guest's call.
async fn has_lease(changes: &ChangeFeed, deadline: Instant) -> Result<(), Rejection> {
    let until = deadline.min(Instant::now() + LEASE_WAIT);
    while let Some(reason) = changes.reads_refused() {
        if changes.read_only().is_some() || Instant::now() >= until {
            return Err(Rejection::new(StatusCode::SERVICE_UNAVAILABLE, reason));
        }
        sleep(LEASE_POLL).await;
    }
    Ok(())
}
