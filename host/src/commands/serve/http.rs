//! The HTTP interface: assembled from the settings, with the files that it reads again.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

use anyhow::Result;
use kvs_runtime::Env;
use tokio::signal::unix::SignalKind;
use tokio::sync::watch;
use tracing::warn;

use super::store::Store;
use crate::admin::Admin;
use crate::edge::access_log::AccessLog;
use crate::edge::auth::Tokens;
use crate::edge::budget::Budget;
use crate::edge::cors::Cors;
use crate::edge::fresh::Reloads;
use crate::edge::proxy::TrustedProxies;
use crate::edge::slow_log::SlowLog;
use crate::edge::throttle::Throttle;
use crate::edge::tls::Tls;
use crate::edge::{Edge, Limits, Metrics, RequestIds, Service, Stage, Successor};
use crate::guest::Shards;
use crate::settings::Serve;
use crate::signals::listen as listen_for;

/// What requests are served with, besides the store.
pub struct Served {
    pub tls: Option<Arc<Tls>>,
    pub tokens: Option<Arc<Tokens>>,
    /// Maximum number of connections.
    pub connections: usize,
    pub budget: Arc<Budget>,
    pub successor: Arc<OnceLock<Successor>>,
}

/// Assembles the HTTP interface, and starts what it uses.
pub fn edge(
    args: &Serve,
    served: Served,
    shards: &Arc<Shards>,
    store: &Store,
    admin: &Admin,
    env: &Env,
) -> Result<Arc<Edge>> {
    let Served { tls, tokens, connections, budget, successor } = served;
    reload_files(admin, tls.as_ref(), tokens.as_ref(), env)?;
    let limits = limits(args, connections)?;
    let service = service(args, (tokens, limits, successor), shards, store, admin, env);
    admin.metrics.add(budget.clone());
    Ok(Arc::new(Edge {
        tls,
        service,
        limits,
        budget,
        proxy_protocol: args.proxy.proxy_protocol,
        tasks: env.tasks.clone(),
        stage: watch::Sender::new(Stage::Serving),
    }))
}

/// Serves the requests that the former process forwards until it ends.
pub fn serve_former(edge: &Arc<Edge>, former: UnixStream, env: &Env) {
    let forwarded = Arc::clone(edge).serve_forwarded(former);
    env.tasks.detach("forwarded connection", async move {
        if let Err(error) = forwarded.await {
            warn!("requests of the former process: {error:#}");
        }
    });
}

/// Starts to read the files of TLS and of the tokens again when they change, or at SIGHUP.
fn reload_files(admin: &Admin, tls: Option<&Arc<Tls>>, tokens: Option<&Arc<Tokens>>, env: &Env) -> Result<()> {
    let hangup = || listen_for(SignalKind::hangup());
    let mut reloads = Vec::new();
    if let Some(tls) = tls {
        tls.start("TLS reload", hangup()?, env);
        admin.metrics.add(tls.clone());
        reloads.push(("tls", tls.last_reload()));
        let tls = Arc::clone(tls);
        admin.health.add("tls", move || tls.condition());
    }
    if let Some(tokens) = tokens {
        tokens.start("token reload", hangup()?, env);
        reloads.push(("tokens", tokens.last_reload()));
        let tokens = Arc::clone(tokens);
        admin.health.add("tokens", move || tokens.condition());
    }
    admin.metrics.add(Arc::new(Reloads(reloads)));
    Ok(())
}

/// Assembles the service of requests, and starts what it uses.
fn service(
    args: &Serve,
    (tokens, limits, successor): (Option<Arc<Tokens>>, Limits, Arc<OnceLock<Successor>>),
    shards: &Arc<Shards>,
    store: &Store,
    admin: &Admin,
    env: &Env,
) -> Service {
    let metrics = Arc::new(Metrics::default());
    admin.metrics.add(metrics.clone());
    let throttle = args.access.rate().map(Throttle::new);
    if let Some(throttle) = &throttle {
        throttle.start(env);
    }
    let access_log = args.access_log_rate.map(AccessLog::new);
    if let Some(access_log) = &access_log {
        access_log.start(env);
        admin.metrics.add(access_log.clone());
    }
    let slow_log = args.slow_request.map(SlowLog::new);
    if let Some(slow_log) = &slow_log {
        slow_log.start(env);
        admin.metrics.add(slow_log.clone());
    }
    Service {
        shards: Arc::clone(shards),
        changes: Arc::clone(&store.changes),
        followed: store.followed.clone(),
        stale_reads: args.stale_reads,
        limits,
        tokens,
        throttle,
        cors: Cors::new(args.access.cors_origin.clone()),
        metrics,
        ids: RequestIds::default(),
        access_log,
        slow_log,
        proxies: TrustedProxies::new(&args.proxy.trusted_proxy),
        successor,
    }
}

/// Limits of connections and requests.
fn limits(args: &Serve, connections: usize) -> Result<Limits> {
    Ok(Limits {
        connections,
        connections_per_address: args.max_connections_per_address,
        handshake_timeout: args.tls.handshake_timeout,
        header_bytes: usize::try_from(args.max_header_bytes.as_u64())?,
        headers: args.max_headers,
        target_bytes: usize::try_from(args.max_target_bytes.as_u64())?,
        header_timeout: args.header_timeout,
        idle_timeout: args.idle_timeout,
        body_bytes: args.max_value_bytes.as_u64(),
        body_rate: args.min_body_rate.as_u64(),
        requests: args.max_requests,
        streams: args.http2_max_streams,
        resets: args.http2_max_resets,
        control_frames: args.http2_max_control_frames,
        request_timeout: args.request_timeout,
        stream_heartbeat: args.watch_keep_alive,
        hold: args.max_wait,
        drain: args.drain_timeout,
    })
}
