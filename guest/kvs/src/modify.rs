//! Changes of what is at a key: `POST /v1/{key}?op=add` and `op=touch`.
//!
//! Owns: their meaning. Each is one put of the whole value, so that other guests can take it in. Must never know: how items
//! are kept.

use std::borrow::Cow;

use kvs_kit::state::Logged;

use crate::answer::{NO_SUCH_KEY, header, line, problem};
use crate::content_type;
use crate::item::Item;
use crate::kvs::store::http::{Request, Response};
use crate::kvs::store::transaction_log::{Event, Put};
use crate::number;
use crate::query::{self, BadQuery, Parameter};
use crate::store::Store;
use crate::value::caching;
use crate::write::{expiry, item_to_change, write};

/// The change that a query requests.
enum Change {
    /// With a new expiry, when there is one.
    Add {
        delta: i64,
        expires: Option<u64>,
    },
    Touch {
        expires: u64,
    },
}

/// Whether a query requests a change. POST without one is not allowed.
pub fn is_wanted(query: &str) -> bool {
    query::has(query, "op")
}

pub fn post(store: &mut Logged<'_, Store>, key: Cow<'_, str>, query: &str, request: &Request) -> Response {
    let change = match change(query, request.time_ms) {
        Ok(change) => change,
        Err(bad) => return line(400, &bad),
    };
    if !request.body.is_empty() {
        return line(400, "the body must be empty; `op` has all its arguments in the query");
    }
    let there = match item_to_change(store, &key, request) {
        Ok(there) => there,
        Err(refusal) => return refusal,
    };
    let read_sequence = Some(there.map_or_else(|absence| absence, Item::sequence));
    let item = there.ok();
    let (value, expires, body) = match change {
        Change::Add { delta, expires } => match number::add(item.map(Item::value), delta) {
            Ok(sum) => (sum.clone().into_bytes(), expires.or_else(|| item.and_then(Item::expires)), sum.into_bytes()),
            Err(error) => return Response { read_sequence, ..error.into() },
        },
        Change::Touch { expires } => match item {
            Some(item) => (item.value().to_vec(), Some(expires), Vec::new()),
            None => return Response { read_sequence, ..problem(404, NO_SUCH_KEY, "no such key") },
        },
    };
    let metadata = item.map(Item::owned_metadata).unwrap_or_default();
    let event = Event::Put(Put { key: key.into_owned(), value, metadata, expires_at_ms: expires });
    match write(store, event) {
        Ok((sequence, _)) => {
            let mut headers = Vec::new();
            if !body.is_empty() {
                headers.push(header(content_type::NAME, "text/plain; charset=utf-8"));
            }
            caching(sequence, expires, &mut headers);
            Response { status: 200, headers, body, read_sequence: Some(sequence) }
        }
        Err(error) => error.into(),
    }
}

fn change(query: &str, now: u64) -> Result<Change, String> {
    let [op, delta, ttl] = query::parameters(query, ["op", "delta", "ttl"]).map_err(|bad| bad.to_string())?;
    let op = op.unwrap_or(Parameter { name: "op", value: Cow::Borrowed("") });
    match &*op.value {
        "add" => {
            let delta = delta.ok_or("query parameter `delta` is missing: op=add needs it")?;
            let delta = number(&delta).map_err(|bad| bad.to_string())?;
            Ok(Change::Add { delta, expires: expiry(ttl, now).map_err(|bad| bad.to_string())? })
        }
        "touch" if delta.is_some() => Err("query parameter `delta` does not belong to op=touch".to_owned()),
        "touch" => {
            let expires = expiry(ttl, now).map_err(|bad| bad.to_string())?;
            let expires = expires.ok_or("query parameter `ttl` is missing: op=touch needs it")?;
            Ok(Change::Touch { expires })
        }
        _ => Err(op.unfit("add or touch").to_string()),
    }
}

