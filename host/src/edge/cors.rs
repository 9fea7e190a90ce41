//! CORS (the Fetch standard): requests of web pages of other origins, and their access to responses.
//!
//! The browser enforces it; permissions still depend on tokens. It is implemented in the host and not in guests, since a
//! preflight request has no token, and a page also reads the rejections of the host.

use bytes::Bytes;
use hyper::header::{self, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode, Uri};

use super::rejection::Rejection;
use super::reply::Reply;

/// Time for which a browser caches a preflight response, in seconds.
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");
const ANY: HeaderValue = HeaderValue::from_static("*");

/// The allowed origins.
#[derive(Clone, Debug)]
pub struct Cors(Vec<HeaderValue>);

/// Parses an origin, as browsers send it: `https://example.org`, `http://localhost:3000`; or `*` for any.
pub fn origin(text: &str) -> Result<HeaderValue, String> {
    let what = || "an origin must look like https://example.org or http://localhost:3000, or be * for any".to_owned();
    let value = HeaderValue::from_str(text).map_err(|_| what())?;
    let uri: Uri = text.parse().map_err(|_| what())?;
    let written = uri.scheme_str().zip(uri.authority()).map(|(scheme, authority)| format!("{scheme}://{authority}"));
    let fits = written.is_some_and(|written| written == text && written == written.to_ascii_lowercase());
    if value == ANY || fits { Ok(value) } else { Err(what()) }
}

impl Cors {
    /// Returns None without origins.
    pub fn new(origins: Vec<HeaderValue>) -> Option<Self> {
        (!origins.is_empty()).then_some(Self(origins))
    }

    /// Returns the response to a preflight request. Methods and headers are not restricted: the guest rejects unsupported
    /// ones.
    pub fn preflight(&self, head: &Parts) -> Option<Result<Response<Reply>, Rejection>> {
        let method = head.headers.get(header::ACCESS_CONTROL_REQUEST_METHOD)?;
        let origin = head.headers.get(header::ORIGIN)?;
        if head.method != Method::OPTIONS {
            return None;
        }
        if !self.allows(origin) {
            return Some(Err(Rejection::new(StatusCode::FORBIDDEN, "origin not allowed")));
        }
        let mut answer = Response::new(Reply::Whole(Bytes::new()));
        *answer.status_mut() = StatusCode::NO_CONTENT;
        let headers = answer.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, method.clone());
        for asked in head.headers.get_all(header::ACCESS_CONTROL_REQUEST_HEADERS) {
            headers.append(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
        }
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
        Some(Ok(answer))
    }

    /// Allows pages of an origin to read a response with all its headers.
    pub fn share(&self, origin: Option<&HeaderValue>, response: &mut Response<Reply>) {
        let headers = response.headers_mut();
        let any = self.0.contains(&ANY);
        if !any {
            headers.append(header::VARY, HeaderValue::from_name(header::ORIGIN));
        }
        if let Some(origin) = origin.filter(|origin| self.allows(origin)) {
            let allowed = if any { ANY } else { origin.clone() };
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, ANY);
        }
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        self.0.iter().any(|other| *other == ANY || other == origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origin_must_have_the_form_of_browsers() {
        for fits in ["*", "https://example.org", "http://localhost:3000", "http://[::1]:80", "app://page"] {
            assert_eq!(origin(fits).as_ref().map(HeaderValue::as_bytes), Ok(fits.as_bytes()));
        }
        for unfit in
            ["", "example.org", "https://example.org/", "https://Example.org", "https://a/b", "null", "a b", "**"]
        {
            assert!(origin(unfit).is_err(), "{unfit}");
        }
    }
}
