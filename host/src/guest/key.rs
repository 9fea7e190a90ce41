//! Rules for the keys that guests put (`wit/store.wit`).
//!
//! Every guest keeps them, so that each can serve what another stored; so the host checks them. They can be loosened later,
//! never tightened: keys that were stored before would be out of reach.

use kvs_txlog::subscribers::GUEST_KEY;

/// Longest key, in bytes.
const MAX_BYTES: usize = 1_024;
/// Longest key that belongs to guests: room for a key of the others behind a name.
const MAX_GUEST_BYTES: usize = 2_048;

pub fn is_valid(key: &str) -> bool {
    if key.starts_with(GUEST_KEY) {
        return key.len() <= MAX_GUEST_BYTES;
    }
    (1..=MAX_BYTES).contains(&key.len()) && !has_control(key.as_bytes()) && !has_dot_segment(key)
}

/// The rule that a key breaks.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("it is empty")]
    Empty,
    #[error("it is {0} bytes long, at most {MAX_BYTES} are allowed")]
    TooLong(usize),
    #[error("it begins with U+0001 as those of guests, and is {0} bytes long, of which {MAX_GUEST_BYTES} are allowed")]
    TooLongForGuest(usize),
    #[error("it has the control character U+{:04X}", u32::from(*.0))]
    Control(char),
    #[error("it has a segment . or ..")]
    DotSegment,
}

/// Returns the rule that a key breaks, if it breaks one.
pub fn check(key: &str) -> Result<(), KeyError> {
    if is_valid(key) {
        return Ok(());
    }
    Err(match key.chars().find(|char| char.is_control()) {
        _ if key.is_empty() => KeyError::Empty,
        _ if key.starts_with(GUEST_KEY) => KeyError::TooLongForGuest(key.len()),
        _ if key.len() > MAX_BYTES => KeyError::TooLong(key.len()),
        Some(control) => KeyError::Control(control),
        None => KeyError::DotSegment,
    })
}

fn has_control(key: &[u8]) -> bool {
    // U+0080 to U+009F are two bytes, the first of which is rare.
    key.iter().any(|byte| byte.is_ascii_control())
        || key.contains(&0xc2) && key.windows(2).any(|pair| matches!(pair, [0xc2, 0x80..=0x9f]))
}

fn has_dot_segment(key: &str) -> bool {
    key.contains('.') && key.split('/').any(|segment| matches!(segment, "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_follow_the_public_rules() {
        for valid in ["a", "ä", "\u{a0}", "/", "a/.b/..c/...", " ", &"x".repeat(MAX_BYTES)] {
            assert!(is_valid(valid), "{valid:?}");
        }
        let long = "x".repeat(MAX_BYTES + 1);
        for invalid in ["", ".", "a/..", "./a", "a/../b", "\0", "a\u{1}", "\n", "\u{7f}", "ä\u{80}", "\u{9f}", &long] {
            assert!(!is_valid(invalid), "{invalid:?}");
        }
    }

    #[test]
    fn broken_rule_is_named() {
        let long = "x".repeat(MAX_BYTES + 1);
        for (key, rule) in [
            ("", KeyError::Empty),
            (long.as_str(), KeyError::TooLong(MAX_BYTES + 1)),
            ("a\nb", KeyError::Control('\n')),
            ("a\u{9f}", KeyError::Control('\u{9f}')),
            ("a/../b", KeyError::DotSegment),
            (&format!("\u{1}{}", "x".repeat(MAX_GUEST_BYTES)), KeyError::TooLongForGuest(MAX_GUEST_BYTES + 1)),
        ] {
            assert_eq!(check(key), Err(rule), "{key:?}");
        }
        assert_eq!(check("a"), Ok(()));
    }

    #[test]
    fn keys_of_guests_are_free_behind_their_mark() {
        let most = format!("\u{1}{}", "x".repeat(MAX_GUEST_BYTES - 1));
        for valid in ["\u{1}", "\u{1}\0/../\u{80}\n", &most] {
            assert!(is_valid(valid), "{valid:?}");
        }
        assert!(!is_valid(&format!("{most}x")));
    }
}
