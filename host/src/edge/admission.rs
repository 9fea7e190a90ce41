//! Admission of a request: its head, the limits, its client, the token and the role of this server, in this order.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hyper::http::request::Parts;
use hyper::{Response, StatusCode};
use kvs_txlog::TransactionLog;

use super::auth::Grant;
use super::body::full;
use super::budget::{Charge, Exceeded};
use super::connection::Peer;
use super::metrics::Limit;
use super::rejection::Rejection;
use super::reply::Reply;
use super::service::{Record, Service};
use super::{consistency, head};

/// A request that is to be answered.
pub enum Admitted<'s> {
    /// By the store, for the client of this grant.
    Request(Counted<'s>, Option<Grant>),
    /// By this response, a preflight request.
    Preflight(Response<Reply>),
}

/// One more in a gauge, until it is dropped.
pub struct Counted<'s>(&'s AtomicUsize);

impl<'s> Counted<'s> {
    /// Returns a guard, and the number of others.
    pub fn new(gauge: &'s AtomicUsize) -> (Self, usize) {
        let others = gauge.fetch_add(1, Ordering::Relaxed);
        (Self(gauge), others)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Service {
    /// Admits or rejects a request whose head takes `head_bytes`.
    pub(super) async fn admit(
        &self,
        head: &Parts,
        head_bytes: usize,
        peer: &Peer,
        charge: &mut Charge,
        record: &mut Record,
    ) -> Result<Admitted<'_>, Rejection> {
        charge.hold(head_bytes).map_err(|Exceeded| full())?;
        // The former process knew the proxy, and forwards the client that it gave. It has admitted the request, too.
        let is_forwarded = peer.socket.is_none();
        if !is_forwarded {
            record.client = self.proxies.client(&peer.client, &head.headers)?;
        }
        head::check(head, &self.limits)?;
        if let Some(preflight) = self.cors.as_ref().and_then(|cors| cors.preflight(head)) {
            return preflight.map(Admitted::Preflight);
        }
        let grant = self.tokens.as_ref().map(|tokens| tokens.get().check(head)).transpose()?;
        record.principal = match &grant {
            Some(grant) => Some(Arc::clone(&grant.name)),
            None => record.client.identity.clone(),
        };
        if !is_forwarded {
            self.throttle(record).await?;
        }
        // Those that wait because of the rate of their client take no places of others.
        let (counted, others) = Counted::new(&self.metrics.in_flight);
        if others >= self.limits.requests && !is_forwarded {
            let full = Rejection::new(StatusCode::SERVICE_UNAVAILABLE, "too many requests at once");
            return Err(full.of_limit(Limit::Requests));
        }
        // Where another process serves by now, it decides.
        if self.successor.get().is_none() {
            self.check_role(head)?;
        }
        Ok(Admitted::Request(counted, grant))
    }

    async fn throttle(&self, Record { client, principal, .. }: &Record) -> Result<(), Rejection> {
        let Some(throttle) = &self.throttle else { return Ok(()) };
        match throttle.admit(principal.as_ref(), client.address.map(|address| address.ip())).await {
            Ok(waited) => {
                self.metrics.delayed.add(u64::from(waited));
                Ok(())
            }
            Err(rejection) => {
                self.metrics.throttled.add(1);
                Err(rejection)
            }
        }
    }

    /// Checks that this server may serve a request: a standby serves stale reads only, to clients that accept them.
    fn check_role(&self, head: &Parts) -> Result<(), Rejection> {
        let accepts_stale = consistency::accepts_stale(&head.headers)?.unwrap_or(self.stale_reads);
        // Also writes that the guest might find to change nothing: on the primary they may change something.
        let is_read = head::is_safe(&head.method);
        if !(is_read && accepts_stale)
            && let Some(reason) = self.changes.read_only()
        {
            let primary = self.followed.as_ref().and_then(|followed| followed.primary());
            return Err(consistency::not_primary(reason, is_read, primary.as_deref()));
        }
        if !is_read && self.changes.rejects_appends() {
            let reason = "the server is read-only, for maintenance; try again later";
            return Err(Rejection::new(StatusCode::SERVICE_UNAVAILABLE, reason));
        }
        Ok(())
    }
}
