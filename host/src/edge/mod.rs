//! The edge: sockets in, whole requests on, responses out when they may leave.
//!
//! Owns: connections and who is at their other end, the limits of what comes in, deadlines.
//! Must never know: what a path or a key means, or what lies in the log.
//!
//! Read `connection` first (from the socket to HTTP; `multiplex` has the requests of HTTP/2), then `service` (one request)
//! and what it admits requests by: `head`, `cors`, `auth`, `throttle`, `consistency`, `budget`, `body`; `stream` has the responses that go on,
//! `problem` errors for programs, `metrics` what is counted and `access_log` what is told.

pub mod access_log;
mod addresses;
pub mod auth;
mod body;
pub mod budget;
mod connection;
mod consistency;
pub mod cors;
mod counted;
mod frames;
mod fresh;
mod head;
mod metrics;
mod multiplex;
mod overheard;
mod patience;
mod problem;
mod refusal;
mod reply;
mod request_id;
mod service;
mod stream;
pub mod throttle;
pub mod tls;

use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kvs_runtime::Tasks;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use addresses::Addresses;
use budget::Budget;
use metrics::Limit;
pub use metrics::Metrics;
pub use request_id::RequestIds;
pub use service::Service;
use tls::Tls;

/// How long to leave the listener alone when the system has no more sockets to give.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Limits of a connection and of a request.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections: usize,
    pub connections_per_address: usize,
    pub handshake_timeout: Duration,
    pub header_bytes: usize,
    pub headers: usize,
    pub target_bytes: usize,
    pub header_timeout: Duration,
    pub idle_timeout: Duration,
    pub body_bytes: u64,
    /// The slowest that a body may come, in bytes a second.
    pub body_rate: u64,
    /// Of one HTTP/2 connection: requests at once, and requests that its client takes back before they are answered.
    pub streams: u32,
    pub resets: usize,
    /// Control frames of one HTTP/2 connection in a second, beside those that its requests and responses need.
    pub control_frames: u32,
    /// Requests under way at once, on all connections.
    pub requests: usize,
    pub request_timeout: Duration,
    /// How often a stream of events says that it goes on, when nothing happens.
    pub stream_heartbeat: Duration,
    /// How long a guest may hold a request.
    pub hold: Duration,
    /// How long requests under way may take when the server stops.
    pub drain: Duration,
}

/// What every connection is served with.
pub struct Edge {
    /// None serves plain HTTP.
    pub tls: Option<Arc<Tls>>,
    pub service: Service,
    pub limits: Limits,
    /// What clients may hold in memory.
    pub budget: Arc<Budget>,
    /// Starts a task for each connection.
    pub tasks: Tasks,
}

impl Edge {
    /// Serves `listener`, and `second` from when it is there, until `stop`, then finishes what is under way. Returns how many
    /// connections had to be cut off.
    pub async fn serve(
        self,
        listener: TcpListener,
        second: impl Future<Output = TcpListener>,
        stop: impl Future<Output = ()>,
    ) -> usize {
        let edge = Arc::new(self);
        let connections = Arc::new(Semaphore::new(edge.limits.connections));
        let addresses = Arc::new(Addresses::default());
        // Each connection holds a receiver to its end.
        let (stopping, _) = watch::channel(());
        let (mut stop, mut second) = (std::pin::pin!(stop), std::pin::pin!(second));
        let mut opened = None;
        loop {
            // A free place first: who finds none waits in the backlog of the listener.
            let accepted = async {
                let place = Arc::clone(&connections).acquire_owned().await;
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    accepted = accept(opened.as_ref()) => accepted,
                };
                (place, accepted)
            };
            let (place, stream, peer) = tokio::select! {
                biased;
                () = &mut stop => break,
                listener = &mut second, if opened.is_none() => {
                    opened = Some(listener);
                    continue;
                }
                (place, accepted) = accepted => match accepted {
                    Ok((stream, peer)) => (place, stream, peer),
                    Err(error) => {
                        accept_failed(&error).await;
                        continue;
                    }
                },
            };
            let Some(counted) = addresses.enter(peer.ip(), edge.limits.connections_per_address) else {
                edge.service.metrics.rejected(Limit::ConnectionsPerAddress);
                debug!(%peer, "closed: this address has {} connections", edge.limits.connections_per_address);
                continue;
            };
            let edge = Arc::clone(&edge);
            let open = edge.service.metrics.open();
            let stop = stopping.subscribe();
            let tasks = edge.tasks.clone();
            tasks.detach("connection", async move {
                if let Err(error) = edge.connected(stream, peer, stop).await {
                    edge.service.metrics.connection_failed(&error);
                    debug!(%peer, "connection ended: {error:#}");
                }
                drop((place, counted, open));
            });
        }
        drop((listener, opened));
        let open = stopping.receiver_count();
        stopping.send_replace(());
        match timeout(edge.limits.drain, stopping.closed()).await {
            Ok(()) => 0,
            Err(_) => open,
        }
    }
}

async fn accept(listener: Option<&TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => pending().await,
    }
}

async fn accept_failed(error: &io::Error) {
    // The peer gave up between its handshake and our accept: nothing is wrong here.
    if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
        return;
    }
    warn!("no connection could be accepted: {error}");
    sleep(ACCEPT_PAUSE).await;
}
