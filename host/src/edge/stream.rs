//! Responses that go on: changes of keys as Server-Sent Events, for as long as the client stays.
//!
//! Owns: how changes are written, what a watch holds in memory, and the heartbeat. Must never know: who may watch, which the guest
//! decided.

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
use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

use super::auth::{Standing, revoked};
use super::body::full;
use super::budget::{Account, Charge, Exceeded};
use super::counted::left;
use super::refusal::{Refusal, refuse};
use super::reply::Reply;
use crate::guest::Watch;
use kvs_txlog::Event;
use kvs_txlog::change::Change;
use kvs_txlog::change_feed::{ChangeFeed, Past, PositionError, Subscription};
use kvs_txlog::file::disk::is_shortage;
use kvs_txlog::subscribers::Selection;
use kvs_txlog::{Forgotten, TransactionLog};

const HEARTBEAT: Bytes = Bytes::from_static(b":\n\n");

/// How far behind a watcher can be and still be caught up while new changes wait for it.
const NEAR: u64 = 1_000;

/// Selectors that a watch may have. Each costs a look at every append.
const SELECTORS: usize = 100;

/// A watch that can begin: what happened since its position is there.
pub struct Stream {
    changes: Arc<ChangeFeed>,
    selection: Arc<Selection>,
    after: u64,
    past: Past,
    holding: Holding,
}

/// What a watch holds: changes that it has yet to send, and texts that its client has not taken.
struct Holding {
    account: Arc<Account>,
    /// So many bytes of a text are free.
    free: usize,
    past: Charge,
    waiting: Charge,
}

/// Parses the position of a watch and reads what happened since then. A refusal leaves in place of the head.
pub async fn open(
    changes: &Arc<ChangeFeed>,
    Watch { selection, after, end }: Watch,
    account: &Arc<Account>,
    free: usize,
) -> Result<Stream, Refusal> {
    let count = selection.keys.len();
    if count > SELECTORS {
        let told = format!("a watch of {count} selectors, at most {SELECTORS} are allowed");
        return Err(refuse(StatusCode::BAD_REQUEST, &told).into());
    }
    let after = match after {
        None => end,
        Some(position) => changes.position(&position).await.map_err(|error| {
            let status = match error {
                PositionError::Malformed => StatusCode::BAD_REQUEST,
                PositionError::Unknown(_) => StatusCode::GONE,
                PositionError::NotYet(_) => StatusCode::SERVICE_UNAVAILABLE,
            };
            refuse(status, &error.to_string())
        })?,
    };
    let selection = Arc::new(selection);
    let past = changes.past(&selection, after).await.map_err(|error| match error.downcast_ref() {
        Some(Forgotten { after, newest }) => {
            let told = format!("what happened after {after} is forgotten; read the keys, and watch since={newest}");
            refuse(StatusCode::GONE, &told)
        }
        None if error.downcast_ref().is_some_and(is_shortage) => {
            warn!("the log could not be read for a watch: {error:#}");
            refuse(StatusCode::SERVICE_UNAVAILABLE, "the log cannot be read at the moment")
        }
        None => {
            warn!("the log could not be read for a watch: {error:#}");
            refuse(StatusCode::INTERNAL_SERVER_ERROR, "the log could not be read")
        }
    })?;
    let (past_charge, waiting) = (account.begin(0), account.begin(free));
    let mut holding = Holding { account: Arc::clone(account), free, past: past_charge, waiting };
    holding.past.hold(bytes(&past)).map_err(|Exceeded| full())?;
    Ok(Stream { changes: Arc::clone(changes), selection, after, past, holding })
}

impl Stream {
    /// The body of a response that continues with the changes, without a gap.
    pub fn start(self, heartbeat: Duration, socket: Arc<TcpStream>, standing: Option<Standing>) -> Reply {
        let (text, body) = mpsc::channel(1);
        let tasks = self.changes.env().tasks.clone();
        let deliver = self.deliver(heartbeat, text, socket);
        tasks.detach("watch", async move {
            tokio::select! {
                biased;
                _ = revoked(standing.as_ref()) => {}
                _ = deliver => {}
            }
        });
        Reply::Stream { pieces: body, _under_way: None }
    }

    /// Delivers until the client sends no more, or is a slow consumer, or there is no room for what waits, or the server stops.
    async fn deliver(self, heartbeat: Duration, text: mpsc::Sender<Bytes>, socket: Arc<TcpStream>) -> Option<()> {
        let Self { changes, selection, after, past, mut holding } = self;
        // At once, so that the client sees that it watches, and knows where it is before anything happens.
        text.send(Bytes::from(format!("id: {after}\n\n"))).await.ok()?;
        let mut after = holding.send_past(past, &text, None).await?;
        while changes.watermark().durable() > after + NEAR {
            after = holding.send_past(changes.past(&selection, after).await.ok()?, &text, None).await?;
        }
        let mut watcher = changes.watch(Selection::clone(&selection))?;
        // What was appended before it began to watch comes by the log, as soon as it is durable.
        changes.watermark().reached(watcher.from).await.ok()?;
        while after < watcher.from {
            let mut past = changes.past(&selection, after).await.ok()?;
            past.changes.retain(|change| change.sequence <= watcher.from);
            past.until = past.until.min(watcher.from);
            after = holding.send_past(past, &text, Some(&watcher)).await?;
        }
        let mut heartbeats = interval(heartbeat);
        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeats.tick().await;
        loop {
            let next = tokio::select! {
                change = watcher.next() => match change? {
                    // It came by the log.
                    change if change.sequence <= after => continue,
                    change => change.text.get_or_init(|| print(&change)).clone(),
                },
                _ = heartbeats.tick() => HEARTBEAT,
                () = left(&socket) => return None,
                () = text.closed() => return None,
            };
            holding.send(next, &text, Some(&watcher)).await?;
        }
    }
}

impl Holding {
    /// Sends what happened before.
    async fn send_past(
        &mut self,
        past: Past,
        text: &mpsc::Sender<Bytes>,
        watcher: Option<&Subscription>,
    ) -> Option<u64> {
        self.past.hold(bytes(&past)).ok()?;
        for change in &past.changes {
            self.send(print(change), text, watcher).await?;
        }
        self.past.must_hold(0);
        Some(past.until)
    }

    /// Sends a piece, which is charged until the client has taken it, as are the changes that wait behind it. None when there is
    /// no room for them.
    async fn send(&mut self, piece: Bytes, text: &mpsc::Sender<Bytes>, watcher: Option<&Subscription>) -> Option<()> {
        let mut charge = self.account.begin(self.free);
        charge.hold(piece.len()).ok()?;
        let piece = charge.keep(piece);
        let mut room = pin!(text.reserve());
        loop {
            // Others share these changes, and may have had their texts written, which are as large. They are charged to each:
            // only slow consumers have more than one.
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

/// Bytes of keys and values.
fn bytes(past: &Past) -> usize {
    let of = |change: &Change| match &change.event {
        Event::Delete(key) => key.len(),
        Event::Put(put) => put.key.len() + put.value.len(),
    };
    past.changes.iter().map(of).sum()
}

/// An event: its sequence, what happened, and what the key has now.
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
    // JSON has no line breaks of its own, so the data is one line.
    let text = format!("id: {}\nevent: {event}\ndata: {data}\n\n", change.sequence);
    // Without the room that it grew into: it is kept, and charged by its length.
    Bytes::from(text.into_boxed_str().into_boxed_bytes())
}
