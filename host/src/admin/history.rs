//! `/history` on the admin listener: the entries of one key, as far as the log has them.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use http_body_util::Either;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use kvs_runtime::Env;
use kvs_txlog::TransactionLog;
use percent_encoding::percent_decode_str;

use super::scan::{Out, Refused, Scans};
use super::{AdminBody, not_allowed, text};
use crate::entry_json;

/// Longest wait for a client to take a mebibyte of entries.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Responds to requests for `/history`.
pub struct Histories {
    log: Arc<dyn TransactionLog>,
    scans: Scans,
}

impl Histories {
    pub fn new(log: Arc<dyn TransactionLog>, env: &Env) -> Self {
        Self { log, scans: Scans::new("history", TIMEOUT, env) }
    }

    pub async fn respond(&self, request: Request<Incoming>) -> Response<AdminBody> {
        if request.method() != Method::GET {
            return not_allowed("GET").map(Either::Left);
        }
        let Some((key, at)) = parse(request.uri().query().unwrap_or_default()) else {
            let reason = "malformed query; there is ?key=KEY and ?key=KEY&at=SEQUENCE\n";
            return text(StatusCode::BAD_REQUEST, reason).map(Either::Left);
        };
        let log = Arc::clone(&self.log);
        let work = move |out: &mut Out| match at {
            None => entries(&*log, &key, out),
            Some(at) => entry_at(&*log, &key, at, out),
        };
        self.scans.respond("application/jsonl", work).await
    }
}

/// Parses the query: the key, and the sequence.
fn parse(query: &str) -> Option<(String, Option<u64>)> {
    let (mut key, mut at) = (None, None);
    for pair in query.split('&') {
        match pair.split_once('=')? {
            ("key", encoded) if key.is_none() => key = Some(decoded(encoded)?),
            ("at", sequence) if at.is_none() => at = Some(sequence.parse().ok()?),
            _ => return None,
        }
    }
    Some((key?, at))
}

/// Decodes a value of a query.
pub fn decoded(encoded: &str) -> Option<String> {
    let encoded = encoded.replace('+', " ");
    Some(percent_decode_str(&encoded).decode_utf8().ok()?.into_owned())
}

fn entries(log: &dyn TransactionLog, key: &str, out: &mut Out) -> Result<()> {
    let mut line = String::new();
    log.replay(0, &mut |entries| {
        for entry in entries.iter().filter(|entry| entry.event.key() == key) {
            line.clear();
            entry_json::print(entry, &mut line);
            out.write_all(line.as_bytes())?;
        }
        Ok(out.pace()?)
    })?;
    Ok(())
}

/// Writes the newest entry up to a sequence.
fn entry_at(log: &dyn TransactionLog, key: &str, at: u64, out: &mut Out) -> Result<()> {
    if at > log.watermark().durable() || !log.history().contains(at) {
        let reason = format!("sequence {at} is not in the history of this log");
        return Err(Refused(StatusCode::GONE, reason).into());
    }
    let mut line = String::new();
    log.replay(0, &mut |entries| {
        if let Some(entry) = entries.iter().rfind(|entry| entry.sequence <= at && entry.event.key() == key) {
            line.clear();
            entry_json::print(entry, &mut line);
        }
        Ok(out.pace()?)
    })?;
    // After the replay, during which the log can have been compacted.
    let retained = log.retained();
    if at < retained {
        let from = match retained {
            u64::MAX => "an older version, which recorded no limit, compacted this log".to_owned(),
            _ => format!("the history can be had from sequence {retained} on"),
        };
        let reason = format!("sequence {at} was compacted; {from}");
        return Err(Refused(StatusCode::GONE, reason).into());
    }
    if line.is_empty() {
        let reason = format!("the log has no entry of this key up to sequence {at}");
        return Err(Refused(StatusCode::NOT_FOUND, reason).into());
    }
    out.write_all(line.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_names_key_and_sequence() {
        let parsed = |key: &str, at| Some((key.to_owned(), at));
        assert_eq!(parse("key=a"), parsed("a", None));
        assert_eq!(parse("at=7&key=a%2Fb+c%26%C3%A9"), parsed("a/b c&é", Some(7)));
        assert_eq!(parse("key="), parsed("", None));
        for malformed in ["", "at=7", "key", "key=a&key=b", "key=a&at=", "key=a&at=-1", "key=%ff", "key=a&x=1"] {
            assert_eq!(parse(malformed), None, "{malformed}");
        }
    }
}
