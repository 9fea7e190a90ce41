//! The edge: sockets in, whole requests on, responses out when they may leave.
//!
//! Owns: connections, the limits of what comes in, deadlines.
//! Must never know: what a path or a key means, or what lies in the log.

mod service;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

pub use service::Service;

/// How long to leave the listener alone when the system has no more sockets to give.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Limits of a connection and of a request.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections: usize,
    pub header_bytes: usize,
    pub header_timeout: Duration,
    pub body_bytes: u64,
    pub request_timeout: Duration,
    /// How long requests under way may take when the server stops.
    pub drain: Duration,
}

/// Serves `listener` until `stop`, then finishes what is under way. Returns how many connections had to be cut off.
pub async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    limits: Limits,
    stop: impl Future<Output = ()>,
) -> usize {
    let connections = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        // A free place first: who finds none waits in the backlog of the listener.
        let accepted = async {
            let place = Arc::clone(&connections).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, stream, peer) = tokio::select! {
            biased;
            () = &mut stop => break,
            (place, accepted) = accepted => match accepted {
                Ok((stream, peer)) => (place, stream, peer),
                Err(error) => {
                    accept_failed(&error).await;
                    continue;
                }
            },
        };
        let connection = graceful.watch(connect(stream, peer, Arc::clone(&service), limits));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                debug!(%peer, "connection ended: {error}");
            }
            drop(place);
        });
    }
    drop(listener);
    let open = graceful.count();
    match timeout(limits.drain, graceful.shutdown()).await {
        Ok(()) => 0,
        Err(_) => open,
    }
}

fn connect(
    stream: TcpStream,
    peer: SocketAddr,
    service: Arc<Service>,
    limits: Limits,
) -> impl hyper_util::server::graceful::GracefulConnection<Error = hyper::Error> {
    // Responses are written whole; without this the kernel would hold the last packet back.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%peer, "TCP_NODELAY: {error}");
    }
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(limits.header_bytes)
        .serve_connection(
            TokioIo::new(stream),
            service_fn(move |request| {
                let service = Arc::clone(&service);
                async move { Ok::<_, std::convert::Infallible>(service.respond(request, peer).await) }
            }),
        )
}

async fn accept_failed(error: &io::Error) {
    // The peer gave up between its handshake and our accept: nothing is wrong here.
    if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
        return;
    }
    warn!("no connection could be accepted: {error}");
    sleep(ACCEPT_PAUSE).await;
}
