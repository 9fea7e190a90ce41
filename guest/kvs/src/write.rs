//! Writes of one key: PUT and DELETE.
//!
//! Owns: their meaning, and what every write of one key has in common. Must never know: how items are kept.

use std::borrow::Cow;

use crate::answer::{Host, etag, header, line, not_stored, with};
use crate::conditions::{Conditions, IF_MATCH, IF_NONE_MATCH, Unmet, tag_of};
use crate::content_type;
use crate::item::Item;
use crate::kvs::store::http::{Request, Response};
use crate::kvs::store::transaction_log::{AppendError, Event, Put};
use crate::query::{self, BadQuery, Parameter};
use crate::store::Store;
use crate::unkept;

/// The longest time to live, in milliseconds: 100 years.
pub const MAX_TTL: u64 = 100 * 365 * 24 * 60 * 60 * 1_000;

/// Response header of PUT: `true` when there was no such key before.
const CREATED: &str = "kvs-created";
/// Response header of DELETE: the entity tag of the value that was deleted, or `none`.
const DELETED: &str = "kvs-deleted";
/// Response header of DELETE: the sequence of the delete, if there was anything to delete.
const SEQUENCE: &str = "kvs-sequence";

pub fn put(store: &mut Store, key: Cow<'_, str>, query: &str, request: Request, host: &mut impl Host) -> Response {
    let conditions = match Conditions::sent(&request.headers) {
        Ok(conditions) => conditions,
        Err(malformed) => return line(400, &malformed.to_string()),
    };
    if let Some(refusal) = unkept::refusal(&request.headers) {
        return refusal;
    }
    let expires = match query::parameters(query, ["ttl"]).and_then(|[ttl]| expiry(ttl, request.time_ms)) {
        Ok(expires) => expires,
        Err(bad) => return line(400, &bad.to_string()),
    };
    let metadata = match content_type::sent(request.headers) {
        Ok(content_type) => content_type.map(|value| (content_type::NAME.to_owned(), value)).into_iter().collect(),
        Err(unfit) => return line(400, &unfit.to_string()),
    };
    if !conditions.is_empty() {
        let there = store.get(&key, request.time_ms);
        if let Err(unmet) = conditions.check(there.ok().map(Item::sequence)) {
            return not_met(unmet, there);
        }
    }
    let event = Event::Put(Put { key: key.into_owned(), value: request.body, metadata, expires_at_ms: expires });
    match write(store, event, host) {
        Ok((sequence, before)) => {
            let created = before.is_none_or(|before| before.is_expired(request.time_ms));
            let headers = vec![etag(sequence), header(CREATED, if created { "true" } else { "false" })];
            Response { status: 201, headers, body: Vec::new(), read_sequence: Some(sequence) }
        }
        Err(error) => not_stored(error),
    }
}

/// 200 also when there is nothing to delete, so that a client can try again without asking what became of the first try.
pub fn delete(store: &mut Store, key: Cow<'_, str>, query: &str, request: &Request, host: &mut impl Host) -> Response {
    if let Err(bad) = query::nothing(query) {
        return line(400, &bad.to_string());
    }
    let there = match item_to_change(store, &key, request) {
        Ok(there) => there,
        Err(refusal) => return refusal,
    };
    let response = |headers, read_sequence| Response {
        status: 200,
        headers,
        body: Vec::new(),
        read_sequence: Some(read_sequence),
    };
    match there.map(Item::sequence) {
        Ok(deleted) => match write(store, Event::Delete(key.into_owned()), host) {
            Ok((sequence, _)) => {
                response(vec![header(DELETED, tag_of(deleted)), header(SEQUENCE, sequence.to_string())], sequence)
            }
            Err(error) => not_stored(error),
        },
        Err(read_sequence) => response(vec![header(DELETED, "none")], read_sequence),
    }
}

/// Appends first, then changes. Returns the sequence of the event, and the item that was there before, expired or not.
pub fn write(store: &mut Store, event: Event, host: &mut impl Host) -> Result<(u64, Option<Item>), AppendError> {
    let events = [event];
    let sequence = host.append(&events)?;
    Ok((sequence, store.replace(sequence, &events[0])))
}

/// Time from which on a value is gone that is put now with this time to live.
pub fn expiry(ttl: Option<Parameter<'_>>, now: u64) -> Result<Option<u64>, BadQuery> {
    let ttl = ttl.map(|ttl| ttl.duration(1..=MAX_TTL)).transpose()?;
    Ok(ttl.map(|ttl| now.saturating_add(ttl)))
}

/// The item that a request is about to change, or the sequence of its absence; an error if a condition does not hold.
pub fn item_to_change<'s>(store: &'s Store, key: &str, request: &Request) -> Result<Result<&'s Item, u64>, Response> {
    let conditions = Conditions::sent(&request.headers).map_err(|malformed| line(400, &malformed.to_string()))?;
    let there = store.get(key, request.time_ms);
    conditions.check(there.ok().map(Item::sequence)).map_err(|unmet| not_met(unmet, there))?;
    Ok(there)
}

