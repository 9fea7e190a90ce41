//! Requests of a test: of the interface of the built-in store, with odd keys; those of a file; and those that the guest's own
//! OpenAPI document has.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use hyper::header::HeaderValue;
use hyper::{Method, Uri};

use super::openapi::Operation;
use crate::contract::Scope;
use crate::guest::message::{Client, Incoming};

/// Keys as they are in a path: few, so that requests meet.
const KEYS: usize = 24;
/// Keys that are no keys, or that are easily taken for others.
const ODD: [&str; 18] = [
    "",
    "%00",
    "%01index",
    "%01%00",
    ".",
    "..",
    "%2E%2E",
    "a%2Fb",
    "a/b",
    "%zz",
    "%",
    "%FF%FE",
    "%C3%A4%20%F0%9F%A6%80",
    "a%0Ab",
    "{tag}a",
    "a+b",
    "%2520",
    "%7F",
];
/// Lengths of keys around the limits for those of clients and of guests.
const LONG: [usize; 4] = [1_024, 1_025, 2_048, 4_000];
const BODIES: [&str; 8] =
    ["", "0", "+1", "9223372036854775807", "text", "{\"a\": 1}", "[\"key-1\", \"key-2\"]", "null"];
const LISTS: [&str; 8] = [
    "",
    "?count=true",
    "?prefix=key-1",
    "?values=true",
    "?limit=3&reverse=true",
    "?prefix=%01",
    "?key=key-1&key=key-2",
    "?delimiter=-",
];
const TRANSACTIONS: [&str; 4] = [
    r#"[{"op": "put", "key": "key-1", "value": "1"}, {"op": "put", "key": "key-2", "value": "2", "ttl": 5}]"#,
    r#"[{"op": "check", "key": "key-1", "value": "1"}, {"op": "delete", "key": "key-2"}]"#,
    r#"[{"op": "add", "key": "key-3", "delta": 1}, {"op": "get", "key": "key-3"}]"#,
    r#"[{"op": "put", "key": "key-4", "value": "1"}, {"op": "check", "key": "key-4", "etag": null}]"#,
];
/// Bytes of a target that are shown.
const SHOWN_BYTES: usize = 120;

#[derive(Clone, Debug)]
pub struct Request {
    pub method: Method,
    pub target: String,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Request {
    fn new(method: Method, target: impl Into<String>) -> Self {
        Self { method, target: target.into(), headers: Vec::new(), body: Vec::new() }
    }

    /// A request that reads what another one changes.
    pub fn get(path: impl Into<String>) -> Self {
        Self::new(Method::GET, path)
    }

    /// The requests of a file: in each line a method, a target and, if there is one, a body. `#` begins a comment.
    pub fn parse_all(text: &str) -> Result<Vec<Self>> {
        let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
        lines.map(|(number, line)| Self::parse(line).with_context(|| format!("line {number}"))).collect()
    }

    fn parse(line: &str) -> Result<Self> {
        let mut parts = line.splitn(3, ' ');
        let method = parts.next().unwrap_or_default();
        let method = Method::from_bytes(method.as_bytes()).with_context(|| format!("{method:?} is not a method"))?;
        let target = parts.next().context("the target is missing: METHOD TARGET [BODY]")?;
        target.parse::<Uri>().with_context(|| format!("{target:?} is not a target"))?;
        Ok(Self { body: parts.next().unwrap_or_default().into(), ..Self::new(method, target) })
    }

    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// What the guest is called with; none where a server would not accept the target.
    pub fn incoming(&self) -> Option<Incoming> {
        let mut request = hyper::Request::new(Bytes::from(self.body.clone()));
        (*request.method_mut(), *request.uri_mut()) = (self.method.clone(), self.target.parse().ok()?);
        for (name, value) in &self.headers {
            request.headers_mut().append(*name, value.parse().ok()?);
        }
        let address = Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 49_152));
        let client = Client { address, tls_version: None, identity: None, turn: Arc::default() };
        Some(Incoming {
            request,
            client: Arc::new(client),
            id: HeaderValue::from_static("test"),
            principal: None,
            scope: Scope::Admin,
            is_sampled: false,
            key_prefix: None,
            quota: None,
        })
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.target.get(..SHOWN_BYTES).filter(|shown| shown.len() < self.target.len());
        let (shown, rest) = shown.map_or((&*self.target, ""), |shown| (shown, "…"));
        write!(f, "{} {shown}{rest}", self.method)?;
        for (name, value) in &self.headers {
            write!(f, ", {name}: {value}")?;
        }
        match self.body.len() {
            0 => Ok(()),
            1..=40 => write!(f, ", body {:?}", String::from_utf8_lossy(&self.body)),
            bytes => write!(f, ", body of {bytes} bytes"),
        }
    }
}

