//! Conditions on a request (RFC 9110, section 13): `If-Match` and `If-None-Match`.
//!
//! Owns: the grammar of entity tags, how they are compared, and which condition comes first. An item's entity tag is its
//! sequence in quotes, which is strong: another value has another sequence.
//! Must never know: methods, or what is answered.

use thiserror::Error;

use crate::Header;

pub const IF_MATCH: &str = "if-match";
pub const IF_NONE_MATCH: &str = "if-none-match";

#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0} is malformed: it is `*`, or entity tags like \"5\", separated by commas")]
pub struct Malformed(&'static str);

/// What a client makes its request depend on.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Conditions {
    if_match: Option<Tags>,
    if_none_match: Option<Tags>,
}

/// Which condition does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmet {
    IfMatch,
    IfNoneMatch,
}

#[derive(Debug, PartialEq, Eq)]
enum Tags {
    Any,
    /// Can be none at all: a list may have no elements.
    These(Vec<Tag>),
}

#[derive(Debug, PartialEq, Eq)]
struct Tag {
    weak: bool,
    opaque: Vec<u8>,
}

/// Whether there are conditions among these headers.
pub fn are_in(headers: &[Header]) -> bool {
    headers.iter().any(|header| header.name == IF_MATCH || header.name == IF_NONE_MATCH)
}

impl Conditions {
    pub fn sent(headers: &[Header]) -> Result<Self, Malformed> {
        Ok(Self { if_match: Tags::sent(headers, IF_MATCH)?, if_none_match: Tags::sent(headers, IF_NONE_MATCH)? })
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the client names values that it has.
    pub fn name_values(&self) -> bool {
        self.if_none_match.is_some()
    }

    /// Whether they hold for what is there: the sequence of an item, or nothing. `If-Match` comes first.
    pub fn check(&self, there: Option<u64>) -> Result<(), Unmet> {
        // A weak tag never matches strongly, and always matches as if it were strong otherwise.
        if self.if_match.as_ref().is_some_and(|tags| !tags.match_(there, |tag| !tag.weak)) {
            return Err(Unmet::IfMatch);
        }
        if self.if_none_match.as_ref().is_some_and(|tags| tags.match_(there, |_| true)) {
            return Err(Unmet::IfNoneMatch);
        }
        Ok(())
    }
}

/// Whether a value, that of `If-Range` for instance, is exactly the entity tag of an item.
pub fn is_tag_of(value: &[u8], sequence: u64) -> bool {
    value == tag_of(sequence).as_bytes()
}

/// The entity tag of an item.
pub fn tag_of(sequence: u64) -> String {
    ["\"", itoa::Buffer::new().format(sequence), "\""].concat()
}

impl Tags {
    /// Several headers of one name are one list.
    fn sent(headers: &[Header], name: &'static str) -> Result<Option<Self>, Malformed> {
        let mut sent = headers.iter().filter(|header| header.name == name).peekable();
        if sent.peek().is_none() {
            return Ok(None);
        }
        let values: Vec<&[u8]> = sent.map(|header| header.value.as_slice()).collect();
        if values == [b"*"] {
            return Ok(Some(Self::Any));
        }
        let mut tags = Vec::new();
        for value in values {
            list(value, &mut tags).ok_or(Malformed(name))?;
        }
        Ok(Some(Self::These(tags)))
    }

