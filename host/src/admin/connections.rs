//! Connections of the admin listener.
//!
//! Owns: how many there are at once, and their timeouts. Must never know: what is asked.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::pending;
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SetOnce, oneshot};
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use super::{Admin, Connection, turns};

/// Connections at once: probes, a scraper and a person. For more, the oldest are closed, after their requests in progress.
const CONNECTIONS: usize = 64;
/// Longest wait for one of them, before another one is closed.
const PLACE_PAUSE: Duration = Duration::from_millis(100);
/// Longest wait for a TLS handshake, and for the head of a request, also between requests.
pub(super) const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for the first request of a connection that was accepted before another process took the listener over.
const FIRST_REQUEST: Duration = Duration::from_secs(1);
/// Least timeout for a client to read: it must not keep its place from a probe.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to leave the listener alone when the system has no more sockets to give.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl Admin {
    pub(super) async fn serve(self: &Arc<Self>, listener: TcpListener) -> Result<Infallible> {
        let connections = Arc::new(Semaphore::new(CONNECTIONS));
        // What closes each, the oldest first.
        let mut open = VecDeque::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.is_handed_over() => return pending().await,
            };
            let accepted =
                accepted.and_then(|(stream, address)| Ok((stream.as_fd().try_clone_to_owned()?, stream, address)));
            let (socket, stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    debug!("no admin connection could be accepted: {error}");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let place = place(&connections, &mut open).await;
            let (close, closes) = oneshot::channel();
            open.push_back(close);
            let admin = Arc::clone(self);
            self.env.tasks.detach("admin connection", async move {
                let connection = Connection { socket, address, caller: SetOnce::new() };
                if let Err(error) = admin.connected(stream, &connection, closes).await {
                    debug!("admin connection ended: {error:#}");
                }
                drop(place);
            });
        }
    }

    async fn connected(
        &self,
        stream: TcpStream,
        connection: &Connection,
        mut closes: oneshot::Receiver<()>,
    ) -> Result<()> {
        let mut stream = TimeoutStream::new(stream);
        // A backup has a timeout of its own, which it reports.
        let backup = self.log.get().map_or(Duration::ZERO, |(backups, ..)| backups.timeout());
        stream.set_write_timeout(Some(WRITE_TIMEOUT.max(2 * backup)));
        let stream = Box::pin(stream);
        let Some(tls) = &self.tls else { return self.http(stream, connection, closes).await };
        let shaking = TlsAcceptor::from(Arc::clone(&tls.get().admin)).accept(stream);
        let shaken = tokio::select! {
            shaken = timeout(HEADER_TIMEOUT, shaking) => shaken,
            _ = &mut closes => return Ok(()),
        };
        self.http(shaken.context("no TLS handshake in time")??, connection, closes).await
    }

    async fn http(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        connection: &Connection,
        closes: oneshot::Receiver<()>,
    ) -> Result<()> {
        let used = SetOnce::new();
        let service = service_fn(|request| {
            // Once is enough.
            let _ = used.set(());
            async move { Ok::<_, Infallible>(self.respond(request, connection).await) }
        });
        let mut served = pin!(turns::http().serve_connection(TokioIo::new(stream), service));
        let mut cut = pin!(async { connection.caller.wait().await.cut().await });
        let mut last = pin!(async {
            tokio::select! {
                () = self.is_handed_over() => {
                    // A request is on its way to this process.
                    let _ = timeout(FIRST_REQUEST, used.wait()).await;
                    false
                }
                _ = closes => true,
            }
        });
        let mut ends = false;
        loop {
            tokio::select! {
                ended = served.as_mut() => return Ok(ended?),
                () = cut.as_mut() => bail!("it holds too much memory"),
                is_closed = last.as_mut(), if !ends => {
                    // hyper would wait for the rest of a head.
                    if is_closed && !used.initialized() {
                        return Ok(());
                    }
                    ends = true;
                    served.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

/// Waits for one of the places, for which the oldest connections are closed.
async fn place(places: &Arc<Semaphore>, open: &mut VecDeque<oneshot::Sender<()>>) -> Option<OwnedSemaphorePermit> {
    open.retain(|close| !close.is_closed());
    if let Ok(place) = Arc::clone(places).try_acquire_owned() {
        return Some(place);
    }
    loop {
        if let Some(close) = open.pop_front() {
            // It may have ended.
            let _ = close.send(());
        }
        if let Ok(place) = timeout(PLACE_PAUSE, Arc::clone(places).acquire_owned()).await {
            return place.ok();
        }
    }
}
