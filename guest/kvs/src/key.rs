//! Which key a path names.
//!
//! Owns: the two forms of the path, and the rules every key keeps. The rules are for ever: loosening one is possible,
//! tightening one strands the keys that were stored before.
//! Must never know: methods, headers, status codes, or whether the key is there.

use std::borrow::Cow;

use thiserror::Error;

use crate::percent::{self, Undecodable};

/// The longest key, in bytes, after decoding.
pub const MAX_BYTES: usize = 1_024;

/// The first character of the keys that belong to guests. This one keeps them, for the guest that comes back, and shows none.
pub const GUEST_KEY: char = '\u{1}';

/// Why a path names no key, as one line of text.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NoKey {
    #[error("unknown path; keys live at /v1/{{key}}, or at /v1/key/{{key}} when they hold a slash")]
    UnknownPath,
    /// Not taken for a key, so that `/v1/…/…` stays free for paths to come.
    #[error("unknown path; a key that holds a slash lives at /v1/key/{{key}}, or is written with %2F")]
    RawSlash,
    #[error("key is empty")]
    Empty,
    #[error("key is {0} bytes long, at most {MAX_BYTES} are allowed")]
    TooLong(usize),
    #[error("key is not valid UTF-8")]
    NotUtf8,
    /// Where the `%` is, counted from 1, in the key as it was sent.
    #[error("bad percent escape at byte {0} of the key")]
    BadEscape(usize),
    #[error("key holds the control character U+{:04X}", u32::from(*.0))]
    Control(char),
    /// Clients and proxies resolve such segments on the way; what they meant does not arrive.
    #[error("key has a `{0}` segment")]
    DotSegment(&'static str),
}

/// The key that a path, without its query, names.
///
/// The short form is `/v1/{key}`, without a raw slash. The long form is `/v1/key/{key}`, with as many as there are.
/// `/v1/key` is the short form of the key `key`.
pub fn in_path(path: &str) -> Result<Cow<'_, str>, NoKey> {
    let short = path.strip_prefix("/v1/").ok_or(NoKey::UnknownPath)?;
    if is_plain(short) {
        return Ok(Cow::Borrowed(short));
    }
    let raw = match short.strip_prefix("key/") {
        Some(long) => long,
        None if short.contains('/') => return Err(NoKey::RawSlash),
        None => short,
    };
    let key = percent::decode(raw).map_err(|undecodable| match undecodable {
        Undecodable::NotUtf8 => NoKey::NotUtf8,
        Undecodable::BadEscape(at) => NoKey::BadEscape(at),
    })?;
    check(&key)?;
    Ok(key)
}

/// Returns whether a text is a key that is written as it is and keeps all rules, as most are: one look at each byte instead
/// of five.
fn is_plain(text: &str) -> bool {
    (1..=MAX_BYTES).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'%' | b'/'))
        && !matches!(text, "." | "..")
}

