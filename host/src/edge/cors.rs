//! Which pages of other origins may ask, and read what is answered (the CORS protocol, in the Fetch standard).
//!
//! It is the browser that keeps the others out; what somebody may do is decided by tokens as ever. Here rather than in
//! guests, since a browser asks first, without a token, and wants to read what the host refuses too.

use bytes::Bytes;
use hyper::header::{self, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode, Uri};

use super::refusal::{Answer, refuse};
use super::reply::Reply;

/// How long a browser need not ask again, in seconds.
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");
const ANY: HeaderValue = HeaderValue::from_static("*");

/// The origins that are let in.
#[derive(Clone, Debug)]
pub struct Cors(Vec<HeaderValue>);

/// An origin, as browsers write it: `https://example.org`, `http://localhost:3000`; or `*`, which is any.
pub fn origin(text: &str) -> Result<HeaderValue, String> {
    let what = || "an origin looks like https://example.org or http://localhost:3000; * is any".to_owned();
    let value = HeaderValue::from_str(text).map_err(|_| what())?;
    let uri: Uri = text.parse().map_err(|_| what())?;
    let written = uri.scheme_str().zip(uri.authority()).map(|(scheme, authority)| format!("{scheme}://{authority}"));
    let fits = written.is_some_and(|written| written == text && written == written.to_ascii_lowercase());
    if value == ANY || fits { Ok(value) } else { Err(what()) }
}

impl Cors {
    /// None when there are no origins.
    pub fn new(origins: Vec<HeaderValue>) -> Option<Self> {
        (!origins.is_empty()).then_some(Self(origins))
    }

    /// The answer to a browser that asks beforehand whether a page may send a request. Which methods and headers make
    /// sense is for the guest to say when they come.
    pub fn preflight(&self, head: &Parts) -> Option<Answer> {
        let method = head.headers.get(header::ACCESS_CONTROL_REQUEST_METHOD)?;
        let origin = head.headers.get(header::ORIGIN)?;
        if head.method != Method::OPTIONS {
            return None;
        }
        if !self.lets_in(origin) {
            return Some(refuse(StatusCode::FORBIDDEN, "pages of this origin may not ask here"));
        }
        let mut answer = Response::new(Bytes::new());
        *answer.status_mut() = StatusCode::NO_CONTENT;
        let headers = answer.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, method.clone());
        for asked in head.headers.get_all(header::ACCESS_CONTROL_REQUEST_HEADERS) {
            headers.append(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
        }
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
        Some(answer)
    }

    /// Lets the page of an origin read a response, with all its headers.
    pub fn share(&self, origin: Option<&HeaderValue>, response: &mut Response<Reply>) {
        let headers = response.headers_mut();
        let any = self.0.contains(&ANY);
        if !any {
            headers.append(header::VARY, HeaderValue::from_name(header::ORIGIN));
        }
        if let Some(origin) = origin.filter(|origin| self.lets_in(origin)) {
            let let_in = if any { ANY } else { origin.clone() };
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, let_in);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, ANY);
        }
    }

    fn lets_in(&self, origin: &HeaderValue) -> bool {
        self.0.iter().any(|other| *other == ANY || other == origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_what_a_browser_would_write() {
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
