//! One request: admitted, read whole within its limits, answered by the guest, held back until the answer is safe to
//! give.
//!
//! Must never know: sockets, what the request means.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body_util::Full;
use hyper::body::Incoming as Arriving;
use hyper::http::request::Parts;
use hyper::{Request, StatusCode};
use tokio::time::{Instant, timeout_at};

use super::auth::Tokens;
use super::refusal::{Answer, Refusal, refuse, unread};
use super::throttle::Throttle;
use super::{Limits, body, head};
use crate::guest::{CallError, Client, Incoming, Shard};
use crate::log::TransactionLog;

/// Answers requests.
pub struct Service {
    pub shard: Arc<Shard>,
    pub log: Arc<dyn TransactionLog>,
    pub limits: Limits,
    /// Without, everybody may do everything.
    pub tokens: Option<Arc<Tokens>>,
    pub throttle: Option<Arc<Throttle>>,
    /// Requests under way.
    pub under_way: AtomicUsize,
}

/// A request under way, until it is dropped.
struct UnderWay<'s>(&'s AtomicUsize);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Service {
    pub(super) async fn respond(&self, request: Request<Arriving>, client: Arc<Client>) -> Answer {
        let deadline = Instant::now() + self.limits.request_timeout;
        let (head, body) = request.into_parts();
        let (_under_way, principal) = match self.admit(&head, &client).await {
            Ok(admitted) => admitted,
            Err(refusal) => return unread(&head.headers, body, *refusal),
        };
        let body = match body::read(&head.headers, body, &self.limits, deadline).await {
            Ok(body) => body,
            Err(refusal) => return *refusal,
        };
        let incoming = Incoming { request: Request::from_parts(head, body), client, principal };
        let answer = match self.shard.call(incoming, deadline).await {
            Ok(answer) => answer,
            Err(error @ CallError::Trapped) => return refuse(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
            Err(error @ CallError::Late) => return refuse(StatusCode::SERVICE_UNAVAILABLE, &error.to_string()),
        };
        // Nothing a client has seen may be taken back by a crash.
        match timeout_at(deadline, self.log.watermark().reached(answer.rests_on)).await {
            Ok(Ok(())) => answer.response.map(Full::new),
            Ok(Err(unknown)) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &unknown.to_string()),
            Err(_) if answer.appended => {
                refuse(StatusCode::GATEWAY_TIMEOUT, "outcome unknown: this was not known to be durable in time")
            }
            Err(_) => {
                refuse(StatusCode::SERVICE_UNAVAILABLE, "what this would show was not known to be durable in time")
            }
        }
    }

    /// Whether anything is done for a request at all, and for whom.
    async fn admit(&self, head: &Parts, client: &Client) -> Result<(UnderWay<'_>, Option<Arc<str>>), Refusal> {
        let before = self.under_way.fetch_add(1, Ordering::Relaxed);
        let under_way = UnderWay(&self.under_way);
        head::check(head, &self.limits)?;
        if before >= self.limits.requests {
            return Err(refuse(StatusCode::SERVICE_UNAVAILABLE, "too many requests at once").into());
        }
        let principal = match &self.tokens {
            Some(tokens) => Some(tokens.get().check(head)?),
            None => client.identity.clone(),
        };
        if let Some(throttle) = &self.throttle {
            throttle.admit(principal.as_ref(), client.address.ip()).await?;
        }
        Ok((under_way, principal))
    }
}