    fn match_(&self, there: Option<u64>, comparable: impl Fn(&Tag) -> bool) -> bool {
        let Some(sequence) = there else { return false };
        match self {
            Self::Any => true,
            Self::These(tags) => {
                let sequence = sequence.to_string();
                tags.iter().any(|tag| comparable(tag) && tag.opaque == sequence.as_bytes())
            }
        }
    }
}

/// `[ entity-tag ] *( OWS "," OWS [ entity-tag ] )`
fn list(value: &[u8], tags: &mut Vec<Tag>) -> Option<()> {
    let mut rest = value.trim_ascii_start();
    while !rest.is_empty() {
        if !rest.starts_with(b",") {
            let (tag, after) = tag(rest)?;
            tags.push(tag);
            rest = after.trim_ascii_start();
        }
        match rest {
            [] => {}
            [b',', after @ ..] => rest = after.trim_ascii_start(),
            _ => return None,
        }
    }
    Some(())
}

/// `[ %s"W/" ] DQUOTE *etagc DQUOTE`, and what comes after it. A tag can hold a comma.
fn tag(text: &[u8]) -> Option<(Tag, &[u8])> {
    let (weak, quoted) = text.strip_prefix(b"W/").map_or((false, text), |quoted| (true, quoted));
    let opaque = quoted.strip_prefix(b"\"")?;
    let end = opaque.iter().position(|byte| !matches!(byte, 0x21 | 0x23..=0x7e | 0x80..))?;
    let after = opaque[end..].strip_prefix(b"\"")?;
    Some((Tag { weak, opaque: opaque[..end].into() }, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conditions(headers: &[(&str, &str)]) -> Result<Conditions, Malformed> {
        let header = |(name, value): &(&str, &str)| Header { name: name.to_string(), value: (*value).into() };
        Conditions::sent(&headers.iter().map(header).collect::<Vec<_>>())
    }

    fn check(headers: &[(&str, &str)], there: Option<u64>) -> Result<(), Unmet> {
        conditions(headers).expect("well-formed").check(there)
    }

    #[test]
    fn if_match_holds_when_a_strong_tag_is_that_of_the_item() {
        for (value, there, holds) in [
            ("*", Some(5), true),
            ("*", None, false),
            ("\"5\"", Some(5), true),
            ("\"5\"", Some(6), false),
            ("\"5\"", None, false),
            ("\"4\", \"5\"", Some(5), true),
            ("\"4\" ,,\t\"5\",", Some(5), true),
            ("W/\"5\"", Some(5), false),
            ("\"4,\", \"5\"", Some(5), true),
            ("\"4,5\"", Some(5), false),
            ("\"05\"", Some(5), false),
            ("", Some(5), false),
        ] {
            let expected = if holds { Ok(()) } else { Err(Unmet::IfMatch) };
            assert_eq!(check(&[(IF_MATCH, value)], there), expected, "{value} {there:?}");
        }
    }

    #[test]
    fn if_none_match_holds_when_no_tag_strong_or_weak_is_that_of_the_item() {
        for (value, there, holds) in [
            ("*", None, true),
            ("*", Some(5), false),
            ("\"5\"", Some(5), false),
            ("W/\"5\"", Some(5), false),
            ("\"4\", W/\"5\"", Some(5), false),
            ("\"4\", \"6\"", Some(5), true),
            ("\"5\"", None, true),
            ("", Some(5), true),
        ] {
            let expected = if holds { Ok(()) } else { Err(Unmet::IfNoneMatch) };
            assert_eq!(check(&[(IF_NONE_MATCH, value)], there), expected, "{value} {there:?}");
        }
    }

    #[test]
    fn if_match_comes_first() {
        let both = |if_match| [(IF_NONE_MATCH, "\"5\""), (IF_MATCH, if_match)];
        assert_eq!(check(&both("\"6\""), Some(5)), Err(Unmet::IfMatch));
        assert_eq!(check(&both("\"5\""), Some(5)), Err(Unmet::IfNoneMatch));
    }

    #[test]
    fn headers_of_one_name_are_one_list() {
        assert_eq!(check(&[(IF_MATCH, "\"4\""), (IF_MATCH, "\"5\"")], Some(5)), Ok(()));
        assert!(conditions(&[(IF_MATCH, "*"), (IF_MATCH, "\"5\"")]).is_err());
    }

    #[test]
    fn what_is_not_a_list_of_tags_is_refused_by_name() {
        for value in [
            "5",
            "\"5",
            "5\"",
            "\"5\" \"6\"",
            "\"5\"; \"6\"",
            "w/\"5\"",
            "W/5",
            "*, \"5\"",
            "\"5\", *",
            "\"a b\"",
            "\"\x7f\"",
        ] {
            for name in [IF_MATCH, IF_NONE_MATCH] {
                assert_eq!(conditions(&[(name, value)]), Err(Malformed(name)), "{value}");
            }
        }
        let message = "if-match is malformed: it is `*`, or entity tags like \"5\", separated by commas";
        assert_eq!(Malformed(IF_MATCH).to_string(), message);
    }

    #[test]
    fn a_tag_of_another_kind_is_well_formed_and_matches_nothing() {
        for value in ["\"\"", "\"a/b,c\"", "\"\u{e4}\"", "\"!#~\""] {
            assert_eq!(check(&[(IF_MATCH, value)], Some(5)), Err(Unmet::IfMatch), "{value}");
        }
    }

    #[test]
    fn nothing_sent_is_no_condition() {
        assert!(conditions(&[("x", "*")]).expect("nothing sent").is_empty());
        assert!(!conditions(&[(IF_MATCH, "")]).expect("an empty list").is_empty());
        assert!(is_tag_of(b"\"5\"", 5) && !is_tag_of(b"W/\"5\"", 5) && !is_tag_of(b"\"5\" ", 5));
    }
}
