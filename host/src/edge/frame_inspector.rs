//! I/O wrapper for HTTP/2 connections, which inspects frames.
//!
//! It bounds reads by the time slice of the connection, limits control frames, and counts `RST_STREAM(REFUSED_STREAM)` on the
//! wire: h2 reads and responds as long as data arrives, and enforces its limit of concurrent streams without reporting it. It
//! delays the end of a connection that misbehaved.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::frames::{Allowance, Frames};
use super::metrics::{Limit, LimitExceeded, Metrics};
use super::multiplex::TimeSlice;

/// Delay between a flood, or another error of the client, and the end of its connection, in which nothing is read. A client that
/// floods reconnects as soon as it is disconnected: to accept it that often would cost other clients more than the frames.
const PENALTY: Duration = Duration::from_secs(1);

/// A stream whose frames are inspected.
pub struct FrameInspector<S> {
    stream: S,
    received: Frames,
    sent: Frames,
    allowance: Allowance,
    /// Set once the limit of control frames is exceeded, or GOAWAY with an error is sent.
    penalty: Option<Pin<Box<Sleep>>>,
    metrics: Arc<Metrics>,
    slice: TimeSlice,
}

impl<S> FrameInspector<S> {
    /// Wraps a stream, with a limit of control frames per second in addition to those that requests and responses need.
    pub fn new(stream: S, metrics: &Arc<Metrics>, slice: TimeSlice, control_frames: u32) -> Self {
        let (received, sent, allowance) = (Frames::of_client(), Frames::default(), Allowance::new(control_frames));
        Self { stream, received, sent, allowance, penalty: None, metrics: Arc::clone(metrics), slice }
    }

    fn penalize(&mut self) {
        self.penalty.get_or_insert_with(|| Box::pin(sleep(PENALTY)));
    }

    fn send(&mut self, bytes: &[u8]) {
        let (metrics, allowance, mut failed) = (&self.metrics, &mut self.allowance, false);
        self.sent.find(bytes, |frame| {
            failed |= frame.is_fatal();
            if frame.is_refusal() {
                metrics.rejected(Limit::Streams);
            }
            if frame.is_data() {
                allowance.sent();
            }
        });
        if failed {
            self.penalize();
        }
    }

    /// Inspects received bytes; returns false if the limit of control frames is exceeded.
    fn receive(&mut self, bytes: &[u8]) -> bool {
        let (allowance, mut admitted) = (&mut self.allowance, true);
        self.received.find(bytes, |frame| admitted &= allowance.admit(frame));
        admitted
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for FrameInspector<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(penalty) = &mut self.penalty {
            ready!(penalty.as_mut().poll(context));
            return Poll::Ready(Err(io::Error::other(LimitExceeded(Limit::ControlFrames))));
        }
        if self.slice.is_over(context) {
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if self.receive(&buffer.filled()[before..]) {
            return Poll::Ready(Ok(()));
        }
        self.metrics.rejected(Limit::ControlFrames);
        buffer.set_filled(before);
        self.penalize();
        self.poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FrameInspector<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = &written {
            self.send(&bytes[..*count]);
        }
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        if let Poll::Ready(Ok(count)) = &written {
            let mut left = *count;
            for piece in pieces {
                let sent = left.min(piece.len());
                self.send(&piece[..sent]);
                left -= sent;
            }
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(penalty) = &mut self.penalty {
            ready!(penalty.as_mut().poll(context));
        }
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Waker;

    use futures_util::FutureExt;
    use h2::Reason;
    use hyper::rt::Executor;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, empty, join, repeat, sink};

    use super::super::multiplex::RequestExecutor;
    use super::*;

    fn inspect<S>(stream: S, slice: TimeSlice, control_frames: u32) -> FrameInspector<S> {
        FrameInspector::new(stream, &Arc::default(), slice, control_frames)
    }

    #[tokio::test]
    async fn connection_with_error_is_closed_after_penalty() {
        for (reason, at_once) in [(Reason::NO_ERROR, true), (Reason::ENHANCE_YOUR_CALM, false)] {
            let mut stream = inspect(join(empty(), sink()), TimeSlice::default(), 1);
            let goaway = [&[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1][..], &u32::from(reason).to_be_bytes()].concat();
            stream.write_all(&goaway).await.expect("it is written");
            assert_eq!(stream.shutdown().now_or_never().is_some(), at_once, "{reason:?}");
            stream.shutdown().await.expect("it is closed");
        }
    }

    #[tokio::test]
    async fn flood_is_disconnected_after_penalty() {
        // Zeros are empty DATA frames.
        let mut stream = inspect(join(repeat(0), sink()), TimeSlice::default(), 1);
        let mut buffer = [0; 1024];
        assert!(stream.read(&mut buffer).now_or_never().is_none(), "the client could reconnect at once");
        let received = stream.read(&mut buffer).await.expect_err("flood is rejected");
        assert_eq!(received.to_string(), "--http2-max-control-frames");
    }

    #[test]
    fn continuous_input_does_not_starve_requests() {
        let slice = TimeSlice::default();
        let streams = RequestExecutor::new(&slice);
        let (executor, answered) = (streams.clone(), Arc::new(AtomicUsize::new(0)));
        let mut turns = pin!(streams.run());
        let mut stream = pin!(inspect(join(repeat(0), sink()), slice, u32::MAX));
        let context = &mut Context::from_waker(Waker::noop());
        for round in 1..=10 {
            let answers = Arc::clone(&answered);
            executor.execute(async move {
                answers.fetch_add(1, Ordering::Relaxed);
            });
            let read = (0..1_000_000).take_while(|_| {
                let mut buffer = [0; 1024];
                stream.as_mut().poll_read(context, &mut ReadBuf::new(&mut buffer)).is_ready()
            });
            let count = read.count();
            assert!(count > 0 && count < 1_000_000, "{count} reads");
            assert!(turns.poll_unpin(context).is_pending());
            assert_eq!(answered.load(Ordering::Relaxed), round);
        }
    }
}
