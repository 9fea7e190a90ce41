//! One connection, from the accepted socket to its last response: TLS, then HTTP/1.1 or HTTP/2.
//!
//! Must never know: what is asked.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use super::{Edge, tls};
use crate::guest::Client;

/// What a client sends first that speaks HTTP/2 without having been asked.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How often to look whether the rest of it has come.
const PEEK: Duration = Duration::from_millis(10);

/// What a connection has been asked.
#[derive(Default)]
struct Activity {
    begun: AtomicUsize,
    under_way: AtomicUsize,
}

impl Edge {
    /// Serves one connection. When told to stop it finishes the requests under way, if there are any.
    pub(super) async fn connected(
        self: &Arc<Self>,
        stream: TcpStream,
        address: SocketAddr,
        mut stop: watch::Receiver<()>,
    ) -> Result<()> {
        // Responses are written whole; without this the kernel would hold the last packet back.
        if let Err(error) = stream.set_nodelay(true) {
            debug!(peer = %address, "TCP_NODELAY: {error}");
        }
        let Some(tls) = &self.tls else {
            let client = Client { address, tls_version: None, identity: None };
            let http2 = tokio::select! {
                begun = timeout(self.limits.header_timeout, speaks_http2(&stream)) => begun.context("it said nothing")??,
                _ = stop.changed() => return Ok(()),
            };
            return self.http(stream, http2, client, stop).await;
        };
        let shaking = TlsAcceptor::from(tls.get()).accept(stream);
        let stream = tokio::select! {
            shaken = timeout(self.limits.handshake_timeout, shaking) => shaken.context("no TLS handshake in time")??,
            // Nothing was asked yet, so nothing is lost.
            _ = stop.changed() => return Ok(()),
        };
        let client = Client { address, tls_version: Some(tls::version(&stream)), identity: tls::identity(&stream) };
        let http2 = tls::speaks_http2(&stream);
        self.http(stream, http2, client, stop).await
    }

    async fn http<S>(self: &Arc<Self>, stream: S, http2: bool, client: Client, stop: watch::Receiver<()>) -> Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (edge, client, activity) = (Arc::clone(self), Arc::new(client), Arc::new(Activity::default()));
        let asked = Arc::clone(&activity);
        let service = service_fn(move |request| {
            let (edge, client, activity) = (Arc::clone(&edge), Arc::clone(&client), Arc::clone(&asked));
            async move {
                let _under_way = activity.begin();
                Ok::<_, Infallible>(edge.service.respond(request, client).await)
            }
        });
        let (limits, stream) = (&self.limits, TokioIo::new(stream));
        if http2 {
            let mut http = http2::Builder::new(TokioExecutor::new());
            http.timer(TokioTimer::new())
                .max_concurrent_streams(limits.streams)
                .max_pending_accept_reset_streams(limits.resets)
                .max_local_error_reset_streams(limits.resets)
                .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX));
            drive(http.serve_connection(stream, service), &activity, stop, limits.header_timeout).await
        } else {
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new())
                .header_read_timeout(limits.header_timeout)
                .max_buf_size(limits.header_bytes)
                .max_headers(limits.headers);
            drive(http.serve_connection(stream, service), &activity, stop, limits.header_timeout).await
        }
    }
}

/// Serves a connection to its end: the client's, ours when told to stop, or that of our patience with a client that asks
/// nothing and does not take its answers.
async fn drive(
    connection: impl GracefulConnection<Error: std::error::Error + Send + Sync + 'static>,
    activity: &Activity,
    mut stop: watch::Receiver<()>,
    patience: Duration,
) -> Result<()> {
    let mut connection = pin!(connection);
    let (mut stopping, mut ending, mut before) = (false, false, None);
    loop {
        tokio::select! {
            biased;
            ended = connection.as_mut() => return Ok(ended?),
            _ = stop.changed(), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
            () = sleep(patience) => {
                let begun = activity.begun.load(Ordering::Relaxed);
                let idle = activity.under_way.load(Ordering::Relaxed) == 0 && before == Some(begun);
                before = Some(begun);
                if idle && ending {
                    bail!("it asked nothing for long, and did not take what it was answered");
                }
                if idle {
                    ending = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
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

impl Activity {
    fn begin(&self) -> UnderWay<'_> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.under_way.fetch_add(1, Ordering::Relaxed);
        UnderWay(self)
    }
}

/// A request under way, until it is dropped.
struct UnderWay<'a>(&'a Activity);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}
