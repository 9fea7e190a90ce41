//! The admin listener: is the server alive, is it ready, what has it counted, which guest serves, and another in its place;
//! and the console, a page in the browser that shows all that.
//!
//! It has a thread and a runtime of its own, and waits for nothing that requests to the store wait for: it answers when
//! every guest is busy, being built, or gone. Requests to `/v1` are passed on to the threads that serve clients.
//!
//! Owns: the admin socket, what its paths mean, the state of the server's health.
//! Must never know: the data, or what a request to the store means.

mod backup;
mod connections;
#[cfg(feature = "console")]
mod console;
#[cfg(not(feature = "console"))]
#[path = "no_console.rs"]
mod console;
mod exposition;
mod guest;
mod health;
mod history;
mod origin;
mod process;
mod read_only;
mod rejected;
mod scan;
mod stats;
mod turns;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener as Bound};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::Either;
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use kvs_runtime::Env;
use kvs_txlog::TransactionLog;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{SetOnce, watch};

use self::backup::Backups;
pub use self::backup::ENTRIES_HEADER;
use self::guest::Guests;
pub use self::health::{Health, Phase};
use self::history::Histories;
use self::origin::Hosts;
pub use self::origin::host_name;
pub use self::process::Process;
pub use self::read_only::{DataUsers, ReadOnly};
use self::rejected::Rejected;
use self::scan::{Pieces, withdrawn};
pub use self::stats::MAX_TOP;
use self::stats::Statistics;
use self::turns::elsewhere;
use crate::audit::{self, Actor};
use crate::edge::auth::{Scope, Tokens, revoked_admin};
use crate::edge::tls::Tls;
use crate::edge::{Caller, Forwarder, REQUEST_ID, Reply, RequestIds, check_framing, is_safe, problem, shown_target};
use crate::guest::Swapper;
use kvs_metrics::{Measured, Metrics, Page};

/// What a request with another path is answered.
const UNKNOWN: &str = if cfg!(feature = "console") {
    "unknown path; there are /livez, /readyz, /primary, /replica, /metrics, /guest, /backup, /history, /stats, /read-only, /v1 and \
     /console\n"
} else {
    "unknown path; there are /livez, /readyz, /primary, /replica, /metrics, /guest, /backup, /history, /stats, /read-only and /v1\n"
};

/// The response to a request.
type Answer = Response<Reply>;
/// Body of a response, or of a backup.
type AdminBody = Either<Reply, Pieces>;

/// Answers the requests of the admin listener.
pub struct Admin {
    pub health: Arc<Health>,
    pub metrics: Arc<Metrics>,
    hosts: Hosts,
    /// Asked for a token of scope admin, or metrics for those, where there are any, by all but health.
    tokens: Option<Arc<Tokens>>,
    /// None speaks plain HTTP.
    tls: Option<Arc<Tls>>,
    ids: RequestIds,
    rejected: Rejected,
    /// None until there is a guest.
    guests: OnceLock<Guests>,
    /// None until the log is open.
    log: OnceLock<(Backups, Histories, Statistics)>,
    /// None until the log is open.
    read_only: OnceLock<Arc<ReadOnly>>,
    /// Passes requests on to the HTTP interface. None until it is open.
    forwarder: OnceLock<Forwarder>,
    /// Set when another process serves the listener.
    handed_over: watch::Sender<bool>,
    env: Env,
}

impl Admin {
    pub fn new(hosts: &[String], tokens: Option<Arc<Tokens>>, tls: Option<Arc<Tls>>, env: &Env) -> Self {
        let metrics = Arc::new(Metrics::default());
        metrics.add(Arc::new(Build { started: env.clock.unix_ms() / 1_000 }));
        metrics.add(Arc::new(env.tasks.clone()));
        let health = Arc::new(Health::new(env.tasks.clone()));
        metrics.add(health.clone());
        Self {
            health,
            metrics,
            hosts: Hosts::new(hosts),
            tokens,
            tls,
            ids: RequestIds::default(),
            rejected: Rejected::new(),
            guests: OnceLock::new(),
            log: OnceLock::new(),
            read_only: OnceLock::new(),
            forwarder: OnceLock::new(),
            handed_over: watch::Sender::new(false),
            env: env.clone(),
        }
    }

    pub fn set_forwarder(&self, forwarder: Forwarder) {
        // One HTTP interface is opened in the life of a process.
        let _ = self.forwarder.set(forwarder);
    }

    pub fn set_swapper(&self, swapper: Arc<Swapper>) {
        // One guest is started in the life of a process; the others are swapped in.
        let _ = self.guests.set(Guests::new(swapper));
    }

    pub fn set_log(&self, log: Arc<dyn TransactionLog>, backup_timeout: Duration) {
        let backups = Backups::new(Arc::clone(&log), backup_timeout, &self.env);
        self.metrics.add(backups.metrics());
        self.health.set_log(Arc::clone(&log));
        // One log is opened in the life of a process.
        let _ = self.log.set((backups, Histories::new(Arc::clone(&log), &self.env), Statistics::new(log, &self.env)));
    }

