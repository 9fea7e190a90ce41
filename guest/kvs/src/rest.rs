//! The REST interface, version 1: what a request means, and what is answered.
//!
//! Owns: methods, headers, status codes and the words of every answer, and what each answer rests on.
//! Must never know: how items are kept, where sequences come from, or how bytes travel.

use std::borrow::Cow;

use crate::content_type;
use crate::exports::kvs::store::sharding::Placement;
use crate::key::{self, NoKey};
use crate::kvs::store::http::{Header, Request, Response};
use crate::kvs::store::transaction_log::{AppendError, Event, Put};
use crate::store::Store;

/// The request headers that are read.
pub const HEADERS: [&str; 1] = [content_type::NAME];

/// Characters of an unknown query parameter that are worth repeating.
const ECHOED_CHARACTERS: usize = 64;

/// What an answer rests on that would be the same in any state.
const NO_STATE: Option<u64> = Some(0);

/// Answers a request. Changes the store only when `append` has taken the change.
pub fn handle(
    store: &mut Store,
    request: Request,
    append: impl FnOnce(&[Event]) -> Result<u64, AppendError>,
) -> Response {
    let Request { method, target, headers, body, time, .. } = request;
    let (path, query) = split(&target);
    let key = match key::in_path(path) {
        Ok(key) => key,
        Err(no_key @ (NoKey::UnknownPath | NoKey::RawSlash)) => return line(404, &no_key.to_string()),
        Err(no_key) => return line(400, &no_key.to_string()),
    };
    if !matches!(method.as_str(), "GET" | "HEAD" | "PUT" | "DELETE") {
        let mut response = line(405, "a key has GET, HEAD, PUT and DELETE");
        response.headers.push(header("allow", "GET, HEAD, PUT, DELETE"));
        return response;
    }
    if let Some(parameter) = query.split('&').find(|parameter| !parameter.is_empty()) {
        return line(400, &unknown_parameter(parameter));
    }
    match method.as_str() {
        "PUT" => put(store, key, headers, body, append),
        "DELETE" => delete(store, key, time, append),
        _ => get(store, &key, time),
    }
}

/// Where the host finds the key of a target. What names no key is refused alike everywhere.
pub fn place(target: &str) -> Placement {
    let (path, _) = split(target);
    key::in_path(path).map_or(Placement::Anywhere, |key| Placement::Key(key.into_owned()))
}

/// One response of many. No target is placed `everywhere`, so there is never more than one to choose from.
pub fn merge(responses: Vec<Response>) -> Response {
    responses.into_iter().next().unwrap_or_else(|| line(500, "no instance answered"))
}

/// GET, and HEAD: the host drops the body.
fn get(store: &Store, key: &str, now: u64) -> Response {
    let item = match store.get(key, now) {
        Ok(item) => item,
        Err(rests_on) => return Response { depends_on: Some(rests_on), ..line(404, "no such key") },
    };
    Response {
        status: 200,
        headers: vec![
            header(content_type::NAME, content_type::kept(&item.metadata)),
            etag(item.sequence),
            // A value may be anything, and whoever put it must not script whoever reads it.
            header("x-content-type-options", "nosniff"),
            header("content-security-policy", "sandbox"),
        ],
        body: item.value.clone(),
        depends_on: Some(item.sequence),
    }
}

fn put(
    store: &mut Store,
    key: Cow<'_, str>,
    headers: Vec<Header>,
    value: Vec<u8>,
    append: impl FnOnce(&[Event]) -> Result<u64, AppendError>,
) -> Response {
    let metadata = match content_type::sent(headers) {
        Ok(content_type) => content_type.map(|value| (content_type::NAME.to_owned(), value)).into_iter().collect(),
        Err(unfit) => return line(400, &unfit.to_string()),
    };
    let event = Event::Put(Put { key: key.into_owned(), value, metadata, expires: None });
    match write(store, event, append) {
        Ok(sequence) => {
            Response { status: 201, headers: vec![etag(sequence)], body: Vec::new(), depends_on: Some(sequence) }
        }
        Err(error) => not_stored(error),
    }
}

/// 200 also when there is nothing to delete, so that a client can try again without asking what became of the first try.
fn delete(
    store: &mut Store,
    key: Cow<'_, str>,
    now: u64,
    append: impl FnOnce(&[Event]) -> Result<u64, AppendError>,
) -> Response {
    let rests_on = match store.get(&key, now) {
        Ok(_) => match write(store, Event::Delete(key.into_owned()), append) {
            Ok(sequence) => sequence,
            Err(error) => return not_stored(error),
        },
        Err(rests_on) => rests_on,
    };
    Response { status: 200, headers: Vec::new(), body: Vec::new(), depends_on: Some(rests_on) }
}

