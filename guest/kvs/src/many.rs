//! `GET /v1?key=…&key=…` and `QUERY /v1`: values of several keys, each as of its own moment.
//!
//! Owns: which keys, and how much they may hold together. With several instances each responds for all keys, and has none
//! of those that it does not own. Must never know: how items are kept, or who owns a key.

use serde::{Deserialize, Serialize};

use crate::answer::{json, line, problem};
use crate::grant;
use crate::key;
use crate::kvs::store::http::{Request, Response};
use crate::list::{Entry, disagreement, parsed};
use crate::query;
use crate::store::Store;

/// Keys of a request, at most.
const MAX_KEYS: usize = 1_000;
/// Bytes of a body, at most.
const MAX_BYTES: usize = 1 << 20;
/// Bytes of all values, at most.
const MAX_VALUE_BYTES: usize = 1 << 20;

/// The values, in the order of the request.
#[derive(Serialize, Deserialize)]
struct Values {
    keys: Vec<Entry>,
}

/// Reason why a request is rejected: the status, and one line.
type Rejected = (u16, String);

/// Whether a query names keys.
pub fn is_wanted(query: &str) -> bool {
    query::has(query, "key")
}

/// GET with keys in the query, and QUERY with a list of keys in the body.
pub fn get(store: &Store, query: &str, request: &Request) -> Response {
    match granted_keys(query, request) {
        Ok(keys) => values(store, keys, request.time_ms).map_or_else(|large| large, |values| json(&values)),
        Err((status, reason)) => line(status, &reason),
    }
}

/// The response of those of all instances.
pub fn merge(responses: &[Response]) -> Response {
    let Some(all) = parsed::<Values>(responses) else { return disagreement() };
    let merged = all.into_iter().map(|values| values.keys).reduce(|merged, other| {
        let pairs = merged.into_iter().zip(other);
        pairs.map(|(one, other)| if one.etag.is_some() { one } else { other }).collect()
    });
    let keys = merged.unwrap_or_default();
    let bytes = keys.iter().filter_map(|entry| entry.size).sum();
    within(bytes).map_or_else(|large| large, |()| json(&Values { keys }))
}

/// The keys of a request, all of which the client may see.
fn granted_keys(query: &str, request: &Request) -> Result<Vec<String>, Rejected> {
    let keys = keys(query, request)?;
    let check = |key: &String| grant::check(&request.grant, key).map_err(|reason| (403, reason));
    keys.iter().try_for_each(check)?;
    Ok(keys)
}

fn keys(query: &str, request: &Request) -> Result<Vec<String>, Rejected> {
    if request.method == "QUERY" {
        query::nothing(query).map_err(|bad| (400, bad.to_string()))?;
        return keys_in(&request.body);
    }
    let ([], [keys]) = query::with_repeated(query, [], ["key"]).map_err(|bad| (400, bad.to_string()))?;
    if keys.len() > MAX_KEYS {
        return Err((400, format!("query parameter `key` must be given at most {MAX_KEYS} times")));
    }
    keys.into_iter().map(|key| key.key().map(Into::into).map_err(|bad| (400, bad.to_string()))).collect()
}

fn keys_in(body: &[u8]) -> Result<Vec<String>, Rejected> {
    if body.len() > MAX_BYTES {
        return Err((413, format!("the list of keys is {} bytes, at most {MAX_BYTES} are allowed", body.len())));
    }
    let keys: Vec<String> = serde_json::from_slice(body).map_err(|error| (400, format!("the body: {error}")))?;
    if keys.len() > MAX_KEYS {
        return Err((400, format!("the body: at most {MAX_KEYS} keys are allowed")));
    }
    for (at, key) in keys.iter().enumerate() {
        key::check(key).map_err(|no_key| (400, format!("key {at}: {no_key}")))?;
    }
    Ok(keys)
}

fn values(store: &Store, keys: Vec<String>, now: u64) -> Result<Values, Response> {
    let mut bytes = 0;
    let find = |key: String| match store.get(&key, now) {
        Ok(item) => {
            bytes += item.value().len();
            within(bytes).map(|()| Entry::of(item, true))
        }
        Err(_) => Ok(Entry::absent(key)),
    };
    Ok(Values { keys: keys.into_iter().map(find).collect::<Result<_, _>>()? })
}

