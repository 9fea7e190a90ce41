use kvs_kit::answer::cross_shard;

use super::*;
use crate::kvs::store::transaction_log::AppendError;
use crate::testing::{EVERYTHING, header_of};

const NOW: u64 = 1_000;

/// `a` and `b`, put at sequences 1 and 2; `old`, expired; `bytes`, which is not text.
fn store() -> Store {
    let mut store = Store::default();
    let puts = [("a", &b"1"[..], None), ("b", b"2", Some(9_000)), ("old", b"3", Some(NOW)), ("bytes", b"\xff", None)];
    for (sequence, (key, value, expires)) in (1..).zip(puts) {
        let metadata = vec![("content-type".to_owned(), "text/plain".to_owned())];
        store.replace(
            sequence,
            &Event::Put(Put { key: key.to_owned(), value: value.into(), metadata, expires_at_ms: expires }),
        );
    }
    store
}

fn post(
    store: &mut Store,
    query: &str,
    request: Request,
    mut append: impl FnMut(&[Event]) -> Result<u64, AppendError>,
) -> Response {
    super::post(&mut Logged::new(store, &mut append), query, request)
}

fn request(body: &str) -> Request {
    let (method, target) = ("POST".to_owned(), String::new());
    Request { method, target, headers: vec![], body: body.into(), principal: None, grant: EVERYTHING, time_ms: NOW }
}

fn text(response: &Response) -> &str {
    str::from_utf8(&response.body).expect("text")
}

/// Posts what must change nothing.
fn refused(body: &str) -> (u16, String) {
    let mut store = store();
    let response = post(&mut store, "", request(body), |_| panic!("appended"));
    assert_eq!(store, self::store());
    (response.status, text(&response).to_owned())
}

#[test]
fn operations_happen_in_order_and_each_sees_those_before_it() {
    let mut store = store();
    let body = r#"[
        {"op": "check", "key": "a", "etag": "\"1\""}, {"op": "check", "key": "b", "etag": "*"},
        {"op": "check", "key": "new", "etag": null}, {"op": "check", "key": "old", "etag": null},
        {"op": "get", "key": "a"}, {"op": "put", "key": "a", "value": "new", "ttl": 5, "content_type": "a/b"},
        {"op": "get", "key": "a"}, {"op": "delete", "key": "b"}, {"op": "get", "key": "b"},
        {"op": "check", "key": "b", "etag": null}, {"op": "delete", "key": "b"}, {"op": "delete", "key": "old"},
        {"op": "put", "key": "b", "value_base64": "/w=="}, {"op": "check", "key": "b", "etag": "*"},
        {"op": "get", "key": "bytes"}, {"op": "put", "key": "a", "value": ""}
    ]"#;
    let put = |key: &str, value: &[u8], content_type: &[&str], expires| {
        let metadata = content_type.iter().map(|value| ("content-type".to_owned(), value.to_string())).collect();
        Event::Put(Put { key: key.to_owned(), value: value.into(), metadata, expires_at_ms: expires })
    };
    let expected = [
        put("a", b"new", &["a/b"], Some(NOW + 5_000)),
        Event::Delete("b".to_owned()),
        put("b", b"\xff", &[], None),
        put("a", b"", &[], None),
    ];
    let response = post(&mut store, "", request(body), |events| {
        assert_eq!(events, expected);
        Ok(10)
    });
    let given = r#"[
        {"op":"check","key":"a","etag":"\"1\""}, {"op":"check","key":"b","etag":"\"2\"","expires":9000},
        {"op":"check","key":"new","etag":null}, {"op":"check","key":"old","etag":null},
        {"op":"get","key":"a","etag":"\"1\"","content_type":"text/plain","value":"1"},
        {"op":"put","key":"a","etag":"\"10\"","expires":6000},
        {"op":"get","key":"a","etag":"\"10\"","expires":6000,"content_type":"a/b","value":"new"},
        {"op":"delete","key":"b","etag":null}, {"op":"get","key":"b","etag":null},
        {"op":"check","key":"b","etag":null}, {"op":"delete","key":"b","etag":null},
        {"op":"delete","key":"old","etag":null}, {"op":"put","key":"b","etag":"\"12\""},
        {"op":"check","key":"b","etag":"\"12\""},
        {"op":"get","key":"bytes","etag":"\"4\"","content_type":"text/plain","value_base64":"/w=="},
        {"op":"put","key":"a","etag":"\"13\""}
    ]"#;
    assert_eq!((response.status, response.read_sequence), (200, None), "{}", text(&response));
    let read = |text| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
    assert_eq!(read(text(&response)), read(given));
    let mut replayed = self::store();
    (10..).zip(&expected).for_each(|(sequence, event)| {
        replayed.replace(sequence, event);
    });
    assert_eq!(store, replayed);
}

