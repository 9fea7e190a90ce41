//! Responses that are made from a pass over the log, while the server works.
//!
//! A thread reads the log, at a sixteenth of its time and after those that have requests, so that these are delayed by little. What
//! it reads and the client has not taken is bounded.

use std::future::pending;
use std::io::{self, ErrorKind, Write};
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Either;
use hyper::body::{Body, Frame};
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};
use kvs_runtime::Env;
use kvs_txlog::Forgotten;
use kvs_txlog::backup::SinceError;
use rustix::process::setpriority_process;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tracing::warn;

use super::{AdminBody, text};
use crate::edge::{Rejection, Reply, left};

/// Size of a piece of a response, and number of pieces that the client has not taken. A piece is made without a pause.
const PIECE_BYTES: usize = 128 << 10;
const PIECES: usize = 16;
/// Idle time per time of work: a scan takes a sixteenth of one core, at most.
const IDLE_RATIO: u32 = 15;
/// Where all cores are busy, a thread with this one gets a tenth of what the others get.
const NICE: i32 = 10;
/// Longest single pause.
const MAX_IDLE: Duration = Duration::from_secs(1);
/// Interval at which a thread looks whether the client took a piece.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Scans of one kind, of which one runs at a time.
pub struct Scans {
    name: &'static str,
    pub timeout: Duration,
    running: Arc<Semaphore>,
    env: Env,
}

/// Why there is no response, with its status.
#[derive(Debug, thiserror::Error)]
#[error("{1}")]
pub struct Refused(pub StatusCode, pub String);

impl Scans {
    /// `timeout` is the longest wait for the client to take a piece.
    pub fn new(name: &'static str, timeout: Duration, env: &Env) -> Self {
        Self { name, timeout, running: Arc::new(Semaphore::new(1)), env: env.clone() }
    }

    /// Runs a scan, and responds with what it writes.
    pub async fn respond(
        &self,
        media_type: &'static str,
        work: impl FnOnce(&mut Out) -> anyhow::Result<()> + Send + 'static,
    ) -> Response<AdminBody> {
        let Self { timeout, running, env, .. } = self;
        let name = self.name;
        let Ok(permit) = Arc::clone(running).try_acquire_owned() else {
            let reason = format!("another {name} is in progress; try again when it is complete\n");
            return text(StatusCode::CONFLICT, reason).map(Either::Left);
        };
        let (pieces, mut received) = mpsc::channel(PIECES);
        let begun = env.clock.now();
        let mut out = Out { pieces, buffer: Vec::new(), sent: 0, timeout: *timeout, env: env.clone(), begun };
        let started = env.tasks.detach_thread(name, move || {
            // Of this thread alone. Where that is refused, the pauses are enough.
            let _ = setpriority_process(None, NICE);
            let done = work(&mut out).and_then(|()| Ok(out.flush()?));
            // Before the end is sent, so that a client that has received it can start the next scan.
            drop(permit);
            let done = done.and_then(|()| Ok(out.send(Piece::End)?));
            if let Err(error) = done {
                let status = status(&error);
                if status.is_server_error() {
                    warn!("the {name} failed: {error:#}");
                }
                // A client that has something already sees its connection end.
                let _ = out.pieces.try_send(Piece::Failed(status, format!("{error:#}\n")));
            }
        });
        if let Err(error) = started {
            let reason = format!("cannot start a thread: {error}\n");
            return text(StatusCode::SERVICE_UNAVAILABLE, reason).map(Either::Left);
        }
        // Nothing is sent before the log can be read: until then an error has a status.
        let body = match received.recv().await {
            Some(Piece::Bytes(first)) => Either::Right(Pieces { first: Some(first), received, withdrawn: None }),
            Some(Piece::End) => Either::Left(Reply::Whole(Bytes::new())),
            Some(Piece::Failed(status, reason)) => return text(status, reason).map(Either::Left),
            None => {
                let reason = format!("the {name} failed\n");
                return text(StatusCode::INTERNAL_SERVER_ERROR, reason).map(Either::Left);
            }
        };
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }
}

