//! One connection, from the accepted socket to its last response: TLS, then HTTP/1.1 or HTTP/2.
//!
//! Must never know: what is asked.

use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Error, Result, bail};
use hyper::header::{self, HeaderValue};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info};

use super::addresses::Addresses;
use super::budget::Account;
use super::counted::MeteredSocket;
use super::frame_inspector::FrameInspector;
use super::frames::PREFACE;
use super::half_close::HalfClose;
use super::metrics::{Limit, LimitExceeded};
use super::multiplex::{RequestExecutor, TimeSlice};
use super::timeouts::{Activity, ConnectionTimeouts, TimeoutAction};
use super::{Edge, Stage, proxy, shown, tls};
use crate::guest::Client;

/// Flow-control window of an HTTP/2 connection and of its streams, in bytes: more than the network holds at 5 MB/s over 50 ms.
/// Bytes that no request has read are in no budget, so all streams of a connection share one window.
const WINDOW: u32 = 256 << 10;
/// Size of the send buffer of an HTTP/2 stream. A larger piece is shared with the budget, not copied.
const SEND_BUFFER: usize = 64 << 10;
/// Polling interval for the rest of the preface of HTTP/2.
const PEEK: Duration = Duration::from_millis(10);

/// The client of a connection, and its account of memory.
pub(super) struct Peer {
    pub client: Arc<Client>,
    /// None for a request that the former process forwards, which waits for nothing.
    pub socket: Option<Arc<TcpStream>>,
    pub account: Arc<Account>,
}

impl Edge {
    /// Serves one connection. At a stop it finishes the requests in progress, if there are any.
    pub(super) async fn connected(
        self: &Arc<Self>,
        mut stream: TcpStream,
        mut address: Option<SocketAddr>,
        addresses: &Arc<Addresses>,
        mut stage: watch::Receiver<Stage>,
    ) -> Result<()> {
        if self.proxy_protocol && self.service.proxies.trusts(address) {
            let client = tokio::select! {
                read = timeout(self.limits.header_timeout, proxy::read_header(&mut stream)) => match read {
                    Ok(client) => client?,
                    Err(_) => bail!(LimitExceeded(Limit::HeaderTimeout)),
                },
                () = reached(&mut stage, Stage::Stopping) => return Ok(()),
            };
            address = client.or(address);
        }
        let limit = self.limits.connections_per_address;
        let counted = address.map(|address| addresses.enter(address.ip(), limit).ok_or(Limit::ConnectionsPerAddress));
        let _counted = counted.transpose().map_err(LimitExceeded)?;
        // Responses are written whole; without this the kernel would hold the last packet back.
        if address.is_some()
            && let Err(error) = stream.set_nodelay(true)
        {
            debug!(peer = %shown(address), "TCP_NODELAY: {error}");
        }
        let metrics = &self.service.metrics;
        let socket = Arc::new(stream);
        let Some(tls) = &self.tls else {
            let client = Client { address, tls_version: None, identity: None, turn: Arc::default() };
            let http2 = tokio::select! {
                begun = timeout(self.limits.header_timeout, speaks_http2(&socket)) => match begun {
                    Ok(http2) => http2?,
                    Err(_) => bail!(LimitExceeded(Limit::HeaderTimeout)),
                },
                () = reached(&mut stage, Stage::Stopping) => return Ok(()),
            };
            let activity = Arc::<Activity>::default();
            let stream = MeteredSocket::new(&socket, metrics, &activity);
            return self.http(stream, http2, self.peer(client, socket), activity, pending(), stage).await;
        };
        let activity = Arc::<Activity>::default();
        let renewals = tls.renewals();
        let shaking =
            TlsAcceptor::from(Arc::clone(&tls.get().config)).accept(MeteredSocket::new(&socket, metrics, &activity));
        let stream = tokio::select! {
            shaken = timeout(self.limits.handshake_timeout, shaking) => match shaken {
                Ok(shaken) => shaken.inspect_err(|error| metrics.handshake_failed(error))?,
                Err(_) => bail!(LimitExceeded(Limit::HandshakeTimeout)),
            },
            // Nothing was asked yet, so nothing is lost.
            () = reached(&mut stage, Stage::Stopping) => return Ok(()),
        };
        tls::verify_resumed(tls, &stream).inspect_err(|error| {
            info!(peer = %shown(address), "closed: the client certificate is no longer valid: {error}");
        })?;
        let (tls_version, identity) = (Some(tls::version(&stream)), tls::identity(&stream));
        let client = Client { address, tls_version, identity, turn: Arc::default() };
        let http2 = tls::speaks_http2(&stream);
        let revoked = tls::revoked(tls, tls::shown(&stream), renewals, self.limits.stream_heartbeat);
        self.http(stream, http2, self.peer(client, socket), activity, revoked, stage).await
    }

    fn peer(&self, client: Client, socket: Arc<TcpStream>) -> Arc<Peer> {
        Arc::new(Peer { client: Arc::new(client), socket: Some(socket), account: self.budget.open() })
    }