/// The response to a condition that does not hold.
pub fn not_met(unmet: Unmet, there: Result<&Item, u64>) -> Response {
    let name = match unmet {
        Unmet::IfMatch => IF_MATCH,
        Unmet::IfNoneMatch => IF_NONE_MATCH,
    };
    match there {
        Ok(item) => {
            let tag = etag(item.sequence());
            let refusal = line(412, &format!("{name} does not hold: the key has the etag \"{}\"", item.sequence()));
            Response { read_sequence: Some(item.sequence()), ..with(refusal, tag) }
        }
        Err(read_sequence) => Response {
            read_sequence: Some(read_sequence),
            ..line(412, &format!("{name} does not hold: there is no such key"))
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rest::handle;
    use crate::testing::{NOW, header_of, request, store_with, text_of, unasked};

    const CONTENT_TYPE: &str = content_type::NAME;

    fn put_with(content_types: &[&str]) -> Request {
        let headers = content_types.iter().map(|value| header(CONTENT_TYPE, *value)).collect();
        Request { headers, body: b"value".into(), ..request("PUT") }
    }

    fn request_with(method: &str, query: &str, headers: &[(&str, &str)]) -> Request {
        let headers = headers.iter().map(|(name, value)| header(name, *value)).collect();
        Request { target: format!("/v1/a?{query}"), headers, ..request(method) }
    }

    #[test]
    fn a_put_is_appended_with_its_content_type_and_answered_with_its_sequence() {
        let kept = vec![(CONTENT_TYPE.to_owned(), "text/plain".to_owned())];
        for (content_types, metadata) in [(&["text/plain"][..], kept), (&[], vec![])] {
            let expected =
                [Event::Put(Put { key: "a".to_owned(), value: b"value".into(), metadata, expires_at_ms: None })];
            let response = handle(&mut store_with(&[], None), put_with(content_types), |events| {
                assert_eq!(events, expected);
                Ok(8)
            });
            let headers = vec![header("etag", "\"8\""), header(CREATED, "false")];
            assert_eq!(response, Response { status: 201, headers, body: vec![], read_sequence: Some(8) });
        }
    }

    #[test]
    fn put_reports_whether_there_was_such_a_key() {
        for (mut store, created) in
            [(Store::default(), "true"), (store_with(&[], None), "false"), (store_with(&[], Some(NOW)), "true")]
        {
            let response = handle(&mut store, put_with(&[]), |_: &[Event]| Ok(8));
            assert_eq!(header_of(&response, CREATED), Some(created));
        }
    }

    #[test]
    fn a_put_with_an_unfit_content_type_is_refused() {
        let response = handle(&mut Store::default(), put_with(&["text/plain", "text/plain"]), unasked);
        assert_eq!(response, line(400, "content-type was sent twice"));
    }

    #[test]
    fn a_delete_is_appended_only_when_there_is_something() {
        let none = |read_sequence| Response {
            status: 200,
            headers: vec![header(DELETED, "none")],
            body: vec![],
            read_sequence,
        };
        let mut store = store_with(&[], None);
        let response = handle(&mut store, request("DELETE"), |events| {
            assert_eq!(events, [Event::Delete("a".to_owned())]);
            Ok(8)
        });
        let headers = vec![header(DELETED, "\"7\""), header(SEQUENCE, "8")];
        assert_eq!(response, Response { headers, ..none(Some(8)) });
        assert_eq!(handle(&mut store, request("DELETE"), unasked), none(Some(8)));
        assert_eq!(handle(&mut store_with(&[], Some(NOW)), request("DELETE"), unasked), none(Some(7)));
    }

    #[test]
    fn a_write_that_was_not_appended_changes_nothing() {
        for (error, status, text) in [
            (AppendError::InsufficientStorage, 507, "no room is left, on disk or in memory; nothing was stored\n"),
            (AppendError::Unavailable, 503, "the log takes no writes at the moment; nothing was stored\n"),
            (AppendError::ReadOnly, 403, "writes are not allowed here; nothing was stored\n"),
            (AppendError::TooLarge(9), 413, "this is too large for the log; nothing was stored\n"),
        ] {
            for method in ["PUT", "DELETE"] {
                let mut store = store_with(&[], None);
                let response = handle(&mut store, request(method), |_| Err(error));
                assert_eq!((response.status, text_of(&response)), (status, text));
                assert_eq!(store, store_with(&[], None), "{method} {error:?}");
            }
        }
    }

    #[test]
    fn a_time_to_live_ends_in_the_log_and_without_one_there_is_no_end() {
        for (query, expires) in [
            ("ttl=60", Some(NOW + 60_000)),
            ("ttl=5ms", Some(NOW + 5)),
            ("ttl=3153600000s", Some(NOW + 3_153_600_000_000)),
            ("", None),
        ] {
            let request = Request { body: b"value".into(), ..request_with("PUT", query, &[]) };
            let mut store = store_with(&[], Some(NOW + 5));
            let expected = [Event::Put(Put {
                key: "a".to_owned(),
                value: b"value".into(),
                metadata: vec![],
                expires_at_ms: expires,
            })];
            let response = handle(&mut store, request, |events| {
                assert_eq!(events, expected);
                Ok(8)
            });
            assert_eq!(response.status, 201);
            assert_eq!(
                header_of(&handle(&mut store, self::request("GET"), unasked), "expires").is_some(),
                expires.is_some()
            );
        }
    }
}
