//! Parts of a value (RFC 9110, section 14): `Range` and `If-Range` on GET.
//!
//! Owns: the grammar of one range of bytes. Several ranges in one request are answered with the whole value, which the
//! standard allows, as is what is malformed or in another unit.
//! Must never know: what is answered.

use std::ops::Range;

use crate::conditions;
use crate::kvs::store::http::Header;

pub const RANGE: &str = "range";
pub const IF_RANGE: &str = "if-range";

/// How much of a value is asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// Never empty.
    Bytes(Range<usize>),
    /// It begins after the end of the value.
    Unsatisfiable,
}

impl Part {
    /// The part of an item, with its sequence and the length of its value, that these headers request.
    pub fn sent(headers: &[Header], sequence: u64, length: usize) -> Self {
        let mut ranges = headers.iter().filter(|header| header.name == RANGE);
        let (Some(range), None) = (ranges.next(), ranges.next()) else { return Self::Whole };
        let mut if_ranges = headers.iter().filter(|header| header.name == IF_RANGE);
        // A date is never that of an item, as items have none.
        if if_ranges.any(|header| !conditions::is_tag_of(&header.value, sequence)) {
            return Self::Whole;
        }
        str::from_utf8(&range.value).ok().and_then(|range| of_bytes(range, length)).unwrap_or(Self::Whole)
    }
}

/// `bytes=first-last`, `bytes=first-` or `bytes=-count`. None is anything else.
fn of_bytes(range: &str, length: usize) -> Option<Part> {
    let (unit, spec) = range.split_once('=')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (first, last) = spec.trim_matches([' ', '\t']).split_once('-')?;
    let range = match (position(first), position(last)) {
        (Some(first), _) if last.is_empty() => first..length,
        (Some(first), Some(last)) if first <= last => first..length.min(last.saturating_add(1)),
        (_, Some(0)) if first.is_empty() => return Some(Part::Unsatisfiable),
        // No range can be given of nothing, though it has all of what is asked for.
        (_, Some(_)) if first.is_empty() && length == 0 => return None,
        (_, Some(count)) if first.is_empty() => length.saturating_sub(count)..length,
        _ => return None,
    };
    Some(if range.start < length { Part::Bytes(range) } else { Part::Unsatisfiable })
}

/// A position in a value. One too large to write down is beyond the end of any.
fn position(digits: &str) -> Option<usize> {
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(headers: &[(&str, &str)], length: usize) -> Part {
        let header = |(name, value): &(&str, &str)| Header { name: name.to_string(), value: (*value).into() };
        Part::sent(&headers.iter().map(header).collect::<Vec<_>>(), 5, length)
    }

    #[test]
    fn one_range_of_bytes_is_understood() {
        for (range, expected) in [
            ("bytes=0-0", Part::Bytes(0..1)),
            ("bytes=2-4", Part::Bytes(2..5)),
            ("bytes=2-", Part::Bytes(2..10)),
            ("bytes=-3", Part::Bytes(7..10)),
            ("bytes=-30", Part::Bytes(0..10)),
            ("bytes=0-9", Part::Bytes(0..10)),
            ("bytes=9-99999999999999999999999", Part::Bytes(9..10)),
            ("bytes= 2-4 ", Part::Bytes(2..5)),
            ("Bytes=2-4", Part::Bytes(2..5)),
            ("bytes=10-", Part::Unsatisfiable),
            ("bytes=10-20", Part::Unsatisfiable),
            ("bytes=99999999999999999999999-", Part::Unsatisfiable),
            ("bytes=-0", Part::Unsatisfiable),
        ] {
            assert_eq!(part(&[(RANGE, range)], 10), expected, "{range}");
        }
    }

    #[test]
    fn what_is_not_understood_is_answered_with_everything() {
        for range in [
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=4-2",
            "bytes=a-",
            "bytes=2-b",
            "bytes=+2-4",
            "bytes=2-+4",
            "bytes=2 -4",
            "bytes=--4",
            "bytes=2-4-",
            "bytes =2-4",
            "lines=2-4",
            "bytes=0-1,3-4",
            "bytes=0-1,",
            "2-4",
            "",
        ] {
            assert_eq!(part(&[(RANGE, range)], 10), Part::Whole, "{range}");
        }
        assert_eq!(part(&[(RANGE, "bytes=0-1"), (RANGE, "bytes=0-1")], 10), Part::Whole);
        assert_eq!(part(&[], 10), Part::Whole);
    }

    #[test]
    fn nothing_has_no_parts() {
        assert_eq!(part(&[(RANGE, "bytes=0-")], 0), Part::Unsatisfiable);
        assert_eq!(part(&[(RANGE, "bytes=-0")], 0), Part::Unsatisfiable);
        assert_eq!(part(&[(RANGE, "bytes=-5")], 0), Part::Whole);
    }

    #[test]
    fn if_range_wants_exactly_the_tag_of_the_item() {
        for (if_range, applies) in [
            ("\"5\"", true),
            ("\"6\"", false),
            ("W/\"5\"", false),
            ("\"5\", \"5\"", false),
            ("Tue, 15 Nov 1994 12:45:26 GMT", false),
        ] {
            let expected = if applies { Part::Bytes(2..5) } else { Part::Whole };
            assert_eq!(part(&[(RANGE, "bytes=2-4"), (IF_RANGE, if_range)], 10), expected, "{if_range}");
        }
    }
}
