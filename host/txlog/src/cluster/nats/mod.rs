//! NATS JetStream as the engine of a log: one stream, with one subject and no consumer.
//!
//! A put is a publish that names the last sequence of the stream, which is the position before it. Reads are direct gets,
//! which any replica answers; republished headers wake those that wait. Consumers are not used: they fall silent, without
//! an error, when the node that has their state dies.
//!
//! Owns: the protocol of JetStream. Must never know: what a frame contains.

mod conditions;
mod connection;
mod opening;
mod restore;
mod snapshots;
mod target;

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use async_nats::client::RequestErrorKind;
use async_nats::header::{NATS_EXPECTED_LAST_SEQUENCE, NATS_SEQUENCE};
use async_nats::{Client, HeaderMap, Message, Request, StatusCode, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use kvs_runtime::Env;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use uuid::Uuid;

use self::conditions::Conditions;
use self::connection::Connection;
pub use self::opening::{Checks, at_rest, open, read};
pub use self::restore::restore;
pub use self::target::Url;

use super::engine::{Call, Ends, Engine, Put, ReadError};

/// Timeout of a publish. A leader that steps down never answers what was in flight, so this is how long that takes.
const ACK_TIMEOUT: Duration = Duration::from_millis(500);
/// Timeout of a direct get: another replica may answer the next.
const GET_TIMEOUT: Duration = Duration::from_millis(500);
const GET_ATTEMPTS: u32 = 3;
/// Timeout of a request to the leader.
const API_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of frames of one read, and their size.
const READ_FRAMES: u64 = 256;
const READ_BYTES: u64 = 4 << 20;

/// Metadata of a stream: the UUID of the log in it, or of the restore that has not completed it.
const LOG: &str = "kvs-log";
const RESTORING: &str = "kvs-restoring";

/// Status of the message after the last one of a batch.
const END_OF_BATCH: u16 = 204;

/// Delay between reads while the replicas that answer do not have a frame yet that was republished.
const RETRY_DELAY: Duration = Duration::from_millis(50);

/// Error codes of JetStream.
const STREAM_NOT_FOUND: u64 = 10059;
/// Several replicas are asked of a node that is not in a cluster.
const NOT_CLUSTERED: u64 = 10074;
const WRONG_LAST_SEQUENCE: u64 = 10071;
/// No room for a message: the limit of the account, of the node, and any resource of it.
const FULL: [u64; 3] = [10002, 10047, 10023];
/// Any error of the store. Those of a store that is full have a text of their own only.
const STORE_FAILED: u64 = 10077;
const STORE_FULL: [&str; 2] = ["maximum bytes exceeded", "no space left on device"];

/// A stream of JetStream.
struct Stream {
    connection: Arc<Connection>,
    names: Names,
    log: Uuid,
    /// None where the stream is not that of the log.
    conditions: Option<Conditions>,
    /// The newest position that was republished.
    noted: watch::Sender<u64>,
}

/// Names of the objects of one log.
#[derive(Clone)]
struct Names {
    log: String,
    stream: String,
    subject: String,
    notes: String,
}

impl Names {
    fn new(name: &str) -> Self {
        let subject = format!("kvs.{name}.00");
        Self { log: name.to_owned(), stream: format!("KVS-{name}-00"), subject, notes: format!("kvs.{name}.note") }
    }

    /// Names of the objects of a snapshot.
    fn snapshot(&self, position: impl Display) -> Self {
        let log = self.log.clone();
        let (stream, subject) = (format!("KVS-{log}-00-snap-{position}"), format!("kvs.{log}.snap.{position}"));
        Self { notes: format!("{subject}.note"), log, stream, subject }
    }
}

impl Engine for Stream {
    fn put(&self, after: u64, frame: Bytes) -> Call<'static, Put> {
        let (connection, subject) = (Arc::clone(&self.connection), self.names.subject.clone());
        Box::pin(async move {
            let mut headers = HeaderMap::new();
            headers.insert(NATS_EXPECTED_LAST_SEQUENCE, after.to_string().as_str());
            let request = Request::new().payload(frame).headers(headers);
            match send(&connection.client, subject, request, ACK_TIMEOUT).await {
                Ok(answer) => {
                    connection.answered();
                    outcome(&answer.payload, after)
                }
                Err(kind) => {
                    match kind {
                        RequestErrorKind::TimedOut => connection.timed_out().await,
                        // Checked at the start, but the client can have connected to another node since.
                        RequestErrorKind::MaxPayloadExceeded => connection.connect_elsewhere().await,
                        _ => {}
                    }
                    Put::Unknown(reason(kind, "a publish"))
                }
            }
        })
    }

    fn read(&self, from: u64, wait: Duration) -> Call<'_, Result<Vec<Bytes>, ReadError>> {
        Box::pin(async move {
            let until = Instant::now() + wait;
            if *self.noted.borrow() < from && !wait.is_zero() {
                // A note can be lost: the end of the wait makes up for it.
                let mut noted = self.noted.subscribe();
                let _ = timeout_at(until, noted.wait_for(|noted| *noted >= from)).await;
            }
            let mut attempts = 1;
            loop {
                match self.get(from).await {
                    // A replica that is behind has no message, and does not say that there is one.
                    Ok(frames) if frames.is_empty() && Instant::now() + RETRY_DELAY < until => sleep(RETRY_DELAY).await,
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

    fn drop_until(&self, position: u64) -> Call<'_, Result<(), ReadError>> {
        Box::pin(self.purge(position))
    }

    fn snapshots(&self) -> Call<'_, Result<Vec<u64>, ReadError>> {
        Box::pin(self.list_snapshots())
    }

    fn make_snapshot(&self, position: u64, run: Uuid) -> Call<'_, Result<(), ReadError>> {
        Box::pin(self.create_snapshot(position, run))
    }

    fn drop_snapshot(&self, position: u64) -> Call<'_, Result<(), ReadError>> {
        Box::pin(self.delete_snapshot(position))
    }

    fn snapshot(&self, position: u64) -> Arc<dyn Engine> {
        Arc::new(self.stream_of_snapshot(position))
    }

    fn warnings(&self) -> Vec<String> {
        self.conditions.as_ref().map(Conditions::warnings).unwrap_or_default()
    }
}

