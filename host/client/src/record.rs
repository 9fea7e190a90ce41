//! A key and its value as one line of JSON, as `kvs export` prints it and `kvs import` reads it.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    pub key: String,
    #[serde(default)]
    value: Option<String>,
    /// A value that is not text.
    #[serde(default)]
    value_base64: Option<String>,
    #[serde(default)]
    pub content_type: Option<String>,
    /// When it is gone, in milliseconds since 1970.
    #[serde(default)]
    expires: Option<u64>,
    /// The same for people who write such lines: in so many seconds.
    #[serde(default)]
    ttl: Option<u64>,
    /// What a dump tells of the store it came from, and another store cannot take over.
    #[serde(default, rename = "etag")]
    _etag: Option<String>,
}

/// How long a value is there.
#[derive(Debug, PartialEq)]
pub enum Life {
    Forever,
    Seconds(u64),
    Over,
}

impl Record {
    /// Reads a line. An error says what is wrong with it.
    pub fn parse(line: &[u8]) -> Result<Self, String> {
        let record: Self = serde_json::from_slice(line)
            .map_err(|error| error.to_string().replace(" at line 1 column ", " at byte "))?;
        if record.ttl.is_some() && record.expires.is_some() {
            return Err("`ttl` and `expires` are both there".to_owned());
        }
        if record.ttl == Some(0) {
            return Err("`ttl` is at least 1".to_owned());
        }
        Ok(record)
    }

    /// The value, out of the one field that is there.
    pub fn into_value(self) -> Result<Vec<u8>, &'static str> {
        match (self.value, self.value_base64) {
            (Some(text), None) => Ok(text.into_bytes()),
            (None, Some(base64)) => STANDARD.decode(base64).map_err(|_| "`value_base64` is not base64"),
            (None, None) => Err("`value` or `value_base64` is missing"),
            (Some(_), Some(_)) => Err("`value` and `value_base64` are both there"),
        }
    }

    pub fn life(&self) -> Life {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        match (self.ttl, self.expires) {
            (Some(ttl), _) => Life::Seconds(ttl),
            (None, None) => Life::Forever,
            (None, Some(expires)) => match expires.saturating_sub(now).div_ceil(1_000) {
                0 => Life::Over,
                seconds => Life::Seconds(seconds),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_line_is_said() {
        for (line, wrong) in [
            ("", "EOF while parsing a value at byte 0"),
            ("{\"key\": \"a\", \"value\": 5}", "invalid type: integer `5`, expected a string at byte 23"),
            ("{\"value\": \"a\"}", "missing field `key` at byte 14"),
            ("{\"key\": \"a\", \"colour\": 5}", "unknown field `colour`"),
            ("{\"key\": \"a\", \"key\": \"b\"}", "duplicate field `key`"),
            ("{\"key\": \"a\", \"value\": \"\", \"ttl\": 1, \"expires\": 1}", "`ttl` and `expires` are both there"),
            ("{\"key\": \"a\", \"value\": \"\", \"ttl\": 0}", "`ttl` is at least 1"),
        ] {
            let told = Record::parse(line.as_bytes()).expect_err(line);
            assert!(told.contains(wrong), "{line}: {told}");
        }
        let value = |line: &str| Record::parse(line.as_bytes()).expect(line).into_value();
        assert_eq!(value(r#"{"key": "a", "value": "é\u0000"}"#), Ok("é\0".into()));
        assert_eq!(value(r#"{"key": "a", "value_base64": "/w==", "etag": "\"5\""}"#), Ok(vec![255]));
        assert_eq!(value(r#"{"key": "a", "value_base64": "?"}"#), Err("`value_base64` is not base64"));
        assert_eq!(value(r#"{"key": "a"}"#), Err("`value` or `value_base64` is missing"));
        assert!(value(r#"{"key": "a", "value": "", "value_base64": ""}"#).is_err());
    }

    #[test]
    fn what_expires_is_put_for_the_time_that_is_left() {
        let life = |expires| Record { expires, ..Record::default() }.life();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        assert_eq!(life(None), Life::Forever);
        assert_eq!(life(Some(now)), Life::Over);
        assert_eq!(life(Some(0)), Life::Over);
        let Life::Seconds(left) = life(Some(now + 3_600_000)) else { panic!("it is not over") };
        assert!((3_500..=3_600).contains(&left), "{left}");
    }
}
