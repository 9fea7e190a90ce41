//! `GET /v1`: keys in order, a page at a time.
//!
//! Owns: where a page ends, and how the pages of several instances become one. A page costs what it holds, whatever else the
//! store does. Must never know: how items are kept.

mod asked;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use self::asked::asked;
pub use self::asked::{Asked, between, position};
use crate::answer::{header, json, json_of, line, problem, with};
use crate::conditions::tag_of;
use crate::content_type;
use crate::item::Item;
use crate::key;
use crate::kvs::store::http::{Request, Response};
use crate::store::{InOrder, Store};
use crate::text;

/// Items looked at for a page, at most. Those that have expired are looked at and not shown.
const MAX_STEPS: usize = 10_000;
/// Bytes of keys and values in a page, as they are in JSON, at most; a single one can take more. A larger value is not in a page.
const PAGE_BYTES: usize = 1 << 20;
/// Bytes of the rest of a row, about.
const ROW_BYTES: usize = 100;
/// The first byte of the keys that belong to guests, which no list shows.
const GUEST_KEY: u8 = key::GUEST_KEY as u8;

/// Header of the first page, whose value the host sets: the position from which a watch misses nothing.
const POSITION: &str = "kvs-position";

/// A page of a list, as it is answered.
#[derive(Serialize, Deserialize)]
pub struct Page<E = Entry> {
    pub keys: Vec<E>,
    /// What keys begin with that are not listed one by one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    prefixes: Option<Vec<String>>,
    list_complete: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    /// Bytes of keys and values in JSON.
    #[serde(skip)]
    bytes: usize,
}

#[derive(Serialize, Deserialize)]
pub struct Entry {
    pub key: String,
    /// Null: there is no such key.
    pub etag: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<usize>,
    /// In milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    content_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
}

/// The key of an entry, of which nothing else is read.
#[derive(Deserialize)]
struct Named {
    key: String,
}

/// How many keys there are.
#[derive(Serialize, Deserialize)]
struct Count {
    count: usize,
}

/// GET, and HEAD: the host drops the body.
pub fn get(store: &Store, query: &str, request: &Request) -> Response {
    let (store, now) = (store.in_order(), request.time_ms);
    let asked = match asked(query) {
        Ok(asked) => asked,
        Err(bad) => return line(400, &bad.to_string()),
    };
    let asked = match asked.within(&request.grant) {
        Ok(asked) => asked,
        Err(reason) => return line(403, &reason),
    };
    if asked.count {
        return match count(&store, &asked, now) {
            Some(count) => at(&asked, json(&Count { count })),
            None => problem(503, "unavailable", "many keys have expired and are not deleted yet; try again"),
        };
    }
    page(&store, &asked, now).response(&asked)
}

/// The page of a list whose keys lie in several instances, each of which gave a page of its own.
pub fn merge(query: &str, responses: &[Response]) -> Response {
    match asked(query) {
        Ok(asked) if asked.count => match parsed::<Count>(responses) {
            Some(counts) => at(&asked, json(&Count { count: counts.iter().map(|count| count.count).sum() })),
            None => disagreement(),
        },
        Ok(asked) => match parsed(responses).and_then(|pages| merged(&asked, pages)) {
            Some(page) => page.response(&asked),
            None => disagreement(),
        },
        Err(bad) => line(400, &bad.to_string()),
    }
}

/// The responses of all instances, read.
pub fn parsed<'r, T: Deserialize<'r>>(responses: &'r [Response]) -> Option<Vec<T>> {
    responses.iter().map(|response| serde_json::from_slice(&response.body).ok()).collect()
}

/// The response when `parsed` has none.
pub fn disagreement() -> Response {
    line(500, "the shards gave responses that do not fit together")
}

/// A response to a list. That of the first page comes with a position.
fn at(asked: &Asked<'_>, response: Response) -> Response {
    if asked.is_first { with(response, header(POSITION, "")) } else { response }
}

fn count(store: &InOrder<'_>, asked: &Asked<'_>, now: u64) -> Option<usize> {
    let all = store.count(&asked.least, asked.most.as_deref(), now)?;
    // Keys of guests do not count.
    let (least, most) = ([GUEST_KEY], [GUEST_KEY + 1]);
    let guests_least = asked.least.as_slice().max(&least);
    let guests_most = asked.most.as_deref().map_or(&most[..], |asked| asked.min(&most));
    Some(all - store.count(guests_least, Some(guests_most), now)?)
}

/// A page of what the store has.
pub fn page(store: &InOrder<'_>, asked: &Asked<'_>, now: u64) -> Page {
    if asked.reverse {
        page_of(asked, now, |until| store.range_back(until))
    } else {
        page_of(asked, now, |from| store.range(from.unwrap_or_default()))
    }
}