fn number(delta: &Parameter<'_>) -> Result<i64, BadQuery> {
    number::parse(delta.value.as_bytes()).ok_or_else(|| delta.unfit("a 64-bit signed integer in decimal text"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rest::handle;
    use crate::testing::{NOW, header_of, request, store_with, text_of, unasked};

    fn ask(query: &str, headers: &[(&str, &str)]) -> Request {
        let headers = headers.iter().map(|(name, value)| header(name, *value)).collect();
        Request { target: format!("/v1/a?{query}"), headers, ..request("POST") }
    }

    /// `a`, an HTML page that is a number and expires.
    fn number_there(value: &str) -> Store {
        let metadata = vec![("content-type".to_owned(), "text/html".to_owned())];
        let put = Put { key: "a".to_owned(), value: value.into(), metadata, expires_at_ms: Some(NOW + 5) };
        let mut store = Store::default();
        store.replace(7, &Event::Put(put));
        store
    }

    #[test]
    fn sum_keeps_metadata_and_expiry_unless_it_gets_another() {
        for (query, sum, expires) in [
            ("op=add&delta=-43", "-1", NOW + 5),
            ("ttl=2m&delta=9223372036854775765&op=add", "9223372036854775807", NOW + 120_000),
        ] {
            let mut store = number_there("42");
            let mut appended = None;
            let response = handle(&mut store, ask(query, &[("if-match", "\"7\"")]), |events: &[Event]| {
                appended = Some(events.to_vec());
                Ok(8)
            });
            let metadata = vec![("content-type".to_owned(), "text/html".to_owned())];
            let put = Put { key: "a".to_owned(), value: sum.into(), metadata, expires_at_ms: Some(expires) };
            assert_eq!(appended, Some(vec![Event::Put(put)]));
            assert_eq!((response.status, text_of(&response), response.read_sequence), (200, sum, Some(8)));
            assert_eq!(header_of(&response, "etag"), Some("\"8\""));
            assert!(header_of(&response, "expires").is_some());
        }
    }

    #[test]
    fn missing_key_counts_as_zero() {
        for mut store in [Store::default(), store_with(&[("content-type", "text/html")], Some(NOW))] {
            let response = handle(&mut store, ask("op=add&delta=5", &[("if-none-match", "*")]), |_: &[Event]| Ok(8));
            assert_eq!((response.status, text_of(&response)), (200, "5"));
            assert_eq!(store.get("a", NOW).map(|item| (item.value(), item.expires())), Ok((&b"5"[..], None)));
        }
    }

    #[test]
    fn value_that_cannot_be_added_to_is_409_with_a_code() {
        for (value, query, code) in [
            ("one", "op=add&delta=1", "not_a_number"),
            ("9223372036854775807", "op=add&delta=1", "number_out_of_range"),
        ] {
            let response = handle(&mut number_there(value), ask(query, &[]), unasked);
            assert_eq!((response.status, response.read_sequence), (409, Some(7)), "{value}");
            assert_eq!(header_of(&response, "kvs-error"), Some(code));
        }
    }

    #[test]
    fn touch_puts_the_value_again_with_another_expiry() {
        let mut store = store_with(&[("content-type", "text/html")], Some(NOW + 5));
        let metadata = vec![("content-type".to_owned(), "text/html".to_owned())];
        let put = Put { key: "a".to_owned(), value: b"value".into(), metadata, expires_at_ms: Some(NOW + 60_000) };
        let response = handle(&mut store, ask("op=touch&ttl=60", &[]), |events: &[Event]| {
            assert_eq!(events, [Event::Put(put.clone())]);
            Ok(8)
        });
        assert_eq!((response.status, text_of(&response), header_of(&response, "etag")), (200, "", Some("\"8\"")));
        let response = handle(&mut Store::default(), ask("op=touch&ttl=60", &[]), unasked);
        assert_eq!((response.status, header_of(&response, "kvs-error")), (404, Some("no_such_key")));
    }

    #[test]
    fn malformed_request_is_rejected_by_name() {
        for (query, reason) in [
            ("op", "query parameter `op` must be add or touch\n"),
            ("op=multiply", "query parameter `op` must be add or touch\n"),
            ("op=add&op=add", "query parameter `op` was given twice\n"),
            ("op=add", "query parameter `delta` is missing: op=add needs it\n"),
            ("op=add&delta=+1", "query parameter `delta` must be a 64-bit signed integer in decimal text\n"),
            ("op=add&delta=1.5", "query parameter `delta` must be a 64-bit signed integer in decimal text\n"),
            (
                "op=add&delta=9223372036854775808",
                "query parameter `delta` must be a 64-bit signed integer in decimal text\n",
            ),
            ("op=touch", "query parameter `ttl` is missing: op=touch needs it\n"),
            ("op=touch&ttl=5&delta=1", "query parameter `delta` does not belong to op=touch\n"),
            (
                "op=touch&ttl=0",
                "query parameter `ttl` must be a duration like 60, 60s, 500ms, 5m, 1h or 30d, from 1ms to 3153600000s\n",
            ),
            ("op=touch&limit=1", "unknown query parameter `limit`\n"),
        ] {
            let response = handle(&mut number_there("1"), ask(query, &[]), unasked);
            assert_eq!((response.status, text_of(&response)), (400, reason), "{query}");
        }
        let request = Request { body: b"5".into(), ..ask("op=add&delta=1", &[]) };
        assert_eq!(handle(&mut number_there("1"), request, unasked).status, 400);
        for (header, status) in [(("if-match", "\"6\""), 412), (("if-none-match", "*"), 412), (("if-match", "6"), 400)]
        {
            assert_eq!(handle(&mut number_there("1"), ask("op=add&delta=1", &[header]), unasked).status, status);
        }
    }
}
