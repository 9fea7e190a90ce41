//! Response cache: responses that their guest declared reusable, given again without a call for as long as they are right.
//!
//! A response is looked up by all that its guest was given (`key`), and is right while the keys it depends on have not
//! changed and the same guest serves (`versions`), until the time that the guest named. What is kept is the guest's response,
//! before anything that the host makes of it for one client; it takes the same way to a client as a response of the guest.
//!
//! Owns: what is kept, for how long, and how much. Must never know: which request a shard handles, how a response leaves.

mod key;
#[cfg(test)]
mod tests;
mod versions;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::header::{HeaderName, HeaderValue};
use hyper::{Method, Response};
use kvs_metrics::{Counter, Measured, Page};
use kvs_runtime::Random;
use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, Lifecycle, OptionsBuilder, Weighter};
use siphasher::sip::SipHasher13;

use super::clock::Clock;
use super::message::{Answer, Given, Incoming, Wanted, own_bytes};
use super::sync;
use crate::contract::Request;
use versions::{Generation, Stamp, Versions};

/// Share of the cache that one response can take.
const SHARE: u64 = 16;
/// Parts of the cache with a lock of their own, so few that the largest response is at most half of one.
const PARTS: usize = 8;
/// Bytes of a typical response with all that it takes here, by which tables are made.
const TYPICAL: u64 = 1 << 10;
/// Bytes that a response takes beside its key, headers and body: itself, its places in tables, and what allocators add.
const OVERHEAD: usize = 352;
/// The same of one buffer: of a header or the body.
const BUFFER: usize = 48;
/// Bytes that a header takes beside its value: itself and a link, the hash of its name, and up to three places in the table of
/// these.
const HEADER: usize = size_of::<(HeaderName, HeaderValue)>() + 44;
/// Keys of a declaration. Each is looked at on every hit.
pub const KEYS: usize = 100;

pub struct ResponseCache {
    responses: Cache<Box<[u8]>, Arc<Kept>, Weight, DefaultHashBuilder, Evictions>,
    /// Most bytes of one response; 0 when nothing is kept.
    largest: u64,
    versions: Versions<Arc<Wanted>>,
    /// Unknown outside, so that nobody can choose keys whose changes invalidate what others read.
    hasher: SipHasher13,
    clock: Arc<Clock>,
    hits: Counter,
    misses: Counter,
    void: Counter,
    evictions: Arc<Counter>,
}

/// The generation of the guest that is called.
pub type Serving = Arc<Generation<Arc<Wanted>>>;

/// A declaration of the call in progress.
pub struct Declared {
    stamp: Stamp,
    until: Option<u64>,
}

/// A response that may be kept, while it is made a message.
pub struct Reusable {
    cache: Arc<ResponseCache>,
    key: Vec<u8>,
    declared: Declared,
    is_head: bool,
    read_sequence: u64,
}

/// A response that is kept.
pub struct Kept {
    /// Without the body for HEAD, but of an error, which can become a problem of another length.
    pub response: Response<Bytes>,
    /// Length of the body that the guest gave.
    pub length: usize,
    read_sequence: u64,
    declared: Declared,
    bytes: u64,
}

impl ResponseCache {
    /// A cache of this many bytes; of none, nothing is kept. The guests' clock says what has expired.
    pub fn new(bytes: u64, clock: Arc<Clock>, random: &Random) -> anyhow::Result<Arc<Self>> {
        let mut options = OptionsBuilder::new();
        options.shards(PARTS).weight_capacity(bytes).estimated_items_capacity(usize::try_from(bytes / TYPICAL)?);
        let evictions = Arc::<Counter>::default();
        let lifecycle = Evictions(Arc::clone(&evictions));
        let responses = Cache::with_options(options.build()?, Weight, DefaultHashBuilder::default(), lifecycle);
        let mut seed = [0; 16];
        random.fill(&mut seed)?;
        Ok(Arc::new(Self {
            responses,
            largest: bytes / SHARE,
            versions: Versions::new(Arc::default()),
            hasher: SipHasher13::new_with_key(&seed),
            clock,
            hits: Counter::default(),
            misses: Counter::default(),
            void: Counter::default(),
            evictions,
        }))
    }

    /// The response to an equal request, when there is one that is right.
    pub fn get(&self, incoming: &Incoming) -> Option<Answer> {
        if self.largest == 0 || incoming.is_sampled || !incoming.request.body().is_empty() {
            return None;
        }
        // Before the response is looked up and judged: in this generation it was right.
        let generation = self.versions.current();
        let headers = incoming.headers(&generation.of);
        let key = key::of(&incoming.record(&headers, 0))?;
        let kept = self.responses.get(&*key).filter(|kept| self.is_right(&kept.declared, &generation));
        let count = if kept.is_some() { &self.hits } else { &self.misses };
        count.add(1);
        kept.map(|kept| Answer {
            read_sequence: kept.read_sequence,
            response: Given::Kept(kept),
            guest_time: Duration::ZERO,
            appended: false,
            is_over_quota: false,
            sequel: None,
            reusable: None,
        })
    }

