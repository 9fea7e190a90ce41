//! Comparison of what two guests did with one request.
//!
//! Owns: what counts as a difference, and how much of it is shown. Must never know: which guest is which.

use std::borrow::Cow;
use std::fmt::Debug;

use hyper::header;
use kvs_txlog::Event;

use crate::contract::Response;
use crate::lines::redact_tokens;

/// Maximum number of bytes of a value that are shown: from a little before the first difference on.
const SHOWN_BYTES: usize = 40;
const BEFORE_BYTES: usize = 8;
/// Headers whose values are secrets.
const SECRET: [&str; 5] = ["set-cookie", "cookie", "authorization", "proxy-authorization", "www-authenticate"];
/// The header whose value is the host's.
const POSITION: &str = "kvs-position";

/// A difference, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What differs.
    pub what: String,
    pub serving: String,
    pub candidate: String,
}

impl Difference {
    pub fn new(what: impl Into<String>, serving: impl Into<String>, candidate: impl Into<String>) -> Self {
        Self { what: what.into(), serving: serving.into(), candidate: candidate.into() }
    }

    /// Describes it, with the names of both sides.
    #[cfg(feature = "compiler")]
    pub fn between(&self, serving: &str, candidate: &str) -> String {
        format!("{}: {} {serving}, {} {candidate}", self.what, self.serving, self.candidate)
    }
}

/// Returns the first difference between two responses, besides their entity tags.
pub fn responses(serving: &Response, candidate: &Response) -> Option<Difference> {
    responses_without(header::ETAG.as_str(), serving, candidate)
}

/// The same, with their entity tags: of two instances that have the same entries.
#[cfg(feature = "compiler")]
pub fn whole_responses(serving: &Response, candidate: &Response) -> Option<Difference> {
    responses_without("", serving, candidate)
}

fn responses_without(left_out: &str, serving: &Response, candidate: &Response) -> Option<Difference> {
    if serving.status != candidate.status {
        return Some(Difference::new("status", serving.status.to_string(), candidate.status.to_string()));
    }
    let (ours, theirs) = (sorted(left_out, serving), sorted(left_out, candidate));
    if ours != theirs {
        let at = ours.iter().zip(&theirs).position(|(one, other)| one != other).unwrap_or(ours.len().min(theirs.len()));
        let names = [&ours, &theirs].map(|headers| headers.get(at).map(|header| header.0.as_str()));
        // The first of both by name is the one that is different, or that only one of them has.
        let name = names.into_iter().flatten().min().unwrap_or_default();
        let values = |headers: &[(String, &[u8])]| {
            headers
                .iter()
                .filter(|header| header.0 == name)
                .map(|header| header.1.to_vec())
                .collect::<Vec<_>>()
                .join(&b", "[..])
        };
        let (ours, theirs) = (values(&ours), values(&theirs));
        let what = format!("header {}", text(name.as_bytes(), 0));
        if SECRET.contains(&name) {
            let redacted = |value: &[u8]| format!("{} bytes, redacted", value.len());
            return Some(Difference::new(what, redacted(&ours), redacted(&theirs)));
        }
        return Some(bytes(what, &ours, &theirs));
    }
    (serving.body != candidate.body).then(|| bytes("body".to_owned(), &serving.body, &candidate.body))
}

/// The headers that are compared. Their order means something only among those of one name.
fn sorted<'r>(left_out: &str, response: &'r Response) -> Vec<(String, &'r [u8])> {
    let named = response.headers.iter().map(|header| {
        let name = header.name.to_ascii_lowercase();
        let value = if name == POSITION { &[] } else { &*header.value };
        (name, value)
    });
    let mut headers: Vec<_> = named.filter(|(name, _)| name != left_out).collect();
    headers.sort_by(|one, other| one.0.cmp(&other.0));
    headers
}

