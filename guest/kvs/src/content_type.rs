//! The content type of a value: what is kept of the one it was sent with, and what is answered.
//!
//! Owns: which content types a response may carry, and which say nothing worth keeping.
//! Must never know: what a content type means for the value, which is bytes whatever is said about it.

use thiserror::Error;

use crate::item::Item;
use crate::kvs::store::http::Header;

/// The header, and the metadata that keeps it.
pub const NAME: &str = "content-type";

/// What a value has when its writer named nothing else.
const DEFAULT: &str = "application/octet-stream";

/// What curl names when its user named nothing.
const OF_CURL: &str = "application/x-www-form-urlencoded";

const MAX_BYTES: usize = 256;

/// Bytes of a token (RFC 9110, section 5.6.2). Every GET checks a content type, so this is a table.
const IN_TOKEN: [bool; 256] = {
    let mut is_in = [false; 256];
    let mut byte = 0;
    while byte < 128 {
        is_in[byte] = matches!(byte as u8, b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z')
            || matches!(byte as u8, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`' | b'|' | b'~');
        byte += 1;
    }
    is_in
};

/// Why a content type cannot be kept, as one line of text.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Unfit {
    #[error("content-type was sent twice")]
    Twice,
    #[error("content-type is {0} bytes long, at most {MAX_BYTES} are allowed")]
    TooLong(usize),
    #[error("content-type holds a character that is not printable ASCII")]
    NotPrintable,
    #[error("content-type is malformed: it is a type like text/plain, and parameters like ; charset=utf-8")]
    Malformed,
}

/// The content type to keep, of the headers that a value was sent with.
pub fn sent(headers: Vec<Header>) -> Result<Option<String>, Unfit> {
    let mut values = headers.into_iter().filter(|header| header.name == NAME).map(|header| header.value);
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Unfit::Twice);
    }
    fit(String::from_utf8(value).map_err(|_| Unfit::NotPrintable)?)
}

/// The content type to keep, of one that was sent.
pub fn fit(value: String) -> Result<Option<String>, Unfit> {
    check(&value)?;
    Ok(Some(value).filter(|value| says_something(value)))
}

/// The content type to answer with.
pub fn kept(item: &Item) -> &str {
    of(item.metadata()).unwrap_or(DEFAULT)
}

/// The content type that was kept, if there is one that a response can carry: another guest may have kept any.
pub fn of<'m>(mut metadata: impl Iterator<Item = (&'m str, &'m str)>) -> Option<&'m str> {
    let kept = metadata.find(|(name, _)| *name == NAME).map(|(_, value)| value);
    kept.filter(|value| !value.is_empty() && check(value).is_ok())
}

/// Whether it is one, in printable ASCII. Nothing at all is fit too, and says nothing.
fn check(value: &str) -> Result<(), Unfit> {
    if value.len() > MAX_BYTES {
        return Err(Unfit::TooLong(value.len()));
    }
    if !value.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return Err(Unfit::NotPrintable);
    }
    if value.is_empty() { Ok(()) } else { media_type(value).ok_or(Unfit::Malformed) }
}

/// `type "/" subtype *( OWS ";" OWS [ parameter ] )` (RFC 9110, section 8.3.1)
fn media_type(text: &str) -> Option<()> {
    let mut rest = token(token(text)?.strip_prefix('/')?)?.trim_start();
    while !rest.is_empty() {
        rest = rest.strip_prefix(';')?.trim_start();
        if !rest.is_empty() && !rest.starts_with(';') {
            let value = token(rest)?.strip_prefix('=')?;
            rest = value.strip_prefix('"').map_or_else(|| token(value), quoted)?.trim_start();
        }
    }
    Some(())
}

/// What comes after a token, which is at least one character.
fn token(text: &str) -> Option<&str> {
    let end = text.bytes().position(|next| !IN_TOKEN[usize::from(next)]).unwrap_or(text.len());
    (end > 0).then(|| &text[end..])
}

/// What comes after the rest of a quoted string, in which a backslash takes away what the next character means.
fn quoted(text: &str) -> Option<&str> {
    let mut characters = text.chars();
    loop {
        match characters.next()? {
            '"' => return Some(characters.as_str()),
            '\\' => characters.next().map(|_| ())?,
            _ => {}
        }
    }
}

fn says_something(value: &str) -> bool {
    let (media_type, _parameters) = value.split_once(';').unwrap_or((value, ""));
    !value.is_empty() && !media_type.trim_end().eq_ignore_ascii_case(OF_CURL)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kvs::store::transaction_log::Put;

    /// Another header, and these content types.
    fn headers(values: &[&[u8]]) -> Vec<Header> {
        let header = |(name, value): (&str, &[u8])| Header { name: name.to_owned(), value: value.into() };
        let content_types = values.iter().map(|value| (NAME, *value));
        [("x", &b"y"[..])].into_iter().chain(content_types).map(header).collect()
    }

    #[test]
    fn what_says_something_is_kept_as_sent() {
        let longest = format!("a/{}", "x".repeat(254));
        for (value, kept) in [
            ("text/plain; charset=utf-8", true),
            ("Text/HTML", true),
            (&longest, true),
            ("application/x-www-form-urlencoded-not", true),
            ("application/x-www-form-urlencoded", false),
            ("Application/X-WWW-Form-Urlencoded ; charset=utf-8", false),
            ("a/b;;c=d ; E=\"f;\\\"g\" ;", true),
            ("!#$%&'*+-.^_`|~/0;x=\"\"", true),
            ("", false),
        ] {
            assert_eq!(sent(headers(&[value.as_bytes()])), Ok(kept.then(|| value.to_owned())), "{value}");
        }
        assert_eq!(sent(headers(&[])), Ok(None));
    }

    #[test]
    fn what_cannot_be_kept_is_refused_with_a_reason() {
        const NOT_PRINTABLE: &str = "content-type holds a character that is not printable ASCII";
        let too_long = [b'x'; 257];
        let cases: [(&[&[u8]], &str); 6] = [
            (&[b"a/b", b"a/b"], "content-type was sent twice"),
            (&[&too_long], "content-type is 257 bytes long, at most 256 are allowed"),
            (&[b"a/\xff"], NOT_PRINTABLE),
            (&["a/ä".as_bytes()], NOT_PRINTABLE),
            (&[b"a/\x7f"], NOT_PRINTABLE),
            (&[b"a/\t"], NOT_PRINTABLE),
        ];
        for (values, why) in cases {
            assert_eq!(sent(headers(values)).map_err(|unfit| unfit.to_string()), Err(why.to_owned()));
        }
    }

    #[test]
    fn what_is_no_media_type_is_refused() {
        for value in [
            "0",
            "text",
            "/",
            "a/",
            "/b",
            "a /b",
            "a/ b",
            " a/b",
            "a/b/c",
            "a/b,c/d",
            "a/b c",
            "a/b; c",
            "a/b; c=",
            "a/b; =d",
            "a/b; c =d",
            "a/b; c= d",
            "a/b; c=d e",
            "a/b; c=\"d",
            "a/b; c=\"d\\\"",
            "a/b; c=\"d\"e",
            "a(b)/c",
            "; charset=utf-8",
            " ",
        ] {
            assert_eq!(sent(headers(&[value.as_bytes()])), Err(Unfit::Malformed), "{value}");
        }
    }

    proptest! {
        #[test]
        fn every_media_type_is_fit_and_any_text_gets_an_answer(
            media_type in r#"[!#a-z0-9.+]{1,9}/[!#a-z0-9.+]{1,9}( ?; ?([a-z]{1,5}=([a-z]{1,5}|"([ !-~&&[^"\\]]|\\[ -~]){0,5}"))?){0,3}"#,
            text: String,
            like in r#"[a/;=" \\]{0,12}"#,
        ) {
            prop_assert!(fit(media_type).is_ok());
            for value in [text, like] {
                let named = value.is_empty() || value.split(';').next().is_some_and(|named| named.contains('/'));
                prop_assert!(fit(value).is_err() || named);
            }
        }
    }

    fn item(metadata: Vec<(String, String)>) -> Item {
        Item::new(1, &Put { key: "a".to_owned(), value: vec![], metadata, expires_at_ms: None })
    }

    #[test]
    fn what_no_response_can_carry_is_not_answered() {
        let too_long = "x".repeat(257);
        for (value, answered) in [
            ("text/html", "text/html"),
            (OF_CURL, OF_CURL),
            ("", DEFAULT),
            ("a\r\nset-cookie: b", DEFAULT),
            ("0", DEFAULT),
            ("ä", DEFAULT),
            (&too_long, DEFAULT),
        ] {
            let metadata = [("x", "y"), (NAME, value)].map(|(name, value)| (name.to_owned(), value.to_owned()));
            assert_eq!(kept(&item(metadata.into())), answered, "{value:?}");
        }
        assert_eq!(kept(&item(vec![])), DEFAULT);
    }
}