/// Appends first, then changes.
fn write(
    store: &mut Store,
    event: Event,
    append: impl FnOnce(&[Event]) -> Result<u64, AppendError>,
) -> Result<u64, AppendError> {
    let events = [event];
    let sequence = append(&events)?;
    let [event] = events;
    store.apply(sequence, event);
    Ok(sequence)
}

fn not_stored(error: AppendError) -> Response {
    match error {
        AppendError::Full => line(507, "no room is left, on disk or in memory; nothing was stored"),
        AppendError::Unavailable => {
            let mut response = line(503, "the log takes no writes at the moment; nothing was stored");
            response.headers.push(header("retry-after", "1"));
            response
        }
        AppendError::ReadOnly => line(403, "writes are not allowed here; nothing was stored"),
        AppendError::TooLarge(_) => line(413, "the key and its value are too large for the log; nothing was stored"),
    }
}

fn unknown_parameter(parameter: &str) -> String {
    let name = parameter.split('=').next().unwrap_or_default();
    let name: String = name.chars().filter(|character| !character.is_control()).take(ECHOED_CHARACTERS).collect();
    format!("unknown query parameter `{name}`")
}

/// Path and query.
fn split(target: &str) -> (&str, &str) {
    target.split_once('?').unwrap_or((target, ""))
}

/// A response of one line of text.
fn line(status: u16, text: &str) -> Response {
    Response {
        status,
        headers: vec![
            header(content_type::NAME, "text/plain; charset=utf-8"),
            header("x-content-type-options", "nosniff"),
        ],
        body: format!("{text}\n").into_bytes(),
        depends_on: NO_STATE,
    }
}

fn etag(sequence: u64) -> Header {
    header("etag", format!("\"{sequence}\""))
}

