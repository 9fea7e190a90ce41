//! Machine-readable errors: a stable code in a header, and `application/problem+json` (RFC 9457) in place of a line of text, if
//! the client accepts it.
//!
//! Errors of the host and of guests are converted alike, so that a guest only has to return the line, and a code where the
//! status says too little. Must never know: the meaning of the line.

use bytes::Bytes;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;

use super::accept;
use super::reply::Reply;

const MEDIA_TYPE: &str = "application/problem+json";

/// Response header: stable code of an error, and parameters of it.
pub const ERROR: HeaderName = HeaderName::from_static("kvs-error");

/// Codes of errors that have none of their own, by status.
const CODES: [(u16, &str); 21] = [
    (400, "malformed"),
    (401, "unauthorized"),
    (403, "forbidden"),
    (404, "not_found"),
    (405, "method_not_allowed"),
    (408, "request_timeout"),
    (409, "conflict"),
    (410, "position_gone"),
    (412, "precondition_failed"),
    (413, "too_large"),
    (414, "target_too_long"),
    (415, "header_not_kept"),
    (416, "range_not_satisfiable"),
    (422, "unprocessable"),
    (429, "rate_limited"),
    (431, "head_too_large"),
    (500, "failed"),
    (501, "not_implemented"),
    (503, "unavailable"),
    (504, OUTCOME_UNKNOWN),
    (507, "insufficient_storage"),
];
/// Code of an error of any other status, which only another guest returns.
const OTHER: &str = "other";

/// Code of an error after which a write may have happened or not.
pub const OUTCOME_UNKNOWN: &str = "outcome_unknown";
/// Code of the rejection of a put beyond the quota of the client.
pub const QUOTA_EXCEEDED: &str = "quota_exceeded";
/// Code of the rejection of a request that only the primary serves.
pub const NOT_PRIMARY: &str = "not_primary";

/// Returns whether a request accepts the media type by name.
pub fn is_wanted(headers: &HeaderMap) -> bool {
    accept::quality(headers, MEDIA_TYPE) > 0
}

/// Completes an error response: its stable code, and the time to wait before a retry. Converts its text to a problem if
/// the client wants that.
pub fn complete(response: &mut Response<Reply>, wants_problem: bool) {
    let status = response.status();
    if !(status.is_client_error() || status.is_server_error()) {
        return;
    }
    let headers = response.headers_mut();
    headers.entry(ERROR).or_insert_with(|| HeaderValue::from_static(code_of(status)));
    if matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
        headers.entry(header::RETRY_AFTER).or_insert(const { HeaderValue::from_static("1") });
    }
    if wants_problem {
        convert(response);
    }
}

/// Code of an error that has none of its own.
fn code_of(status: StatusCode) -> &'static str {
    CODES.iter().find(|(of, _)| *of == status.as_u16()).map_or(OTHER, |(_, code)| code)
}

fn convert(response: &mut Response<Reply>) {
    let is_text = |kind: &HeaderValue| kind.as_bytes().starts_with(b"text/plain");
    if !response.headers().get(header::CONTENT_TYPE).is_some_and(is_text) {
        return;
    }
    let Reply::Whole(line) = response.body() else { return };
    let error = response.headers().get(ERROR).and_then(|error| error.to_str().ok()).unwrap_or(OTHER);
    let problem = problem(response.status(), error, line);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    *response.body_mut() = Reply::Whole(problem);
}

/// The code and its parameters, `check_failed;operation=1`, become fields.
fn problem(status: StatusCode, error: &str, line: &Bytes) -> Bytes {
    let (title, detail) = (status.canonical_reason(), String::from_utf8_lossy(line));
    let detail = detail.trim_end();
    let mut parts = error.split(';');
    let code = parts.next();
    let mut problem =
        json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "code": code, "detail": detail });
    for (name, number) in parts.filter_map(|part| part.split_once('=')) {
        if let Ok(number) = number.parse::<u64>() {
            problem[name] = number.into();
        }
    }
    Bytes::from(problem.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::rejection::Rejection;

    fn completed(rejection: Rejection, wants_problem: bool) -> Response<Reply> {
        let mut response = rejection.response();
        complete(&mut response, wants_problem);
        response
    }

    fn body(response: Response<Reply>) -> serde_json::Value {
        let Reply::Whole(body) = response.into_body() else { panic!("a stream") };
        serde_json::from_slice(&body).expect("JSON")
    }

    #[test]
    fn only_text_errors_become_problems() {
        let problem = completed(Rejection::new(StatusCode::SERVICE_UNAVAILABLE, "a \"line\""), true);
        assert_eq!(problem.headers()[header::CONTENT_TYPE], MEDIA_TYPE);
        assert_eq!(problem.headers()[header::RETRY_AFTER], "1");
        let expected = json!({
            "type": "about:blank", "title": "Service Unavailable", "status": 503, "code": "unavailable",
            "detail": "a \"line\""
        });
        assert_eq!(body(problem), expected);
        let fine = completed(Rejection::new(StatusCode::OK, "fine"), true);
        assert_eq!(fine.headers()[header::CONTENT_TYPE], "text/plain; charset=utf-8");
        assert!(!fine.headers().contains_key(ERROR));
    }

    #[test]
    fn code_and_its_parameters_become_fields() {
        let rejection = Rejection::new(StatusCode::CONFLICT, "line").with_code("check_failed;operation=3;key=x");
        let problem = body(completed(rejection, true));
        assert_eq!((&problem["code"], &problem["operation"]), (&json!("check_failed"), &json!(3)));
        assert_eq!(problem.get("key"), None);
    }

    #[test]
    fn every_error_has_a_code_and_retries_a_time() {
        for (status, code, retry_after) in [
            (StatusCode::NOT_FOUND, "not_found", None),
            (StatusCode::TOO_MANY_REQUESTS, "rate_limited", Some("1")),
            (StatusCode::SERVICE_UNAVAILABLE, "unavailable", Some("1")),
            (StatusCode::IM_A_TEAPOT, OTHER, None),
        ] {
            let line = completed(Rejection::new(status, "line"), false);
            assert_eq!(line.headers()[ERROR], code);
            let header = line.headers().get(header::RETRY_AFTER).map(|value| value.to_str().expect("text"));
            assert_eq!(header, retry_after, "{status}");
        }
    }

    #[test]
    fn every_code_is_described() {
        let description = include_str!("../../../guest/kvs/openapi.json");
        let description: serde_json::Value = serde_json::from_str(description).expect("JSON");
        let described =
            description["components"]["schemas"]["Problem"]["properties"]["code"]["anyOf"][0]["enum"].as_array();
        let described = described.expect("a list");
        for code in CODES.iter().map(|(_, code)| *code).chain([OTHER, OUTCOME_UNKNOWN, NOT_PRIMARY, QUOTA_EXCEEDED]) {
            assert!(described.contains(&json!(code)), "{code}");
        }
        let book = include_str!("../../../docs/http-api.md");
        for code in described {
            let code = code.as_str().expect("text");
            assert_eq!(described.iter().filter(|other| *other == code).count(), 1, "{code} is there twice");
            assert!(book.contains(&format!("`{code}`")), "{code}");
        }
    }
}