fn page_of<'s, I: Iterator<Item = &'s Item>>(asked: &Asked<'_>, now: u64, walk: impl Fn(Option<&[u8]>) -> I) -> Page {
    let mut page = Page::new(asked);
    let (mut place, mut rows, mut steps) = (asked.begin(), 0, 0);
    'seek: loop {
        for item in walk(place.as_deref()) {
            let Some(rest) = item.key().strip_prefix(asked.prefix.as_bytes()) else { break };
            if asked.is_beyond(item.key()) {
                break;
            }
            steps += 1;
            if rows == asked.limit || steps > MAX_STEPS {
                return page.until(asked, place);
            }
            if item.key().first() == Some(&GUEST_KEY) {
                // However many there are, they are passed over in one step.
                place = Some(asked.past_all(&[GUEST_KEY]));
                continue 'seek;
            }
            if item.is_expired(now) {
                place = Some(asked.past(item.key()));
                continue;
            }
            let delimiter = asked.delimiter.as_deref();
            if let Some(end) = delimiter.and_then(|delimiter| end_of(delimiter, rest)) {
                let group = &item.key()[..asked.prefix.len() + end];
                let name = String::from_utf8_lossy(group).into_owned();
                if !page.takes(text::json_bytes(&name)) {
                    return page.until(asked, place);
                }
                rows += 1;
                page.prefixes.get_or_insert_default().push(name);
                // However many keys begin so, they are passed over in one step.
                place = Some(asked.past_all(group));
                continue 'seek;
            }
            let entry = Entry::of(item, asked.values);
            if !page.takes(entry.json_bytes()) {
                return page.until(asked, place);
            }
            rows += 1;
            page.keys.push(entry);
            place = Some(asked.past(item.key()));
        }
        page.list_complete = true;
        return page;
    }
}

/// Where the first `delimiter` ends. The search of `str` takes linear time, whatever the two hold.
fn end_of(delimiter: &str, text: &[u8]) -> Option<usize> {
    let at = str::from_utf8(text).ok()?.find(delimiter)?;
    Some(at + delimiter.len())
}

/// Entries are copied as they are: with what they hold twice, those of many instances would exceed the memory of one.
fn merged<'r>(asked: &Asked<'_>, pages: Vec<Page<&'r RawValue>>) -> Option<Page<&'r RawValue>> {
    // Up to here, every instance has said all it has. A cursor of its own making can be read.
    let ends = pages.iter().filter_map(|page| position(page.cursor.as_deref()?, asked.reverse));
    let end = if asked.reverse { ends.max() } else { ends.min() };
    let mut rows: BTreeMap<String, Option<&'r RawValue>> = BTreeMap::new();
    for page in pages {
        rows.extend(page.prefixes.into_iter().flatten().map(|prefix| (prefix, None)));
        for entry in page.keys {
            rows.insert(serde_json::from_str::<Named>(entry.get()).ok()?.key, Some(entry));
        }
    }
    let mut page = Page::new(asked);
    let rows: &mut dyn Iterator<Item = _> =
        if asked.reverse { &mut rows.into_iter().rev() } else { &mut rows.into_iter() };
    let (mut place, mut next) = (None, None);
    for (count, (name, entry)) in rows.enumerate() {
        let bytes = entry.map_or_else(|| text::json_bytes(&name), |entry| entry.get().len());
        if count == asked.limit || !page.takes(bytes) {
            next = place.take();
            break;
        }
        if end.as_ref().is_some_and(|end| asked.is_at(name.as_bytes(), end)) {
            break;
        }
        match entry {
            Some(entry) => {
                place = Some(asked.past(name.as_bytes()));
                page.keys.push(entry);
            }
            None => {
                place = Some(asked.past_all(name.as_bytes()));
                page.prefixes.get_or_insert_default().push(name);
            }
        }
    }
    // A group that one instance has listed can end behind the end of another.
    let next = next.or(end.map(|end| place.filter(|place| asked.is_at(place, &end)).unwrap_or(end)));
    page.list_complete = next.is_none();
    Some(page.until(asked, next))
}

impl<E: Serialize> Page<E> {
    fn response(&self, asked: &Asked<'_>) -> Response {
        let bytes = self.bytes + (self.keys.len() + 1) * ROW_BYTES;
        at(asked, json_of(self, bytes))
    }
}

impl<E> Page<E> {
    fn new(asked: &Asked<'_>) -> Self {
        let prefixes = asked.delimiter.as_ref().map(|_| Vec::new());
        Self { keys: Vec::new(), prefixes, list_complete: false, cursor: None, bytes: 0 }
    }

    /// Whether a row of this many bytes belongs to the page, which has one in any case.
    fn takes(&mut self, bytes: usize) -> bool {
        let is_first = self.bytes == 0;
        let takes = is_first || self.bytes + bytes <= PAGE_BYTES;
        self.bytes += if takes { bytes } else { 0 };
        takes
    }

    /// The next page begins at this place.
    fn until(self, asked: &Asked<'_>, place: Option<Vec<u8>>) -> Self {
        Self { cursor: place.map(|place| asked.cursor(&place)), ..self }
    }
}

impl Entry {
    /// A key that does not exist.
    pub fn absent(key: String) -> Self {
        Self { key, etag: None, size: None, expires: None, content_type: None, value: None, value_base64: None }
    }

    /// Bytes of key and value in JSON.
    fn json_bytes(&self) -> usize {
        let texts = [self.value.as_deref(), self.value_base64.as_deref()].into_iter().flatten();
        text::json_bytes(&self.key) + texts.map(text::json_bytes).sum::<usize>()
    }

    pub fn of(item: &Item, values: bool) -> Self {
        let is_shown = values && item.value().len() <= PAGE_BYTES;
        let (value, value_base64) = if is_shown { text::fields(item.value()) } else { (None, None) };
        Self {
            key: String::from_utf8_lossy(item.key()).into_owned(),
            etag: Some(tag_of(item.sequence())),
            size: Some(item.value().len()),
            expires: item.expires(),
            content_type: content_type::of(item.metadata()).filter(|_| values).map(str::to_owned),
            value,
            value_base64,
        }
    }
}

#[cfg(test)]
mod tests;
