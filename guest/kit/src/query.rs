//! The parameters of a request: those a query may have, each at most once, and what is wrong with the others.
//!
//! Must never know: what a parameter is for.

use std::borrow::Cow;
use std::ops::RangeInclusive;

use thiserror::Error;

use crate::duration;
use crate::key::{self, NoKey};
use crate::percent::{self, Undecodable};
use crate::text::printable;

/// Characters of a parameter's name that are worth repeating.
const ECHOED_CHARACTERS: usize = 64;

/// What is wrong with a query, as one line of text that names the parameter.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BadQuery {
    #[error("unknown query parameter `{0}`")]
    Unknown(String),
    #[error("query parameter `{0}` was given twice")]
    Twice(&'static str),
    #[error("query parameter `{0}` {1}")]
    Undecodable(&'static str, Undecodable),
    #[error("query parameter `{0}` must be {1}")]
    Unfit(&'static str, String),
    #[error("query parameter `{0}` is missing: {1}")]
    Missing(&'static str, &'static str),
    #[error("query parameter `{0}` does not go with `{1}`")]
    DoesNotFit(&'static str, &'static str),
    #[error("query parameter `{0}` is no key: {1}")]
    NoKey(&'static str, NoKey),
}

/// A parameter that was given: its name, and its value decoded.
#[derive(Debug, PartialEq, Eq)]
pub struct Parameter<'q> {
    pub name: &'static str,
    pub value: Cow<'q, str>,
}

/// The parameters of a query, in the order of `known`.
pub fn parameters<'q, const N: usize>(
    query: &'q str,
    known: [&'static str; N],
) -> Result<[Option<Parameter<'q>>; N], BadQuery> {
    with_repeated(query, known, []).map(|(found, [])| found)
}

/// Parameters that are there at most once, and those that can be there several times.
pub type Found<'q, const N: usize, const M: usize> = ([Option<Parameter<'q>>; N], [Vec<Parameter<'q>>; M]);

/// As `parameters`, with some that can be there several times.
pub fn with_repeated<'q, const N: usize, const M: usize>(
    query: &'q str,
    known: [&'static str; N],
    repeated: [&'static str; M],
) -> Result<Found<'q, N, M>, BadQuery> {
    let mut found = known.map(|_| None);
    let mut lists = repeated.map(|_| Vec::new());
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let decoded = |name| {
            let value = percent::decode_query(value).map_err(|undecodable| BadQuery::Undecodable(name, undecodable))?;
            Ok(Parameter { name, value })
        };
        if let Some((name, list)) = repeated.iter().zip(&mut lists).find(|(repeated, _)| **repeated == name) {
            list.push(decoded(name)?);
            continue;
        }
        let known = known.iter().zip(&mut found).find(|(known, _)| **known == name);
        let (&name, found) = known.ok_or_else(|| BadQuery::Unknown(printable(name, ECHOED_CHARACTERS)))?;
        if found.replace(decoded(name)?).is_some() {
            return Err(BadQuery::Twice(name));
        }
    }
    Ok((found, lists))
}

/// Whether a query has a parameter of this name.
pub fn has(query: &str, name: &str) -> bool {
    query.split('&').any(|parameter| parameter.split('=').next() == Some(name))
}

/// A query that has no parameters.
pub fn nothing(query: &str) -> Result<(), BadQuery> {
    parameters(query, []).map(|[]| ())
}

impl<'q> Parameter<'q> {
    /// A whole number, in digits alone.
    pub fn number(&self, allowed: RangeInclusive<u64>) -> Result<u64, BadQuery> {
        digits(&self.value)
            .filter(|number| allowed.contains(number))
            .ok_or_else(|| self.unfit(format!("a whole number from {} to {}", allowed.start(), allowed.end())))
    }

    /// A duration, in milliseconds: `10`, `10s`, `500ms`.
    pub fn duration(&self, allowed: RangeInclusive<u64>) -> Result<u64, BadQuery> {
        let duration = duration::parse(&self.value).filter(|duration| allowed.contains(duration));
        duration.ok_or_else(|| self.unfit(duration::Within(allowed).to_string()))
    }

    /// A key, which keeps the rules for keys.
    pub fn key(self) -> Result<Cow<'q, str>, BadQuery> {
        key::check(&self.value).map_err(|no_key| BadQuery::NoKey(self.name, no_key))?;
        Ok(self.value)
    }

    /// `true` or `false`.
    pub fn flag(&self) -> Result<bool, BadQuery> {
        match &*self.value {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err(self.unfit("true or false")),
        }
    }

    /// What is wrong with its value.
    pub fn unfit(&self, must_be: impl Into<String>) -> BadQuery {
        BadQuery::Unfit(self.name, must_be.into())
    }
}

/// `parse` would take a sign too.
fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_found_in_any_order_and_decoded() {
        let found = parameters("b=x+y%26&&a&", ["a", "b", "c"]).expect("all are known");
        let parameter = |name, value: &'static str| Some(Parameter { name, value: value.into() });
        assert_eq!(found, [parameter("a", ""), parameter("b", "x y&"), None]);
        assert_eq!(nothing("&"), Ok(()));
        let (once, [list]) = with_repeated("b=1&a=2&b=%33", ["a"], ["b"]).expect("all are known");
        assert_eq!(once, [parameter("a", "2")]);
        assert_eq!(list.into_iter().map(Some).collect::<Vec<_>>(), [parameter("b", "1"), parameter("b", "3")]);
    }

    #[test]
    fn malformed_query_is_rejected_by_name() {
        let long = "ä".repeat(65);
        let cut = format!("unknown query parameter `{}`", "ä".repeat(64));
        for (query, message) in [
            ("c=1", "unknown query parameter `c`"),
            ("A=1", "unknown query parameter `A`"),
            ("%61=1", "unknown query parameter `%61`"),
            ("c\r\nd", "unknown query parameter `cd`"),
            ("=1", "unknown query parameter ``"),
            (&long, &cut),
            ("a=1&b&a=1", "query parameter `a` was given twice"),
            ("a=%f", "query parameter `a` has a bad percent escape at byte 1"),
            ("a=%ff", "query parameter `a` is not valid UTF-8"),
        ] {
            let bad = parameters(query, ["a", "b"]).expect_err(query);
            assert_eq!(bad.to_string(), message);
        }
    }

    #[test]
    fn a_number_is_digits_within_its_bounds() {
        let number = |value: &'static str| Parameter { name: "a", value: value.into() }.number(1..=10);
        assert_eq!(number("10"), Ok(10));
        assert_eq!(number("007"), Ok(7));
        for value in ["0", "11", "", "+1", "-1", "1.0", " 1", "١", "99999999999999999999"] {
            let message = number(value).expect_err(value).to_string();
            assert_eq!(message, "query parameter `a` must be a whole number from 1 to 10", "{value}");
        }
    }

    #[test]
    fn duration_is_within_its_bounds() {
        let duration = |value: &'static str| Parameter { name: "a", value: value.into() }.duration(1..=10_000);
        assert_eq!((duration("1ms"), duration("10"), duration("10s")), (Ok(1), Ok(10_000), Ok(10_000)));
        for value in ["0", "11s", "10001ms", "", "ten"] {
            let reason = duration(value).expect_err(value).to_string();
            let expected = "query parameter `a` must be a duration like 60, 60s, 500ms, 5m, 1h or 30d, from 1ms to 10s";
            assert_eq!(reason, expected, "{value}");
        }
    }
}
