//! Values in JSON: `value` when it is text, `value_base64` when it is not or when its escapes would more than double it, so that a
//! value takes at most twice its bytes; and text of clients in responses.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// The two fields, of which one is set.
pub fn fields(value: &[u8]) -> (Option<String>, Option<String>) {
    match str::from_utf8(value) {
        Ok(text) if json_bytes(text) <= 2 * text.len() => (Some(text.to_owned()), None),
        _ => (None, Some(STANDARD.encode(value))),
    }
}

/// Bytes of a text in JSON, without the quotes around it.
pub fn json_bytes(text: &str) -> usize {
    let bytes = text.bytes().map(|byte| match byte {
        b'"' | b'\\' | b'\x08' | b'\t' | b'\n' | b'\x0c' | b'\r' => 2,
        ..b' ' => 6,
        _ => 1,
    });
    bytes.sum()
}

/// The value of the two fields, of which one is to be set, or what is wrong with them.
pub fn value(text: Option<String>, base64: Option<String>) -> Result<Vec<u8>, &'static str> {
    match (text, base64) {
        (Some(text), None) => Ok(text.into_bytes()),
        (None, Some(base64)) => STANDARD.decode(base64).map_err(|_| "`value_base64` is not base64"),
        (None, None) => Err("`value` or `value_base64` is missing"),
        (Some(_), Some(_)) => Err("`value` and `value_base64` are both there"),
    }
}

/// Text that repeats what a client sent, as a part of a line.
pub fn printable(text: &str, most_characters: usize) -> String {
    text.chars().filter(|character| !character.is_control()).take(most_characters).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_value_comes_back() {
        for bytes in [&b""[..], b"text", "ä".as_bytes(), b"\xff\x00", b"\x01"] {
            let (text, base64) = fields(bytes);
            assert_eq!(value(text, base64).as_deref(), Ok(bytes));
        }
        assert_eq!(fields(b"\xff"), (None, Some("/w==".to_owned())));
    }

    #[test]
    fn value_in_json_is_at_most_twice_as_long() {
        for (text, is_text) in [("\"\"\n\\", true), ("\x01\x01\x7fabcdefgh", true), ("\x01\x01abcd", false)] {
            let json = serde_json::to_string(text).expect("JSON");
            assert_eq!(json_bytes(text), json.len() - 2, "{json}");
            assert_eq!(fields(text.as_bytes()).0.is_some(), is_text, "{json}");
        }
    }

    #[test]
    fn one_of_the_two_is_wanted() {
        let some = || Some("AA==".to_owned());
        assert_eq!(value(None, None), Err("`value` or `value_base64` is missing"));
        assert_eq!(value(some(), some()), Err("`value` and `value_base64` are both there"));
        for base64 in ["AA", "AA=", "A===", "-_==", "AA==\n", "AB=="] {
            assert_eq!(value(None, Some(base64.to_owned())), Err("`value_base64` is not base64"), "{base64}");
        }
    }
}
