//! Keys of Consul. Their flags, and the sessions that hold them, have no counterpart.

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::Lines;
use crate::server::{ApiRequest, ClientError, Server, segment_of};

#[derive(Deserialize)]
struct KeyValue {
    /// None of an empty value.
    #[serde(rename = "Value", default)]
    value: Option<String>,
}

pub fn copy(server: &Server, lines: &mut Lines) -> Result<()> {
    let keys: Vec<String> = get(server, "/v1/kv/?keys")?.unwrap_or_default();
    lines.expect(keys.len() as u64);
    for key in keys {
        // None: it has gone meanwhile.
        let found: Option<Vec<KeyValue>> = get(server, &format!("/v1/kv/{}", segment_of(&key)))?;
        if let Some(found) = found.and_then(|mut found| found.pop()) {
            let value = STANDARD.decode(found.value.unwrap_or_default()).context("a value is not base64")?;
            lines.put(key.as_bytes(), &value, None)?;
        }
    }
    Ok(())
}

/// Reads JSON; none where there is nothing.
fn get<T: serde::de::DeserializeOwned>(server: &Server, target: &str) -> Result<Option<T>> {
    let request = ApiRequest { method: "GET", target, headers: &[], body: None };
    match server.send_for(&request) {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.downcast_ref(), Some(ClientError::Status { status: 404, .. })) => Ok(None),
        Err(error) => Err(error),
    }
}
