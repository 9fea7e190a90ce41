//! I/O wrapper for HTTP/2 connections, which delays the end of what the client sends until its requests are responded to.
//!
//! At that end h2 drops all requests in flight, and what it has not written of their responses. A client that has closed its side
//! of the connection may still read them.

use std::io;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::timeouts::Activity;

/// A stream whose end is read after the responses are written.
pub struct HalfClose<S> {
    stream: S,
    activity: Arc<Activity>,
    timeout: Duration,
    /// Timeout for the requests in flight, since the client closed its side.
    closed: Option<Pin<Box<Sleep>>>,
    /// Something was written since the last read, or may be: when nothing can be read, h2 writes what it can.
    writes: bool,
    /// The socket had no room for the last write.
    is_blocked: bool,
}

impl<S> HalfClose<S> {
    /// Wraps a stream, with a timeout for the requests in flight at its end. It is for those whose client takes nothing of their
    /// responses: all others end earlier.
    pub fn new(stream: S, activity: &Arc<Activity>, timeout: Duration) -> Self {
        let activity = Arc::clone(activity);
        Self { stream, activity, timeout, closed: None, writes: true, is_blocked: false }
    }

    /// Completes when nothing more can be written. A client without a window cannot enlarge it.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let timeout = self.timeout;
        let closed = self.closed.get_or_insert_with(|| Box::pin(sleep(timeout)));
        let mut is_late = false;
        if self.activity.is_busy() {
            is_late = closed.as_mut().poll(context).is_ready();
            if !is_late {
                // The response is still to be written.
                self.writes = true;
                return Poll::Pending;
            }
        }
        if self.is_blocked {
            return if is_late { Poll::Ready(()) } else { Poll::Pending };
        }
        if mem::take(&mut self.writes) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    /// Notes the result of a write or a flush. TLS has a buffer, so that a flush can be pending after a write was not.
    fn note<T>(&mut self, written: &Poll<T>, context: &Context<'_>) {
        let was_blocked = mem::replace(&mut self.is_blocked, written.is_pending());
        if was_blocked && !self.is_blocked {
            // For the next read, which waits for this.
            context.waker().wake_by_ref();
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for HalfClose<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.closed.is_none() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
            if buffer.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
        }
        self.poll_end(context).map(Ok)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for HalfClose<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.writes = true;
        self.note(&written, context);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        self.writes = true;
        self.note(&written, context);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.note(&flushed, context);
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    /// Reads once; returns whether anything was read, or the end.
    fn reads(stream: &mut HalfClose<impl AsyncRead + Unpin>) -> bool {
        stream.read(&mut [0; 16]).now_or_never().is_some()
    }

    /// Writes once; returns whether there was room.
    fn writes(stream: &mut HalfClose<impl AsyncWrite + Unpin>, bytes: &[u8]) -> bool {
        stream.write(bytes).now_or_never().is_some()
    }

    #[tokio::test]
    async fn end_is_read_after_responses() {
        let activity = Arc::<Activity>::default();
        let (mut client, server) = duplex(4);
        let mut stream = HalfClose::new(server, &activity, Duration::from_secs(3_600));
        client.write_all(b"ask").await.expect("there is room");
        client.shutdown().await.expect("it is open");
        assert!(reads(&mut stream), "the request is read");
        let request = Arc::clone(&activity).begin();
        assert!(!reads(&mut stream) && !reads(&mut stream), "the request would be dropped");
        drop(request);
        assert!(!reads(&mut stream), "the response is to be written");
        assert!(writes(&mut stream, b"resp") && !writes(&mut stream, b"onse"));
        assert!(!reads(&mut stream) && !reads(&mut stream), "the rest waits for the client");
        client.read_exact(&mut [0; 4]).await.expect("it was written");
        assert!(writes(&mut stream, b"onse"));
        assert!(!reads(&mut stream), "there may be more");
        assert_eq!(stream.read(&mut [0; 16]).now_or_never().expect("the end").expect("no error"), 0);
    }

    #[tokio::test]
    async fn request_in_flight_delays_end_up_to_timeout() {
        let activity = Arc::<Activity>::default();
        let (client, server) = duplex(4);
        let mut stream = HalfClose::new(server, &activity, Duration::from_millis(10));
        let _request = Arc::clone(&activity).begin();
        drop(client);
        assert_eq!(stream.read(&mut [0; 16]).await.expect("no error"), 0);
    }
}
