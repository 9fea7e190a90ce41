//! Event streams: changes of keys as server-sent events, until the client disconnects.
//!
//! Owns: the format of events, the memory of a watch, and keep-alives. Must never know: who may watch, which the guest
//! decides.

use std::collections::VecDeque;
use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::StatusCode;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tracing::warn;

use super::auth::{Standing, revoked};
use super::body::full;
use super::budget::{Account, Charge, Exceeded};
use super::counted::left;
use super::metrics::WatchGuard;
use super::rejection::Rejection;
use super::reply::Reply;
use crate::guest::Watch;
use kvs_txlog::Event;
use kvs_txlog::change::Change;
use kvs_txlog::change_feed::{ChangeFeed, Past, PositionError, Subscription};
use kvs_txlog::file::disk::is_shortage;
use kvs_txlog::subscribers::{Keys, Selection};
use kvs_txlog::{Forgotten, TransactionLog};

const HEARTBEAT: Bytes = Bytes::from_static(b":\n\n");

/// Maximum lag at which a watch switches from the log to the change feed, which queues new changes from then on.
const NEAR: u64 = 1_000;

/// Maximum number of selectors of a watch. Each costs a lookup at every append.
const MAX_SELECTORS: usize = 100;

/// A watch that can start: the changes since its position are available.
pub struct Stream {
    changes: Arc<ChangeFeed>,
    selection: Arc<Selection>,
    after: u64,
    past: Past,
    holding: Holding,
}

/// Memory of a watch: changes still to be sent, and texts that its client has not received.
struct Holding {
    account: Arc<Account>,
    /// Number of bytes of a text that are not charged.
    free: usize,
    past: Charge,
    waiting: Charge,
}

/// Checks the keys of a watch, parses its position and reads the changes since then. A rejection is sent as the response.
pub async fn open(
    changes: &Arc<ChangeFeed>,
    Watch { selection, after, end }: Watch,
    key_prefix: Option<&str>,
    account: &Arc<Account>,
    free: usize,
) -> Result<Stream, Rejection> {
    let count = selection.keys.len();
    if count > MAX_SELECTORS {
        let reason = format!("a watch of {count} selectors, at most {MAX_SELECTORS} are allowed");
        return Err(Rejection::new(StatusCode::BAD_REQUEST, reason));
    }
    if key_prefix.is_some_and(|prefix| !selection.keys.iter().all(|keys| is_within(prefix, keys))) {
        let reason = "the watch selects keys that do not begin with the key prefix of the token";
        return Err(Rejection::new(StatusCode::FORBIDDEN, reason));
    }
    let after = match after {
        None => end,
        Some(position) => changes.position(&position).await.map_err(|error| {
            let status = match error {
                PositionError::Malformed => StatusCode::BAD_REQUEST,
                PositionError::Unknown(_) => StatusCode::GONE,
                PositionError::NotYet(_) => StatusCode::SERVICE_UNAVAILABLE,
            };
            Rejection::new(status, error.to_string())
        })?,
    };
    let selection = Arc::new(selection);
    let past = changes.past(&selection, after).await.map_err(|error| match error.downcast_ref() {
        Some(Forgotten { after, .. }) => {
            // The end of the log, not that of what was compacted, which a compaction may have moved when the client is back.
            let end = changes.watermark().durable();
            let reason = format!(
                "changes after sequence {after} were compacted; list the keys again and watch with since={end}"
            );
            Rejection::new(StatusCode::GONE, reason)
        }
        None if error.downcast_ref().is_some_and(is_shortage) => {
            warn!("failed to read the log for a watch: {error:#}");
            Rejection::new(StatusCode::SERVICE_UNAVAILABLE, "the log is temporarily unavailable")
        }
        None => {
            warn!("failed to read the log for a watch: {error:#}");
            Rejection::new(StatusCode::INTERNAL_SERVER_ERROR, "failed to read the log")
        }
    })?;
    let (past_charge, waiting) = (account.begin(0), account.begin(free));
    let mut holding = Holding { account: Arc::clone(account), free, past: past_charge, waiting };
    holding.past.hold(bytes(&past)).map_err(|Exceeded| full())?;
    Ok(Stream { changes: Arc::clone(changes), selection, after, past, holding })
}