/// Generates requests, the same from the same seed.
pub struct Generator {
    rng: fastrand::Rng,
    given: Vec<Request>,
    operations: Vec<Operation>,
    /// The entity tag that was seen last.
    tag: String,
}

impl Generator {
    pub fn new(rng: fastrand::Rng, given: Vec<Request>, operations: Vec<Operation>) -> Self {
        Self { rng, given, operations, tag: "\"1\"".to_owned() }
    }

    /// An entity tag for conditions of later requests.
    pub fn saw(&mut self, tag: &HeaderValue) {
        self.tag = tag.to_str().unwrap_or_default().to_owned();
    }

    pub fn next(&mut self) -> Request {
        if !self.given.is_empty() && self.rng.bool() {
            return self.given[self.rng.usize(..self.given.len())].clone();
        }
        if !self.operations.is_empty() && self.rng.u8(..4) == 0 {
            return self.of_document();
        }
        self.of_store()
    }

    /// A request of the interface of the built-in store.
    fn of_store(&mut self) -> Request {
        let target = format!("/v1/{}", self.key());
        let request = match self.rng.u8(..100) {
            0..30 => Request::get(target),
            30..34 => Request::new(Method::HEAD, target),
            34..64 => {
                let query = self.pick(&["", "", "", "?ttl=5s", "?ttl=1m"]);
                Request { body: self.body(), ..Request::new(Method::PUT, target + query) }
            }
            64..76 => Request::new(Method::DELETE, target),
            76..82 => {
                let query = self.pick(&["?op=add&delta=1", "?op=add&delta=-7", "?op=touch&ttl=10s"]);
                Request::new(Method::POST, target + query)
            }
            82..87 => Request { body: b"+1".into(), ..Request::new(Method::PATCH, target) },
            87..91 => {
                let body = self.pick(&TRANSACTIONS).into();
                Request { body, ..Request::new(Method::POST, "/v1") }
            }
            91..98 => Request::get(format!("/v1{}", self.pick(&LISTS))),
            _ => Request::new(Method::DELETE, format!("/v1?prefix=key-{}", self.rng.u8(..3))),
        };
        self.with_headers(request)
    }

    fn with_headers(&mut self, mut request: Request) -> Request {
        match self.rng.u8(..20) {
            0 => request.headers.push(("if-none-match", "*".to_owned())),
            1 => request.headers.push(("if-match", self.tag.clone())),
            2 => request.headers.push(("if-none-match", self.tag.clone())),
            3..6 => {
                let value =
                    self.pick(&["text/plain", "application/json", "no type", "application/x-www-form-urlencoded"]);
                request.headers.push(("content-type", value.to_owned()));
            }
            6 => request.headers.push(("range", "bytes=1-3".to_owned())),
            _ => {}
        }
        request
    }

    /// A request that the document of the guest describes.
    fn of_document(&mut self) -> Request {
        let operation = self.operations[self.rng.usize(..self.operations.len())].clone();
        let mut target = String::new();
        // `/locks/{name}`: what is in braces is replaced.
        for (index, part) in operation.path.split(['{', '}']).enumerate() {
            if index % 2 == 0 { target += part } else { target += &self.key() }
        }
        for (name, values) in &operation.query {
            if self.rng.bool() {
                let value = match &**values {
                    [] => self.pick(&["1", "5s", "true", "key-1", ""]),
                    values => &values[self.rng.usize(..values.len())],
                };
                target.push(if target.contains('?') { '&' } else { '?' });
                target += &format!("{name}={value}");
            }
        }
        let body = if operation.has_body { self.body() } else { Vec::new() };
        self.with_headers(Request { body, ..Request::new(operation.method, target) })
    }

    fn key(&mut self) -> String {
        match self.rng.u8(..20) {
            0..17 => format!("key-{}", self.rng.usize(..KEYS)),
            17 => self.pick(&ODD).to_owned(),
            18 => (0..self.rng.u8(1..6)).map(|_| format!("%{:02X}", self.rng.u8(..))).collect(),
            _ => "k".repeat(LONG[self.rng.usize(..LONG.len())]),
        }
    }

    fn body(&mut self) -> Vec<u8> {
        match self.rng.u8(..10) {
            0..7 => self.pick(&BODIES).into(),
            7 => format!("value {}", self.rng.u16(..)).into(),
            8 => (0..self.rng.u16(..300)).map(|_| self.rng.u8(..)).collect(),
            _ => vec![b'x'; self.rng.usize(..20_000)],
        }
    }

    fn pick(&mut self, of: &[&'static str]) -> &'static str {
        of[self.rng.usize(..of.len())]
    }
}
