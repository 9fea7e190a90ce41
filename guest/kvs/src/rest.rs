//! The REST interface, version 1: which path and method is what.
//!
//! Owns: paths, methods, and the request headers that are read. What is asked of one key is in `value`, of all in `list`,
//! of several at once in `transaction`, of what happens to them in `watch`.
//! Must never know: how items are kept, where sequences come from, or how bytes travel.

use std::borrow::Cow;

use kvs_kit::Target;
use kvs_kit::path::split;
use kvs_kit::state::Logged;

use crate::answer::{NO_STATE, cross_shard, header, line, not_allowed, with};
use crate::conditions::{self, IF_MATCH, IF_NONE_MATCH};
use crate::content_type;
use crate::key::{self, NoKey};
use crate::kvs::store::http::{Request, Response};
use crate::kvs::store::transaction_log::{AppendError, Event};
use crate::range::{IF_RANGE, RANGE};
use crate::store::Store;
use crate::{grant, list, many, modify, prefix, query, transaction, unkept, value, watch, write};

/// The request headers that are read.
pub const HEADERS: [&str; 11] = [
    content_type::NAME,
    IF_MATCH,
    IF_NONE_MATCH,
    RANGE,
    IF_RANGE,
    watch::LAST_EVENT_ID,
    unkept::CONTENT_RANGE,
    unkept::CONTENT_ENCODING,
    unkept::CONTENT_LANGUAGE,
    unkept::CONTENT_DISPOSITION,
    unkept::CACHE_CONTROL,
];

/// The interface, for programs.
const OPENAPI: &str = include_str!("../openapi.json");

/// The methods of a key.
const KEY_METHODS: &str = "GET, HEAD, PUT, POST, DELETE";

/// What a target is about.
enum Resource<'t> {
    Key(Cow<'t, str>),
    AllKeys,
    Description,
}

/// As `respond`, for a host that only takes what is appended.
pub fn handle(
    store: &mut Store,
    request: Request,
    mut append: impl FnMut(&[Event]) -> Result<u64, AppendError>,
) -> Response {
    respond(&mut Logged::new(store, &mut append), request)
}

/// Answers a request. Changes the store only when the host has taken the change into the log.
pub fn respond(store: &mut Logged<'_, Store>, mut request: Request) -> Response {
    let target = std::mem::take(&mut request.target);
    let (path, query) = split(&target);
    let resource = match resource(path) {
        Ok(resource) => resource,
        Err(no_key) => return no_key.into(),
    };
    if let Resource::Key(key) = &resource
        && let Err(reason) = grant::check(&request.grant, key)
    {
        return line(403, &reason);
    }
    match (request.method.as_str(), resource) {
        ("GET" | "HEAD", Resource::Key(key)) => value::get(store, &key, query, &request),
        ("PUT", Resource::Key(key)) => write::put(store, key, query, request),
        ("DELETE", Resource::Key(key)) => write::delete(store, key, query, &request),
        ("POST", Resource::Key(key)) if modify::is_wanted(query) => modify::post(store, key, query, &request),
        ("POST", Resource::Key(_)) => {
            let reason = "POST of a key needs the query parameter `op`: add or touch";
            with(line(405, reason), header("allow", KEY_METHODS))
        }
        (_, Resource::Key(_)) => not_allowed("a key has", KEY_METHODS),
        ("GET" | "HEAD", Resource::AllKeys) if watch::is_wanted(query) => watch::get(store, query, &request),
        ("GET" | "HEAD", Resource::AllKeys) if many::is_wanted(query) => many::get(store, query, &request),
        ("QUERY", Resource::AllKeys) => many::get(store, query, &request),
        ("GET" | "HEAD", Resource::AllKeys) => list::get(store, query, &request),
        ("POST" | "DELETE", Resource::AllKeys) if conditions::are_in(&request.headers) => {
            line(400, "if-match and if-none-match go with requests of one key; a transaction has the operation `check`")
        }
        ("POST", Resource::AllKeys) => transaction::post(store, query, request),
        ("DELETE", Resource::AllKeys) => prefix::delete(store, query, &request),
        (_, Resource::AllKeys) => not_allowed("the list of keys has", "GET, HEAD, QUERY, POST, DELETE"),
        ("GET" | "HEAD", Resource::Description) => describe(query),
        (_, Resource::Description) => not_allowed("this document has", "GET, HEAD"),
    }
}

fn resource(path: &str) -> Result<Resource<'_>, NoKey> {
    match path {
        "/v1" => Ok(Resource::AllKeys),
        "/openapi.json" => Ok(Resource::Description),
        path => key::in_path(path).map(Resource::Key),
    }
}

fn describe(query: &str) -> Response {
    if let Err(bad) = query::nothing(query) {
        return line(400, &bad.to_string());
    }
    let headers = vec![header(content_type::NAME, "application/json")];
    Response { status: 200, headers, body: OPENAPI.into(), read_sequence: NO_STATE }
}

