//! Percent-encoding, undone once and strictly.
//!
//! Own code because the percent-encoding crate leaves a bad escape as it stands. A key must have one meaning, and `%zz`
//! left alone would be the key that `%25zz` names too.

use std::borrow::Cow;

use thiserror::Error;

/// Why a text cannot be decoded.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Undecodable {
    #[error("is not valid UTF-8")]
    NotUtf8,
    /// Where the `%` is, counted from 1, in the text as it was sent.
    #[error("has a bad percent escape at byte {0}")]
    BadEscape(usize),
}

/// Decodes a part of a path, without a copy when there is nothing to decode.
pub fn decode(raw: &str) -> Result<Cow<'_, str>, Undecodable> {
    if raw.contains('%') { undo(raw, false).map(Cow::Owned) } else { Ok(Cow::Borrowed(raw)) }
}

/// Decodes a part of a query, where `+` is a space, as in what browsers and most libraries send.
pub fn decode_query(raw: &str) -> Result<Cow<'_, str>, Undecodable> {
    if raw.contains(['%', '+']) { undo(raw, true).map(Cow::Owned) } else { Ok(Cow::Borrowed(raw)) }
}

fn undo(raw: &str, plus_is_space: bool) -> Result<String, Undecodable> {
    let mut decoded = Vec::with_capacity(raw.len());
    let mut rest = raw.as_bytes();
    while let [byte, after @ ..] = rest {
        rest = after;
        match byte {
            b'%' => {
                let escape = hex_pair(after).ok_or(Undecodable::BadEscape(raw.len() - after.len()))?;
                decoded.push(escape);
                rest = &after[2..];
            }
            b'+' if plus_is_space => decoded.push(b' '),
            byte => decoded.push(*byte),
        }
    }
    String::from_utf8(decoded).map_err(|_| Undecodable::NotUtf8)
}

/// The byte that the first two characters of `text` write in hexadecimal.
fn hex_pair(text: &[u8]) -> Option<u8> {
    let digit = |at: usize| char::from(*text.get(at)?).to_digit(16);
    u8::try_from(digit(0)? * 16 + digit(1)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plus_is_a_space_in_a_query_only() {
        assert_eq!(decode("a+b%2B").as_deref(), Ok("a+b+"));
        assert_eq!(decode_query("a+b%2B").as_deref(), Ok("a b+"));
    }

    #[test]
    fn nothing_is_copied_when_nothing_is_escaped() {
        assert!(matches!(decode("a+ä"), Ok(Cow::Borrowed(_))));
        assert!(matches!(decode_query("aä"), Ok(Cow::Borrowed(_))));
    }

    #[test]
    fn undecodable_text_is_rejected_with_its_place() {
        assert_eq!(decode_query("a+%4"), Err(Undecodable::BadEscape(3)));
        assert_eq!(decode_query("%FF"), Err(Undecodable::NotUtf8));
    }
}
