//! NATS JetStream as the engine of a log: one stream, with one subject and no consumer.
//!
//! A put is a publish that names the last sequence of the stream, which is the position before it. Reads are direct gets,
//! which any replica answers; republished headers wake those that wait. Consumers are not used: they fall silent, without
//! an error, when the node that has their state dies.
//!
//! Owns: the protocol of JetStream. Must never know: what a frame contains.

mod opening;
mod target;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_nats::client::RequestErrorKind;
use async_nats::header::{NATS_EXPECTED_LAST_SEQUENCE, NATS_SEQUENCE};
use async_nats::{Client, HeaderMap, Message, Request, StatusCode};
use bytes::Bytes;
use futures_util::StreamExt;
use kvs_runtime::Env;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::timeout;
use uuid::Uuid;

pub use self::opening::{Checks, at_rest, open, read};
pub use self::target::Url;

use super::engine::{Call, Ends, Engine, Put, ReadError};

/// Timeout of a publish. A leader that steps down never answers what was in flight, so this is how long that takes.
const ACK_TIMEOUT: Duration = Duration::from_millis(500);
/// Timeout of a direct get: another replica may answer the next.
const GET_TIMEOUT: Duration = Duration::from_millis(500);
const GET_ATTEMPTS: u32 = 3;
/// Timeout of a request to the leader.
const API_TIMEOUT: Duration = Duration::from_secs(2);
/// Consecutive timeouts after which the client connects to another node: the one that it has may be paused.
const OVERDUE: u32 = 2;
/// Maximum number of frames of one read, and their size.
const READ_FRAMES: u64 = 256;
const READ_BYTES: u64 = 4 << 20;

/// Metadata of a stream: the UUID of the log in it.
const LOG: &str = "kvs-log";

/// Status of the message after the last one of a batch.
const END_OF_BATCH: u16 = 204;

/// Error codes of JetStream.
const STREAM_NOT_FOUND: u64 = 10059;
const WRONG_LAST_SEQUENCE: u64 = 10071;
/// No room for a message: the limit of the stream, of the account, of the node.
const FULL: [u64; 3] = [10077, 10002, 10047];

/// A stream of JetStream.
struct Stream {
    client: Client,
    names: Names,
    log: Uuid,
    /// The newest position that was republished.
    noted: watch::Sender<u64>,
    /// Consecutive timeouts.
    overdue: Arc<AtomicU32>,
}

/// Names of the objects of one log.
#[derive(Clone)]
struct Names {
    stream: String,
    subject: String,
    notes: String,
}

impl Names {
    fn new(name: &str) -> Self {
        let subject = format!("kvs.{name}.00");
        Self { stream: format!("KVS-{name}-00"), subject, notes: format!("kvs.{name}.note") }
    }
}

impl Engine for Stream {
    fn put(&self, after: u64, frame: Bytes) -> Call<'static, Put> {
        let (client, overdue, subject) = (self.client.clone(), Arc::clone(&self.overdue), self.names.subject.clone());
        Box::pin(async move {
            let mut headers = HeaderMap::new();
            headers.insert(NATS_EXPECTED_LAST_SEQUENCE, after.to_string().as_str());
            let request = Request::new().payload(frame).headers(headers).timeout(Some(ACK_TIMEOUT));
            match client.send_request(subject, request).await {
                Ok(answer) => {
                    overdue.store(0, Ordering::Relaxed);
                    outcome(&answer, after)
                }
                Err(error) => {
                    if error.kind() == RequestErrorKind::TimedOut {
                        is_overdue(&client, &overdue).await;
                    }
                    Put::Unknown(reason(error.kind(), "a publish"))
                }
            }
        })
    }

    fn read(&self, from: u64, wait: Duration) -> Call<'_, Result<Vec<Bytes>, ReadError>> {
        Box::pin(async move {
            if *self.noted.borrow() < from && !wait.is_zero() {
                // A note can be lost: the end of the wait makes up for it.
                let mut noted = self.noted.subscribe();
                let _ = timeout(wait, noted.wait_for(|noted| *noted >= from)).await;
            }
            let mut attempts = 1;
            loop {
                match self.get(from).await {
                    Err(ReadError::Unavailable(_)) if attempts < GET_ATTEMPTS => attempts += 1,
                    Err(ReadError::Unavailable(reason)) => {
                        // Whether it is the stream that is gone, the engine knows.
                        return Err(self.info().await.err().unwrap_or(ReadError::Unavailable(reason)));
                    }
                    read => return read,
                }
            }
        })
    }

    fn ends(&self) -> Call<'_, Result<Ends, ReadError>> {
        Box::pin(self.info())
    }
}