    fn is_right(&self, declared: &Declared, generation: &Serving) -> bool {
        self.versions.is_current(&declared.stamp, generation)
            && declared.until.is_none_or(|until| self.clock.now() < until)
    }

    /// The generation in which a call begins. To be asked in its turn.
    pub fn serving(&self) -> Option<Serving> {
        (self.largest > 0).then(|| self.versions.generation())
    }

    /// Begins a generation: another guest serves, which reads these headers, or the same with another history. To be called before
    /// that guest is, which is why a swap calls it in all turns.
    pub fn serve(&self, headers: Arc<Wanted>) {
        self.versions.next_generation(headers);
    }

    /// The same, when only the history is another. Needs no turn.
    pub fn renew(&self) {
        self.versions.renew();
    }

    /// The key is about to change.
    pub fn announce(&self, key: &str) {
        if self.largest > 0 {
            self.versions.announce(self.hash(key));
        }
    }

    /// Takes a declaration, in the call that makes it.
    pub fn declare(&self, serving: &Serving, keys: &[String], until: Option<u64>) -> Declared {
        Declared { stamp: self.versions.stamp(serving, keys.iter().map(|key| self.hash(key))), until }
    }

    /// A declaration was void.
    pub fn count_void(&self) {
        self.void.add(1);
    }

    /// A response to this request that was declared reusable.
    pub fn reusable(
        self: &Arc<Self>,
        request: &Request<'_>,
        declared: Declared,
        read_sequence: u64,
    ) -> Option<Box<Reusable>> {
        let key = key::of(request)?;
        let is_head = request.method == Method::HEAD.as_str();
        Some(Box::new(Reusable { cache: Arc::clone(self), key, declared, is_head, read_sequence }))
    }

    fn hash(&self, key: &str) -> u64 {
        let mut hasher = self.hasher;
        key.hash(&mut hasher);
        hasher.finish()
    }
}

impl Reusable {
    /// Keeps the message that the response became.
    pub fn keep(self, response: &Response<Bytes>) {
        let Self { cache, key, declared, is_head, read_sequence } = self;
        // What is superseded already must not take the place of what superseded it.
        if !cache.is_right(&declared, &cache.versions.generation()) {
            return;
        }
        let status = response.status();
        let is_error = status.is_client_error() || status.is_server_error();
        let length = response.body().len();
        let body = if is_head && !is_error { Bytes::new() } else { response.body().clone() };
        let headers = response.headers();
        let bytes = OVERHEAD
            + key.len()
            + declared.stamp.bytes()
            + headers.values().map(header_bytes).sum::<usize>()
            + BUFFER
            + body.len();
        let bytes = bytes as u64;
        if bytes > cache.largest {
            return;
        }
        let mut kept = Response::new(body);
        (*kept.status_mut(), *kept.headers_mut()) = (status, headers.clone());
        let kept = Kept { response: kept, length, read_sequence, declared, bytes };
        cache.responses.insert(key.into(), Arc::new(kept));
    }
}

fn header_bytes(value: &HeaderValue) -> usize {
    match own_bytes(value) {
        0 => HEADER,
        bytes => HEADER + BUFFER + bytes,
    }
}

/// What a response takes.
#[derive(Clone)]
struct Weight;

impl Weighter<Box<[u8]>, Arc<Kept>> for Weight {
    fn weight(&self, _key: &Box<[u8]>, kept: &Arc<Kept>) -> u64 {
        kept.bytes
    }
}

/// Counts evictions.
#[derive(Clone)]
struct Evictions(Arc<Counter>);

impl Lifecycle<Box<[u8]>, Arc<Kept>> for Evictions {
    type RequestState = ();

    fn begin_request(&self) {}

    /// Not `on_evict`, which is also called for what is replaced.
    fn before_evict(&self, (): &mut (), _key: &Box<[u8]>, _kept: &mut Arc<Kept>) {
        self.0.add(1);
    }
}

impl Measured for ResponseCache {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        page.counter("response_cache_hits", "Responses given without a call of the guest", self.hits.get())?;
        let help = "Requests without a body for which no response was kept";
        page.counter("response_cache_misses", help, self.misses.get())?;
        page.gauge("response_cache_bytes", "Bytes that kept responses take", self.responses.weight())?;
        let help = "Kept responses that gave way to others";
        page.counter("response_cache_evictions", help, self.evictions.get())?;
        let help = "Declarations of reuse that did not hold, by what else the guest did in the call";
        page.counter("response_cache_void_declarations", help, self.void.get())
    }
}