    pub fn set_read_only(&self, read_only: Arc<ReadOnly>) {
        self.metrics.add(read_only.clone());
        // One log is opened in the life of a process.
        let _ = self.read_only.set(read_only);
    }

    /// Leaves the listener to another process, and ends the connections after their requests in flight.
    pub fn hand_over(&self) {
        self.handed_over.send_replace(true);
    }

    async fn is_handed_over(&self) {
        // The sender is in `self`.
        let _ = self.handed_over.subscribe().wait_for(|handed_over| *handed_over).await;
    }

    /// Serves `listener` from a thread of its own, to the end of the process.
    pub fn start(self: Arc<Self>, listener: Bound) -> Result<()> {
        listener.set_nonblocking(true)?;
        self.rejected.start(&self.env);
        let Env { tasks, clock, .. } = self.env.clone();
        let serve = move || -> Result<Infallible> {
            let runtime = turns::runtime().context("no runtime")?;
            let listener = listener.try_clone()?;
            runtime.block_on(async { self.serve(TcpListener::from_std(listener)?).await })
        };
        tasks.restart_thread("admin", &clock, serve).context("no thread for the admin listener")?;
        Ok(())
    }

    async fn respond(&self, request: Request<Incoming>, connection: &Connection) -> Response<AdminBody> {
        let object = object(&request);
        let request_id = Some(self.ids.of(request.headers()));
        let mut actor = Actor { principal: None, request_id, peer: Some(connection.address) };
        let response = self.answer(request, &mut actor, connection).await;
        // An edit has a line of its own, which no rate leaves out.
        if response.extensions().get::<Recorded>().is_none() {
            self.rejected.log(&actor, &object, response.status());
        }
        response
    }

    /// The paths there are, and what answers them.
    async fn answer(
        &self,
        request: Request<Incoming>,
        actor: &mut Actor,
        connection: &Connection,
    ) -> Response<AdminBody> {
        let (head, body) = request.into_parts();
        if let Err(rejection) = check_framing(&head) {
            return rejection.with_unread(&head.headers, body).response().map(Either::Left);
        }
        let request = Request::from_parts(head, body);
        if let Err(refusal) = self.hosts.check(&request) {
            return (*refusal).map(Either::Left);
        }
        // Load balancers ask for health without a token. The console is public, since it asks for the token.
        let is_health = matches!(request.uri().path(), "/livez" | "/readyz" | "/primary" | "/replica");
        let is_public = is_health || console::file(request.uri().path()).is_some();
        if let Some(tokens) = self.tokens.as_ref().filter(|_| !is_public) {
            let needed = if request.uri().path() == "/metrics" { Scope::Metrics } else { Scope::Admin };
            let checked;
            (actor.principal, checked) = tokens.get().check_admin(request.headers(), needed);
            if let Err(rejection) = checked {
                return rejection.response().map(Either::Left);
            }
        }
        if is_scan(request.uri().path()) {
            return self.answer_by_scan(request, connection).await;
        }
        self.answer_whole(request, actor, connection).await.map(Either::Left)
    }

    /// Answers with what a pass over the log finds, for as long as the client may ask for it.
    async fn answer_by_scan(&self, request: Request<Incoming>, connection: &Connection) -> Response<AdminBody> {
        let Some((backups, histories, statistics)) = self.log.get() else {
            return text(StatusCode::SERVICE_UNAVAILABLE, "the log is not open yet\n").map(Either::Left);
        };
        // A backup sends all that it reads, so that hyper notices.
        let is_backup = request.uri().path() == "/backup";
        let socket = match (!is_backup).then(|| connection.second_socket()).transpose() {
            Ok(socket) => socket,
            Err(error) => {
                let reason = format!("no second handle of the connection: {error}\n");
                return text(StatusCode::SERVICE_UNAVAILABLE, reason).map(Either::Left);
            }
        };
        let revoked = revoked_admin(self.tokens.clone(), request.headers().clone(), Scope::Admin);
        let mut withdrawn = withdrawn(revoked, socket);
        let scan = async {
            match request.uri().path() {
                "/backup" => backups.respond(request).await,
                "/history" => histories.respond(request).await,
                _ => statistics.respond(request).await,
            }
        };
        let response = tokio::select! {
            response = scan => response,
            rejection = &mut withdrawn => return rejection.response().map(Either::Left),
        };
        response.map(|body| match body {
            Either::Right(pieces) => Either::Right(pieces.until(withdrawn)),
            whole => whole,
        })
    }

