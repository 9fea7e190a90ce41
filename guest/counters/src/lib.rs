//! The default store, with counters: `PATCH /v1/{key}` with `+1` or `-5` adds to a value that is a decimal number, and
//! answers with the sum.
//!
//! A counter is an ordinary value, its number written out, and what is appended is an ordinary put. So any other guest
//! can take over at any time, and reads the numbers as they are.

use std::{slice, str};

use kvs_guest::answer::{Host, etag, header, line, not_stored};
use kvs_guest::exports::kvs::store::lifecycle::Description;
use kvs_guest::exports::kvs::store::{handler, lifecycle, sharding};
use kvs_guest::item::Item;
use kvs_guest::kvs::store::http::{Request, Response};
use kvs_guest::kvs::store::transaction_log::{Event, Put};
use kvs_guest::store::Store;
use kvs_guest::{Imports, content_type, grant, key, rest};

type Default = kvs_guest::Component;

/// What the host instantiates.
pub struct Component;

impl handler::Guest for Component {
    fn handle(request: Request) -> Response {
        kvs_guest::STORE.with_borrow_mut(|store| answer(store, request, &mut Imports))
    }
}

/// PATCH on a key, and everything else as ever.
pub fn answer(store: &mut Store, request: Request, host: &mut impl Host) -> Response {
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    match key::in_path(path) {
        Ok(_) if request.method == "PATCH" && !query.is_empty() => line(400, "PATCH takes no query parameters"),
        Ok(key) if request.method == "PATCH" => add(store, &key, &request, host),
        Ok(_) => {
            let mut response = rest::respond(store, request, host);
            let allow = response.headers.iter_mut().find(|header| header.name == "allow");
            allow.into_iter().for_each(|allow| allow.value.extend(b", PATCH"));
            response
        }
        Err(_) => rest::respond(store, request, host),
    }
}

fn add(store: &mut Store, key: &str, request: &Request, host: &mut impl Host) -> Response {
    if let Err(reason) = grant::check(&request.grant, key) {
        return line(403, &reason);
    }
    let Some(change) = change(&request.body) else {
        return line(422, "the body is no number with a sign: +1, -5");
    };
    let (number, metadata, expires) = match store.get(key, request.time_ms) {
        Ok(item) => (number(item.value()), metadata(item), item.expires()),
        Err(_) => (Some(0), vec![(content_type::NAME.to_owned(), "text/plain".to_owned())], None),
    };
    let Some(number) = number else { return line(409, "the value is no number, so that nothing can be added") };
    let Some(sum) = number.checked_add(change) else { return line(409, "the sum does not fit in 64 bits") };

    let value = sum.to_string().into_bytes();
    let body = value.clone();
    let event = Event::Put(Put { key: key.to_owned(), value, metadata, expires_at_ms: expires });
    // Appended first, then changed.
    let sequence = match host.append(slice::from_ref(&event)) {
        Ok(sequence) => sequence,
        Err(error) => return not_stored(error),
    };
    store.apply(sequence, &event);
    let headers = vec![header(content_type::NAME, "text/plain"), etag(sequence)];
    Response { status: 200, headers, body, read_sequence: Some(sequence) }
}

/// What to add: a number with its sign, so that nobody who means to set a value adds to it.
fn change(body: &[u8]) -> Option<i64> {
    let text = str::from_utf8(body).ok()?.trim();
    text.starts_with(['+', '-']).then(|| text.parse().ok())?
}

fn number(value: &[u8]) -> Option<i64> {
    str::from_utf8(value).ok()?.trim().parse().ok()
}

