//! Targets of requests: path and query, and what stands in a path.
//!
//! Must never know: what a path means. `key` has the paths of keys.

use std::borrow::Cow;

use crate::percent::{self, Undecodable};

/// Path and query.
pub fn split(target: &str) -> (&str, &str) {
    // A target is short, and a loop over its bytes takes a third of what `split_once` does.
    match target.bytes().position(|byte| byte == b'?') {
        Some(end) => (&target[..end], &target[end + 1..]),
        None => (target, ""),
    }
}

/// The one segment that follows `prefix` in a path, decoded; `None` when the path does not begin so, or has another
/// number of segments: `segment_after("/locks/a%2Fb", "/locks/")` is `a/b`.
pub fn segment_after<'p>(path: &'p str, prefix: &str) -> Result<Option<Cow<'p, str>>, BadSegment> {
    match path.strip_prefix(prefix) {
        Some(segment) if !segment.is_empty() && !segment.contains('/') => Ok(Some(percent::decode(segment)?)),
        _ => Ok(None),
    }
}

/// A segment that cannot be decoded.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[error("the last segment of the path {0}")]
pub struct BadSegment(#[from] Undecodable);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_is_a_path_and_a_query() {
        for (target, parts) in [("/a", ("/a", "")), ("/a?", ("/a", "")), ("/a?b?c", ("/a", "b?c")), ("", ("", ""))] {
            assert_eq!(split(target), parts, "{target}");
        }
    }

    #[test]
    fn segment_is_the_only_one_and_decoded() {
        let segment = |path: &'static str| segment_after(path, "/locks/");
        assert_eq!(segment("/locks/a%2Fb+c"), Ok(Some("a/b+c".into())));
        for path in ["/locks", "/locks/", "/lock/a", "/locks/a/b", "/locks//", "locks/a"] {
            assert_eq!(segment(path), Ok(None), "{path}");
        }
        let reason = segment("/locks/a%zz").expect_err("it is no escape").to_string();
        assert_eq!(reason, "the last segment of the path has a bad percent escape at byte 2");
    }
}
