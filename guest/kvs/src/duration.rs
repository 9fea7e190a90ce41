//! Durations as clients write them: `60` and `60s`, `500ms`, `5m`, `1h`.
//!
//! Must never know: the parameter or field that a duration is for.

use std::fmt;
use std::ops::RangeInclusive;

/// Parses a duration, in milliseconds. A number without a unit is in seconds.
pub fn parse(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let milliseconds = match unit {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(milliseconds)
}

/// Description of the durations within a range, whose ends are in milliseconds.
pub struct Within(pub RangeInclusive<u64>);

impl fmt::Display for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (least, most) = (self.0.start(), self.0.end() / 1_000);
        write!(f, "a duration like 60, 60s, 500ms, 5m or 1h, from {least}ms to {most}s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duration_has_an_optional_unit() {
        for (text, expected) in
            [("60", 60_000), ("60s", 60_000), ("007ms", 7), ("5m", 300_000), ("1h", 3_600_000), ("0", 0)]
        {
            assert_eq!(parse(text), Some(expected), "{text}");
        }
        let overflows = (u64::MAX / 1_000 + 1).to_string();
        for text in ["", "s", "1 s", "1S", "1.0s", "-1s", "+1", "1ss", "1d", "١", "99999999999999999999", &overflows] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
