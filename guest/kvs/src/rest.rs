//! The REST interface, version 1: which path and method is what.
//!
//! Owns: paths, methods, and the request headers that are read. What is asked of one key is in `value`.
//! Must never know: how items are kept, where sequences come from, or how bytes travel.

use crate::answer::{header, line, with};
use crate::conditions::{IF_MATCH, IF_NONE_MATCH};
use crate::content_type;
use crate::exports::kvs::store::sharding::Placement;
use crate::key::{self, NoKey};
use crate::kvs::store::http::{Request, Response};
use crate::kvs::store::transaction_log::{AppendError, Event};
use crate::range::{IF_RANGE, RANGE};
use crate::store::Store;
use crate::value;

/// The request headers that are read.
pub const HEADERS: [&str; 5] = [content_type::NAME, IF_MATCH, IF_NONE_MATCH, RANGE, IF_RANGE];

/// Answers a request. Changes the store only when `append` has taken the change.
pub fn handle(
    store: &mut Store,
    mut request: Request,
    append: impl FnOnce(&[Event]) -> Result<u64, AppendError>,
) -> Response {
    let target = std::mem::take(&mut request.target);
    let (path, query) = split(&target);
    let key = match key::in_path(path) {
        Ok(key) => key,
        Err(no_key @ (NoKey::UnknownPath | NoKey::RawSlash)) => return line(404, &no_key.to_string()),
        Err(no_key) => return line(400, &no_key.to_string()),
    };
    match request.method.as_str() {
        "GET" | "HEAD" => value::get(store, &key, query, &request),
        "PUT" => value::put(store, key, query, request, append),
        "DELETE" => value::delete(store, key, query, &request, append),
        _ => with(line(405, "a key has GET, HEAD, PUT and DELETE"), header("allow", "GET, HEAD, PUT, DELETE")),
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

/// Path and query.
fn split(target: &str) -> (&str, &str) {
    target.split_once('?').unwrap_or((target, ""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::NO_STATE;
    use crate::kvs::store::transaction_log::Put;

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

    /// `/v1/a` with this metadata and expiry, put by some guest at sequence 7.
    fn store_with(metadata: &[(&str, &str)], expires: Option<u64>) -> Store {
        let metadata = metadata.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let mut store = Store::default();
        store.apply(7, &Event::Put(Put { key: "a".to_owned(), value: b"value".into(), metadata, expires }));
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
    fn a_target_is_placed_by_its_key_alone() {
        for target in ["/v1/%61", "/v1/key/a?x"] {
            assert!(matches!(place(target), Placement::Key(key) if key == "a"), "{target}");
        }
        for target in ["/", "/v1/", "/v1/a/b", "/v1/%00"] {
            assert!(matches!(place(target), Placement::Anywhere), "{target}");
        }
    }
}
