//! An HTTP/2 stream of frames, read for no longer than a turn, on which refusals are overheard and control frames counted:
//! the library reads and answers for as long as something comes, and refuses streams beyond the limit by itself, and
//! tells nobody but the client.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::frames::{Allowance, Frames};
use super::metrics::{Beyond, Limit, Metrics};
use super::multiplex::Turn;

/// Time from a flood to the end of its connection, in which nothing is read. A client that floods connects again as soon as it is
/// closed: to accept it so often would cost others more than the frames.
const PENALTY: Duration = Duration::from_secs(1);

pub struct Overheard<S> {
    stream: S,
    received: Frames,
    sent: Frames,
    allowance: Allowance,
    /// Once too many control frames have come.
    penalty: Option<Pin<Box<Sleep>>>,
    metrics: Arc<Metrics>,
    turn: Turn,
}

impl<S> Overheard<S> {
    /// So many control frames a second may come, beside those that requests and responses need.
    pub fn new(stream: S, metrics: &Arc<Metrics>, turn: Turn, control_frames: u32) -> Self {
        let (received, sent, allowance) = (Frames::of_client(), Frames::default(), Allowance::new(control_frames));
        Self { stream, received, sent, allowance, penalty: None, metrics: Arc::clone(metrics), turn }
    }

    fn send(&mut self, bytes: &[u8]) {
        let (metrics, allowance) = (&self.metrics, &mut self.allowance);
        self.sent.find(bytes, |frame| {
            if frame.is_refusal() {
                metrics.rejected(Limit::Streams);
            }
            if frame.is_data() {
                allowance.sent();
            }
        });
    }

    /// Whether these may come.
    fn receive(&mut self, bytes: &[u8]) -> bool {
        let (allowance, mut admitted) = (&mut self.allowance, true);
        self.received.find(bytes, |frame| admitted &= allowance.admit(frame));
        admitted
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Overheard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(penalty) = &mut self.penalty {
            ready!(penalty.as_mut().poll(context));
            return Poll::Ready(Err(io::Error::other(Beyond(Limit::ControlFrames))));
        }
        if self.turn.is_over(context) {
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if self.receive(&buffer.filled()[before..]) {
            return Poll::Ready(Ok(()));
        }
        self.metrics.rejected(Limit::ControlFrames);
        buffer.set_filled(before);
        self.penalty = Some(Box::pin(sleep(PENALTY)));
        self.poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Overheard<S> {
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
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Waker;

    use futures_util::FutureExt;
    use hyper::rt::Executor;
    use tokio::io::{AsyncReadExt, join, repeat, sink};

    use super::super::multiplex::Streams;
    use super::*;

    #[tokio::test]
    async fn flood_is_not_read_on_and_ends_after_its_penalty() {
        // All of them are empty frames of DATA.
        let mut stream = Overheard::new(join(repeat(0), sink()), &Arc::default(), Turn::default(), 1);
        let mut buffer = [0; 1024];
        assert!(stream.read(&mut buffer).now_or_never().is_none(), "it could come again at once");
        let received = stream.read(&mut buffer).await.expect_err("it goes on");
        assert_eq!(received.to_string(), "--http2-max-control-frames");
    }

    #[test]
    fn however_much_comes_requests_and_others_have_their_turn() {
        let turn = Turn::default();
        let streams = Streams::new(&turn);
        let (executor, answered) = (streams.clone(), Arc::new(AtomicUsize::new(0)));
        let mut turns = pin!(streams.run());
        let mut stream = pin!(Overheard::new(join(repeat(0), sink()), &Arc::default(), turn, u32::MAX));
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
