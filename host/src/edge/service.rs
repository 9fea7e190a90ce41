//! One request: admitted, read whole within its limits, answered by the guest, held back until the answer is safe to
//! give.
//!
//! Must never know: sockets, what the request means.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hyper::body::Incoming as Arriving;
use hyper::http::request::Parts;
use hyper::{Request, Response, StatusCode};
use tokio::time::{Instant, timeout_at};

use super::auth::Tokens;
use super::refusal::{Refusal, refuse, unread};
use super::reply::Reply;
use super::throttle::Throttle;
use super::{Limits, body, head, stream};
use crate::guest::{CallError, Client, Incoming, Shard};
use crate::log::TransactionLog;
use crate::log::changes::Changes;

/// Answers requests.
pub struct Service {
    pub shard: Arc<Shard>,
    pub changes: Arc<Changes>,
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
    pub(super) async fn respond(&self, request: Request<Arriving>, client: Arc<Client>) -> Response<Reply> {
        let answered = self.answer(request, client).await;
        answered.unwrap_or_else(|refusal| refusal.map(Reply::Whole))
    }

    async fn answer(&self, request: Request<Arriving>, client: Arc<Client>) -> Result<Response<Reply>, Refusal> {
        let deadline = Instant::now() + self.limits.request_timeout;
        let (head, body) = request.into_parts();
        let (_under_way, principal) = match self.admit(&head, &client).await {
            Ok(admitted) => admitted,
            Err(refusal) => return Err(unread(&head.headers, body, *refusal).into()),
        };
        let body = body::read(&head.headers, body, &self.limits, deadline).await?;
        let incoming = Incoming { request: Request::from_parts(head, body), client, principal };
        let answer = self.shard.call(incoming, deadline).await.map_err(|error| {
            let status = match error {
                CallError::Trapped => StatusCode::INTERNAL_SERVER_ERROR,
                CallError::Late => StatusCode::SERVICE_UNAVAILABLE,
            };
            refuse(status, &error.to_string())
        })?;
        // Nothing a client has seen may be taken back by a crash.
        match timeout_at(deadline, self.changes.watermark().reached(answer.rests_on)).await {
            Ok(Ok(())) => {}
            Ok(Err(unknown)) => return Err(refuse(StatusCode::INTERNAL_SERVER_ERROR, &unknown.to_string()).into()),
            Err(_) if answer.appended => {
                let unknown = "outcome unknown: this was not known to be durable in time";
                return Err(refuse(StatusCode::GATEWAY_TIMEOUT, unknown).into());
            }
            Err(_) => {
                let late = "what this would show was not known to be durable in time";
                return Err(refuse(StatusCode::SERVICE_UNAVAILABLE, late).into());
            }
        }
        let (head, body) = answer.response.into_parts();
        let reply = match answer.follow {
            Some(follow) => stream::open(&self.changes, follow, self.limits.stream_heartbeat).await?,
            None => Reply::from(body),
        };
        Ok(Response::from_parts(head, reply))
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