impl Stream {
    /// Returns the begin of the body, from which a client can resume.
    pub fn begin(&self) -> Bytes {
        begin(self.after)
    }

    /// Returns the body of a response that continues with the changes, without a gap.
    pub fn start(
        self,
        heartbeat: Duration,
        socket: Arc<TcpStream>,
        standing: Option<Standing>,
        open: WatchGuard,
    ) -> Reply {
        let (text, body) = mpsc::channel(1);
        let tasks = self.changes.env().tasks.clone();
        let deliver = self.deliver(heartbeat, text, socket);
        tasks.detach("watch", async move {
            tokio::select! {
                biased;
                _ = revoked(standing.as_ref()) => {}
                _ = deliver => {}
            }
            drop(open);
        });
        Reply::Stream { pieces: body, _in_flight: None }
    }

    /// Delivers events until the client disconnects, is a slow consumer, or exceeds the memory budget, or the server stops.
    async fn deliver(self, heartbeat: Duration, text: mpsc::Sender<Bytes>, socket: Arc<TcpStream>) -> Option<()> {
        let Self { changes, selection, after, past, mut holding } = self;
        // At once, so that the client sees that the watch is established, and has a position before the first event.
        text.send(begin(after)).await.ok()?;
        let mut shown = after;
        let mut heartbeats = interval(heartbeat);
        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeats.tick().await;
        let mut after = holding.send_past(past, &text, None).await?;
        while changes.watermark().durable() > after + NEAR {
            let reading = changes.past(&selection, after);
            let past = with_heartbeats(reading, after, &mut heartbeats, &text, &socket).await?.ok()?;
            after = holding.send_past(past, &text, None).await?;
        }
        let mut watcher = changes.watch(Selection::clone(&selection))?;
        // Changes appended before the subscription come from the log, as soon as they are durable.
        let durable = changes.watermark().reached(watcher.from);
        with_heartbeats(durable, after, &mut heartbeats, &text, &socket).await?.ok()?;
        while after < watcher.from {
            let reading = changes.past(&selection, after);
            let mut past = with_heartbeats(reading, after, &mut heartbeats, &text, &socket).await?.ok()?;
            past.changes.retain(|change| change.sequence <= watcher.from);
            past.until = past.until.min(watcher.from);
            after = holding.send_past(past, &text, Some(&watcher)).await?;
        }
        loop {
            let next = tokio::select! {
                change = watcher.next() => match change {
                    // Sent from the log already.
                    Some(change) if change.sequence <= after => continue,
                    Some(change) => {
                        (after, shown) = (change.sequence, change.sequence);
                        change.text.get_or_init(|| print(&change)).clone()
                    }
                    None => {
                        // If the client takes it, it resumes without a search of the log.
                        let _ = text.try_send(begin(progress(&watcher, after, shown)?));
                        return None;
                    }
                },
                _ = heartbeats.tick() => match progress(&watcher, after, shown) {
                    Some(position) => {
                        (after, shown) = (position, position);
                        begin(position)
                    }
                    None => HEARTBEAT,
                },
                () = left(&socket) => return None,
                () = text.closed() => return None,
            };
            holding.send(next, &text, Some(&watcher)).await?;
        }
    }
}

/// Waits for the log, which can take long: for the next chunk of history, as long as no change is selected, or for a commit. A
/// heartbeat has the position meanwhile, so that a client which is cut off does not begin again. Returns None when the client has
/// left.
async fn with_heartbeats<T>(
    work: impl Future<Output = T>,
    after: u64,
    heartbeats: &mut Interval,
    text: &mpsc::Sender<Bytes>,
    socket: &TcpStream,
) -> Option<T> {
    let mut work = pin!(work);
    loop {
        tokio::select! {
            done = work.as_mut() => return Some(done),
            // Without room the client has something to read.
            _ = heartbeats.tick() => drop(text.try_send(begin(after))),
            () = left(socket) => return None,
            () = text.closed() => return None,
        }
    }
}

