//! An HTTP/2 stream of frames, read for no longer than a turn, on which refusals are overheard: the library reads for as
//! long as something comes, and refuses streams beyond the limit by itself, and tells nobody but the client.
//!
//! Frames are those of RFC 9113, section 4.1.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use h2::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::metrics::{Limit, Metrics};
use super::multiplex::Turn;

pub struct Overheard<S> {
    stream: S,
    frames: Frames,
    metrics: Arc<Metrics>,
    turn: Turn,
}

impl<S> Overheard<S> {
    pub fn new(stream: S, metrics: &Arc<Metrics>, turn: Turn) -> Self {
        Self { stream, frames: Frames::default(), metrics: Arc::clone(metrics), turn }
    }

    fn hear(&mut self, bytes: &[u8]) {
        for _ in 0..self.frames.refusals(bytes) {
            self.metrics.rejected(Limit::Streams);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Overheard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.turn.is_over(context) {
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Overheard<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = &written {
            self.hear(&bytes[..*count]);
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
                self.hear(&piece[..sent]);
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

/// Of a frame: three bytes of length, one that says what it is, one of flags, and four of the stream.
const HEAD: usize = 9;
const RST_STREAM: u8 = 3;

/// Where in a frame the bytes are that come next.
#[derive(Default)]
struct Frames {
    /// What has come of the head and, of a frame that ends a stream, of the reason.
    head: Vec<u8>,
    /// Bytes to the end of the frame that are of no interest.
    skip: usize,
}

impl Frames {
    /// How many streams are refused with these bytes, which go on where those before ended.
    fn refusals(&mut self, mut bytes: &[u8]) -> usize {
        let mut refusals = 0;
        loop {
            let skipped = self.skip.min(bytes.len());
            (self.skip, bytes) = (self.skip - skipped, &bytes[skipped..]);
            if bytes.is_empty() {
                return refusals;
            }
            let wanted = match self.head[..] {
                [_, _, _, RST_STREAM, ..] => HEAD + 4,
                _ => HEAD,
            };
            let (part, rest) = bytes.split_at(bytes.len().min(wanted - self.head.len()));
            self.head.extend_from_slice(part);
            bytes = rest;
            match self.head[..] {
                [_, _, _, RST_STREAM, _, _, _, _, _, a, b, c, d] => {
                    refusals += usize::from(Reason::from(u32::from_be_bytes([a, b, c, d])) == Reason::REFUSED_STREAM);
                    self.head.clear();
                }
                [a, b, c, kind, _, _, _, _, _] if kind != RST_STREAM => {
                    self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
                    self.head.clear();
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Waker;

    use futures_util::FutureExt;
    use hyper::rt::Executor;
    use proptest::prelude::*;
    use tokio::io::{join, repeat, sink};

    use super::super::multiplex::Streams;
    use super::*;

    #[test]
    fn however_much_comes_requests_and_others_have_their_turn() {
        let turn = Turn::default();
        let streams = Streams::new(&turn);
        let (executor, answered) = (streams.clone(), Arc::new(AtomicUsize::new(0)));
        let mut turns = pin!(streams.run());
        let mut stream = pin!(Overheard::new(join(repeat(0), sink()), &Arc::default(), turn));
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

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("a frame is short").to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 1], payload].concat()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn refusals_are_told_from_all_else_wherever_the_bytes_are_cut(
            frames in prop::collection::vec(prop_oneof![
                (0..10_u8, prop::collection::vec(0..8_u8, 0..40)).prop_filter("ends no stream", |(kind, _)| *kind != RST_STREAM),
                (6..9_u32).prop_map(|reason| (RST_STREAM, reason.to_be_bytes().to_vec())),
            ], 0..20),
            cuts in prop::collection::vec(0..30_usize, 0..40),
        ) {
            let refused = frames.iter().filter(|(kind, payload)| *kind == RST_STREAM && payload[3] == 7).count();
            let bytes: Vec<_> = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload)).collect();
            let (mut heard, mut rest, mut count) = (Frames::default(), &bytes[..], 0);
            for cut in cuts {
                let (part, others) = rest.split_at(cut.min(rest.len()));
                count += heard.refusals(part);
                rest = others;
            }
            prop_assert_eq!(count + heard.refusals(rest), refused);
        }
    }
}