impl Stream {
    /// Reads frames from one replica.
    async fn get(&self, from: u64) -> Result<Vec<Bytes>, ReadError> {
        let unavailable = |what: &str| ReadError::Unavailable(format!("a direct get {what}"));
        let sent = timeout(GET_TIMEOUT, self.ask(from)).await;
        let mut answers = sent.ok().flatten().ok_or_else(|| unavailable("could not be sent"))?;
        let mut frames = Vec::new();
        loop {
            let answer = match timeout(GET_TIMEOUT, answers.next()).await {
                Ok(Some(answer)) => answer,
                // What has come is in order, and the rest can be asked for again.
                _ if !frames.is_empty() => return Ok(frames),
                Ok(None) => return Err(unavailable("was cut off")),
                Err(_) => {
                    self.connection.timed_out().await;
                    return Err(unavailable("timed out"));
                }
            };
            self.connection.answered();
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

    /// Sends a direct get, and returns its answers. Waits for as long as the client cannot send.
    async fn ask(&self, from: u64) -> Option<Subscriber> {
        let inbox = self.connection.client.new_inbox();
        let answers = self.connection.client.subscribe(inbox.clone()).await.ok()?;
        let request = json!({ "seq": from, "batch": READ_FRAMES, "max_bytes": READ_BYTES }).to_string();
        let subject = format!("$JS.API.DIRECT.GET.{}", self.names.stream);
        self.connection.client.publish_with_reply(subject, inbox, request.into()).await.ok()?;
        Some(answers)
    }

    /// Asks the leader for the state of the stream.
    async fn info(&self) -> Result<Ends, ReadError> {
        let info = stream_info(&self.connection.client, &self.names).await?;
        let stream = &self.names.stream;
        let info =
            info.ok_or_else(|| ReadError::Gone(format!("the stream {stream} is gone: it was deleted; restore it")))?;
        if info["config"]["metadata"][LOG] != self.log.to_string() {
            return Err(ReadError::Gone(format!(
                "the stream {stream} was replaced by that of another log; restore it"
            )));
        }
        // Without a leader any node answers, with what it has: it may lag behind what was acknowledged.
        let cluster = &info["cluster"];
        if cluster.is_object() && cluster["leader"].as_str().is_none_or(str::is_empty) {
            return Err(ReadError::Unavailable(format!("the stream {stream} has no leader now")));
        }
        if let Some(conditions) = &self.conditions {
            conditions.note(&info["config"], &self.names);
        }
        let malformed = || ReadError::Unavailable("the state of the stream is malformed".into());
        let number = |name: &str| info["state"][name].as_u64();
        let (Some(first), Some(last)) = (number("first_seq"), number("last_seq")) else { return Err(malformed()) };
        let (Some(frames), Some(bytes)) = (number("messages"), number("bytes")) else { return Err(malformed()) };
        // Reads up to there need not wait for a note: without a writer there is none.
        self.set_noted(last);
        Ok(Ends { first: if frames == 0 { last + 1 } else { first }, last, frames, bytes })
    }

    /// Notes what is republished, so that reads that wait for it go on.
    async fn note(&self) -> anyhow::Result<()> {
        let mut notes = self.connection.client.subscribe(format!("{}.>", self.names.notes)).await?;
        while let Some(note) = notes.next().await {
            if let Some(position) = position(&note) {
                self.set_noted(position);
            }
        }
        anyhow::bail!("the subscription to the notes of the stream ended")
    }

    fn set_noted(&self, position: u64) {
        self.noted.send_if_modified(|noted| {
            let is_newer = *noted < position;
            *noted = position.max(*noted);
            is_newer
        });
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
    let request = Request::new().payload(body.to_string().into());
    let answer = send(client, format!("$JS.API.{call}"), request, API_TIMEOUT).await;
    let answer = answer.map_err(|kind| ReadError::Unavailable(reason(kind, call)))?;
    serde_json::from_slice(&answer.payload)
        .map_err(|_| ReadError::Unavailable(format!("the answer to {call} is malformed")))
}

/// Makes a request. The client's own timeout begins when the request is in its queue, which is full after a long outage.
async fn send(client: &Client, subject: String, request: Request, time: Duration) -> Result<Message, RequestErrorKind> {
    match timeout(time, client.send_request(subject, request.timeout(None))).await {
        Ok(answer) => answer.map_err(|error| error.kind()),
        Err(_) => Err(RequestErrorKind::TimedOut),
    }
}

/// Returns the error in an answer, for people.
fn error(answer: &Value) -> String {
    answer["error"]["description"].as_str().unwrap_or("an error without a description").to_owned()
}

fn outcome(answer: &[u8], after: u64) -> Put {
    let answer: Value = serde_json::from_slice(answer).unwrap_or_default();
    match (answer["error"]["err_code"].as_u64(), answer["seq"].as_u64()) {
        (None, Some(position)) if position == after + 1 => Put::Durable,
        (Some(WRONG_LAST_SEQUENCE), _) => Put::Refused,
        (Some(code), _) if FULL.contains(&code) => Put::Full,
        (Some(STORE_FAILED), _) if STORE_FULL.iter().any(|full| error(&answer).contains(full)) => Put::Full,
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
        RequestErrorKind::MaxPayloadExceeded => {
            format!("{call} is larger than max_payload of the node: set it to the same on all nodes")
        }
        kind => format!("{call} failed: {kind}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcome_of_publish_is_that_of_its_answer() {
        let error = |code: u64, description: &str| {
            let answer = json!({ "error": { "code": 503, "err_code": code, "description": description }, "seq": 0 });
            outcome(answer.to_string().as_bytes(), 4)
        };
        assert_eq!(outcome(br#"{"stream":"x","seq":5}"#, 4), Put::Durable);
        assert_eq!(error(10071, "wrong last sequence: 9"), Put::Refused);
        for (code, description) in [
            (10077, "maximum bytes exceeded"),
            (10077, "write /store/1.blk: no space left on device"),
            (10002, "resource limits exceeded for account"),
            (10047, "insufficient storage resources available"),
            (10023, "insufficient resources"),
        ] {
            assert_eq!(error(code, description), Put::Full, "{description}");
        }
        assert_eq!(error(10077, "input/output error"), Put::Unknown("input/output error".into()));
        assert!(matches!(outcome(br#"{"stream":"x","seq":6}"#, 4), Put::Unknown(_)));
        assert!(matches!(outcome(b"", 4), Put::Unknown(_)));
    }
}