/// Returns a later position than the last that was shown, where that is not before what was sent: a client that resumes there need
/// not search all that was written meanwhile, and is not refused when that was compacted.
fn progress(watcher: &Subscription, sent: u64, shown: u64) -> Option<u64> {
    watcher.position().filter(|position| *position >= sent && *position > shown)
}

fn begin(after: u64) -> Bytes {
    Bytes::from(format!("id: {after}\n\n"))
}

impl Holding {
    /// Sends a chunk of history, as far as the memory of its connection allows, and returns up to where.
    async fn send_past(
        &mut self,
        past: Past,
        text: &mpsc::Sender<Bytes>,
        watcher: Option<&Subscription>,
    ) -> Option<u64> {
        let mut unsent = bytes(&past);
        self.past.hold(unsent).ok()?;
        let (mut changes, mut until) = (VecDeque::from(past.changes), past.until);
        while let Some(change) = changes.pop_front() {
            unsent -= size(&change);
            let (sequence, piece) = (change.sequence, print(&change));
            drop(change);
            self.past.must_hold(unsent);
            let mut charge = self.account.begin(self.free);
            while charge.hold(piece.len()).is_err() {
                // What does not fit beside it is read again.
                unsent -= size(&changes.pop_back()?);
                until = changes.back().map_or(sequence, |change| change.sequence);
                self.past.must_hold(unsent);
            }
            self.send_charged(charge.keep(piece), text, watcher).await?;
        }
        Some(until)
    }

    /// Sends a piece, which is charged until the client has received it, as are the changes queued behind it. Returns None when
    /// the memory budget is exceeded.
    async fn send(&mut self, piece: Bytes, text: &mpsc::Sender<Bytes>, watcher: Option<&Subscription>) -> Option<()> {
        let mut charge = self.account.begin(self.free);
        charge.hold(piece.len()).ok()?;
        self.send_charged(charge.keep(piece), text, watcher).await
    }

    async fn send_charged(
        &mut self,
        piece: Bytes,
        text: &mpsc::Sender<Bytes>,
        watcher: Option<&Subscription>,
    ) -> Option<()> {
        let mut room = pin!(text.reserve());
        loop {
            // Other subscribers share these changes, and possibly their formatted texts, which are as large. Each subscriber is
            // charged for them: only slow consumers have more than one.
            self.waiting.hold(2 * watcher.map_or(0, Subscription::waiting)).ok()?;
            tokio::select! {
                biased;
                room = room.as_mut() => {
                    room.ok()?.send(piece);
                    return Some(());
                }
                () = grown(watcher) => {}
            }
        }
    }
}

async fn grown(watcher: Option<&Subscription>) {
    match watcher {
        Some(watcher) => watcher.grown().await,
        None => pending().await,
    }
}

/// Returns whether all of these keys begin with a prefix.
fn is_within(prefix: &str, keys: &Keys) -> bool {
    let (Keys::One(keys) | Keys::Begin(keys)) = keys;
    keys.starts_with(prefix)
}

/// Returns the bytes of keys and values.
fn bytes(past: &Past) -> usize {
    past.changes.iter().map(size).sum()
}

fn size(change: &Change) -> usize {
    match &change.event {
        Event::Delete(key) => key.len(),
        Event::Put(put) => put.key.len() + put.value.len(),
    }
}

/// Formats a change as an event.
fn print(change: &Change) -> Bytes {
    let (event, data) = match &change.event {
        Event::Delete(key) => ("delete", json!({ "key": key })),
        Event::Put(put) => {
            let mut data = json!({ "key": put.key });
            match std::str::from_utf8(&put.value) {
                Ok(text) => data["value"] = text.into(),
                Err(_) => data["value_base64"] = STANDARD.encode(&put.value).into(),
            }
            if let Some(expires) = put.expires {
                data["expires"] = expires.into();
            }
            for (name, value) in &put.metadata {
                data["metadata"][name] = value.as_str().into();
            }
            ("put", data)
        }
    };
    // JSON without formatting has no line breaks, so the data is one line.
    let text = format!("id: {}\nevent: {event}\ndata: {data}\n\n", change.sequence);
    // Without excess capacity: it is kept, and charged by its length.
    Bytes::from(text.into_boxed_str().into_boxed_bytes())
}
