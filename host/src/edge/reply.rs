//! The body of a response: one piece, or pieces as they come.

use std::convert::Infallible;
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::mpsc;

use super::timeouts::InFlight;

pub enum Reply {
    Whole(Bytes),
    /// Length of a body that is not sent, since the request was HEAD.
    Length(usize),
    /// Ends with the sender. Its request is in progress until then.
    Stream {
        pieces: mpsc::Receiver<Bytes>,
        _in_flight: Option<InFlight>,
    },
}

impl Reply {
    /// The reply to HEAD instead of GET.
    pub fn without_body(self) -> Self {
        match self {
            Self::Whole(body) => Self::Length(body.len()),
            other => other,
        }
    }

    /// Keeps the request in flight until the end of the response.
    pub fn keep_in_flight(&mut self, guard: InFlight) {
        if let Self::Stream { _in_flight, .. } = self {
            *_in_flight = Some(guard);
        }
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole(body) => {
                let body = mem::take(body);
                Poll::Ready((!body.is_empty()).then(|| Ok(Frame::data(body))))
            }
            Self::Length(_) => Poll::Ready(None),
            Self::Stream { pieces, .. } => {
                pieces.poll_recv(context).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(body) => body.is_empty(),
            // Only a response that may have a body states a length.
            Self::Length(length) => *length == 0,
            Self::Stream { .. } => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(body) => SizeHint::with_exact(body.len() as u64),
            Self::Length(length) => SizeHint::with_exact(*length as u64),
            Self::Stream { .. } => SizeHint::default(),
        }
    }
}