/// Routes a request to where the host finds what it is about. Every instance rejects alike what is to be rejected.
pub fn route(method: &str, target: &str) -> Target {
    let (path, query) = split(target);
    match (method, resource(path)) {
        (_, Ok(Resource::Key(key))) => Target::Key(key.into_owned()),
        // The log is one, whatever the instance.
        ("GET" | "HEAD", Ok(Resource::AllKeys)) if watch::is_wanted(query) => Target::AnyShard,
        ("GET" | "HEAD" | "QUERY" | "DELETE", Ok(Resource::AllKeys)) => Target::AllShards,
        ("POST", Ok(Resource::AllKeys)) => Target::KeysInBody,
        _ => Target::AnyShard,
    }
}

/// One response of those of all instances; none came when the keys of a transaction lie in several.
pub fn merge(request: &Request, mut responses: Vec<Response>) -> Response {
    if responses.is_empty() {
        return cross_shard();
    }
    let (_, query) = split(&request.target);
    if request.method == "DELETE" {
        return prefix::merge(query, responses);
    }
    if let Some(refused) = responses.iter().position(|response| response.status != 200) {
        return responses.swap_remove(refused);
    }
    match request.method.as_str() {
        "QUERY" => many::merge(&responses),
        _ if many::is_wanted(query) => many::merge(&responses),
        _ => list::merge(query, &responses),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{header_of, request, store_with, text_of, unasked};

    #[test]
    fn what_cannot_be_served_in_any_state_is_refused_with_a_reason() {
        let long_name = format!("/v1/a?{}", "ä".repeat(65));
        let cut_name = format!("unknown query parameter `{}`\n", "ä".repeat(64));
        for (method, target, status, text) in [
            ("GET", "/v2", 404, "unknown path; keys live at /v1/{key}, or at /v1/key/{key} when they hold a slash\n"),
            ("GET", "/?a", 404, "unknown path; keys live at /v1/{key}, or at /v1/key/{key} when they hold a slash\n"),
            (
                "POST",
                "/v1/a/b",
                404,
                "unknown path; a key that holds a slash lives at /v1/key/{key}, or is written with %2F\n",
            ),
            ("PUT", "/v1/?a", 400, "key is empty\n"),
            ("PUT", "/v1/%zz", 400, "bad percent escape at byte 1 of the key\n"),
            ("POST", "/v1/a", 405, "POST of a key needs the query parameter `op`: add or touch\n"),
            ("get", "/v1/a", 405, "a key has GET, HEAD, PUT, POST and DELETE\n"),
            ("GET", "/v1/a?ttl=5", 400, "unknown query parameter `ttl`\n"),
            ("PUT", "/v1/a?&a\r\nb&c", 400, "unknown query parameter `ab`\n"),
            ("DELETE", "/v1/a?=5", 400, "unknown query parameter ``\n"),
            ("HEAD", &long_name, 400, &cut_name),
        ] {
            let request = Request { target: target.to_owned(), ..request(method) };
            let response = handle(&mut store_with(&[], None), request, unasked);
            assert_eq!((response.status, text_of(&response)), (status, text), "{method} {target}");
            assert_eq!(response.read_sequence, NO_STATE, "{method} {target}");
            let allow = (status == 405).then_some("GET, HEAD, PUT, POST, DELETE");
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
    fn target_is_routed_by_what_it_is_about() {
        for target in ["/v1/%61", "/v1/key/a?x"] {
            assert!(matches!(route("GET", target), Target::Key(key) if key == "a"), "{target}");
        }
        for (method, target) in
            [("GET", "/v1?prefix=a"), ("GET", "/v1?key=a&key=b"), ("QUERY", "/v1"), ("DELETE", "/v1?prefix=a")]
        {
            assert!(matches!(route(method, target), Target::AllShards), "{method} {target}");
        }
        assert!(matches!(route("GET", "/v1?watch&key=a"), Target::AnyShard));
        assert!(matches!(route("GET", "/v1?watch&prefix=a"), Target::AnyShard));
        assert!(matches!(route("POST", "/v1"), Target::KeysInBody));
        for target in ["/", "/v1/", "/v1/a/b", "/v1/%00", "/openapi.json"] {
            assert!(matches!(route("GET", target), Target::AnyShard), "{target}");
        }
    }

    #[test]
    fn a_page_that_one_instance_refuses_is_refused() {
        let list = || Request { target: "/v1".to_owned(), ..request("GET") };
        let page = handle(&mut Store::default(), list(), unasked);
        let refusal = line(503, "not now");
        assert_eq!(merge(&list(), vec![page, refusal.clone()]), refusal);
    }

    #[test]
    fn a_transaction_across_instances_is_422() {
        assert_eq!(merge(&request("POST"), Vec::new()).status, 422);
    }

    #[test]
    fn the_description_is_json_and_names_every_resource() {
        let request = Request { target: "/openapi.json".to_owned(), ..request("GET") };
        let response = handle(&mut Store::default(), request, unasked);
        let description: serde_json::Value = serde_json::from_slice(&response.body).expect("JSON");
        let paths: Vec<_> = description["paths"].as_object().expect("paths").keys().collect();
        assert_eq!(paths, ["/openapi.json", "/v1", "/v1/key/{key}", "/v1/{key}"]);
    }
}
