//! The HTTP server: accepts connections, passes complete requests on, and releases responses once they are durable.
//!
//! Owns: connections, authentication, limits of requests, deadlines.
//! Must never know: the meaning of a path or a key, or the contents of the log.
//!
//! Read `connection` first (from the socket to HTTP; `multiplex` has the requests of HTTP/2), then `service` (one request)
//! and its admission checks: `head`, `cors`, `auth`, `throttle`, `consistency`, `budget`, `body`; `stream` has event streams,
//! `problem` machine-readable errors. `forward` has the requests of the admin listener.

pub mod accept;
pub mod access_log;
mod addresses;
mod admission;
pub mod auth;
mod body;
pub mod budget;
mod connection;
mod consistency;
pub mod cors;
mod counted;
mod durability;
mod forward;
mod frame_inspector;
mod frames;
pub mod fresh;
mod half_close;
mod head;
pub mod line_rate;
mod lingering;
pub mod listener;
mod long_poll;
mod metrics;
mod multiplex;
pub mod problem;
pub mod proxy;
mod rejection;
mod reply;
mod request_id;
mod service;
pub mod slow_log;
mod stream;
mod successor;
pub mod throttle;
mod timeouts;
pub mod tls;

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use kvs_runtime::Tasks;
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

pub use access_log::target as shown_target;
use addresses::Addresses;
use budget::Budget;
pub use counted::left;
pub use forward::{Caller, Forwarder};
pub use head::{check_framing, is_safe};
pub use lingering::linger;
use listener::{Listener, Listeners};
pub use metrics::Metrics;
pub use rejection::Rejection;
pub use reply::Reply;
pub use request_id::{HEADER as REQUEST_ID, RequestIds};
pub use service::Service;
pub use successor::Successor;
use tls::Tls;

/// Delay before the next accept when the system is out of sockets.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Timeout of closing idle connections when the service has been handed over for as long as the drain timeout.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

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
    /// Minimum rate of a request body, in bytes per second.
    pub body_rate: u64,
    /// Maximum concurrent streams, and pending reset streams, of one HTTP/2 connection.
    pub streams: u32,
    pub resets: usize,
    /// Control frames per second of one HTTP/2 connection, in addition to those that its requests and responses need.
    pub control_frames: u32,
    /// Maximum requests in flight, on all connections.
    pub requests: usize,
    pub request_timeout: Duration,
    /// Interval of keep-alive comments on event streams.
    pub stream_heartbeat: Duration,
    /// Maximum duration of a long poll.
    pub hold: Duration,
    /// Timeout of requests in flight at shutdown.
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
    /// Whether connections of trusted proxies begin with a header of the PROXY protocol.
    pub proxy_protocol: bool,
    /// Starts a task for each connection.
    pub tasks: Tasks,
    /// Each connection, and each request of the admin listener, holds a receiver to its end.
    pub stage: watch::Sender<Stage>,
}

/// Stage of the service. It only goes forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Serving,
    /// Another process accepts connections. Open ones end with their next response, so that no request is lost on an idle one.
    HandedOver,
    /// Requests in flight are finished, and idle connections closed.
    Stopping,
}

impl Edge {
    /// Serves `listeners`, and `second` from when it is there, until another process accepts connections or `stopped`, then
    /// finishes what is in flight. Returns how many connections had to be cut off.
    pub async fn serve(
        self: Arc<Self>,
        mut listeners: Listeners,
        second: impl Future<Output = Arc<Listener>>,
        handed_over: impl Future<Output = ()>,
        stopped: impl Future<Output = ()>,
    ) -> usize {
        let edge = self;
        let connections = Arc::new(Semaphore::new(edge.limits.connections));
        let addresses = Arc::new(Addresses::default());
        let (mut handed_over, mut stopped, mut second) = (pin!(handed_over), pin!(stopped), pin!(second));
        let mut is_opened = false;
        let stage = loop {
            // The permit first: without one, connections wait in the backlog of the listener.
            let accepted = async {
                let place = Arc::clone(&connections).acquire_owned().await;
                (place, listeners.accept().await)
            };
            let (place, stream, peer) = tokio::select! {
                biased;
                () = &mut stopped => break Stage::Stopping,
                () = &mut handed_over => break Stage::HandedOver,
                listener = &mut second, if !is_opened => {
                    is_opened = true;
                    listeners.push(listener);
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
            let addresses = Arc::clone(&addresses);
            let edge = Arc::clone(&edge);
            let open = edge.service.metrics.open();
            let stage = edge.stage.subscribe();
            let tasks = edge.tasks.clone();
            tasks.detach("connection", async move {
                if let Err(error) = edge.connected(stream, peer, &addresses, stage).await {
                    edge.service.metrics.connection_failed(&error);
                    debug!(peer = %shown(peer), "connection ended: {error:#}");
                }
                drop((place, open));
            });
        };
        drop(listeners);
        edge.stage.send_replace(stage);
        let mut drain = edge.limits.drain;
        if stage == Stage::HandedOver {
            // Idle connections have this long to send a request, unless this process is stopped too.
            tokio::select! {
                drained = timeout(drain, edge.stage.closed()) => if drained.is_err() { drain = CLOSE_TIMEOUT },
                () = stopped => {}
            }
            edge.stage.send_replace(Stage::Stopping);
        }
        // Those that are left after the timeout are cut off.
        let _ = timeout(drain, edge.stage.closed()).await;
        edge.stage.receiver_count()
    }
}

/// Returns the address of a client as log lines have it.
fn shown(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "unix".to_owned(), |address| address.to_string())
}

async fn accept_failed(error: &io::Error) {
    // The peer aborted between its handshake and the accept, which is normal.
    if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
        return;
    }
    warn!("failed to accept a connection: {error}");
    sleep(ACCEPT_PAUSE).await;
}
