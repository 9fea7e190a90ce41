//! The parameters of a request: those a query may have, each at most once, and what is wrong with the others.
//!
//! Must never know: what a parameter is for.

use std::borrow::Cow;
use std::ops::RangeInclusive;

use thiserror::Error;

use crate::percent::{self, Undecodable};

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
    let mut found = known.map(|_| None);
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let (&name, found) = known
            .iter()
            .zip(&mut found)
            .find(|(known, _)| **known == name)
            .ok_or_else(|| BadQuery::Unknown(printable(name)))?;
        let value = percent::decode_query(value).map_err(|undecodable| BadQuery::Undecodable(name, undecodable))?;
        if found.replace(Parameter { name, value }).is_some() {
            return Err(BadQuery::Twice(name));
        }
    }
    Ok(found)
}

/// A query that has no parameters.
pub fn nothing(query: &str) -> Result<(), BadQuery> {
    parameters(query, []).map(|[]| ())
}

fn printable(name: &str) -> String {
    name.chars().filter(|character| !character.is_control()).take(ECHOED_CHARACTERS).collect()
}

impl Parameter<'_> {
    /// A whole number, in digits alone.
    pub fn number(&self, allowed: RangeInclusive<u64>) -> Result<u64, BadQuery> {
        digits(&self.value)
            .filter(|number| allowed.contains(number))
            .ok_or_else(|| self.unfit(format!("a whole number from {} to {}", allowed.start(), allowed.end())))
    }

    /// A time in whole seconds: `10s`.
    pub fn seconds(&self, allowed: RangeInclusive<u64>) -> Result<u64, BadQuery> {
        let number = self.value.strip_suffix('s').filter(|number| !number.is_empty()).and_then(digits);
        number.filter(|number| allowed.contains(number)).ok_or_else(|| {
            self.unfit(format!("a whole number of seconds from {}s to {}s", allowed.start(), allowed.end()))
        })
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
    }

    #[test]
    fn what_is_wrong_is_told_by_name() {
        let long = "ä".repeat(65);
        let cut = format!("unknown query parameter `{}`", "ä".repeat(64));
        for (query, told) in [
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
            assert_eq!(bad.to_string(), told);
        }
    }

    #[test]
    fn a_number_is_digits_within_its_bounds() {
        let number = |value: &'static str| Parameter { name: "a", value: value.into() }.number(1..=10);
        assert_eq!(number("10"), Ok(10));
        assert_eq!(number("007"), Ok(7));
        for value in ["0", "11", "", "+1", "-1", "1.0", " 1", "١", "99999999999999999999"] {
            let told = number(value).expect_err(value).to_string();
            assert_eq!(told, "query parameter `a` must be a whole number from 1 to 10", "{value}");
        }
    }

    #[test]
    fn a_time_is_a_number_of_seconds_within_its_bounds() {
        let seconds = |value: &'static str| Parameter { name: "a", value: value.into() }.seconds(1..=10);
        assert_eq!((seconds("1s"), seconds("10s")), (Ok(1), Ok(10)));
        for value in ["0s", "11s", "", "s", "10", "1 s", "1S", "1ms", "1.0s", "-1s", "1ss", "99999999999999999999s"] {
            let told = seconds(value).expect_err(value).to_string();
            assert_eq!(told, "query parameter `a` must be a whole number of seconds from 1s to 10s", "{value}");
        }
    }
}
