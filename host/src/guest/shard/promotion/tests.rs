//! A promotion on a log of which the test decides when it is durable, and the promotions that this finds.

use std::cell::Cell;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use hyper::Request;
use hyper::header::HeaderValue;
use kvs_runtime::Env;
use kvs_txlog::file::{DEFAULT_SEGMENT_BYTES, Durability, FileLog, Options};
use kvs_txlog::{AppendError, Event, Receive, TransactionLog, Watermark};
use tempfile::TempDir;
use tokio::runtime::Builder;
use tokio::time::Instant;

use super::*;
use crate::contract::Scope;
use crate::guest::message::Given;
use crate::guest::{Arrangement, Client, Engine, Incoming, Limits, Shards, Source};

/// Ways to break a promotion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// The replica serves before what the one before it appended is durable.
    Early,
    /// The replica lacks the last entries.
    Incomplete,
}

thread_local! {
    static ON: Cell<Option<Mutant>> = const { Cell::new(None) };
}

/// Asked by the code that a mutant changes.
pub fn is(mutant: Mutant) -> bool {
    ON.get() == Some(mutant)
}

/// A log in files that is durable as far as `watermark` says.
struct Held {
    log: FileLog,
    watermark: Watermark,
}

impl TransactionLog for Held {
    fn append(&self, time: u64, events: &[Event]) -> Result<u64, AppendError> {
        self.log.append(time, events)
    }

    fn appended(&self) -> u64 {
        self.log.appended()
    }

    fn watermark(&self) -> &Watermark {
        &self.watermark
    }

    fn replay(&self, after: u64, receive: &mut Receive<'_>) -> Result<u64> {
        self.log.replay(after, receive)
    }

    fn close(&self) -> Result<()> {
        self.log.close()
    }
}

fn request(method: &str) -> Incoming {
    let request = Request::builder().method(method).uri("/v1/key").body(Bytes::from_static(b"value")).unwrap();
    let client = Client { address: None, tls_version: None, identity: None, turn: Arc::default() };
    Incoming {
        request,
        client: Arc::new(client),
        id: HeaderValue::from_static("id"),
        principal: None,
        scope: Scope::Admin,
        is_sampled: false,
        key_prefix: None,
    }
}

async fn status(shards: &Shards, method: &str) -> u16 {
    let answer = shards.call(request(method), Instant::now() + Duration::from_secs(600)).await.unwrap();
    let Given::Fresh { record, .. } = answer.response else { panic!("nothing is kept") };
    record.status
}

/// An engine that compiles a guest once.
fn engine(cache: &Path) -> Engine {
    let time = Duration::from_secs(600);
    let limits = Limits {
        call: time,
        replay: time,
        memory_bytes: 1 << 30,
        memory_source: None,
        table_elements: 100_000,
        instances: 100,
        value_bytes: 1 << 20,
        response_bytes: 1 << 20,
        appends: 1_000,
        log_bytes: 1 << 20,
        log_line_bytes: 1 << 10,
    };
    Engine::new(limits, Vec::new(), Some(cache), 0, &Env::real()).unwrap()
}

/// Swaps the guest while an entry is not durable yet. Returns what is wrong with that.
async fn swap(engine: &Engine) -> Result<(), &'static str> {
    let (data, env) = (TempDir::new().unwrap(), Env::real());
    let options = Options {
        data: data.path().to_owned(),
        segment_bytes: DEFAULT_SEGMENT_BYTES,
        group_bytes: 1 << 20,
        durability: Durability::Os,
        retain: Duration::ZERO,
        advertise: None,
        env: env.clone(),
    };
    let log = Arc::new(Held { log: FileLog::open(options).unwrap(), watermark: Watermark::new(0) });
    let [guest, other] = [(); 2].map(|()| engine.load(Source::BuiltIn).unwrap());
    engine.keep(&guest);
    let arrangement = Arrangement { count: 1, with_spares: false };
    let (shards, _) = Shards::build(guest, log.clone(), arrangement, env).unwrap();
    let mut replicas = shards.replicas(&other).unwrap();
    replica::catch_up_all(&mut replicas, &|_, _| Ok(())).unwrap();
    assert_eq!(status(&shards, "PUT").await, 201);
    log.log.watermark().reached(1).await.unwrap();

    let mut switch = pin!(shards.switch(Arc::new(other), replicas));
    for _ in 0..10 {
        if switch.as_mut().now_or_never().is_some() {
            return Err("it serves before everything is durable");
        }
        // There is one thread that blocks: what the switch has given it is done.
        task::spawn_blocking(|| ()).await.unwrap();
    }
    log.watermark.advance(1);
    switch.await.unwrap();
    if status(&shards, "GET").await == 200 { Ok(()) } else { Err("it lacks the last entry") }
}

#[test]
fn promotion_waits_and_every_mutant_of_it_is_found() {
    let runtime = Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
    let cache = TempDir::new().unwrap();
    let engine = engine(cache.path());
    let swapped = |mutant| {
        ON.set(mutant);
        runtime.block_on(swap(&engine))
    };
    assert_eq!(swapped(None), Ok(()));
    assert_eq!(swapped(Some(Mutant::Early)), Err("it serves before everything is durable"));
    assert_eq!(swapped(Some(Mutant::Incomplete)), Err("it lacks the last entry"));
}
