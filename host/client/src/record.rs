//! A key and its value as one line of JSON, as `kvs export` prints it and `kvs import` reads it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::Error;
use serde::{Deserialize, Deserializer};

/// Shortest and longest time to live.
const MIN_TTL: Duration = Duration::from_millis(1);
const MAX_TTL: Duration = Duration::from_secs(100 * 365 * 86_400);

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
    /// Time to live, a number of seconds or a text such as "90s", an alternative for hand-written lines.
    #[serde(default, deserialize_with = "ttl")]
    ttl: Option<Duration>,
    /// Part of an export, but meaningless in another store.
    #[serde(default, rename = "etag")]
    _etag: Option<String>,
}

/// Expiry of a value.
#[derive(Debug, PartialEq)]
pub enum Expiry {
    Never,
    In(Duration),
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
        if record.ttl.is_some_and(|ttl| !(MIN_TTL..=MAX_TTL).contains(&ttl)) {
            return Err("`ttl` must be from 1ms to 100 years".to_owned());
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
            (None, Some(expires)) => match expires.saturating_sub(now) {
                0 => Expiry::Expired,
                left => Expiry::In(Duration::from_millis(left).min(MAX_TTL)),
            },
        }
    }
}

/// Maximum length of a duration in bytes: `humantime` panics when the parts of a longer one overflow together.
const MAX_DURATION_BYTES: usize = 20;

/// Parses a duration with units.
pub fn duration(text: &str) -> Result<Duration, String> {
    if text.len() > MAX_DURATION_BYTES {
        return Err(format!("a duration has at most {MAX_DURATION_BYTES} bytes"));
    }
    humantime::parse_duration(text).map_err(|error| error.to_string())
}

/// Parses a time to live, as transactions have it, and in larger units.
fn ttl<'d, D: Deserializer<'d>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "`ttl` must be a number of seconds, or a text such as \"90s\"")]
    enum Ttl {
        Seconds(u64),
        Text(String),
    }
    Ok(Some(match Ttl::deserialize(deserializer)? {
        Ttl::Seconds(seconds) => Duration::from_secs(seconds),
        Ttl::Text(text) => match text.parse() {
            Ok(seconds) => Duration::from_secs(seconds),
            Err(_) => duration(&text).map_err(|error| D::Error::custom(format!("`ttl` {text:?}: {error}")))?,
        },
    }))
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
            ("{\"key\": \"a\", \"value\": \"\", \"ttl\": 0}", "`ttl` must be from 1ms to 100 years"),
            ("{\"key\": \"a\", \"value\": \"\", \"ttl\": \"101years\"}", "`ttl` must be from 1ms to 100 years"),
            ("{\"key\": \"a\", \"value\": \"\", \"ttl\": \"soon\"}", "`ttl` \"soon\": "),
            ("{\"key\": \"a\", \"value\": \"\", \"ttl\": true}", "`ttl` must be a number of seconds, or a text"),
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
    fn ttl_is_seconds_or_has_unit() {
        for (ttl, seconds) in [("60", 60), ("\"60\"", 60), ("\"90s\"", 90), ("\"30days\"", 30 * 86_400)] {
            let line = format!("{{\"key\": \"a\", \"value\": \"\", \"ttl\": {ttl}}}");
            let record = Record::parse(line.as_bytes()).expect(ttl);
            assert_eq!(record.expiry(), Expiry::In(Duration::from_secs(seconds)), "{ttl}");
        }
    }

    #[test]
    fn expiry_becomes_remaining_time() {
        let expiry = |expires| Record { expires, ..Record::default() }.expiry();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        assert_eq!(expiry(None), Expiry::Never);
        assert_eq!(expiry(Some(now)), Expiry::Expired);
        assert_eq!(expiry(Some(0)), Expiry::Expired);
        let Expiry::In(left) = expiry(Some(now + 3_600_000)) else { panic!("it has not expired") };
        assert!((3_500..=3_600).contains(&left.as_secs()), "{left:?}");
    }
}