/// Returns the difference between what two calls asked for in place of their responses.
pub fn asked(serving: Option<String>, candidate: Option<String>) -> Option<Difference> {
    let shown = |asked: Option<String>| asked.map_or("nothing".to_owned(), |asked| text(asked.as_bytes(), 0));
    (serving != candidate).then(|| Difference::new("watch or wait", shown(serving), shown(candidate)))
}

/// Returns the first difference between two appends, of which one can be missing.
pub fn events(append: usize, serving: Option<&[Event]>, candidate: Option<&[Event]>) -> Option<Difference> {
    if serving == candidate {
        return None;
    }
    let append = append + 1;
    let (Some(ours), Some(theirs)) = (serving, candidate) else {
        let count =
            |events: Option<&[Event]>| events.map_or("none".to_owned(), |events| format!("{} events", events.len()));
        return Some(Difference::new(format!("append {append}"), count(serving), count(candidate)));
    };
    let at = ours.iter().zip(theirs).position(|(one, other)| one != other).unwrap_or(ours.len().min(theirs.len()));
    let what = format!("event {} of append {append}", at + 1);
    Some(match (ours.get(at), theirs.get(at)) {
        (Some(Event::Put(one)), Some(Event::Put(other))) if one.key == other.key => {
            let what = format!("{what}, {}", text(one.key.as_bytes(), 0));
            if one.value != other.value {
                bytes(what, &one.value, &other.value)
            } else if one.expires != other.expires {
                Difference::new(format!("{what}: expiry"), debug(one.expires), debug(other.expires))
            } else {
                Difference::new(format!("{what}: metadata"), debug(&one.metadata), debug(&other.metadata))
            }
        }
        (one, other) => Difference::new(what, event(one), event(other)),
    })
}

/// Describes an event.
pub fn event(event: Option<&Event>) -> String {
    match event {
        None => "none".to_owned(),
        Some(Event::Put(put)) => format!("put {}, {} bytes", text(put.key.as_bytes(), 0), put.value.len()),
        Some(Event::Delete(key)) => format!("delete {}", text(key.as_bytes(), 0)),
    }
}

fn debug(value: impl Debug) -> String {
    text(format!("{value:?}").as_bytes(), 0)
}

fn bytes(what: String, serving: &[u8], candidate: &[u8]) -> Difference {
    let same = serving.iter().zip(candidate).take_while(|(one, other)| one == other).count();
    let from = same.saturating_sub(BEFORE_BYTES);
    Difference::new(what, text(serving, from), text(candidate, from))
}

/// Shows a part of a value in quotes, without control characters; nothing of one that has a token in it, which could be cut
/// into parts that nobody recognizes.
pub fn text(value: &[u8], from: usize) -> String {
    if matches!(redact_tokens(&String::from_utf8_lossy(value)), Cow::Owned(_)) {
        return format!("{} bytes, redacted", value.len());
    }
    let end = value.len().min(from + SHOWN_BYTES);
    let shown = String::from_utf8_lossy(value.get(from..end).unwrap_or_default());
    let (before, after) = (if from > 0 { "…" } else { "" }, if end < value.len() { "…" } else { "" });
    let length =
        if before.is_empty() && after.is_empty() { String::new() } else { format!(" ({} bytes)", value.len()) };
    format!("\"{before}{}{after}\"{length}", shown.escape_debug())
}

/// Shows a text without control characters and without tokens.
pub fn redacted(text: &str) -> String {
    redact_tokens(&text.escape_debug().to_string()).into_owned()
}

#[cfg(test)]
mod tests {
    use kvs_txlog::Put;

    use super::*;
    use crate::contract::HeaderOwned;

    fn response(headers: &[(&str, &str)], body: &str) -> Response {
        let header =
            |(name, value): &(&str, &str)| HeaderOwned { name: (*name).to_owned(), value: value.as_bytes().to_vec() };
        Response { status: 200, headers: headers.iter().map(header).collect(), body: body.into(), read_sequence: None }
    }