impl Stream {
    /// Reads frames from one replica.
    async fn get(&self, from: u64) -> Result<Vec<Bytes>, ReadError> {
        let unavailable = |what: &str| ReadError::Unavailable(format!("a direct get {what}"));
        let inbox = self.client.new_inbox();
        let mut answers = self.client.subscribe(inbox.clone()).await.map_err(|_| unavailable("could not be sent"))?;
        let request = json!({ "seq": from, "batch": READ_FRAMES, "max_bytes": READ_BYTES }).to_string();
        let subject = format!("$JS.API.DIRECT.GET.{}", self.names.stream);
        let sent = self.client.publish_with_reply(subject, inbox, request.into()).await;
        sent.map_err(|_| unavailable("could not be sent"))?;
        let mut frames = Vec::new();
        loop {
            let answer = match timeout(GET_TIMEOUT, answers.next()).await {
                Ok(Some(answer)) => answer,
                // What has come is in order, and the rest can be asked for again.
                _ if !frames.is_empty() => return Ok(frames),
                Ok(None) => return Err(unavailable("was cut off")),
                Err(_) => {
                    is_overdue(&self.client, &self.overdue).await;
                    return Err(unavailable("timed out"));
                }
            };
            self.overdue.store(0, Ordering::Relaxed);
            match answer.status {
                Some(StatusCode::NO_RESPONDERS) => return Err(unavailable("met no replica of the stream")),
                // No message, or no more.
                Some(StatusCode::NOT_FOUND) => return Ok(frames),
                Some(status) if status.as_u16() == END_OF_BATCH => return Ok(frames),
                Some(status) if !status.is_success() => {
                    let description = answer.description.unwrap_or_default();
                    return Err(unavailable(&format!("failed: {status} {description}")));
                }
                _ => {}
            }
            let (position, expected) = (position(&answer), from + frames.len() as u64);
            match position {
                Some(position) if position == expected => frames.push(answer.payload),
                _ if !frames.is_empty() => return Ok(frames),
                Some(position) => {
                    let reason =
                        format!("a replica has message {position} of {}, but not {expected}", self.names.stream);
                    return Err(ReadError::Missing(reason));
                }
                None => return Err(unavailable("returned a message without a sequence")),
            }
            if frames.len() as u64 == READ_FRAMES {
                return Ok(frames);
            }
        }
    }

    /// Asks the leader for the state of the stream.
    async fn info(&self) -> Result<Ends, ReadError> {
        let info = stream_info(&self.client, &self.names).await?;
        let stream = &self.names.stream;
        let info =
            info.ok_or_else(|| ReadError::Gone(format!("the stream {stream} is gone: it was deleted; restore it")))?;
        if info["config"]["metadata"][LOG] != self.log.to_string() {
            return Err(ReadError::Gone(format!(
                "the stream {stream} was replaced by that of another log; restore it"
            )));
        }
        let number = |name: &str| info["state"][name].as_u64();
        let (Some(first), Some(last), Some(frames)) = (number("first_seq"), number("last_seq"), number("messages"))
        else {
            return Err(ReadError::Unavailable("the state of the stream is malformed".into()));
        };
        Ok(Ends { first: if frames == 0 { last + 1 } else { first }, last, frames })
    }

    /// Notes what is republished, so that reads that wait for it go on.
    async fn note(&self) -> anyhow::Result<()> {
        let mut notes = self.client.subscribe(format!("{}.>", self.names.notes)).await?;
        while let Some(note) = notes.next().await {
            if let Some(position) = position(&note) {
                self.noted.send_if_modified(|noted| {
                    let is_newer = *noted < position;
                    *noted = position.max(*noted);
                    is_newer
                });
            }
        }
        anyhow::bail!("the subscription to the notes of the stream ended")
    }

    fn start(self: &Arc<Self>, env: &Env) {
        let stream = Arc::clone(self);
        env.tasks.restart("log notes", &env.clock, move || {
            let stream = Arc::clone(&stream);
            async move { stream.note().await }
        });
    }
}

/// Returns the state and configuration of a stream; None if there is none.
async fn stream_info(client: &Client, names: &Names) -> Result<Option<Value>, ReadError> {
    let info = api(client, &format!("STREAM.INFO.{}", names.stream), &json!({})).await?;
    match info["error"]["err_code"].as_u64() {
        None => Ok(Some(info)),
        Some(STREAM_NOT_FOUND) => Ok(None),
        Some(_) => Err(ReadError::Unavailable(error(&info))),
    }
}

/// Makes a request to the leader.
async fn api(client: &Client, call: &str, body: &Value) -> Result<Value, ReadError> {
    let request = Request::new().payload(body.to_string().into()).timeout(Some(API_TIMEOUT));
    let answer = client.send_request(format!("$JS.API.{call}"), request).await;
    let answer = answer.map_err(|error| ReadError::Unavailable(reason(error.kind(), call)))?;
    serde_json::from_slice(&answer.payload)
        .map_err(|_| ReadError::Unavailable(format!("the answer to {call} is malformed")))
}

/// Returns the error in an answer, for people.
fn error(answer: &Value) -> String {
    answer["error"]["description"].as_str().unwrap_or("an error without a description").to_owned()
}

fn outcome(answer: &Message, after: u64) -> Put {
    let answer: Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
    match (answer["error"]["err_code"].as_u64(), answer["seq"].as_u64()) {
        (None, Some(position)) if position == after + 1 => Put::Durable,
        (Some(WRONG_LAST_SEQUENCE), _) => Put::Refused,
        (Some(code), _) if FULL.contains(&code) => Put::Full,
        (Some(_), _) => Put::Unknown(error(&answer)),
        (None, _) => Put::Unknown("the answer to a publish is malformed".into()),
    }
}

fn position(message: &Message) -> Option<u64> {
    message.headers.as_ref()?.get(NATS_SEQUENCE)?.as_str().parse().ok()
}

fn reason(kind: RequestErrorKind, call: &str) -> String {
    match kind {
        RequestErrorKind::TimedOut => format!("{call} timed out"),
        RequestErrorKind::NoResponders => {
            format!("{call} met no leader: the stream or JetStream has none at the moment")
        }
        kind => format!("{call} failed: {kind}"),
    }
}

/// Counts a timeout, and connects to another node after several.
async fn is_overdue(client: &Client, overdue: &AtomicU32) {
    if overdue.fetch_add(1, Ordering::Relaxed) + 1 >= OVERDUE {
        overdue.store(0, Ordering::Relaxed);
        // An error means that the client is closed, which the next call reports.
        let _ = client.force_reconnect().await;
    }
}