    async fn answer_whole(&self, request: Request<Incoming>, actor: &mut Actor, connection: &Connection) -> Answer {
        match (request.uri().path(), request.method()) {
            ("/livez", &Method::GET | &Method::HEAD) => text(StatusCode::OK, "ok\n"),
            ("/readyz", &Method::GET | &Method::HEAD) => self.report(Health::report).await,
            ("/primary", &Method::GET | &Method::HEAD) => self.report(Health::primary).await,
            ("/replica", &Method::GET | &Method::HEAD) => self.report(Health::replica).await,
            ("/metrics", &Method::GET | &Method::HEAD) => {
                let (metrics, headers) = (Arc::clone(&self.metrics), request.headers().clone());
                elsewhere(move || {
                    let (exposition, media_type) = exposition::of(&metrics, &headers);
                    let mut response = text(StatusCode::OK, exposition);
                    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
                    response
                })
                .await
            }
            ("/livez" | "/readyz" | "/primary" | "/replica" | "/metrics", _) => not_allowed("GET, HEAD"),
            ("/read-only", method) => match self.read_only.get() {
                Some(read_only) => read_only.respond(method, actor).await,
                None => text(StatusCode::SERVICE_UNAVAILABLE, "the log is not open yet\n"),
            },
            ("/guest", _) => match self.guests.get() {
                Some(guests) => guests.respond(request, actor).await,
                None => text(StatusCode::SERVICE_UNAVAILABLE, "no guest serves yet\n"),
            },
            (path, _) if path == "/v1" || path.starts_with("/v1/") => self.forward(request, actor, connection).await,
            (path, &Method::GET | &Method::HEAD) if let Some(file) = console::file(path) => console::page(file),
            _ => text(StatusCode::NOT_FOUND, UNKNOWN),
        }
    }

    async fn report(&self, of: fn(&Health) -> (bool, String)) -> Answer {
        let health = Arc::clone(&self.health);
        elsewhere(move || {
            let (is_so, report) = of(&health);
            text(if is_so { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, report)
        })
        .await
    }

    /// Passes a request on to the HTTP interface, which asks for a token of its own where there are tokens. What it edits is in
    /// the audit trail.
    async fn forward(&self, request: Request<Incoming>, actor: &mut Actor, connection: &Connection) -> Answer {
        let wants_problem = problem::is_wanted(request.headers());
        let mut response = self.pass_on(request, actor, connection).await;
        // A rejection of this listener; the responses of the HTTP interface are complete.
        problem::complete(&mut response, wants_problem);
        response
    }

    async fn pass_on(&self, request: Request<Incoming>, actor: &mut Actor, connection: &Connection) -> Answer {
        let Some(forwarder) = self.forwarder.get() else {
            return text(StatusCode::SERVICE_UNAVAILABLE, "the HTTP interface is not open yet\n");
        };
        let caller = match connection.caller.get() {
            Some(caller) => Arc::clone(caller),
            None => match forwarder.open(connection.socket.as_fd(), connection.address) {
                // Requests of one connection come one after the other, so this is the first.
                Ok(caller) => {
                    let _ = connection.caller.set(Arc::clone(&caller));
                    caller
                }
                Err(rejection) => return rejection.response(),
            },
        };
        let mut edit = (!is_safe(request.method())).then(|| Edit {
            actor: actor.clone(),
            object: object(&request),
            outcome: None,
        });
        let mut response = forwarder.respond(request, caller).await;
        if let Some(id) = response.headers().get(REQUEST_ID) {
            actor.request_id = Some(id.clone());
        }
        if let Some(edit) = &mut edit {
            edit.actor.request_id = actor.request_id.clone();
            edit.outcome = Some(response.status());
            response.extensions_mut().insert(Recorded);
        }
        response
    }
}

/// Whether a request to this path reads the log.
fn is_scan(path: &str) -> bool {
    matches!(path, "/backup" | "/history" | "/stats")
}

/// Returns a request as the audit trail has it.
fn object(request: &Request<Incoming>) -> String {
    format!("{} {}", request.method(), shown_target(request.uri()))
}

/// Marks the response to a request that has a line in the audit trail.
#[derive(Clone)]
struct Recorded;

/// A request that may change the store, logged when it is over.
struct Edit {
    actor: Actor,
    object: String,
    /// None when the client disconnected before the response.
    outcome: Option<StatusCode>,
}

impl Drop for Edit {
    fn drop(&mut self) {
        let outcome = self.outcome.as_ref().map_or("unknown: the client disconnected", StatusCode::as_str);
        audit::log(&self.actor, "edit", &self.object, outcome);
    }
}

/// An accepted connection.
struct Connection {
    /// A second handle of its socket, for requests that wait and notice that the client has left.
    socket: OwnedFd,
    address: SocketAddr,
    /// Set by the first request to the HTTP interface.
    caller: SetOnce<Arc<Caller>>,
}

impl Connection {
    fn second_socket(&self) -> io::Result<TcpStream> {
        TcpStream::from_std(self.socket.try_clone()?.into())
    }
}

/// The program, and the time of its start in seconds since 1970.
struct Build {
    started: u64,
}

impl Measured for Build {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        page.info("build", "The program", [("version", env!("CARGO_PKG_VERSION"))])?;
        page.gauge("start_time_seconds", "Time of the start, in seconds since 1970", self.started)
    }
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Reply::Whole(text.into()));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn not_allowed(methods: &'static str) -> Answer {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, format!("this path has {methods}\n"));
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(methods));
    response
}
