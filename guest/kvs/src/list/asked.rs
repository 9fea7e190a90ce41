//! Selection of a list: which keys, in which direction, from where on.
//!
//! Owns: the parameters, and the cursor of the next page. Must never know: how items are kept.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::grant;
use crate::kvs::store::http::Grant;
use crate::query::{self, BadQuery, Parameter};

/// Keys and prefixes in a page, at most.
pub const MAX_LIMIT: u64 = 1_000;

/// Selection of a list: keys from `least` on and before `most`, in either direction.
pub struct Asked<'q> {
    pub prefix: Cow<'q, str>,
    pub limit: usize,
    pub least: Vec<u8>,
    /// None: all that come after `least`.
    pub most: Option<Vec<u8>>,
    pub reverse: bool,
    pub values: bool,
    pub delimiter: Option<Cow<'q, str>>,
    pub is_first: bool,
    pub count: bool,
}

pub fn asked(query: &str) -> Result<Asked<'_>, BadQuery> {
    let names = ["prefix", "limit", "cursor", "values", "delimiter", "start", "end", "reverse", "count"];
    let [prefix, limit, cursor, values, delimiter, start, end, reverse, count] = query::parameters(query, names)?;
    let flag = |flag: Option<Parameter<'_>>| flag.map_or(Ok(false), |flag| flag.flag());
    let count = flag(count)?;
    let beside = [&limit, &cursor, &values, &delimiter, &reverse].into_iter().flatten().next();
    if let Some(Parameter { name, .. }) = beside.filter(|_| count) {
        return Err(BadQuery::DoesNotFit(name, "count"));
    }
    let (values, reverse) = (flag(values)?, flag(reverse)?);
    let is_first = cursor.is_none();
    let bounds = (start.map(|start| start.value), end.map(|end| end.value));
    let mut asked = between(prefix.map_or(Cow::Borrowed(""), |prefix| prefix.value), bounds, reverse, cursor)?;
    asked.limit = limit.map_or(Ok(MAX_LIMIT), |limit| limit.number(1..=MAX_LIMIT))? as usize;
    let delimiter = delimiter.map(|Parameter { name, value }| match &*value {
        "" => Err(Parameter { name, value }.unfit("at least one character")),
        _ => Ok(value),
    });
    Ok(Asked { values, delimiter: delimiter.transpose()?, is_first, count, ..asked })
}

/// Keys that begin so, within the bounds, from where the page with this cursor ended.
pub fn between<'q>(
    prefix: Cow<'q, str>,
    (start, end): (Option<Cow<'q, str>>, Option<Cow<'q, str>>),
    reverse: bool,
    cursor: Option<Parameter<'q>>,
) -> Result<Asked<'q>, BadQuery> {
    let cursor = cursor
        .map(|cursor| position(&cursor.value, reverse).ok_or_else(|| cursor.unfit("one that such a list has given")));
    let mut least = prefix.as_bytes().max(start.as_deref().unwrap_or_default().as_bytes()).to_vec();
    let mut most = (!prefix.is_empty()).then(|| after_all(prefix.as_bytes()));
    end.iter().for_each(|end| end_before(&mut most, end.as_bytes()));
    match cursor.transpose()? {
        Some(cursor) if reverse => end_before(&mut most, &cursor),
        Some(cursor) => least = least.max(cursor),
        None => {}
    }
    let (limit, values, delimiter) = (MAX_LIMIT as usize, false, None);
    Ok(Asked { prefix, limit, least, most, reverse, values, delimiter, is_first: true, count: false })
}

/// Moves the end of a list to `end`, if that comes before it.
fn end_before(most: &mut Option<Vec<u8>>, end: &[u8]) {
    if most.as_deref().is_none_or(|most| end < most) {
        *most = Some(end.to_vec());
    }
}

/// The direction of a list. A place in it is a key: forward the least that can come, in reverse the least that was passed.
impl Asked<'_> {
    /// Narrows the list to the keys of a grant. Groups stay those of the prefix that was asked for.
    pub fn within(mut self, grant: &Grant) -> Result<Self, String> {
        let prefix = grant::narrow(grant, Cow::Borrowed(&*self.prefix))?.into_owned();
        if prefix.len() > self.prefix.len() {
            self.least = self.least.max(prefix.clone().into_bytes());
            end_before(&mut self.most, &after_all(prefix.as_bytes()));
        }
        Ok(self)
    }

    pub fn begin(&self) -> Option<Vec<u8>> {
        if self.reverse { self.most.clone() } else { Some(self.least.clone()) }
    }

    /// Whether a key comes after all that is asked for.
    pub fn is_beyond(&self, key: &[u8]) -> bool {
        if self.reverse { key < self.least.as_slice() } else { self.most.as_deref().is_some_and(|most| key >= most) }
    }

    /// The place after a key.
    pub fn past(&self, key: &[u8]) -> Vec<u8> {
        if self.reverse { key.to_vec() } else { after(key) }
    }

    /// The place after all keys that begin so.
    pub fn past_all(&self, prefix: &[u8]) -> Vec<u8> {
        if self.reverse { prefix.to_vec() } else { after_all(prefix) }
    }

    /// Whether a key or group of keys is at this place or after it.
    pub fn is_at(&self, name: &[u8], place: &[u8]) -> bool {
        if self.reverse { name < place } else { name >= place }
    }

    pub fn cursor(&self, place: &[u8]) -> String {
        URL_SAFE_NO_PAD.encode([&[cursor_kind(self.reverse)], place].concat())
    }
}

/// The least key that comes after this one.
fn after(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

/// The least key that comes after all that begin so.
fn after_all(prefix: &[u8]) -> Vec<u8> {
    let mut next = prefix.to_vec();
    // No byte of a text is 255.
    if let Some(last) = next.last_mut() {
        *last = last.saturating_add(1);
    }
    next
}

/// The place in a cursor of a list in this direction.
pub fn position(cursor: &str, reverse: bool) -> Option<Vec<u8>> {
    let mut position = URL_SAFE_NO_PAD.decode(cursor).ok()?;
    (position.first() == Some(&cursor_kind(reverse))).then(|| position.split_off(1))
}

/// The first byte of a cursor: which kind of cursor it is.
fn cursor_kind(reverse: bool) -> u8 {
    if reverse { 2 } else { 1 }
}
