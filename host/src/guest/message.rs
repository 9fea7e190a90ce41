//! A request and its answer, as HTTP has them and as the contract does.
//!
//! Owns: the translation between HTTP messages and the contract's records, and what of a guest's response may leave. Must
//! never know: how a guest is called.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use bytes::Bytes;
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use kvs_txlog::subscribers::Selection;

use super::cache::{Kept, Reusable};
use super::quota::Quota;
use crate::contract::{self, Grant, HeaderRef, ResponseRef, Scope};

/// Headers a response may carry; far more than any needs, far fewer than an HTTP library can hold.
const RESPONSE_HEADERS: usize = 256;

/// Headers that the host adds: the request id, and against guesses of the content type and of how long a response is good.
const HOST_HEADERS: usize = 3;

/// Headers that speak of the connection or the framing, which are the host's.
static CONNECTION_HEADERS: [HeaderName; 7] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    HeaderName::from_static("keep-alive"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Header that a guest sets for the host to give it a value: the position from which a watch misses nothing that the response
/// does not show.
static POSITION: HeaderName = HeaderName::from_static("kvs-position");

/// Names that most responses have: to find one among few takes less than to parse it.
static COMMON_NAMES: [HeaderName; 6] = [
    header::CONTENT_TYPE,
    header::ETAG,
    header::ACCEPT_RANGES,
    header::CONTENT_SECURITY_POLICY,
    HeaderName::from_static("kvs-created"),
    HeaderName::from_static("kvs-sequence"),
];

fn name(name: &str) -> Result<HeaderName> {
    if let Some(common) = COMMON_NAMES.iter().find(|common| common.as_str() == name) {
        return Ok(common.clone());
    }
    let name = HeaderName::from_bytes(name.as_bytes())?;
    ensure!(!CONNECTION_HEADERS.contains(&name), "the header {name} is set by the host, not by the guest");
    Ok(name)
}

/// Values that most responses have. These are shared by all: without a buffer and a count of references, a kept response takes less
/// memory, and a hit reads less of it.
const COMMON_VALUES: [&str; 7] = [
    "bytes",
    "sandbox",
    "nosniff",
    "no-cache",
    "application/json",
    "application/octet-stream",
    "text/plain; charset=utf-8",
];

/// Returns the bytes that a header value holds of its own.
pub(super) fn own_bytes(value: &HeaderValue) -> usize {
    if COMMON_VALUES.iter().any(|common| *value == **common) { 0 } else { value.len() }
}

fn value(bytes: Vec<u8>) -> Result<HeaderValue> {
    match COMMON_VALUES.iter().find(|common| common.as_bytes() == bytes) {
        Some(common) => Ok(HeaderValue::from_static(common)),
        None => Ok(HeaderValue::from_maybe_shared(Bytes::from(bytes))?),
    }
}

/// A client: the other end of a connection, or who that is a proxy of.
#[derive(Debug)]
pub struct Client {
    /// None on a Unix socket. The port is 0 where a proxy did not give it.
    pub address: Option<SocketAddr>,
    pub tls_version: Option<&'static str>,
    /// The subject of its certificate, which was found good.
    pub identity: Option<Arc<str>>,
    /// Its requests are called for one after the other: a hundred streams of one connection get no more of the guest than
    /// one request of another.
    pub turn: Arc<tokio::sync::Mutex<()>>,
}

impl Client {
    /// A client of a proxy, on its connection.
    pub fn at(&self, address: SocketAddr) -> Self {
        let Self { tls_version, identity, turn, .. } = self;
        Self { address: Some(address), tls_version: *tls_version, identity: identity.clone(), turn: Arc::clone(turn) }
    }
}

/// Names of the request headers that a guest is given.
#[derive(Default)]
pub struct Wanted {
    names: Box<[HeaderName]>,
    /// A bit for each length of a name, which rules out most other headers without a comparison.
    lengths: u64,
}

impl Wanted {
    pub fn new(names: impl Into<Box<[HeaderName]>>) -> Self {
        let names = names.into();
        let lengths = names.iter().map(Self::length).fold(0, |all, length| all | length);
        Self { names, lengths }
    }

    fn has(&self, name: &HeaderName) -> bool {
        self.lengths & Self::length(name) != 0 && self.names.contains(name)
    }

    fn length(name: &HeaderName) -> u64 {
        1 << (name.as_str().len() % 64)
    }
}

/// A request, read whole.
#[derive(Clone, Debug)]
pub struct Incoming {
    pub request: Request<Bytes>,
    pub client: Arc<Client>,
    /// By which it is known outside.
    pub id: HeaderValue,
    /// Who asks, when that is known.
    pub principal: Option<Arc<str>>,
    /// What the client may do.
    pub scope: Scope,
    /// Whether a candidate is given it too.
    pub is_sampled: bool,
    /// Which keys it may read and change, if not all.
    pub key_prefix: Option<Arc<str>>,
    /// What the keys with that prefix may take, if not all.
    pub quota: Option<Quota>,
}

impl Incoming {
    pub fn id(&self) -> &str {
        self.id.to_str().unwrap_or_default()
    }

    pub(super) fn target(&self) -> &str {
        self.request.uri().path_and_query().map_or("", |target| target.as_str())
    }

    /// Those of its headers that the guest asked for.
    pub(super) fn headers(&self, wanted: &Wanted) -> Vec<HeaderRef<'_>> {
        // There are fewer of those that came than of those that can be asked for, and to look for each costs a hash.
        let shown = self.request.headers().iter().filter(|(name, _)| wanted.has(name));
        shown.map(|(name, value)| HeaderRef { name: name.as_str(), value: value.as_bytes() }).collect()
    }

    pub(super) fn record<'r>(&'r self, headers: &'r [HeaderRef<'r>], time: u64) -> contract::Request<'r> {
        contract::Request {
            method: self.request.method().as_str(),
            target: self.target(),
            headers,
            body: self.request.body(),
            principal: self.principal.as_deref(),
            grant: Grant { scope: self.scope, key_prefix: self.key_prefix.as_deref() },
            time_ms: time,
        }
    }

    pub(super) fn without_body(&self) -> Self {
        let mut request = Request::new(Bytes::new());
        (*request.method_mut(), *request.uri_mut()) = (self.request.method().clone(), self.request.uri().clone());
        (*request.version_mut(), *request.headers_mut()) = (self.request.version(), self.request.headers().clone());
        Self {
            request,
            client: Arc::clone(&self.client),
            id: self.id.clone(),
            principal: self.principal.clone(),
            scope: self.scope,
            is_sampled: self.is_sampled,
            key_prefix: self.key_prefix.clone(),
            quota: self.quota,
        }
    }
}

