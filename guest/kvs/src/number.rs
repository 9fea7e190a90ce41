//! Numbers in values: signed integers of 64 bits, in decimal text.
//!
//! Must never know: the key that a number is at, or what becomes of it.

use thiserror::Error;

/// Reason why a number cannot be added to a value.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum AddError {
    #[error("the value is not a 64-bit signed integer in decimal text")]
    NotANumber,
    #[error("the sum is not between -9223372036854775808 and 9223372036854775807")]
    OutOfRange,
}

impl AddError {
    /// Stable code of the error.
    pub fn code(self) -> &'static str {
        match self {
            Self::NotANumber => "not_a_number",
            Self::OutOfRange => "number_out_of_range",
        }
    }
}

/// Parses a number: digits, with `-` before them or without.
pub fn parse(text: &[u8]) -> Option<i64> {
    // `parse` would accept `+` too.
    let text = str::from_utf8(text).ok().filter(|text| !text.starts_with('+'))?;
    text.parse().ok()
}

/// Adds to a value. One that does not exist counts as 0.
pub fn add(value: Option<&[u8]>, delta: i64) -> Result<String, AddError> {
    let number = value.map_or(Ok(0), |value| parse(value).ok_or(AddError::NotANumber))?;
    number.checked_add(delta).map(|sum| sum.to_string()).ok_or(AddError::OutOfRange)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_is_decimal_text() {
        for (value, delta, sum) in [
            (None, 5, "5"),
            (Some("-5"), 3, "-2"),
            (Some("007"), 0, "7"),
            (Some("-0"), 0, "0"),
            (Some("9223372036854775806"), 1, "9223372036854775807"),
            (Some("9223372036854775807"), i64::MIN, "-1"),
        ] {
            assert_eq!(add(value.map(str::as_bytes), delta).as_deref(), Ok(sum), "{value:?}");
        }
    }

    #[test]
    fn overflow_and_other_values_are_rejected() {
        for (value, delta) in [("9223372036854775807", 1), ("-9223372036854775808", -1)] {
            assert_eq!(add(Some(value.as_bytes()), delta), Err(AddError::OutOfRange));
        }
        for value in [&b""[..], b"+1", b"-", b"1.0", b" 1", b"1\n", b"0x1", b"1e3", b"\xff", b"9223372036854775808"] {
            assert_eq!(add(Some(value), 1), Err(AddError::NotANumber), "{value:?}");
        }
    }
}
