//! The socket of a connection, with counters of its bytes.
//!
//! The socket is shared with waiting requests: hyper does not read from an HTTP/1.1 connection while a request is in flight,
//! so they detect themselves that the client has closed its side ([`left`]).

use std::io::{self, ErrorKind, IoSlice};
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use super::metrics::Metrics;
use super::timeouts::Activity;

/// A socket that counts the bytes read and written.
pub struct MeteredSocket {
    socket: Arc<TcpStream>,
    metrics: Arc<Metrics>,
    activity: Arc<Activity>,
}

impl MeteredSocket {
    pub fn new(socket: &Arc<TcpStream>, metrics: &Arc<Metrics>, activity: &Arc<Activity>) -> Self {
        Self { socket: Arc::clone(socket), metrics: Arc::clone(metrics), activity: Arc::clone(activity) }
    }

    fn send(
        &self,
        context: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.socket.poll_write_ready(context))?;
            match write(&self.socket) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                written => {
                    self.metrics.sent.add(*written.as_ref().unwrap_or(&0) as u64);
                    return Poll::Ready(written);
                }
            }
        }
    }
}

/// Waits until the client closes its side of the connection, or all of it, which cannot be distinguished.
pub async fn left(socket: &TcpStream) {
    // Urgent data is not enabled, so this reports the end of the stream. An error is an end too.
    let _ = socket.ready(Interest::PRIORITY).await;
}

impl AsyncRead for MeteredSocket {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let socket = &self.socket;
        loop {
            ready!(socket.poll_read_ready(context))?;
            let (room, mut count) = (buffer.remaining(), None);
            let read = socket.try_io(Interest::READABLE, || {
                let read = socket.try_read_buf(buffer)?;
                count = Some(read);
                // A short read has emptied the socket: the next read need not find that out by a system call.
                if read > 0 && read < room { Err(ErrorKind::WouldBlock.into()) } else { Ok(()) }
            });
            match (count, read) {
                (Some(count), _) => {
                    if count > 0 {
                        self.metrics.received.add(count as u64);
                        self.activity.read();
                    }
                    return Poll::Ready(Ok(()));
                }
                (None, Err(error)) if error.kind() != ErrorKind::WouldBlock => return Poll::Ready(Err(error)),
                (None, _) => {}
            }
        }
    }
}

impl AsyncWrite for MeteredSocket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.send(context, |socket| socket.try_write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.send(context, |socket| socket.try_write_vectored(pieces))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(SockRef::from(&*self.socket).shutdown(Shutdown::Write))
    }
}
