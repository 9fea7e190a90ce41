//! Machine-readable errors: `application/problem+json` (RFC 9457) in place of a line of text, if the client accepts it.
//!
//! Errors of the host and of guests are converted alike, so that a guest only has to return the line. Must never know: the
//! meaning of the line.

use bytes::Bytes;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;

use super::accept;
use super::reply::Reply;

const MEDIA_TYPE: &str = "application/problem+json";

/// Returns whether a request accepts the media type by name.
pub fn is_wanted(headers: &HeaderMap) -> bool {
    accept::quality(headers, MEDIA_TYPE) > 0
}

/// Converts an error response with a text body.
pub fn of(response: Response<Reply>) -> Response<Reply> {
    let status = response.status();
    let is_text = |kind: &HeaderValue| kind.as_bytes().starts_with(b"text/plain");
    let has_text = response.headers().get(header::CONTENT_TYPE).is_some_and(is_text);
    if !has_text || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let (mut head, body) = response.into_parts();
    let Reply::Whole(line) = body else { return Response::from_parts(head, body) };
    head.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    Response::from_parts(head, Reply::Whole(problem(status, &line)))
}

fn problem(status: StatusCode, line: &Bytes) -> Bytes {
    let (title, detail) = (status.canonical_reason(), String::from_utf8_lossy(line));
    let detail = detail.trim_end();
    let problem = json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "detail": detail });
    Bytes::from(problem.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::refusal::refuse;

    #[test]
    fn only_text_errors_become_problems() {
        let problem = of(refuse(StatusCode::SERVICE_UNAVAILABLE, "a \"line\"").map(Reply::Whole));
        assert_eq!(problem.headers()[header::CONTENT_TYPE], MEDIA_TYPE);
        assert_eq!(problem.headers()[header::RETRY_AFTER], "1");
        let Reply::Whole(body) = problem.into_body() else { panic!("a stream") };
        let expected =
            json!({"type": "about:blank", "title": "Service Unavailable", "status": 503, "detail": "a \"line\""});
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&body).expect("JSON"), expected);
        let fine = of(refuse(StatusCode::OK, "fine").map(Reply::Whole));
        assert_eq!(fine.headers()[header::CONTENT_TYPE], "text/plain; charset=utf-8");
    }
}