fn header(name: &str, value: impl Into<Vec<u8>>) -> Header {
    Header { name: name.to_owned(), value: value.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTENT_TYPE: &str = content_type::NAME;
    const NOW: u64 = 1_000;

    /// A request without headers, to `/v1/a` unless said otherwise.
    fn request(method: &str) -> Request {
        Request {
            method: method.to_owned(),
            target: "/v1/a".to_owned(),
            headers: Vec::new(),
            body: Vec::new(),
            principal: None,
            time: NOW,
        }
    }

    fn put_with(content_types: &[&str]) -> Request {
        let headers = content_types.iter().map(|value| header(CONTENT_TYPE, *value)).collect();
        Request { headers, body: b"value".into(), ..request("PUT") }
    }

    /// `/v1/a` with this metadata and expiry, put by some guest at sequence 7.
    fn store_with(metadata: &[(&str, &str)], expires: Option<u64>) -> Store {
        let metadata = metadata.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let mut store = Store::default();
        store.apply(7, Event::Put(Put { key: "a".to_owned(), value: b"value".into(), metadata, expires }));
        store
    }

    fn unasked(_: &[Event]) -> Result<u64, AppendError> {
        panic!("appended")
    }

    fn header_of<'r>(response: &'r Response, name: &str) -> Option<&'r str> {
        let header = response.headers.iter().find(|header| header.name == name)?;
        Some(str::from_utf8(&header.value).expect("text"))
    }

    fn text_of(response: &Response) -> &str {
        str::from_utf8(&response.body).expect("text")
    }

    #[test]
    fn a_value_comes_with_all_its_headers_to_get_and_to_head() {
        let mut store = store_with(&[("x", "y"), (CONTENT_TYPE, "text/html")], None);
        for method in ["GET", "HEAD"] {
            let expected = Response {
                status: 200,
                headers: vec![
                    header("content-type", "text/html"),
                    header("etag", "\"7\""),
                    header("x-content-type-options", "nosniff"),
                    header("content-security-policy", "sandbox"),
                ],
                body: b"value".into(),
                depends_on: Some(7),
            };
            assert_eq!(handle(&mut store, request(method), unasked), expected, "{method}");
        }
    }

    #[test]
    fn a_put_is_appended_with_its_content_type_and_answered_with_its_sequence() {
        let kept = vec![(CONTENT_TYPE.to_owned(), "text/plain".to_owned())];
        for (content_types, metadata) in [(&["text/plain"][..], kept), (&[], vec![])] {
            let expected = [Event::Put(Put { key: "a".to_owned(), value: b"value".into(), metadata, expires: None })];
            let response = handle(&mut store_with(&[], None), put_with(content_types), |events| {
                assert_eq!(events, expected);
                Ok(8)
            });
            let created =
                Response { status: 201, headers: vec![header("etag", "\"8\"")], body: vec![], depends_on: Some(8) };
            assert_eq!(response, created);
        }
    }

    #[test]
    fn a_put_with_an_unfit_content_type_is_refused() {
        let response = handle(&mut Store::default(), put_with(&["text/plain", "text/plain"]), unasked);
        assert_eq!(response, line(400, "content-type was sent twice"));
    }

    #[test]
    fn a_delete_is_appended_only_when_there_is_something() {
        let empty = |depends_on| Response { status: 200, headers: vec![], body: vec![], depends_on };
        let mut store = store_with(&[], None);
        let response = handle(&mut store, request("DELETE"), |events| {
            assert_eq!(events, [Event::Delete("a".to_owned())]);
            Ok(8)
        });
        assert_eq!(response, empty(Some(8)));
        assert_eq!(handle(&mut store, request("DELETE"), unasked), empty(Some(8)));
        assert_eq!(handle(&mut store_with(&[], Some(NOW)), request("DELETE"), unasked), empty(Some(7)));
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        for (mut store, rests_on) in [(Store::default(), 0), (store_with(&[], Some(NOW)), 7)] {
            let response = handle(&mut store, request("GET"), unasked);
            assert_eq!(response, Response { depends_on: Some(rests_on), ..line(404, "no such key") });
            assert_eq!(text_of(&response), "no such key\n");
            assert_eq!(header_of(&response, CONTENT_TYPE), Some("text/plain; charset=utf-8"));
            assert_eq!(header_of(&response, "x-content-type-options"), Some("nosniff"));
        }
    }

    #[test]
    fn what_cannot_be_served_in_any_state_is_refused_with_a_reason() {
        let long_name = format!("/v1/a?{}", "ä".repeat(65));
        let cut_name = format!("unknown query parameter `{}`\n", "ä".repeat(64));
        for (method, target, status, text) in [
            ("GET", "/v1", 404, "unknown path; keys live at /v1/{key}, or at /v1/key/{key} when they hold a slash\n"),
            ("GET", "/v1?a", 404, "unknown path; keys live at /v1/{key}, or at /v1/key/{key} when they hold a slash\n"),
            (
                "POST",
                "/v1/a/b",
                404,
                "unknown path; a key that holds a slash lives at /v1/key/{key}, or is written with %2F\n",
            ),
            ("PUT", "/v1/?a", 400, "key is empty\n"),
            ("PUT", "/v1/%zz", 400, "bad percent escape at byte 1 of the key\n"),
            ("POST", "/v1/a", 405, "a key has GET, HEAD, PUT and DELETE\n"),
            ("get", "/v1/a", 405, "a key has GET, HEAD, PUT and DELETE\n"),
            ("GET", "/v1/a?ttl=5", 400, "unknown query parameter `ttl`\n"),
            ("PUT", "/v1/a?&a\r\nb&c", 400, "unknown query parameter `ab`\n"),
            ("DELETE", "/v1/a?=5", 400, "unknown query parameter ``\n"),
            ("HEAD", &long_name, 400, &cut_name),
        ] {
            let request = Request { target: target.to_owned(), ..request(method) };
            let response = handle(&mut store_with(&[], None), request, unasked);
            assert_eq!((response.status, text_of(&response)), (status, text), "{method} {target}");
            assert_eq!(response.depends_on, NO_STATE, "{method} {target}");
            let allow = (status == 405).then_some("GET, HEAD, PUT, DELETE");
            assert_eq!(header_of(&response, "allow"), allow, "{method} {target}");
        }
    }

    #[test]
    fn an_empty_query_asks_for_nothing() {
        for target in ["/v1/a?", "/v1/a?&"] {
            let request = Request { target: target.to_owned(), ..request("GET") };
            assert_eq!(handle(&mut store_with(&[], None), request, unasked).status, 200, "{target}");
        }
    }

    #[test]
    fn a_write_that_was_not_appended_changes_nothing() {
        for (error, status, text, retry_after) in [
            (AppendError::Full, 507, "no room is left, on disk or in memory; nothing was stored\n", None),
            (AppendError::Unavailable, 503, "the log takes no writes at the moment; nothing was stored\n", Some("1")),
            (AppendError::ReadOnly, 403, "writes are not allowed here; nothing was stored\n", None),
            (
                AppendError::TooLarge(9),
                413,
                "the key and its value are too large for the log; nothing was stored\n",
                None,
            ),
        ] {
            for method in ["PUT", "DELETE"] {
                let mut store = store_with(&[], None);
                let response = handle(&mut store, request(method), |_| Err(error));
                assert_eq!((response.status, text_of(&response)), (status, text));
                assert_eq!(header_of(&response, "retry-after"), retry_after);
                assert_eq!(store, store_with(&[], None), "{method} {error:?}");
            }
        }
    }

    #[test]
    fn a_target_is_placed_by_its_key_alone() {
        for target in ["/v1/%61", "/v1/key/a?x"] {
            assert!(matches!(place(target), Placement::Key(key) if key == "a"), "{target}");
        }
        for target in ["/", "/v1/", "/v1/a/b", "/v1/%00"] {
            assert!(matches!(place(target), Placement::Anywhere), "{target}");
        }
    }
}
