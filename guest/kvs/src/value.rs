//! Reads of one key: GET and HEAD.
//!
//! Owns: their meaning, and what their responses depend on. Must never know: how items are kept, or how they change.

use std::time::{Duration, UNIX_EPOCH};

use kvs_kit::state::Logged;

use crate::answer::{NO_SUCH_KEY, etag, header, line, problem, with};
use crate::conditions::{Conditions, Unmet};
use crate::content_type;
use crate::item::Item;
use crate::kvs::store::http::{Header, Request, Response};
use crate::query::{self, BadQuery};
use crate::range::Part;
use crate::store::Store;
use crate::write::not_met;

/// That a value comes with: what it is, what caches need, what clients may do with it, and which part it is.
const MOST_HEADERS: usize = 8;

/// The longest time to wait for a change, in milliseconds.
const MAX_WAIT: u64 = 300_000;

/// The last second of the year 9999, which is the last that HTTP can write.
const LAST_DATE: Duration = Duration::from_secs(253_402_300_799);

/// GET, and HEAD: the host drops the body. With `wait` the client learns when something else is there than it has: the
/// values of `If-None-Match`, or none.
pub fn get(store: &Logged<'_, Store>, key: &str, query: &str, request: &Request) -> Response {
    let wait = match wait(query) {
        Ok(wait) => wait,
        Err(bad) => return line(400, &bad.to_string()),
    };
    let conditions = match Conditions::sent(&request.headers) {
        Ok(conditions) => conditions,
        Err(malformed) => return line(400, &malformed.to_string()),
    };
    let there = store.get(key, request.time_ms);
    // Whatever the answer is, it is the same until the key changes or expires; not when the client waits for that.
    store.reuse(key, there.ok().and_then(Item::expires));
    let wait_for_change = || wait.into_iter().for_each(|timeout_ms| store.wait_for_change(key, timeout_ms));
    let item = match there {
        Ok(item) => item,
        // Conditions are for what would succeed without them.
        Err(read_sequence) => {
            if !conditions.name_values() {
                wait_for_change();
            }
            return Response { read_sequence: Some(read_sequence), ..problem(404, NO_SUCH_KEY, "no such key") };
        }
    };
    match conditions.check(Some(item.sequence())) {
        Ok(()) => {}
        Err(Unmet::IfNoneMatch) => {
            wait_for_change();
            let mut headers = Vec::new();
            caching(item.sequence(), item.expires(), &mut headers);
            return of(item, 304, headers, Vec::new());
        }
        Err(unmet) => return not_met(unmet, Ok(item)),
    }
    let mut headers = Vec::with_capacity(MOST_HEADERS);
    headers.push(header(content_type::NAME, content_type::kept(item)));
    caching(item.sequence(), item.expires(), &mut headers);
    headers.extend([
        header("accept-ranges", "bytes"),
        // A value may be anything, and must not run as a script in the browser of its reader.
        header("content-security-policy", "sandbox"),
    ]);
    let (value, length) = (item.value(), item.value().len());
    let part =
        if request.method == "GET" { Part::sent(&request.headers, item.sequence(), length) } else { Part::Whole };
    match part {
        Part::Whole => of(item, 200, headers, value.into()),
        Part::Bytes(range) => {
            headers.push(header("content-range", format!("bytes {}-{}/{length}", range.start, range.end - 1)));
            of(item, 206, headers, value[range].into())
        }
        Part::Unsatisfiable => {
            let refusal = line(416, &format!("the value has {length} bytes, and the range begins after them"));
            let refusal = with(refusal, header("content-range", format!("bytes */{length}")));
            Response { read_sequence: Some(item.sequence()), ..refusal }
        }
    }
}

/// How long the client waits for something else than it has, in milliseconds.
fn wait(query: &str) -> Result<Option<u64>, BadQuery> {
    let [wait] = query::parameters(query, ["wait"])?;
    wait.map(|wait| wait.duration(1..=MAX_WAIT)).transpose()
}

/// A response that depends on an item.
fn of(item: &Item, status: u16, headers: Vec<Header>, body: Vec<u8>) -> Response {
    Response { status, headers, body, read_sequence: Some(item.sequence()) }
}

/// What a cache needs to know.
pub fn caching(sequence: u64, expires: Option<u64>, headers: &mut Vec<Header>) {
    headers.push(etag(sequence));
    if let Some(expires) = expires {
        // In whole seconds, and not later than it is gone.
        let date = Duration::from_secs(expires / 1_000).min(LAST_DATE);
        headers.push(header("expires", httpdate::fmt_http_date(UNIX_EPOCH + date)));
        // It can be overwritten before, so a cache is to ask whether it still has the value.
        headers.push(header("cache-control", "no-cache"));
    }
}

#[cfg(test)]
mod tests {
    use kvs_kit::host::Host;

    use super::*;
    use crate::conditions::{IF_MATCH, IF_NONE_MATCH};
    use crate::kvs::store::transaction_log::{AppendError, Event};
    use crate::kvs::store::watch::Selector;
    use crate::rest::{handle, respond};
    use crate::testing::{NOW, header_of, request, store_with, text_of, unasked};

