//! One request: admitted, read whole within its limits, answered by the guest, held back until the answer is safe to
//! give.
//!
//! Must never know: sockets, what the request means.

use std::sync::{Arc, OnceLock};
use std::time::{self, Duration};

use bytes::Bytes;
use hyper::body::{Body, Incoming as Arriving};
use hyper::header::{self, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::error;

use super::access_log::{AccessLog, Line};
use super::admission::Admitted;
use super::auth::{Standing, Tokens};
use super::body::full;
use super::budget::{Charge, Exceeded};
use super::connection::Peer;
use super::consistency;
use super::cors::Cors;
use super::lingering::linger;
use super::metrics::{self, Limit, Metrics, WatchGuard};
use super::proxy::TrustedProxies;
use super::rejection::Rejection;
use super::reply::Reply;
use super::request_id::{self, RequestIds};
use super::slow_log::{SlowLog, Times};
use super::successor::{Forwarded, Successor};
use super::throttle::Throttle;
use super::{Limits, body, durability, head, problem, stream};
use crate::contract::Scope;
use crate::follow::Followed;
use crate::guest::{Answer, CallError, Client, Incoming, Sequel, Shards};
use kvs_txlog::change_feed::ChangeFeed;

/// What one request over HTTP/1.1 can hold without being charged for it: there is one at a time.
const FREE: usize = 4 << 10;
/// What a stream of HTTP/2 takes beside the head of its request, or beside the body of its response.
const STREAM: usize = 2 << 10;

/// Returns the bytes that a request holds without being charged for them.
fn free(http2: bool) -> usize {
    if http2 { 0 } else { FREE }
}

/// Returns whether caches may keep a response to this method without being asked to.
fn is_cacheable(method: &Method) -> bool {
    *method == Method::GET || *method == Method::HEAD || method.as_str() == "QUERY"
}

/// Adds the headers of every response where the guest gave none of its own.
fn set_defaults<B>(response: &mut Response<B>, is_cacheable: bool) {
    let headers = response.headers_mut();
    if is_cacheable {
        // Without it, caches may keep a response for a while of their own choice, also a 404.
        headers.entry(header::CACHE_CONTROL).or_insert(const { HeaderValue::from_static("no-cache") });
    }
    // No browser is to guess that something is a script, unless the guest says it may.
    headers.entry(X_CONTENT_TYPE_OPTIONS).or_insert(const { HeaderValue::from_static("nosniff") });
}

/// Answers requests.
pub struct Service {
    pub shards: Arc<Shards>,
    pub changes: Arc<ChangeFeed>,
    /// Known where this process began as a standby.
    pub followed: Option<Arc<Followed>>,
    /// Reads are stale on a standby unless the client asks for others.
    pub stale_reads: bool,
    pub limits: Limits,
    /// Without, everybody may do everything.
    pub tokens: Option<Arc<Tokens>>,
    pub throttle: Option<Arc<Throttle>>,
    /// Without, only pages of this server's own origin may read what it answers.
    pub cors: Option<Cors>,
    pub metrics: Arc<Metrics>,
    pub ids: RequestIds,
    pub access_log: Option<Arc<AccessLog>>,
    pub slow_log: Option<Arc<SlowLog>>,
    /// Proxies that give the addresses of their clients.
    pub proxies: TrustedProxies,
    /// Set when another process serves in place of this one.
    pub successor: Arc<OnceLock<Successor>>,
}

/// The guest's answer, and on a standby the time up to which it has everything.
pub struct Answered {
    pub answer: Answer,
    pub as_of: Option<time::Instant>,
    /// Whether a call before the last one, of a request that waited, appended.
    pub appended_before: bool,
}

/// Outcome of a call.
pub enum Called {
    Here(Answered),
    /// The response of the process that serves in place of this one.
    Elsewhere(Response<Bytes>),
}

/// An admitted request, as far as its response depends on it.
struct Asked<'r> {
    id: &'r HeaderValue,
    method: Method,
    http2: bool,
    key_prefix: Option<Arc<str>>,
    standing: Option<Standing>,
    deadline: Instant,
}

impl Asked<'_> {
    /// Charges a response. `must` where the request may have changed something, so that it cannot be rejected any more.
    fn hold(&self, charge: &mut Charge, body_bytes: usize, must: bool) -> Result<(), Rejection> {
        let bytes = body_bytes + if self.http2 { STREAM } else { 0 };
        if must {
            charge.must_hold(bytes);
            return Ok(());
        }
        charge.hold(bytes).map_err(|Exceeded| full())
    }
}

