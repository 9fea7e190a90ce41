//! Keys of etcd, as of one revision, with the TTL of their leases; through its gateway for JSON.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Lines, Login, PAGE};
use crate::server::{ApiRequest, Server};

/// The largest TTL that etcd grants, in seconds.
const MAX_TTL: u64 = 9_000_000_000;

/// The gateway writes 64-bit numbers as text, and leaves out what is empty or 0.
#[derive(Deserialize)]
struct Range {
    header: Header,
    #[serde(default)]
    kvs: Vec<KeyValue>,
    #[serde(default)]
    more: bool,
    #[serde(default)]
    count: Option<String>,
}

#[derive(Deserialize)]
struct Header {
    revision: String,
}

#[derive(Deserialize)]
struct KeyValue {
    key: String,
    #[serde(default)]
    value: String,
    #[serde(default)]
    lease: Option<String>,
}

#[derive(Deserialize)]
struct Session {
    token: String,
}

#[derive(Deserialize)]
struct Lease {
    /// Seconds; negative when the lease has ended.
    #[serde(rename = "TTL", default)]
    ttl: Option<String>,
}

/// A server, and the token of this session.
struct Etcd<'s> {
    server: &'s Server,
    token: Option<String>,
}

pub fn copy(server: &Server, login: Option<&Login>, lines: &mut Lines) -> Result<()> {
    let mut etcd = Etcd { server, token: None };
    if let Some(Login { user, password }) = login {
        let session: Session = etcd.post("/v3/auth/authenticate", &json!({ "name": user, "password": password }))?;
        etcd.token = Some(session.token);
    }
    let (mut begin, mut revision) = (vec![0], None);
    let mut leases = HashMap::new();
    loop {
        let mut range = json!({ "key": STANDARD.encode(&begin), "range_end": "AA==", "limit": PAGE });
        if let Some(revision) = &revision {
            range["revision"] = json!(revision);
        }
        let page: Range = etcd.post("/v3/kv/range", &range)?;
        if revision.is_none() {
            lines.expect(page.count.as_deref().unwrap_or("0").parse().context("the number of keys is none")?);
            revision = Some(page.header.revision);
        }
        for entry in &page.kvs {
            let key = STANDARD.decode(&entry.key).context("a key is not base64")?;
            let value = STANDARD.decode(&entry.value).context("a value is not base64")?;
            match entry.lease.as_deref().filter(|lease| *lease != "0") {
                None => lines.put(&key, &value, None)?,
                Some(lease) => {
                    // The end and not the time left: a later key of the lease may be read much later.
                    let end: Instant = match leases.get(lease) {
                        Some(end) => *end,
                        None => *leases.entry(lease.to_owned()).or_insert(Instant::now() + etcd.time_left(lease)?),
                    };
                    lines.put(&key, &value, Some(end.saturating_duration_since(Instant::now())))?;
                }
            }
            begin = key;
        }
        if !page.more || page.kvs.is_empty() {
            return Ok(());
        }
        // The smallest key after it.
        begin.push(0);
    }
}

impl Etcd<'_> {
    /// The time left of a lease; none when it has ended, and its keys with it.
    fn time_left(&self, lease: &str) -> Result<Duration> {
        let Lease { ttl } = self.post("/v3/lease/timetolive", &json!({ "ID": lease }))?;
        let seconds: i64 = ttl.as_deref().unwrap_or("0").parse().context("the TTL of a lease is no number")?;
        Ok(Duration::from_secs(u64::try_from(seconds).unwrap_or(0).min(MAX_TTL)))
    }

    fn post<T: DeserializeOwned>(&self, target: &str, body: &Value) -> Result<T> {
        let mut headers = vec![("content-type", "application/json")];
        headers.extend(self.token.as_deref().map(|token| ("authorization", token)));
        let body = body.to_string();
        self.server.send_for(&ApiRequest { method: "POST", target, headers: &headers, body: Some(body.as_bytes()) })
    }
}