    const CONTENT_TYPE: &str = content_type::NAME;

    fn request_with(method: &str, query: &str, headers: &[(&str, &str)]) -> Request {
        let headers = headers.iter().map(|(name, value)| header(name, *value)).collect();
        Request { target: format!("/v1/a?{query}"), headers, ..request(method) }
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
                    header("accept-ranges", "bytes"),
                    header("content-security-policy", "sandbox"),
                ],
                body: b"value".into(),
                read_sequence: Some(7),
            };
            assert_eq!(handle(&mut store, request(method), unasked), expected, "{method}");
        }
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        for (mut store, read_sequence) in [(Store::default(), 0), (store_with(&[], Some(NOW)), 7)] {
            let response = handle(&mut store, request("GET"), unasked);
            assert_eq!(
                response,
                Response { read_sequence: Some(read_sequence), ..problem(404, NO_SUCH_KEY, "no such key") }
            );
            assert_eq!(text_of(&response), "no such key\n");
            assert_eq!(header_of(&response, CONTENT_TYPE), Some("text/plain; charset=utf-8"));
        }
    }

    #[test]
    fn what_a_client_has_is_not_sent_again() {
        for method in ["GET", "HEAD"] {
            let request = request_with(method, "", &[(IF_NONE_MATCH, "W/\"7\"")]);
            let response = handle(&mut store_with(&[], Some(61_999)), request, unasked);
            let headers = vec![
                header("etag", "\"7\""),
                header("expires", "Thu, 01 Jan 1970 00:01:01 GMT"),
                header("cache-control", "no-cache"),
            ];
            assert_eq!(response, Response { status: 304, headers, body: vec![], read_sequence: Some(7) });
        }
    }

    #[test]
    fn response_about_one_key_is_reusable_until_it_expires() {
        /// Remembers what was declared.
        #[derive(Default)]
        struct Reusing(Vec<(String, Option<u64>)>);

        impl Host for Reusing {
            fn append(&mut self, _events: &[Event]) -> Result<u64, AppendError> {
                Ok(8)
            }
            fn subscribe(&mut self, _selectors: &[Selector], _after: Option<&str>, _puts_only: bool) {}
            fn wait_for_change(&mut self, _key: &str, _timeout_ms: u64) {}
            fn reuse(&mut self, key: &str, until_ms: Option<u64>) {
                self.0.push((key.to_owned(), until_ms));
            }
        }

        let declared = |mut store: Store, request: Request| {
            let mut host = Reusing::default();
            respond(&mut Logged::new(&mut store, &mut host), request);
            host.0
        };
        let until = |until| vec![("a".to_owned(), until)];
        for method in ["GET", "HEAD"] {
            assert_eq!(declared(store_with(&[], None), request(method)), until(None), "{method}");
            assert_eq!(declared(store_with(&[], Some(NOW + 1)), request(method)), until(Some(NOW + 1)), "{method}");
            // Gone, and so until the key is put again.
            assert_eq!(declared(store_with(&[], Some(NOW)), request(method)), until(None), "{method}");
            assert_eq!(declared(Store::default(), request(method)), until(None), "{method}");
            let condition = request_with(method, "", &[(IF_NONE_MATCH, "\"7\"")]);
            assert_eq!(declared(store_with(&[], None), condition), until(None), "{method}");
        }
        for method in ["PUT", "DELETE", "POST"] {
            assert_eq!(declared(store_with(&[], None), request(method)), [], "{method}");
        }
        let list = Request { target: "/v1".to_owned(), ..request("GET") };
        assert_eq!(declared(store_with(&[], None), list), []);
    }

    #[test]
    fn who_waits_is_held_as_long_as_there_is_what_it_has() {
        /// Remembers what was held.
        #[derive(Default)]
        struct Holding(Option<(String, u64)>);

        impl Host for Holding {
            fn append(&mut self, _events: &[Event]) -> Result<u64, AppendError> {
                panic!("appended")
            }
            fn subscribe(&mut self, _selectors: &[Selector], _after: Option<&str>, _puts_only: bool) {
                panic!("subscribed")
            }
            fn wait_for_change(&mut self, key: &str, timeout_ms: u64) {
                self.0 = Some((key.to_owned(), timeout_ms));
            }
            fn reuse(&mut self, _key: &str, _until_ms: Option<u64>) {}
        }

        for (there, condition, status, held) in [
            (true, Some((IF_NONE_MATCH, "\"7\"")), 304, true),
            (true, Some((IF_NONE_MATCH, "*")), 304, true),
            (true, Some((IF_NONE_MATCH, "\"6\"")), 200, false),
            (true, Some((IF_MATCH, "\"6\"")), 412, false),
            (true, None, 200, false),
            (false, Some((IF_NONE_MATCH, "\"7\"")), 404, false),
            (false, Some((IF_MATCH, "*")), 404, true),
            (false, None, 404, true),
        ] {
            for method in ["GET", "HEAD"] {
                let mut store = if there { store_with(&[], None) } else { Store::default() };
                let (mut host, asked) = (Holding::default(), request_with(method, "wait=10s", condition.as_slice()));
                let response = respond(&mut Logged::new(&mut store, &mut host), asked);
                let expected = held.then(|| ("a".to_owned(), 10_000));
                assert_eq!((response.status, host.0), (status, expected), "{method} {there} {condition:?}");
            }
        }
    }

    #[test]
    fn unmet_condition_is_412_with_entity_tag() {
        for (method, name, value) in [
            ("GET", IF_MATCH, "\"6\""),
            ("PUT", IF_MATCH, "\"6\""),
            ("PUT", IF_NONE_MATCH, "*"),
            ("DELETE", IF_MATCH, "W/\"7\""),
        ] {
            let response = handle(&mut store_with(&[], None), request_with(method, "", &[(name, value)]), unasked);
            assert_eq!((response.status, response.read_sequence), (412, Some(7)), "{method} {name}");
            assert_eq!(text_of(&response), format!("{name} does not hold: the key has the etag \"7\"\n"));
            assert_eq!(header_of(&response, "etag"), Some("\"7\""));
        }
        for method in ["PUT", "DELETE"] {
            let request = request_with(method, "", &[(IF_MATCH, "*")]);
            let response = handle(&mut store_with(&[], Some(NOW)), request, unasked);
            assert_eq!((response.status, response.read_sequence), (412, Some(7)), "{method}");
            assert_eq!(text_of(&response), "if-match does not hold: there is no such key\n");
        }
    }

    #[test]
    fn a_condition_on_what_is_not_there_to_read_is_not_asked() {
        let request = request_with("GET", "", &[(IF_MATCH, "*")]);
        assert_eq!(handle(&mut Store::default(), request, unasked).status, 404);
    }

    #[test]
    fn what_is_malformed_is_refused_before_anything_is_looked_up() {
        for method in ["GET", "HEAD", "PUT", "DELETE"] {
            for name in [IF_MATCH, IF_NONE_MATCH] {
                let response = handle(&mut Store::default(), request_with(method, "", &[(name, "7")]), unasked);
                assert_eq!(response.status, 400);
                assert!(text_of(&response).starts_with(&format!("{name} is malformed")), "{}", text_of(&response));
            }
        }
        for (method, query, reason) in [
            (
                "PUT",
                "ttl=0",
                "query parameter `ttl` must be a duration like 60, 60s, 500ms, 5m, 1h or 30d, from 1ms to 3153600000s\n",
            ),
            ("PUT", "ttl=1&ttl=1", "query parameter `ttl` was given twice\n"),
            ("PUT", "tll=1", "unknown query parameter `tll`\n"),
            (
                "GET",
                "wait=10x",
                "query parameter `wait` must be a duration like 60, 60s, 500ms, 5m, 1h or 30d, from 1ms to 300s\n",
            ),
            (
                "HEAD",
                "wait=301",
                "query parameter `wait` must be a duration like 60, 60s, 500ms, 5m, 1h or 30d, from 1ms to 300s\n",
            ),
            ("PUT", "wait=10s", "unknown query parameter `wait`\n"),
            ("DELETE", "ttl=1", "unknown query parameter `ttl`\n"),
            ("HEAD", "ttl=1", "unknown query parameter `ttl`\n"),
        ] {
            let response = handle(&mut Store::default(), request_with(method, query, &[]), unasked);
            assert_eq!((response.status, text_of(&response)), (400, reason), "{method} {query}");
        }
    }

    #[test]
    fn a_part_of_a_value_comes_with_its_place() {
        for (range, status, body, place) in [
            ("bytes=1-3", 206, "alu", Some("bytes 1-3/5")),
            ("bytes=-2", 206, "ue", Some("bytes 3-4/5")),
            ("bytes=5-", 416, "the value has 5 bytes, and the range begins after them\n", Some("bytes */5")),
            ("bytes=3-1", 200, "value", None),
        ] {
            let response = handle(&mut store_with(&[], None), request_with("GET", "", &[("range", range)]), unasked);
            assert_eq!(
                (response.status, text_of(&response), response.read_sequence),
                (status, body, Some(7)),
                "{range}"
            );
            assert_eq!(header_of(&response, "content-range"), place, "{range}");
            let response = handle(&mut store_with(&[], None), request_with("HEAD", "", &[("range", range)]), unasked);
            assert_eq!((response.status, text_of(&response)), (200, "value"), "HEAD {range}");
        }
    }

    #[test]
    fn an_expiry_that_no_date_can_write_is_answered_with_the_last_date() {
        let response = handle(&mut store_with(&[], Some(u64::MAX)), request("GET"), unasked);
        assert_eq!(header_of(&response, "expires"), Some("Fri, 31 Dec 9999 23:59:59 GMT"));
    }
}
