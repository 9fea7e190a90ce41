//! `/backup` on the admin listener: a backup of the log, while the server works.
//!
//! A thread of its own reads the log, at a tenth of its time, so that requests are delayed by little. What it reads and the
//! client has not taken is bounded.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Either;
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use kvs_metrics::{Counter, Measured, Page};
use kvs_runtime::Env;
use kvs_txlog::backup::{self, SinceError};
use kvs_txlog::{Forgotten, TransactionLog};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tracing::{info, warn};

use super::{AdminBody, not_allowed, text};

/// Size of a piece of a backup, and number of pieces that the client has not taken.
const PIECE_BYTES: usize = 1 << 20;
const PIECES: usize = 2;
/// Idle time per time of work: a backup takes a tenth of one core, at most.
const IDLE_RATIO: u32 = 9;
/// Interval at which a thread looks whether the client took a piece.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Number of entries of the backup, at most, for a display of its progress.
pub const ENTRIES_HEADER: &str = "kvs-backup-entries";

/// Responds to requests for `/backup`.
pub struct Backups {
    log: Arc<dyn TransactionLog>,
    timeout: Duration,
    /// One runs at a time.
    running: Arc<Semaphore>,
    metrics: Arc<BackupMetrics>,
    env: Env,
}

impl Backups {
    pub fn new(log: Arc<dyn TransactionLog>, timeout: Duration, env: &Env) -> Self {
        let (running, metrics) = (Arc::new(Semaphore::new(1)), Arc::default());
        Self { log, timeout, running, metrics, env: env.clone() }
    }

    pub fn metrics(&self) -> Arc<BackupMetrics> {
        Arc::clone(&self.metrics)
    }

    pub async fn respond(&self, request: Request<Incoming>) -> Response<AdminBody> {
        if request.method() != Method::GET {
            return not_allowed("GET").map(Either::Left);
        }
        let since = match request.uri().query().unwrap_or_default() {
            "" => Some(0),
            query => query.strip_prefix("since=").and_then(|sequence| sequence.parse().ok()),
        };
        let Some(since) = since else {
            let reason = "unknown query; there is ?since=SEQUENCE\n";
            return text(StatusCode::BAD_REQUEST, reason).map(Either::Left);
        };
        let Ok(permit) = Arc::clone(&self.running).try_acquire_owned() else {
            let reason = "another backup is in progress; try again when it is complete\n";
            return text(StatusCode::CONFLICT, reason).map(Either::Left);
        };
        let entries = self.log.history().entries(since, self.log.watermark().durable());
        let (pieces, mut received) = mpsc::channel(PIECES);
        let Self { log, timeout, metrics, env, .. } = self;
        let out =
            Out { pieces, buffer: Vec::new(), sent: 0, timeout: *timeout, env: env.clone(), begun: env.clock.now() };
        let (log, metrics) = (Arc::clone(log), Arc::clone(metrics));
        let work = move || {
            run(&*log, since, out, &metrics);
            drop(permit);
        };
        if let Err(error) = env.tasks.detach_thread("backup", work) {
            let reason = format!("cannot start a thread: {error}\n");
            return text(StatusCode::SERVICE_UNAVAILABLE, reason).map(Either::Left);
        }
        // Nothing is sent before the log can be read: until then an error has a status.
        let first = match received.recv().await {
            Some(Piece::Bytes(bytes)) => bytes,
            Some(Piece::Failed(status, reason)) => return text(status, reason).map(Either::Left),
            _ => return text(StatusCode::INTERNAL_SERVER_ERROR, "the backup failed\n").map(Either::Left),
        };
        let mut response = Response::new(Either::Right(Pieces { first: Some(first), received }));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(ENTRIES_HEADER, entries.into());
        response
    }
}

fn run(log: &dyn TransactionLog, since: u64, mut out: Out, metrics: &BackupMetrics) {
    let written = backup::write(log, since, &mut out).and_then(|trailer| {
        out.send(Piece::End)?;
        Ok(trailer)
    });
    match written {
        Ok(trailer) => {
            metrics.succeeded(out.env.clock.unix_ms() / 1000, out.sent);
            info!("backup: {} entries after {since} up to sequence {}", trailer.count, trailer.sequence);
        }
        Err(error) => {
            metrics.failures.add(1);
            warn!("the backup failed: {error:#}");
            let is_gone = error.is::<Forgotten>() || error.is::<SinceError>();
            let status = if is_gone { StatusCode::GONE } else { StatusCode::INTERNAL_SERVER_ERROR };
            // A client that has something already sees its connection end.
            let _ = out.pieces.try_send(Piece::Failed(status, format!("{error:#}\n")));
        }
    }
}

/// What the thread of a backup has for its response.
enum Piece {
    Bytes(Bytes),
    /// The backup is complete.
    End,
    Failed(StatusCode, String),
}

/// The thread's side of a response.
struct Out {
    pieces: Sender<Piece>,
    buffer: Vec<u8>,
    /// Bytes sent.
    sent: u64,
    timeout: Duration,
    env: Env,
    /// When the work for the next piece began.
    begun: Instant,
}

impl Out {
    /// Waits until the client has room for a piece, and then for as long as is due to those that the server serves.
    fn send(&mut self, mut piece: Piece) -> io::Result<()> {
        let Self { timeout, env: Env { clock, .. }, .. } = self;
        let (worked, waiting) = (clock.elapsed(self.begun), clock.now());
        loop {
            piece = match self.pieces.try_send(piece) {
                Ok(()) => break,
                Err(TrySendError::Closed(_)) => {
                    return Err(io::Error::new(ErrorKind::BrokenPipe, "the client disconnected"));
                }
                Err(TrySendError::Full(piece)) => piece,
            };
            if clock.elapsed(waiting) >= *timeout {
                let reason = format!("the client took nothing for {timeout:?} (--backup-timeout)");
                return Err(io::Error::new(ErrorKind::TimedOut, reason));
            }
            clock.pause(POLL_INTERVAL);
        }
        clock.pause((worked * IDLE_RATIO).saturating_sub(clock.elapsed(waiting)));
        self.begun = clock.now();
        Ok(())
    }
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
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        Poll::Ready(match ready!(self.received.poll_recv(context)) {
            Some(Piece::Bytes(bytes)) => Some(Ok(Frame::data(bytes))),
            Some(Piece::End) => None,
            Some(Piece::Failed(..)) | None => Some(Err(io::Error::other("the backup failed"))),
        })
    }
}

/// The backups that clients took.
#[derive(Default)]
pub struct BackupMetrics {
    time: AtomicU64,
    bytes: AtomicU64,
    failures: Counter,
}

impl BackupMetrics {
    fn succeeded(&self, time: u64, bytes: u64) {
        self.bytes.store(bytes, Ordering::Relaxed);
        self.time.store(time, Ordering::Relaxed);
    }
}

impl Measured for BackupMetrics {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let help = "Time of the last complete backup, in seconds since 1970; 0 for none since the start";
        page.gauge("backup_last_success_timestamp_seconds", help, self.time.load(Ordering::Relaxed))?;
        page.gauge("backup_last_bytes", "Size of the last complete backup", self.bytes.load(Ordering::Relaxed))?;
        page.counter("backup_failures", "Backups that were not completed", self.failures.get())
    }
}