/// Data of a request for metrics and log lines, however it ends.
pub struct Record {
    /// The peer, or the client that it gives as a trusted proxy.
    pub client: Arc<Client>,
    pub principal: Option<Arc<str>>,
    /// Whether it was a long poll that waited.
    pub waited: bool,
    pub times: Times,
}

/// The response to HEAD instead of GET. The length of an empty body is that of any other, but hyper leaves it out.
fn without_body(response: Response<Reply>) -> Response<Reply> {
    let mut response = response.map(Reply::without_body);
    let may_have_body = !matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if may_have_body && response.body().size_hint().exact() == Some(0) {
        response.headers_mut().insert(header::CONTENT_LENGTH, const { HeaderValue::from_static("0") });
    }
    response
}

impl Service {
    pub(super) async fn respond(&self, request: Request<Arriving>, peer: &Peer) -> Response<Reply> {
        let (begun, method) = (Instant::now(), metrics::number(request.method()));
        let is_head = request.method() == Method::HEAD;
        let is_cacheable = is_cacheable(request.method());
        let wants_problems = problem::is_wanted(request.headers());
        let origin = self.cors.as_ref().and_then(|_| request.headers().get(header::ORIGIN).cloned());
        let id = self.ids.of(request.headers());
        let mut record =
            Record { client: Arc::clone(&peer.client), principal: None, waited: false, times: Times::default() };
        let logs = self.access_log.is_some() || self.slow_log.is_some();
        let logged = logs.then(|| (request.method().clone(), request.uri().clone()));
        let deadline = begun + self.limits.request_timeout;
        let answered = self.answer(request, peer, &id, deadline, &mut record).await;
        let mut response = answered.unwrap_or_else(|rejection| {
            if let Some(limit) = rejection.limit() {
                self.metrics.rejected(limit);
            }
            let mut response = rejection.response();
            set_defaults(&mut response, is_cacheable);
            response.headers_mut().insert(request_id::HEADER, id.clone());
            response
        });
        // A forwarded one is complete.
        if response.extensions().get::<Forwarded>().is_none() {
            problem::complete(&mut response, wants_problems);
            if is_head {
                response = without_body(response);
            }
            if let Some(cors) = &self.cors {
                cors.share(origin.as_ref(), &mut response);
            }
        } else if is_head {
            response = Forwarded::head(response);
        }
        let (status, took) = (response.status(), begun.elapsed());
        self.metrics.answered(method, status, took, record.waited);
        if let Some((method, uri)) = &logged {
            let (principal, bytes) = (record.principal.as_deref(), response.body().size_hint().exact());
            let line = Line { id: &id, client: &record.client, principal, method, uri, status, bytes, took };
            if let Some(log) = &self.access_log {
                log.log(&line);
            }
            // A long poll took what its client wanted.
            if let Some(log) = self.slow_log.as_ref().filter(|_| !record.waited) {
                log.log(&line, &record.times);
            }
        }
        response
    }