/// The rules for a decoded key.
pub fn check(key: &str) -> Result<(), NoKey> {
    if key.is_empty() {
        return Err(NoKey::Empty);
    }
    if key.len() > MAX_BYTES {
        return Err(NoKey::TooLong(key.len()));
    }
    if let Some(control) = key.chars().find(|character| character.is_control()) {
        return Err(NoKey::Control(control));
    }
    for segment in [".", ".."] {
        if key.split('/').any(|part| part == segment) {
            return Err(NoKey::DotSegment(segment));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
    use proptest::prelude::*;

    use super::*;

    /// Everything but letters, digits and `/`.
    const LONG_FORM: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/');

    #[test]
    fn paths_that_name_a_key() {
        for (path, key) in [
            ("/v1/a", "a"),
            ("/v1/key", "key"),
            ("/v1/keys", "keys"),
            ("/v1/key/a", "a"),
            ("/v1/key/key", "key"),
            ("/v1/key/a/b", "a/b"),
            ("/v1/key/a//b/", "a//b/"),
            ("/v1/key//", "/"),
            ("/v1/a%2Fb", "a/b"),
            ("/v1/a%2fb", "a/b"),
            ("/v1/key%2Fa", "key/a"),
            ("/v1/a%20b", "a b"),
            ("/v1/a+b", "a+b"),
            ("/v1/%C3%A4", "ä"),
            ("/v1/ä", "ä"),
            ("/v1/%F0%9F%A6%80", "🦀"),
            // Decoded once, not twice.
            ("/v1/%2541", "%41"),
            ("/v1/...", "..."),
            ("/v1/key/.a/b..", ".a/b.."),
            ("/v1/%C2%A0", "\u{a0}"),
        ] {
            assert_eq!(in_path(path).as_deref(), Ok(key), "{path}");
        }
    }

    #[test]
    fn paths_that_name_none_and_the_line_that_says_why() {
        const UNKNOWN: &str = "unknown path; keys live at /v1/{key}, or at /v1/key/{key} when they hold a slash";
        const SLASH: &str = "unknown path; a key that holds a slash lives at /v1/key/{key}, or is written with %2F";
        for (path, why) in [
            ("", UNKNOWN),
            ("*", UNKNOWN),
            ("/", UNKNOWN),
            ("/v1", UNKNOWN),
            ("/v2/a", UNKNOWN),
            ("//v1/a", UNKNOWN),
            ("/V1/a", UNKNOWN),
            ("/v1/a/b", SLASH),
            ("/v1/a/", SLASH),
            ("/v1//a", SLASH),
            ("/v1/%6Bey/a", SLASH),
            ("/v1/", "key is empty"),
            ("/v1/key/", "key is empty"),
            ("/v1/%FF", "key is not valid UTF-8"),
            ("/v1/%ED%A0%80", "key is not valid UTF-8"),
            ("/v1/%C0%AF", "key is not valid UTF-8"),
            ("/v1/ab%4", "bad percent escape at byte 3 of the key"),
            ("/v1/%", "bad percent escape at byte 1 of the key"),
            ("/v1/%zz", "bad percent escape at byte 1 of the key"),
            ("/v1/%+1", "bad percent escape at byte 1 of the key"),
            ("/v1/%4ä", "bad percent escape at byte 1 of the key"),
            ("/v1/key/%41bcde%4g", "bad percent escape at byte 8 of the key"),
            ("/v1/a%09", "key holds the control character U+0009"),
            ("/v1/a\tb", "key holds the control character U+0009"),
            ("/v1/%00", "key holds the control character U+0000"),
            ("/v1/%7F", "key holds the control character U+007F"),
            ("/v1/%C2%85", "key holds the control character U+0085"),
            ("/v1/.", "key has a `.` segment"),
            ("/v1/..", "key has a `..` segment"),
            ("/v1/%2E%2E", "key has a `..` segment"),
            ("/v1/a%2F..", "key has a `..` segment"),
            ("/v1/key/../a", "key has a `..` segment"),
            ("/v1/key/a/./b", "key has a `.` segment"),
        ] {
            let answer = in_path(path).map_err(|no_key| no_key.to_string());
            assert_eq!(answer.as_deref(), Err(&why.to_owned()), "{path}");
        }
    }

    #[test]
    fn the_length_is_that_of_the_decoded_key() {
        let longest = "%41".repeat(MAX_BYTES);
        assert_eq!(in_path(&format!("/v1/{longest}")).as_deref(), Ok("A".repeat(MAX_BYTES).as_str()));
        assert_eq!(in_path(&format!("/v1/{longest}ä")), Err(NoKey::TooLong(1_026)));
        assert_eq!(NoKey::TooLong(1_025).to_string(), "key is 1025 bytes long, at most 1024 are allowed");
    }

    #[test]
    fn nothing_is_copied_when_nothing_is_escaped() {
        assert!(matches!(in_path("/v1/key/a/ä"), Ok(Cow::Borrowed(_))));
    }

    /// What a key may be, said again without the code under test.
    fn valid_key() -> impl Strategy<Value = String> {
        r"(\PC|[/.% ]){1,256}".prop_filter("by the rules", |key| {
            key.len() <= 1_024 && !key.split('/').any(|segment| matches!(segment, "." | ".."))
        })
    }

    proptest! {
        #[test]
        fn every_valid_key_comes_back_from_both_forms(key in valid_key()) {
            let short = format!("/v1/{}", utf8_percent_encode(&key, NON_ALPHANUMERIC));
            let long = format!("/v1/key/{}", utf8_percent_encode(&key, LONG_FORM));
            prop_assert_eq!(in_path(&short), Ok(Cow::Borrowed(key.as_str())));
            prop_assert_eq!(in_path(&long), Ok(Cow::Borrowed(key.as_str())));
        }

        #[test]
        fn any_bytes_get_an_answer(bytes: Vec<u8>, escapes in "(/v1/)?(key/)?[%0-9a-f/.]*") {
            for path in [String::from_utf8_lossy(&bytes).as_ref(), &escapes] {
                if let Ok(key) = in_path(path) {
                    prop_assert!(check(&key).is_ok());
                }
            }
        }
    }
}
