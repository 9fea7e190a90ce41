//! A key and its value as one line of JSON, as `kvs export` prints it and `kvs import` reads it.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

/// A line of an export or import.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    pub key: String,
    #[serde(default)]
    value: Option<String>,
    /// A value that is not UTF-8.
    #[serde(default)]
    value_base64: Option<String>,
    #[serde(default)]
    pub content_type: Option<String>,
    /// Expiry, in milliseconds since 1970.
    #[serde(default)]
    expires: Option<u64>,
    /// Time to live in seconds, an alternative for hand-written lines.
    #[serde(default)]
    ttl: Option<u64>,
    /// Part of an export, but meaningless in another store.
    #[serde(default, rename = "etag")]
    _etag: Option<String>,
}

/// Expiry of a value.
#[derive(Debug, PartialEq)]
pub enum Expiry {
    Never,
    /// After this number of seconds.
    In(u64),
    Expired,
}

impl Record {
    /// Parses a line.
    pub fn parse(line: &[u8]) -> Result<Self, String> {
        let record: Self = serde_json::from_slice(line)
            .map_err(|error| error.to_string().replace(" at line 1 column ", " at byte "))?;
        if record.ttl.is_some() && record.expires.is_some() {
            return Err("`ttl` and `expires` are mutually exclusive".to_owned());
        }
        if record.ttl == Some(0) {
            return Err("`ttl` must be at least 1".to_owned());
        }
        Ok(record)
    }

    /// Returns the value, from either field.
    pub fn into_value(self) -> Result<Vec<u8>, &'static str> {
        match (self.value, self.value_base64) {
            (Some(text), None) => Ok(text.into_bytes()),
            (None, Some(base64)) => STANDARD.decode(base64).map_err(|_| "`value_base64` is not base64"),
            (None, None) => Err("`value` or `value_base64` is missing"),
            (Some(_), Some(_)) => Err("`value` and `value_base64` are mutually exclusive"),
        }
    }

    pub fn expiry(&self) -> Expiry {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        match (self.ttl, self.expires) {
            (Some(ttl), _) => Expiry::In(ttl),
            (None, None) => Expiry::Never,
            (None, Some(expires)) => match expires.saturating_sub(now).div_ceil(1_000) {
                0 => Expiry::Expired,
                seconds => Expiry::In(seconds),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_rejects_malformed_lines() {
        for (line, wrong) in [
            ("", "EOF while parsing a value at byte 0"),
            ("{\"key\": \"a\", \"value\": 5}", "invalid type: integer `5`, expected a string at byte 23"),
            ("{\"value\": \"a\"}", "missing field `key` at byte 14"),
            ("{\"key\": \"a\", \"colour\": 5}", "unknown field `colour`"),
            ("{\"key\": \"a\", \"key\": \"b\"}", "duplicate field `key`"),
            (
                "{\"key\": \"a\", \"value\": \"\", \"ttl\": 1, \"expires\": 1}",
                "`ttl` and `expires` are mutually exclusive",
            ),
            ("{\"key\": \"a\", \"value\": \"\", \"ttl\": 0}", "`ttl` must be at least 1"),
        ] {
            let error = Record::parse(line.as_bytes()).expect_err(line);
            assert!(error.contains(wrong), "{line}: {error}");
        }
        let value = |line: &str| Record::parse(line.as_bytes()).expect(line).into_value();
        assert_eq!(value(r#"{"key": "a", "value": "é\u0000"}"#), Ok("é\0".into()));
        assert_eq!(value(r#"{"key": "a", "value_base64": "/w==", "etag": "\"5\""}"#), Ok(vec![255]));
        assert_eq!(value(r#"{"key": "a", "value_base64": "?"}"#), Err("`value_base64` is not base64"));
        assert_eq!(value(r#"{"key": "a"}"#), Err("`value` or `value_base64` is missing"));
        assert!(value(r#"{"key": "a", "value": "", "value_base64": ""}"#).is_err());
    }

    #[test]
    fn expiry_becomes_remaining_seconds() {
        let expiry = |expires| Record { expires, ..Record::default() }.expiry();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        assert_eq!(expiry(None), Expiry::Never);
        assert_eq!(expiry(Some(now)), Expiry::Expired);
        assert_eq!(expiry(Some(0)), Expiry::Expired);
        let Expiry::In(left) = expiry(Some(now + 3_600_000)) else { panic!("it has not expired") };
        assert!((3_500..=3_600).contains(&left), "{left}");
    }
}