/// What a call gave.
pub struct Answer {
    pub response: Given,
    /// The newest sequence that the response depends on: it may leave when the log is durable up to this.
    pub read_sequence: u64,
    /// Time in the guest. Of several shards, the longest.
    pub guest_time: Duration,
    /// Whether the call appended, so that it has an outcome at all.
    pub appended: bool,
    /// Whether an append was refused for the quota of the client, which is why the response is an error.
    pub is_over_quota: bool,
    /// What the guest asked for in place of the response as it is.
    pub sequel: Option<Sequel>,
    /// Keeps the response for equal requests, when the guest declared that it can be reused.
    pub reusable: Option<Box<Reusable>>,
}

/// A response as the guest gave it.
pub enum Given {
    /// Now. It is looked at by who asked, when others have their turn.
    Fresh {
        record: contract::Response,
        /// Longest body.
        most: usize,
        /// End of the log when the call began; of several calls, the smallest.
        end: u64,
    },
    /// Before, to an equal request.
    Kept(Arc<Kept>),
}

impl Given {
    /// Whether it was kept, with the headers that the host added to it.
    pub fn is_kept(&self) -> bool {
        matches!(self, Self::Kept(_))
    }

    /// The size of its body.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Fresh { record, .. } => record.body.len(),
            Self::Kept(kept) => kept.length,
        }
    }

    /// The HTTP message that it is, if it is one. The body of a kept response to HEAD can be missing.
    pub fn message(self) -> Result<Response<Bytes>> {
        let (record, most, end) = match self {
            Self::Fresh { record, most, end } => (record, most, end),
            // Copied as a whole: to append a header hashes its name.
            Self::Kept(kept) => return Ok(kept.response.clone()),
        };
        ensure!((200..=599).contains(&record.status), "status {}", record.status);
        let bytes = record.body.len();
        ensure!(bytes <= most, "a body of {bytes} bytes, at most {most} are allowed");
        let count = record.headers.len();
        ensure!(count <= RESPONSE_HEADERS, "{count} headers, at most {RESPONSE_HEADERS} are allowed");
        let mut response = Response::new(Bytes::from(record.body));
        *response.status_mut() = StatusCode::from_u16(record.status)?;
        response.headers_mut().reserve(count + HOST_HEADERS);
        for header in record.headers {
            let name = name(&header.name)?;
            let value = if name == POSITION { HeaderValue::from(end) } else { value(header.value)? };
            response.headers_mut().append(name, value);
        }
        Ok(response)
    }

    /// The position that the response shows, which is the end of the log when the call began.
    pub(super) fn position(&self) -> Option<u64> {
        let (end, record) = self.fresh()?;
        record.headers.iter().any(|header| POSITION == *header.name).then_some(end)
    }

    /// End of the log when the call began.
    pub(super) fn end(&self) -> Option<u64> {
        self.fresh().map(|(end, _)| end)
    }

    /// The same, with the response to the call.
    pub(super) fn fresh(&self) -> Option<(u64, &contract::Response)> {
        match self {
            Self::Fresh { end, record, .. } => Some((*end, record)),
            Self::Kept(_) => None,
        }
    }

    pub(super) fn headers(&self) -> Vec<HeaderRef<'_>> {
        match self {
            Self::Fresh { record, .. } => {
                record.headers.iter().map(|header| HeaderRef { name: &header.name, value: &header.value }).collect()
            }
            Self::Kept(kept) => kept
                .response
                .headers()
                .iter()
                .map(|(name, value)| HeaderRef { name: name.as_str(), value: value.as_bytes() })
                .collect(),
        }
    }
}

impl Answer {
    pub(super) fn record<'r>(&'r self, headers: &'r [HeaderRef<'r>]) -> ResponseRef<'r> {
        let (status, body) = match &self.response {
            Given::Fresh { record, .. } => (record.status, &*record.body),
            Given::Kept(kept) => (kept.response.status().as_u16(), &**kept.response.body()),
        };
        ResponseRef { status, headers, body, read_sequence: Some(self.read_sequence) }
    }
}

pub enum Sequel {
    /// The head, and then changes.
    Watch(Watch),
    /// Another response, later. Boxed, since hardly any request waits.
    Wait(Box<Wait>),
}

/// Changes that a response continues with.
pub struct Watch {
    pub selection: Selection,
    /// Position after which they begin, as the client sent it; without one, they begin after `end`.
    pub after: Option<String>,
    /// End of the log at the call.
    pub end: u64,
}

/// A request that waits for a change of a key, or for the end of its timeout.
pub struct Wait {
    pub key: String,
    pub timeout: Duration,
    /// To be handled again.
    pub incoming: Incoming,
}
