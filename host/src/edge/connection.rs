//! One connection, from the accepted socket to its last response: TLS, then HTTP.
//!
//! Must never know: what is asked.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use anyhow::{Context, Result};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use super::{Edge, tls};
use crate::guest::Client;

impl Edge {
    /// Serves one connection. When told to stop it finishes the request under way, if there is one.
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
            return self.http(stream, Client { address, tls_version: None, identity: None }, stop).await;
        };
        let shaking = TlsAcceptor::from(tls.get()).accept(stream);
        let stream = tokio::select! {
            shaken = timeout(self.limits.handshake_timeout, shaking) => shaken.context("no TLS handshake in time")??,
            // Nothing was asked yet, so nothing is lost.
            _ = stop.changed() => return Ok(()),
        };
        let client = Client { address, tls_version: Some(tls::version(&stream)), identity: tls::identity(&stream) };
        self.http(stream, client, stop).await
    }

    async fn http(
        self: &Arc<Self>,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        client: Client,
        mut stop: watch::Receiver<()>,
    ) -> Result<()> {
        let client = Arc::new(client);
        let service = service_fn(|request| {
            let (edge, client) = (Arc::clone(self), Arc::clone(&client));
            async move { Ok::<_, Infallible>(edge.service.respond(request, client).await) }
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(self.limits.header_timeout)
            .max_buf_size(self.limits.header_bytes)
            .max_headers(self.limits.headers);
        let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
        tokio::select! {
            biased;
            ended = connection.as_mut() => return Ok(ended?),
            _ = stop.changed() => connection.as_mut().graceful_shutdown(),
        }
        Ok(connection.await?)
    }
}