    fn between(ours: &[(&str, &str)], theirs: &[(&str, &str)]) -> Option<(String, String, String)> {
        let difference = responses(&response(ours, "body"), &response(theirs, "body"))?;
        Some((difference.what, difference.serving, difference.candidate))
    }

    fn expected(what: &str, serving: &str, candidate: &str) -> Option<(String, String, String)> {
        Some((what.to_owned(), serving.to_owned(), candidate.to_owned()))
    }

    #[test]
    fn headers_differ_by_name_and_value_and_not_by_order() {
        assert_eq!(between(&[("a", "1"), ("b", "2")], &[("B", "2"), ("a", "1")]), None);
        assert_eq!(between(&[("etag", "1"), ("kvs-position", "7")], &[("etag", "2"), ("kvs-position", "8")]), None);
        assert_eq!(between(&[("a", "1")], &[("a", "2")]), expected("header \"a\"", "\"1\"", "\"2\""));
        assert_eq!(between(&[("b", "1")], &[("a", "2"), ("b", "1")]), expected("header \"a\"", "\"\"", "\"2\""));
        assert_eq!(between(&[("b", "1")], &[]), expected("header \"b\"", "\"1\"", "\"\""));
        assert_eq!(
            between(&[("a", "1"), ("a", "2")], &[("a", "2"), ("a", "1")]),
            expected("header \"a\"", "\"1, 2\"", "\"2, 1\"")
        );
        assert_eq!(between(&[("kvs-position", "7")], &[]), expected("header \"kvs-position\"", "\"\"", "\"\""));
    }

    #[test]
    fn secrets_are_not_shown() {
        let difference = between(&[("set-cookie", "session=1")], &[("set-cookie", "session=12")]);
        assert_eq!(difference, expected("header \"set-cookie\"", "9 bytes, redacted", "10 bytes, redacted"));
        let token = format!("{}{}", crate::edge::auth::TOKEN_PREFIX, "0123456789abcdef0123");
        assert_eq!(text(token.as_bytes(), 20), format!("{} bytes, redacted", token.len()));
    }

    #[test]
    fn values_are_cut_around_the_first_difference() {
        let (ours, theirs) =
            (format!("{}one\n", "x".repeat(500)), format!("{}two\n{}", "x".repeat(500), "y".repeat(90)));
        let difference = responses(&response(&[], &ours), &response(&[], &theirs)).expect("they differ");
        assert_eq!((&*difference.what, &*difference.serving), ("body", "\"…xxxxxxxxone\\n\" (504 bytes)"));
        assert_eq!(difference.candidate, format!("\"…xxxxxxxxtwo\\n{}…\" (594 bytes)", "y".repeat(28)));
    }

    #[test]
    fn events_differ_in_every_part() {
        let put = |value: &str, expires, metadata: &[(&str, &str)]| {
            let metadata = metadata.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            Event::Put(Put { key: "k".to_owned(), value: value.into(), metadata, expires })
        };
        let usual = put("1", None, &[]);
        let what = |other: Event| {
            events(0, Some(std::slice::from_ref(&usual)), Some(&[other])).map(|difference| difference.what)
        };
        assert_eq!(what(usual.clone()), None);
        assert_eq!(what(put("2", None, &[])).as_deref(), Some("event 1 of append 1, \"k\""));
        assert_eq!(what(put("1", Some(1), &[])).as_deref(), Some("event 1 of append 1, \"k\": expiry"));
        assert_eq!(what(put("1", None, &[("a", "b")])).as_deref(), Some("event 1 of append 1, \"k\": metadata"));
        assert_eq!(what(Event::Delete("k".to_owned())).as_deref(), Some("event 1 of append 1"));
        let two = [usual.clone(), usual.clone()];
        let more = events(1, Some(&two), Some(&two[..1])).expect("one is missing");
        assert_eq!(
            (&*more.what, &*more.serving, &*more.candidate),
            ("event 2 of append 2", "put \"k\", 1 bytes", "none")
        );
    }
}