#[test]
fn the_first_check_that_fails_undoes_all() {
    for (check, reason) in [
        (r#""key": "a", "etag": "\"2\"""#, "operation 1: the check of `a` failed: the key has the etag \"1\"\n"),
        (r#""key": "a", "etag": null"#, "operation 1: the check of `a` failed: the key has the etag \"1\"\n"),
        (r#""key": "old", "etag": "*""#, "operation 1: the check of `old` failed: there is no such key\n"),
        (
            r#""key": "new", "etag": "\"9\"""#,
            "operation 1: the check of `new` failed: the key was put by an operation before\n",
        ),
        (
            r#""key": "a", "value": "2""#,
            "operation 1: the check of `a` failed: the key has another value, with the etag \"1\"\n",
        ),
    ] {
        let body = format!(
            r#"[{{"op": "put", "key": "new", "value": ""}}, {{"op": "check", {check}}}, {{"op": "check", "key": "a", "etag": "\"7\""}}]"#
        );
        assert_eq!(refused(&body), (409, reason.to_owned()));
        let response = post(&mut store(), "", request(&body), |_| panic!("appended"));
        assert_eq!(response.read_sequence, None, "on all that there is");
        assert_eq!(header_of(&response, "kvs-error"), Some("check_failed;operation=1"));
    }
}

#[test]
fn numbers_json_and_checks_of_values_see_what_happened_before() {
    let mut store = store();
    let body = r#"[
        {"op": "check", "key": "a", "value": "1"}, {"op": "add", "key": "a", "delta": 41},
        {"op": "check", "key": "a", "value_base64": "NDI="}, {"op": "add", "key": "b", "delta": -3, "ttl": "2m"},
        {"op": "add", "key": "old", "delta": 1}, {"op": "add", "key": "old", "delta": 1},
        {"op": "put", "key": "c", "json": {"n": 1.50, "n": 2}}, {"op": "check", "key": "c", "value": "{\"n\": 1.50, \"n\": 2}"}
    ]"#;
    let put = |key: &str, value: &str, content_type: &str, expires| {
        let metadata = [content_type].into_iter().filter(|value| !value.is_empty());
        let metadata = metadata.map(|value| ("content-type".to_owned(), value.to_string())).collect();
        Event::Put(Put { key: key.to_owned(), value: value.into(), metadata, expires_at_ms: expires })
    };
    let response = post(&mut store, "", request(body), |events| {
        let expected = [
            put("a", "42", "text/plain", None),
            put("b", "-1", "text/plain", Some(NOW + 120_000)),
            put("old", "1", "", None),
            put("old", "2", "", None),
            put("c", r#"{"n": 1.50, "n": 2}"#, "application/json", None),
        ];
        assert_eq!(events, expected);
        Ok(10)
    });
    let results: serde_json::Value = serde_json::from_str(text(&response)).expect("JSON");
    assert_eq!(response.status, 200, "{results}");
    assert_eq!(results[1], serde_json::json!({"op": "add", "key": "a", "etag": "\"10\"", "value": "42"}));
    assert_eq!((&results[5]["value"], &results[5]["etag"]), (&"2".into(), &"\"13\"".into()));
}

#[test]
fn number_that_cannot_be_added_to_undoes_all() {
    for (key, delta, code) in
        [("bytes", 1, "not_a_number;operation=1"), ("a", i64::MAX, "number_out_of_range;operation=1")]
    {
        let body = format!(r#"[{{"op":"delete","key":"b"}},{{"op":"add","key":"{key}","delta":{delta}}}]"#);
        let response = post(&mut store(), "", request(&body), |_| panic!("appended"));
        assert_eq!((response.status, header_of(&response, "kvs-error")), (409, Some(code)));
        assert!(text(&response).starts_with("operation 1: nothing was added to `"), "{}", text(&response));
    }
}

#[test]
fn what_is_malformed_is_refused_with_its_place() {
    let deep = "[".repeat(100_000);
    let deep_value = format!(r#"[{{"op": {deep}"#);
    let (many, long) = (format!("[{}]", vec![r#"{"op":"get","key":"a"}"#; 1_001].join(",")), "k".repeat(1_025));
    let long = format!(r#"[{{"op": "get", "key": "{long}"}}]"#);
    let get = |more: &str| format!(r#"[{{"op":"get","key":"a"}},{{"op":"get","key":"a"{more}}}]"#);
    let put = |more: &str| format!(r#"[{{"op":"put","key":"a"{more}}}]"#);
    let check = |more: &str| format!(r#"[{{"op":"check","key":"a"{more}}}]"#);
    let add = |more: &str| format!(r#"[{{"op":"add","key":"a"{more}}}]"#);
    for (body, reason) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{}", "invalid type: map, expected a list of operations at line 1 column 0"),
        ("[1]", "operation 0: invalid type: integer `1`, expected an operation at line 1 column 2"),
        ("[] x", "trailing characters at line 1 column 4"),
        ("[", "operation 0: EOF while parsing a list at line 1 column 1"),
        (&deep, "operation 0: invalid type: sequence, expected"),
        (&deep_value, "operation 0: "),
        (r#"[["get", "a", null, null, null, null]]"#, "operation 0: invalid type: sequence, expected an operation"),
        (&many, "at most 1000 operations are allowed"),
        (r#"[{"op":"get"}]"#, "operation 0: missing field `key`"),
        (r#"[{"key":"a"}]"#, "operation 0: missing field `op`"),
        (
            r#"[{"op":"GET","key":"a"}]"#,
            "operation 0: unknown variant `GET`, expected one of `check`, `put`, `delete`, `get`, `add` at line 1 column 12",
        ),
        (r#"[{"op":"get","key":""}]"#, "operation 0: key is empty"),
        (r#"[{"op":"get","key":"a\u0000"}]"#, "operation 0: key holds the control character U+0000"),
        (r#"[{"op":"get","key":"\ud800"}]"#, "operation 0: "),
        (&long, "operation 0: key is 1025 bytes long, at most 1024 are allowed"),
        (&get(r#","key":"b""#), "operation 1: duplicate field `key` at line 1 column 51"),
        (&get(r#","wert":"b""#), "operation 1: unknown field `wert`, expected one of"),
        (&get(r#","we\nrt":"b""#), "operation 1: unknown field `wert`, expected one of"),
        (&get(r#","value":"b""#), "operation 1: `value` does not belong to it"),
        (&get(r#","value_base64":"b""#), "operation 1: `value_base64` does not belong to it"),
        (&get(r#","content_type":"b""#), "operation 1: `content_type` does not belong to it"),
        (&get(r#","ttl":1"#), "operation 1: `ttl` does not belong to it"),
        (&get(r#","etag":null"#), "operation 1: `etag` does not belong to it"),
        (&put(r#","value":"","etag":"*""#), "operation 0: `etag` does not belong to it"),
        (&put(""), "operation 0: `value` or `value_base64` is missing"),
        (&put(r#","value":1"#), "operation 0: invalid type: integer `1`, expected a string at line 1 column 32"),
        (&put(r#","value":"","value_base64":"""#), "operation 0: `value` and `value_base64` are both there"),
        (&put(r#","value_base64":"?""#), "operation 0: `value_base64` is not base64"),
        (&put(r#","value":null"#), "operation 0: invalid type: null, expected a string"),
        (
            &put(r#","value":"","ttl":null"#),
            "operation 0: invalid type: null, expected a whole number of seconds or a dur",
        ),
        (
            &put(r#","value":"","ttl":0"#),
            "operation 0: `ttl` must be a duration like 60, 60s, 500ms, 5m, 1h or 30d, from 1ms to 3153600000s",
        ),
        (
            &put(r#","value":"","ttl":-1"#),
            "operation 0: invalid type: integer `-1`, expected a whole number of seconds or a d",
        ),
        (
            &put(r#","value":"","ttl":1.5"#),
            "operation 0: invalid type: floating point `1.5`, expected a whole number of second",
        ),
        (&put(r#","value":"","content_type":"a\n""#), "operation 0: content-type holds a character that is not"),
        (&put(r#","value":"","ttl":"1x""#), "operation 0: `ttl` must be a duration like 60, 60s"),
        (&put(r#","value":"","ttl":18446744073709551615"#), "operation 0: `ttl` must be a duration like 60, 60s"),
        (&put(r#","value":"","json":1"#), "operation 0: `json` and another value are both there"),
        (&put(r#","json":{"#), "operation 0: "),
        (&put(r#","value":"","delta":1"#), "operation 0: `delta` does not belong to it"),
        (&get(r#","json":1"#), "operation 1: `json` does not belong to it"),
        (&check(r#","json":1"#), "operation 0: `json` does not belong to it"),
        (&add(""), "operation 0: `delta` is missing"),
        (&add(r#","delta":"1""#), "operation 0: invalid type: string \"1\", expected i64"),
        (&add(r#","delta":1.5"#), "operation 0: invalid type: floating point `1.5`, expected i64"),
        (&add(r#","delta":9223372036854775808"#), "operation 0: invalid value: integer `9223372036854775808`"),
        (&add(r#","delta":1,"etag":"*""#), "operation 0: `etag` does not belong to it"),
        (&check(r#","etag":"*","value":"1""#), "operation 0: `etag` and a value are both there"),
        (&check(""), "operation 0: `etag`, `value` or `value_base64` is missing"),
        (&check(r#","etag":5"#), "operation 0: invalid type: integer `5`, expected a string"),
        (&check(r#","etag":"5""#), r#"operation 0: `etag` must be null, "*", or an entity tag like "\"5\"""#),
    ] {
        let (status, line) = refused(body);
        assert_eq!(status, 400, "{line}");
        assert!(line.starts_with(reason), "{line} instead of {reason}");
        assert_eq!(line.find('\n'), Some(line.len() - 1), "{line} is not one line");
    }
    let unknown = format!(r#"[{{"{}": 1}}]"#, "x".repeat(1 << 16));
    assert!(refused(&unknown).1.len() < 1_000);
}

#[test]
fn what_is_too_large_is_refused() {
    let mut store = store();
    let get = r#"[{"op":"get","key":"a"}]"#;
    let sized = |bytes: usize| get.to_owned() + &" ".repeat(bytes - get.len());
    assert_eq!(refused(&sized((1 << 20) + 1)).0, 413);
    assert_eq!(post(&mut store, "", request(&sized(1 << 20)), |_| panic!("appended")).status, 200);
    let put = Put { key: "large".to_owned(), value: vec![b'x'; (1 << 20) - 1], metadata: vec![], expires_at_ms: None };
    store.replace(9, &Event::Put(put));
    for (body, status) in [
        (r#"[{"op":"get","key":"large"},{"op":"get","key":"a"}]"#, 200),
        (r#"[{"op":"get","key":"large"},{"op":"get","key":"a"},{"op":"get","key":"a"}]"#, 413),
    ] {
        let response = post(&mut store, "", request(body), |_| panic!("appended"));
        assert_eq!(response.status, status, "{}", text(&response));
    }
}

#[test]
fn what_was_not_appended_did_not_happen() {
    for (error, status) in [
        (AppendError::InsufficientStorage, 507),
        (AppendError::Unavailable, 503),
        (AppendError::ReadOnly, 403),
        (AppendError::TooLarge(1), 413),
    ] {
        let mut store = store();
        let response = post(&mut store, "", request(r#"[{"op":"put","key":"a","value":""}]"#), |_| Err(error));
        assert_eq!((response.status, &store), (status, &self::store()));
    }
}

#[test]
fn nothing_is_a_transaction_too() {
    assert_eq!(refused("[]"), (200, "[]".to_owned()));
    assert_eq!(
        refused(r#"[{"op":"delete","key":"old"}]"#),
        (200, r#"[{"op":"delete","key":"old","etag":null}]"#.to_owned())
    );
}

#[test]
fn it_is_placed_by_its_keys() {
    let body = br#"[{"op":"get","key":"{cart7}:items"},{"op":"delete","key":"x"}]"#;
    assert_eq!(keys(body), ["{cart7}:items", "x"]);
    assert_eq!(keys(b"nonsense"), [""; 0]);
    assert_eq!(cross_shard().status, 422);
}