fn metadata(item: &Item) -> Vec<(String, String)> {
    item.metadata().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

impl lifecycle::Guest for Component {
    fn describe() -> Description {
        Description { name: "counters".to_owned(), ..Default::describe() }
    }

    kvs_guest::default_lifecycle!();
}

impl sharding::Guest for Component {
    kvs_guest::default_sharding!();
}

// The names under which a component exports its calls are none that a native linker takes.
#[cfg(target_arch = "wasm32")]
kvs_guest::export!(Component with_types_in kvs_guest);

#[cfg(test)]
mod tests {
    use kvs_guest::kvs::store::http::{Grant, Scope};
    use kvs_guest::kvs::store::transaction_log::AppendError;

    use super::*;

    const EVERYTHING: Grant = Grant { scope: Scope::Admin, key_prefix: None };

    fn request(method: &str, target: &str, body: &str) -> Request {
        let (method, target) = (method.to_owned(), target.to_owned());
        Request {
            method,
            target,
            headers: Vec::new(),
            body: body.into(),
            principal: None,
            grant: EVERYTHING,
            time_ms: 10,
        }
    }

    /// Answers, for which all that is appended has sequence 7.
    fn ask(store: &mut Store, method: &str, body: &str) -> (u16, String) {
        let response = answer(store, request(method, "/v1/n", body), &mut |_: &[Event]| Ok(7));
        (response.status, String::from_utf8(response.body).expect("text"))
    }

    fn said(status: u16, text: &str) -> (u16, String) {
        (status, text.to_owned())
    }

    #[test]
    fn a_counter_begins_at_nothing_and_is_a_value_like_any_other() {
        let mut store = Store::default();
        assert_eq!(ask(&mut store, "PATCH", "+1"), said(200, "1"));
        assert_eq!(ask(&mut store, "PATCH", "-5\n"), said(200, "-4"));
        assert_eq!(ask(&mut store, "GET", ""), said(200, "-4"));
        assert_eq!(ask(&mut store, "PUT", "40"), said(201, ""));
        assert_eq!(ask(&mut store, "PATCH", "+2"), said(200, "42"));
    }

    #[test]
    fn what_is_no_change_is_refused() {
        let mut store = Store::default();
        for body in ["", "1", "+", "+1.5", "one", "+99999999999999999999", "++1"] {
            assert_eq!(
                ask(&mut store, "PATCH", body),
                said(422, "the body is no number with a sign: +1, -5\n"),
                "{body}"
            );
        }
        assert_eq!(store, Store::default());
    }

    #[test]
    fn what_cannot_be_added_to_stays() {
        for (value, why) in [
            ("many", "the value is no number, so that nothing can be added\n"),
            ("9223372036854775807", "the sum does not fit in 64 bits\n"),
        ] {
            let mut store = Store::default();
            ask(&mut store, "PUT", value);
            assert_eq!(ask(&mut store, "PATCH", "+1"), said(409, why));
            assert_eq!(ask(&mut store, "GET", ""), said(200, value));
        }
    }

    #[test]
    fn what_was_not_appended_is_not_added() {
        let mut store = Store::default();
        let refused = answer(&mut store, request("PATCH", "/v1/n", "+1"), &mut |_: &[Event]| {
            Err(AppendError::InsufficientStorage)
        });
        assert_eq!((refused.status, store), (507, Store::default()));
    }

    #[test]
    fn a_change_has_no_parameters() {
        let mut store = Store::default();
        let refused = answer(&mut store, request("PATCH", "/v1/n?ttl=5", "+1"), &mut |_: &[Event]| Ok(7));
        assert_eq!((refused.status, store), (400, Store::default()));
    }

    #[test]
    fn metadata_and_expiry_stay_with_the_value() {
        let mut store = Store::default();
        let metadata = vec![("content-type".to_owned(), "text/csv".to_owned())];
        let put = Put { key: "n".to_owned(), value: b"1".into(), metadata: metadata.clone(), expires_at_ms: Some(20) };
        store.apply(1, &Event::Put(put));
        assert_eq!(ask(&mut store, "PATCH", "+1"), said(200, "2"));
        let item = store.get("n", 10).expect("it is there");
        assert_eq!((super::metadata(item), item.expires()), (metadata, Some(20)));
    }

    #[test]
    fn methods_are_told_with_the_one_that_came_with_it() {
        let response = answer(&mut Store::default(), request("BREW", "/v1/n", ""), &mut |_: &[Event]| Ok(1));
        let allow = response.headers.iter().find(|header| header.name == "allow").expect("it is told");
        assert_eq!((response.status, allow.value.ends_with(b", PATCH")), (405, true));
    }
}
