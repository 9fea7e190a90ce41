//! Snapshots: a stream for each, named by its position, with the settings of the stream of the log.
//!
//! Not the object store of NATS, which reads by ordered consumers: these fall silent, without an error, when the node that has
//! their state dies.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::watch;
use uuid::Uuid;

use super::{LOG, STREAM_NOT_FOUND, Stream, api, error, stream_info};
use crate::cluster::engine::ReadError;

/// Metadata of the stream of a snapshot: the run that made it.
const RUN: &str = "kvs-run";

impl Stream {
    /// Returns the stream of a snapshot, which may not be there.
    pub fn stream_of_snapshot(&self, position: u64) -> Self {
        let (connection, noted) = (Arc::clone(&self.connection), watch::Sender::new(0));
        Self { connection, names: self.names.snapshot(position), log: self.log, conditions: None, noted }
    }

    /// Returns the positions of all snapshots.
    pub async fn list_snapshots(&self) -> Result<Vec<u64>, ReadError> {
        let pattern = self.names.snapshot("*");
        let answer = self.request("STREAM.NAMES", &json!({ "subject": pattern.subject })).await?;
        let prefix = pattern.stream.trim_end_matches('*');
        let names = answer["streams"].as_array().into_iter().flatten().filter_map(Value::as_str);
        Ok(names.filter_map(|name| name.strip_prefix(prefix)?.parse().ok()).collect())
    }

    /// Creates the stream of a snapshot. NATS accepts the same settings again, so those of each run are others.
    pub async fn create_snapshot(&self, position: u64, run: Uuid) -> Result<(), ReadError> {
        let names = self.names.snapshot(position);
        let unavailable =
            |why: String| ReadError::Unavailable(format!("cannot make the stream {}: {why}", names.stream));
        let client = &self.connection.client;
        let info = stream_info(client, &self.names).await?;
        let mut config = info.ok_or_else(|| unavailable("that of the log is gone".to_owned()))?["config"].take();
        for (setting, value) in [
            ("name", json!(names.stream)),
            ("subjects", json!([names.subject])),
            ("description", json!("snapshot of a transaction log of kvs")),
            ("max_bytes", json!(-1)),
            ("metadata", json!({ LOG: self.log.to_string(), RUN: run.to_string() })),
        ] {
            config[setting] = value;
        }
        if let Some(config) = config.as_object_mut() {
            config.remove("republish");
        }
        self.request(&format!("STREAM.CREATE.{}", names.stream), &config).await.map(drop)
    }

    pub async fn delete_snapshot(&self, position: u64) -> Result<(), ReadError> {
        let call = format!("STREAM.DELETE.{}", self.names.snapshot(position).stream);
        let answer = api(&self.connection.client, &call, &json!({})).await?;
        match answer["error"]["err_code"].as_u64() {
            None | Some(STREAM_NOT_FOUND) => Ok(()),
            Some(_) => Err(ReadError::Unavailable(format!("{call}: {}", error(&answer)))),
        }
    }

    /// Drops the messages up to a position.
    pub async fn purge(&self, position: u64) -> Result<(), ReadError> {
        let call = format!("STREAM.PURGE.{}", self.names.stream);
        self.request(&call, &json!({ "seq": position + 1 })).await.map(drop)
    }

    /// Makes a request to the leader that must succeed.
    async fn request(&self, call: &str, body: &Value) -> Result<Value, ReadError> {
        let answer = api(&self.connection.client, call, body).await?;
        if answer["error"].is_null() {
            return Ok(answer);
        }
        Err(ReadError::Unavailable(format!("{call}: {}", error(&answer))))
    }
}