    async fn http<S>(
        self: &Arc<Self>,
        stream: S,
        http2: bool,
        peer: Arc<Peer>,
        activity: Arc<Activity>,
        revoked: impl Future<Output = rustls::Error>,
        stage: watch::Receiver<Stage>,
    ) -> Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let account = Arc::clone(&peer.account);
        let asked = Arc::clone(&activity);
        let timeouts = ConnectionTimeouts::new(Arc::clone(&activity), http2, &self.limits);
        let address = peer.client.address;
        let cut = async {
            tokio::select! {
                () = account.cut() => Error::new(LimitExceeded(Limit::InflightBytes)),
                error = revoked => {
                    info!(peer = %shown(address), "closed: the client certificate is no longer valid: {error}");
                    Error::new(error)
                }
            }
        };
        // Shared by the requests of this connection alone: a count of references to the edge would go back and forth between
        // threads.
        let slice = TimeSlice::default();
        let shared = Arc::new((Arc::clone(self), peer, slice.clone()));
        let service = service_fn(move |request| {
            // In flight from here on, before its first turn: `HalfClose` asks between.
            let (shared, guard) = (Arc::clone(&shared), Arc::clone(&asked).begin());
            async move {
                let (edge, peer, slice) = &*shared;
                if !http2 {
                    slice.turn().await;
                }
                let mut response = edge.service.respond(request, peer).await;
                if !http2 && *edge.stage.borrow() != Stage::Serving {
                    let close = const { HeaderValue::from_static("close") };
                    response.headers_mut().insert(header::CONNECTION, close);
                }
                response.body_mut().keep_in_flight(guard);
                Ok::<_, Infallible>(response)
            }
        });
        let limits = &self.limits;
        if http2 {
            let streams = RequestExecutor::new(&slice);
            // A long poll that waits is called once more at the end of what the client sends.
            let stream = HalfClose::new(stream, &activity, 2 * limits.request_timeout);
            let stream = TokioIo::new(FrameInspector::new(stream, &self.service.metrics, slice, limits.control_frames));
            let mut http = http2::Builder::new(streams.clone());
            http.timer(TokioTimer::new())
                .max_concurrent_streams(limits.streams)
                .initial_connection_window_size(WINDOW)
                .initial_stream_window_size(WINDOW)
                .max_send_buf_size(SEND_BUFFER)
                .max_pending_accept_reset_streams(limits.resets)
                .max_local_error_reset_streams(limits.resets)
                .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX));
            drive(http.serve_connection(stream, service), streams.run(), cut, timeouts, (stage, Stage::HandedOver))
                .await
        } else {
            let mut http = http1::Builder::new();
            // Without the timer of hyper, which is set for each request: `ConnectionTimeouts` cost less. The size is that of a head
            // that is read, and that of what is written and not taken, beside one piece.
            http.max_buf_size(limits.header_bytes).max_headers(limits.headers);
            // A client that sends no more is still answered.
            http.half_close(true);
            drive(
                http.serve_connection(TokioIo::new(stream), service),
                slice.renew(),
                cut,
                timeouts,
                (stage, Stage::Stopping),
            )
            .await
        }
    }
}

/// Serves a connection until the client ends it, `cut` resolves, a timeout is exceeded, or the service reaches the stage `last`.
/// HTTP/2 has GOAWAY to end one that is idle; with HTTP/1.1 a request can be on its way.
///
/// Looking now and again costs less than a timer for each request, and notices a little late.
async fn drive(
    connection: impl GracefulConnection<Error: std::error::Error + Send + Sync + 'static>,
    streams: impl Future<Output = Infallible>,
    cut: impl Future<Output = Error>,
    mut timeouts: ConnectionTimeouts,
    (mut stage, last): (watch::Receiver<Stage>, Stage),
) -> Result<()> {
    let (mut connection, mut streams, mut cut) = (pin!(connection), pin!(streams), pin!(cut));
    let mut stopping = false;
    loop {
        tokio::select! {
            biased;
            ended = connection.as_mut() => return Ok(ended?),
            never = streams.as_mut() => match never {},
            error = cut.as_mut() => return Err(error),
            () = reached(&mut stage, last), if !stopping => {
                stopping = true;
                timeouts.shut_down();
                connection.as_mut().graceful_shutdown();
            }
            () = sleep(timeouts.next_look()) => match timeouts.look() {
                TimeoutAction::Continue => {}
                TimeoutAction::ShutDown => connection.as_mut().graceful_shutdown(),
                TimeoutAction::Abort(Limit::HeaderTimeout) if stopping => return Ok(()),
                TimeoutAction::Abort(limit) => bail!(LimitExceeded(limit)),
            }
        }
    }
}

/// Waits for a stage of the service, or a later one.
async fn reached(stage: &mut watch::Receiver<Stage>, awaited: Stage) {
    // The sender is in the edge, which outlives its connections.
    let _ = stage.wait_for(|stage| *stage >= awaited).await;
}

/// Whether the first bytes, which stay where they are, are those of HTTP/2. No method of HTTP/1.1 starts like this.
async fn speaks_http2(stream: &TcpStream) -> Result<bool> {
    let mut first = [0; PREFACE.len()];
    loop {
        let seen = stream.peek(&mut first).await?;
        if seen == 0 || !PREFACE.starts_with(&first[..seen]) {
            return Ok(false);
        }
        if seen == PREFACE.len() {
            return Ok(true);
        }
        sleep(PEEK).await;
    }
}