/// The error shows how large values are, and so depends on everything there is.
fn within(bytes: usize) -> Result<(), Response> {
    if bytes > MAX_VALUE_BYTES {
        let reason = format!("the values are together more than {MAX_VALUE_BYTES} bytes; ask for fewer keys");
        return Err(problem(413, "too_large", &reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rest::{handle, merge as merge_any};
    use crate::testing::{NOW, request, store_with, text_of, unasked};

    fn ask(query: &str) -> Request {
        Request { target: format!("/v1?{query}"), ..request("GET") }
    }

    fn ask_in_body(body: &str) -> Request {
        Request { target: "/v1".to_owned(), body: body.into(), ..request("QUERY") }
    }

    const A: &str = r#"{"key":"a","etag":"\"7\"","size":5,"expires":5000,"content_type":"text/html","value":"value"}"#;

    #[test]
    fn values_come_in_the_order_of_the_request() {
        let mut store = store_with(&[("content-type", "text/html")], Some(5_000));
        let expected = format!(r#"{{"keys":[{{"key":"b c","etag":null}},{A},{A}]}}"#);
        for request in [ask("key=b+c&key=a&key=%61"), ask_in_body(r#"["b c", "a", "a"]"#)] {
            let response = handle(&mut store, request, unasked);
            assert_eq!((response.status, text_of(&response), response.read_sequence), (200, &*expected, None));
        }
        let expired = handle(&mut store_with(&[], Some(NOW)), ask("key=a"), unasked);
        assert_eq!(text_of(&expired), r#"{"keys":[{"key":"a","etag":null}]}"#);
        assert_eq!(text_of(&handle(&mut store, ask_in_body("[]"), unasked)), r#"{"keys":[]}"#);
    }

    #[test]
    fn merged_values_are_those_of_their_owners() {
        let mut stores = [Store::default(), store_with(&[("content-type", "text/html")], Some(5_000))];
        for asked in [ask("key=b&key=a"), ask_in_body(r#"["b","a"]"#)] {
            let responses = stores.iter_mut().map(|store| handle(store, asked.clone(), unasked)).collect();
            let response = merge_any(&asked, responses);
            let expected = format!(r#"{{"keys":[{{"key":"b","etag":null}},{A}]}}"#);
            assert_eq!((response.status, text_of(&response)), (200, &*expected));
        }
    }

    #[test]
    fn malformed_request_is_rejected_by_place() {
        let many = "key=a&".repeat(1_001);
        for (request, status, reason) in [
            (ask("key=a&key="), 400, "query parameter `key` is no key: key is empty\n"),
            (ask("key=a&prefix=a"), 400, "unknown query parameter `prefix`\n"),
            (ask(&many), 400, "query parameter `key` must be given at most 1000 times\n"),
            (ask_in_body(r#"["a", ".."]"#), 400, "key 1: key has a `..` segment\n"),
            (
                ask_in_body(r#"["a", 1]"#),
                400,
                "the body: invalid type: integer `1`, expected a string at line 1 column 7\n",
            ),
            (ask_in_body(""), 400, "the body: EOF while parsing a value at line 1 column 0\n"),
            (
                ask_in_body(&format!("[{}]", vec![r#""a""#; 1_001].join(","))),
                400,
                "the body: at most 1000 keys are allowed\n",
            ),
            (Request { target: "/v1?key=a".to_owned(), ..ask_in_body("[]") }, 400, "unknown query parameter `key`\n"),
        ] {
            let response = handle(&mut Store::default(), request, unasked);
            assert_eq!((response.status, text_of(&response)), (status, reason));
        }
        let response = handle(&mut Store::default(), ask_in_body(&" ".repeat((1 << 20) + 1)), unasked);
        assert_eq!(response.status, 413);
    }

    #[test]
    fn values_have_a_limit_together() {
        use crate::kvs::store::transaction_log::{Event, Put};

        let store = |key: &str, size| {
            let put = Put { key: key.to_owned(), value: vec![b'x'; size], metadata: vec![], expires_at_ms: None };
            let mut store = Store::default();
            store.replace(1, &Event::Put(put));
            store
        };
        let most = handle(&mut store("a", MAX_VALUE_BYTES), ask("key=a"), unasked);
        assert_eq!(most.status, 200);
        let large = handle(&mut store("a", MAX_VALUE_BYTES), ask("key=a&key=a"), unasked);
        assert_eq!((large.status, large.read_sequence), (413, None), "it shows sizes");
        let asked = ask("key=a&key=b");
        for (size, status) in [(0, 200), (1, 413)] {
            let mut stores = [store("a", MAX_VALUE_BYTES), store("b", size)];
            let responses = stores.iter_mut().map(|store| handle(store, asked.clone(), unasked)).collect();
            assert_eq!(merge_any(&asked, responses).status, status);
        }
    }
}