    async fn answer(
        &self,
        request: Request<Arriving>,
        peer: &Peer,
        id: &HeaderValue,
        deadline: Instant,
        record: &mut Record,
    ) -> Result<Response<Reply>, Rejection> {
        let (head, body) = request.into_parts();
        let http2 = head.version == Version::HTTP_2;
        let mut charge = peer.account.begin(free(http2));
        // HTTP/1.1 has one request at a time, whose head stays in the buffer of its connection.
        let head_bytes = if http2 { STREAM + head::bytes(&head) } else { 0 };
        let admitted = match self.admit(&head, head_bytes, peer, &mut charge, record).await {
            Ok(admitted) => admitted,
            Err(rejection) => return Err(rejection.with_unread(&head.headers, body)),
        };
        let (in_flight, grant) = match admitted {
            Admitted::Request(in_flight, grant) => (in_flight, grant),
            Admitted::Preflight(mut response) => {
                if !body.is_end_stream() {
                    linger(&head.headers, body);
                }
                set_defaults(&mut response, false);
                response.headers_mut().insert(request_id::HEADER, id.clone());
                return Ok(response);
            }
        };
        let arrives_later = !body.is_end_stream();
        let body = body::read(&head.headers, body, &self.limits, deadline, &mut charge, head_bytes).await?;
        charge.wait_for_server();
        let scope = grant.as_ref().map_or(Scope::Admin, |grant| grant.scope.into());
        let key_prefix = grant.as_ref().and_then(|grant| grant.key_prefix.clone());
        let quota = grant.as_ref().and_then(|grant| grant.quota);
        let is_counted = !head::is_safe(&head.method) && self.successor.get().is_none();
        if let Some((prefix, _)) = key_prefix.as_ref().zip(quota).filter(|_| is_counted) {
            let counted = self.count(prefix, deadline);
            if head.method == Method::DELETE {
                // It begins a count, for a guest that puts something then, and does not wait: a client can always delete.
                let _ = timeout(Duration::ZERO, counted).await;
            } else {
                counted.await?;
            }
        }
        let standing = self.tokens.clone().zip(grant).map(|(tokens, grant)| {
            let (method, uri) = (head.method.clone(), head.uri.clone());
            Standing { tokens, grant, method, uri }
        });
        if arrives_later && let Some(standing) = &standing {
            standing.check()?;
        }
        let mut asked = Asked { id, method: head.method.clone(), http2, key_prefix, standing, deadline };
        let incoming = Incoming {
            request: Request::from_parts(head, body),
            client: Arc::clone(&record.client),
            id: id.clone(),
            principal: record.principal.clone(),
            scope,
            key_prefix: asked.key_prefix.clone(),
            quota,
            is_sampled: self.shards.shadow().samples(),
        };
        let called = match self.call(incoming, deadline, record).await? {
            Called::Here(Answered {
                answer: Answer { sequel: Some(Sequel::Wait(wait)), appended, read_sequence, .. },
                ..
            }) => {
                // A long poll that waits is not counted as a request in flight.
                drop(in_flight);
                charge.must_hold(head_bytes);
                charge.wait_for_server();
                let called;
                let (socket, standing) = (peer.socket.as_deref(), asked.standing.as_ref());
                let appended = appended.then_some(read_sequence);
                (called, asked.deadline) = self.wait(wait, appended, socket, standing, record).await?;
                called
            }
            called => called,
        };
        match called {
            Called::Here(answered) => self.reply(answered, asked, peer, charge, record).await,
            Called::Elsewhere(response) => {
                asked.hold(&mut charge, response.body().len(), !head::is_safe(&asked.method))?;
                charge.wait_for_client();
                Ok(response.map(|body| Reply::Whole(charge.keep(body))))
            }
        }
    }

    /// Responds with the guest's answer, once nothing that it shows can be lost, and begins the watch that it asks for.
    async fn reply(
        &self,
        Answered { answer, as_of, appended_before }: Answered,
        asked: Asked<'_>,
        peer: &Peer,
        mut charge: Charge,
        record: &mut Record,
    ) -> Result<Response<Reply>, Rejection> {
        let length = answer.response.bytes();
        asked.hold(&mut charge, length, answer.appended || appended_before)?;
        charge.wait_for_server();
        let begun = Instant::now();
        let safe = durability::reached(&self.changes, &answer, asked.deadline).await;
        record.times.commit = begun.elapsed();
        safe.map_err(|rejection| rejection.with_effect(appended_before))?;
        if answer.is_over_quota && !answer.appended {
            let reason = "the quota of the token would be exceeded, max-keys or max-bytes; nothing was stored";
            let rejection = Rejection::new(StatusCode::INSUFFICIENT_STORAGE, reason);
            return Err(rejection
                .with_code(problem::QUOTA_EXCEEDED)
                .of_limit(Limit::Quota)
                .with_effect(appended_before));
        }
        charge.wait_for_client();
        let is_complete = answer.response.is_kept();
        let mut response = answer.response.message().map_err(|invalid| {
            let (guest, request_id) = (self.shards.serving().description, asked.id.to_str().unwrap_or_default());
            error!(guest = guest.name, request_id, "invalid response: {invalid:#}");
            Rejection::new(StatusCode::INTERNAL_SERVER_ERROR, "the store gave an invalid response")
        })?;
        if !is_complete {
            set_defaults(&mut response, is_cacheable(&asked.method));
        }
        if let Some(reusable) = answer.reusable {
            // A place for the id of each request that is given a copy. Not an id: one that a client sent is a part of a larger buffer.
            response.headers_mut().insert(request_id::HEADER, const { HeaderValue::from_static("-") });
            reusable.keep(&response);
        }
        response.headers_mut().insert(request_id::HEADER, asked.id.clone());
        let (mut head, body) = response.into_parts();
        if let Some(as_of) = as_of {
            consistency::set_age(&mut head.headers, self.shards.env().clock.elapsed(as_of));
        }
        let reply = match answer.sequel {
            Some(Sequel::Watch(watch)) => {
                let Asked { method, key_prefix, standing, .. } = asked;
                // A chunk of history may be larger than its share only where nothing else is held.
                drop(charge);
                let free = free(asked.http2);
                let stream = stream::open(&self.changes, watch, key_prefix.as_deref(), &peer.account, free).await;
                let stream = stream.map_err(|rejection| rejection.with_effect(answer.appended || appended_before))?;
                // A proxy that buffers would hold events back.
                head.headers.insert("x-accel-buffering", const { HeaderValue::from_static("no") });
                match &peer.socket {
                    Some(_) if method == Method::HEAD => Reply::Whole(Bytes::new()),
                    Some(socket) => stream.start(
                        self.limits.stream_heartbeat,
                        Arc::clone(socket),
                        standing,
                        WatchGuard::new(&self.metrics),
                    ),
                    // It would end with the former process, perhaps within an event. The client resumes here.
                    None => Reply::Whole(stream.begin()),
                }
            }
            Some(Sequel::Wait(_)) | None if body.len() == length => Reply::Whole(charge.keep(body)),
            // A response to HEAD that was kept.
            Some(Sequel::Wait(_)) | None => Reply::Length(length),
        };
        Ok(Response::from_parts(head, reply))
    }

