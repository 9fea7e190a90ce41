//! Durations as clients write them, the same as in the settings of the host: `60` and `60s`, `500ms`, `5m`, `1h`, `30d`.
//!
//! Must never know: the parameter or field that a duration is for.

use std::fmt;
use std::ops::RangeInclusive;

/// Maximum length of a duration in bytes: `humantime` panics when the parts of a longer one overflow together.
const MAX_BYTES: usize = 20;

/// Parses a duration, in milliseconds. A number without a unit is in seconds.
pub fn parse(text: &str) -> Option<u64> {
    if text.len() > MAX_BYTES {
        return None;
    }
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse::<u64>().ok()?.checked_mul(1_000);
    }
    u64::try_from(humantime::parse_duration(text).ok()?.as_millis()).ok()
}

/// Description of the durations within a range, whose ends are in milliseconds.
pub struct Within(pub RangeInclusive<u64>);

impl fmt::Display for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (least, most) = (self.0.start(), self.0.end() / 1_000);
        write!(f, "a duration like 60, 60s, 500ms, 5m, 1h or 30d, from {least}ms to {most}s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duration_has_an_optional_unit() {
        for (text, expected) in [
            ("60", 60_000),
            ("60s", 60_000),
            ("007ms", 7),
            ("5m", 300_000),
            ("1h", 3_600_000),
            ("1h 30m", 5_400_000),
            ("1.5s", 1_500),
            ("30d", 2_592_000_000),
            ("30days", 2_592_000_000),
            ("2weeks", 1_209_600_000),
            ("0", 0),
        ] {
            assert_eq!(parse(text), Some(expected), "{text}");
        }
        const PANICS: &str = "18446744073709551615s1000ms";
        let overflows = (u64::MAX / 1_000 + 1).to_string();
        for text in ["", "s", "1S", "1.0", "-1s", "+1", "1ss", "1D", "١", "99999999999999999999", &overflows, PANICS] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
