//! Rejections by the host: a status and a line with the reason.

use std::borrow::Cow;

use bytes::Bytes;
use hyper::body::{Body, Incoming as Arriving};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

use super::lingering::linger;
use super::metrics::Limit;
use super::problem;
use super::reply::Reply;

/// A rejection. Boxed, since most requests have none.
#[derive(Debug)]
pub struct Rejection(Box<Parts>);

#[derive(Debug)]
struct Parts {
    status: StatusCode,
    reason: Cow<'static, str>,
    code: Option<&'static str>,
    limit: Option<Limit>,
    headers: HeaderMap,
}

impl Rejection {
    /// Creates a rejection with a line of plain text.
    pub fn new(status: StatusCode, reason: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Parts { status, reason: reason.into(), code: None, limit: None, headers: HeaderMap::new() }))
    }

    /// Names the exceeded limit, for the metrics.
    pub fn of_limit(mut self, limit: Limit) -> Self {
        self.0.limit = Some(limit);
        self
    }

    /// Gives it a code of its own, where the status says too little.
    pub fn with_code(mut self, code: &'static str) -> Self {
        self.0.code = Some(code);
        self
    }

    /// The same where the request may have changed something before: any other status means that nothing was changed.
    pub fn with_effect(mut self, may_have_changed: bool) -> Self {
        if may_have_changed && self.0.code != Some(problem::OUTCOME_UNKNOWN) {
            self.0.status = StatusCode::INTERNAL_SERVER_ERROR;
            self.0.reason = format!("outcome unknown: something was appended, and after it: {}", self.0.reason).into();
            self.0.code = Some(problem::OUTCOME_UNKNOWN);
        }
        self
    }

    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.insert(name, value);
        self
    }

    /// Closes the connection after the response.
    pub fn closing(self) -> Self {
        self.with_header(header::CONNECTION, HeaderValue::from_static("close"))
    }

    /// Has a body that was not read end with a lingering close.
    pub fn with_unread(self, headers: &HeaderMap, body: Arriving) -> Self {
        if body.is_end_stream() {
            return self;
        }
        linger(headers, body);
        self.closing()
    }

    pub fn limit(&self) -> Option<Limit> {
        self.0.limit
    }

    pub fn response(self) -> Response<Reply> {
        let Parts { status, reason, code, headers, .. } = *self.0;
        let mut response = Response::new(Reply::Whole(Bytes::from(format!("{reason}\n"))));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        let kind = HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        if let Some(code) = code {
            response.headers_mut().insert(problem::ERROR, HeaderValue::from_static(code));
        }
        response
    }
}

#[cfg(test)]
impl Rejection {
    pub fn status(&self) -> StatusCode {
        self.0.status
    }

    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    pub fn headers(&self) -> &HeaderMap {
        &self.0.headers
    }
}