fn status(error: &anyhow::Error) -> StatusCode {
    match error.downcast_ref() {
        Some(Refused(status, _)) => *status,
        None if error.is::<Forgotten>() || error.is::<SinceError>() => StatusCode::GONE,
        None => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// What the thread of a scan has for its response.
enum Piece {
    Bytes(Bytes),
    /// The response is complete.
    End,
    Failed(StatusCode, String),
}

/// The thread's side of a response.
pub struct Out {
    pieces: Sender<Piece>,
    buffer: Vec<u8>,
    /// Bytes sent.
    pub sent: u64,
    timeout: Duration,
    env: Env,
    /// When the work since the last pause began.
    begun: Instant,
}

impl Out {
    /// Waits until the client has room for a piece.
    fn send(&mut self, mut piece: Piece) -> io::Result<()> {
        self.pace()?;
        let Self { timeout, env: Env { clock, .. }, .. } = self;
        let waiting = clock.now();
        while let Err(error) = self.pieces.try_send(piece) {
            piece = match error {
                TrySendError::Full(piece) => piece,
                TrySendError::Closed(_) => return Err(disconnected()),
            };
            if clock.elapsed(waiting) >= *timeout {
                let reason = format!("the client took nothing for {timeout:?} (--backup-timeout)");
                return Err(io::Error::new(ErrorKind::TimedOut, reason));
            }
            clock.pause(POLL_INTERVAL);
        }
        self.begun = clock.now();
        Ok(())
    }

    /// Pauses for as long as is due to the requests that the server serves, for the work since the last pause.
    pub fn pace(&mut self) -> io::Result<()> {
        if self.pieces.is_closed() {
            return Err(disconnected());
        }
        let clock = &self.env.clock;
        clock.pause((clock.elapsed(self.begun) * IDLE_RATIO).min(MAX_IDLE));
        self.begun = clock.now();
        Ok(())
    }
}

fn disconnected() -> io::Error {
    io::Error::new(ErrorKind::BrokenPipe, "the client disconnected")
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            self.sent += self.buffer.len() as u64;
            let piece = Piece::Bytes(mem::take(&mut self.buffer).into());
            self.send(piece)?;
        }
        Ok(())
    }
}

/// The body of a response. One that is not complete ends with an error, which closes the connection.
pub struct Pieces {
    first: Option<Bytes>,
    received: Receiver<Piece>,
    /// Ends the response when it returns.
    withdrawn: Option<Withdrawn>,
}

/// Returns when the client may no longer ask, or has left.
type Withdrawn = Pin<Box<dyn Future<Output = Rejection> + Send>>;

/// Returns when `revoked` does, or when the client closes its side of the socket. Where little or nothing is sent before the end,
/// hyper would not notice that; a scan ends at its next pause.
pub fn withdrawn(revoked: impl Future<Output = Rejection> + Send + 'static, socket: Option<TcpStream>) -> Withdrawn {
    Box::pin(async move {
        let disconnected = async {
            match &socket {
                Some(socket) => left(socket).await,
                None => pending().await,
            }
        };
        tokio::select! {
            rejection = revoked => rejection,
            () = disconnected => {
                Rejection::new(StatusCode::BAD_REQUEST, "the client closed its side of the connection")
            }
        }
    })
}

impl Pieces {
    /// Ends the response when its client may no longer ask for it, or has left.
    pub fn until(self, withdrawn: Withdrawn) -> Self {
        Self { withdrawn: Some(withdrawn), ..self }
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(withdrawn) = &mut self.withdrawn
            && withdrawn.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(Some(Err(io::Error::other("the token was revoked, or the client left"))));
        }
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        Poll::Ready(match ready!(self.received.poll_recv(context)) {
            Some(Piece::Bytes(bytes)) => Some(Ok(Frame::data(bytes))),
            Some(Piece::End) => None,
            Some(Piece::Failed(..)) | None => Some(Err(io::Error::other("the log could not be read to its end"))),
        })
    }
}