    /// Waits until the keys of a client with a quota are counted.
    async fn count(&self, prefix: &Arc<str>, deadline: Instant) -> Result<(), Rejection> {
        match timeout_at(deadline, self.shards.counted(prefix)).await {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => {
                let reason = "the keys of the token are being counted for its quota; try again later";
                Err(Rejection::new(StatusCode::SERVICE_UNAVAILABLE, reason))
            }
        }
    }

    /// Returns the time up to which a standby has everything. To be called before a response is made or looked up: the state only
    /// gets newer.
    fn as_of(&self) -> Option<time::Instant> {
        self.followed.as_ref().and_then(|followed| followed.as_of())
    }

    /// Returns the kept response to an equal request, or calls the guest and records its times.
    pub(super) async fn call(
        &self,
        incoming: Incoming,
        deadline: Instant,
        record: &mut Record,
    ) -> Result<Called, Rejection> {
        let as_of = self.as_of();
        if let Some(answer) = self.shards.kept(&incoming) {
            return Ok(Called::Here(Answered { answer, as_of, appended_before: false }));
        }
        let (client, begun) = (Arc::clone(&incoming.client), Instant::now());
        // HTTP/1.1 has one request at a time, which needs no timer.
        let turn = match client.turn.try_lock() {
            Ok(turn) => Ok(turn),
            Err(_) => timeout_at(deadline, client.turn.lock()).await,
        };
        let answer = match turn {
            Ok(_turn) => self.shards.call(incoming, deadline).await,
            Err(_) => Err(CallError::Late),
        };
        let guest_time = match &answer {
            Ok(answer) => answer.guest_time,
            Err(CallError::Trapped { guest_time }) => *guest_time,
            Err(_) => Duration::ZERO,
        };
        record.times.guest = guest_time;
        record.times.queue = begun.elapsed().saturating_sub(guest_time);
        let error = match answer {
            Ok(answer) => return Ok(Called::Here(Answered { answer, as_of, appended_before: false })),
            Err(error) => error,
        };
        let reason = error.to_string();
        let rejection = |status| Rejection::new(status, reason.clone());
        Err(match error {
            CallError::Trapped { .. } => rejection(StatusCode::INTERNAL_SERVER_ERROR),
            CallError::Partial => rejection(StatusCode::INTERNAL_SERVER_ERROR).with_code(problem::OUTCOME_UNKNOWN),
            CallError::KeyPrefix => rejection(StatusCode::FORBIDDEN),
            CallError::Down => rejection(StatusCode::SERVICE_UNAVAILABLE),
            CallError::Late => rejection(StatusCode::SERVICE_UNAVAILABLE).of_limit(Limit::RequestTimeout),
            CallError::HandedOver(incoming) => match self.successor.get() {
                Some(successor) => {
                    let response = successor.respond(*incoming, deadline).await;
                    record.times.queue = begun.elapsed();
                    return Ok(Called::Elsewhere(response?));
                }
                None => Rejection::new(StatusCode::SERVICE_UNAVAILABLE, reason),
            },
        })
    }
}
