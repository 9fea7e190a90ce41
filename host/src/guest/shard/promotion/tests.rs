//! Promotions on a log of which the test decides when it is durable, and what it can read, and the mutants that this finds.

use std::cell::Cell;
use std::future::ready;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::SystemTime;

use anyhow::bail;
use bytes::Bytes;
use futures_util::FutureExt;
use hyper::Request;
use hyper::header::HeaderValue;
use kvs_runtime::{Env, Time};
use kvs_txlog::file::{DEFAULT_SEGMENT_BYTES, Durability, FileLog, Options};
use kvs_txlog::{AppendError, Condition, Event, Receive, TransactionLog, Watermark};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;

use super::*;
use crate::contract::Scope;
use crate::guest::message::Given;
use crate::guest::{Arrangement, Client, Engine, Guest, Incoming, Limits, Shards, Source};

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
    /// Number of the next reads that fail.
    failures: AtomicUsize,
    /// Number of reads that have begun.
    reads: AtomicUsize,
    /// Whether reads wait.
    is_held: Mutex<bool>,
    changed: Condvar,
}

impl Held {
    fn hold_reads(&self, is_held: bool) {
        *self.is_held.lock().unwrap() = is_held;
        self.changed.notify_all();
    }
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
        self.reads.fetch_add(1, Ordering::Relaxed);
        drop(self.changed.wait_while(self.is_held.lock().unwrap(), |is_held| *is_held).unwrap());
        let fails = self.failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if fails.is_ok() {
            bail!("too many open files");
        }
        self.log.replay(after, receive)
    }

    fn close(&self) -> Result<()> {
        self.log.close()
    }
}

fn request(method: &str) -> Incoming {
    incoming(method, "/v1/key", Bytes::from_static(b"value"))
}

fn incoming(method: &str, target: &str, body: Bytes) -> Incoming {
    let request = Request::builder().method(method).uri(target).body(body).unwrap();
    let client = Client { address: None, tls_version: None, identity: None, turn: Arc::default() };
    Incoming {
        request,
        client: Arc::new(client),
        id: HeaderValue::from_static("id"),
        principal: None,
        scope: Scope::Admin,
        is_sampled: false,
        key_prefix: None,
        quota: None,
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
        log_lines: 1_000,
        log_line_bytes: 1 << 10,
        metrics: 100,
        tick_interval: Duration::from_millis(10),
    };
    Engine::new(limits, Vec::new(), Some(cache), 0, &Env::real()).unwrap()
}

/// A server with an entry that is not durable yet, and another guest that lacks it.
struct Begun {
    _data: TempDir,
    log: Arc<Held>,
    shards: Arc<Shards>,
    other: Arc<Guest>,
    replicas: Vec<Replica>,
}

async fn begin(engine: &Engine) -> Begun {
    begin_with(engine, Env::real()).await
}

fn options(data: &TempDir) -> Options {
    Options {
        data: data.path().to_owned(),
        segment_bytes: DEFAULT_SEGMENT_BYTES,
        group_bytes: 1 << 20,
        durability: Durability::Os,
        retain: Duration::ZERO,
        advertise: None,
        env: Env::real(),
    }
}

async fn begin_with(engine: &Engine, env: Env) -> Begun {
    let data = TempDir::new().unwrap();
    let log = Arc::new(Held {
        log: FileLog::open(options(&data)).unwrap(),
        watermark: Watermark::new(0),
        failures: AtomicUsize::new(0),
        reads: AtomicUsize::new(0),
        is_held: Mutex::default(),
        changed: Condvar::new(),
    });
    let [guest, other] = [(); 2].map(|()| engine.load(Source::BuiltIn).unwrap());
    engine.keep(&guest);
    let arrangement = Arrangement { count: 1, with_spares: false };
    let (shards, _) = Shards::build(guest, log.clone(), arrangement, env).unwrap();
    let mut replicas = shards.replicas(&other).unwrap();
    replica::catch_up_all(&mut replicas, &replica::unobserved).unwrap();
    assert_eq!(status(&shards, "PUT").await, 201);
    log.log.watermark().reached(1).await.unwrap();
    Begun { _data: data, log, shards, other: Arc::new(other), replicas }
}

/// Swaps the guest while an entry is not durable yet. Returns what is wrong with that.
async fn swap(engine: &Engine) -> Result<(), &'static str> {
    let Begun { _data, log, shards, other, replicas } = begin(engine).await;
    let mut switch = pin!(shards.switch(other, replicas));
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

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap()
}

#[test]
fn promotion_waits_and_every_mutant_of_it_is_found() {
    let runtime = runtime();
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

#[test]
fn failed_read_costs_no_promotion() {
    let cache = TempDir::new().unwrap();
    let engine = engine(cache.path());
    runtime().block_on(async {
        let Begun { _data, log, shards, other, replicas } = begin(&engine).await;
        log.watermark.advance(1);
        log.failures.store(1, Ordering::Relaxed);
        shards.switch(other, replicas).await.unwrap();
        assert_eq!((log.failures.load(Ordering::Relaxed), status(&shards, "GET").await), (0, 200));
    });
}

#[test]
fn rollback_that_waits_is_reported() {
    let cache = TempDir::new().unwrap();
    let engine = engine(cache.path());
    runtime().block_on(async {
        let Begun { _data, log, shards, other, replicas } = begin(&engine).await;
        log.watermark.advance(1);
        let switched = shards.switch(other, replicas).await.unwrap();
        assert_eq!(status(&shards, "PUT").await, 201);
        let mut restoring = pin!(shards.restore(switched.before, None));
        assert!(restoring.as_mut().now_or_never().is_none(), "it serves before everything is durable");
        assert_eq!(shards.outages().count(), 1);
        assert!(!matches!(shards.condition(), Condition::Well));
        log.watermark.advance(2);
        restoring.await.unwrap();
        assert_eq!((shards.outages().count(), status(&shards, "GET").await), (0, 200));
    });
}

#[test]
fn switch_does_not_wait_for_rebuild() {
    let cache = TempDir::new().unwrap();
    let engine = engine(cache.path());
    runtime().block_on(async {
        let Begun { _data, log, shards, other, replicas } = begin(&engine).await;
        log.watermark.advance(1);
        let before = log.reads.load(Ordering::Relaxed);
        log.hold_reads(true);
        shards.rebuild().await.unwrap();
        while log.reads.load(Ordering::Relaxed) == before {
            task::yield_now().await;
        }
        let mut switch = pin!(shards.switch(other, replicas));
        assert!(switch.as_mut().now_or_never().is_none());
        log.hold_reads(false);
        switch.await.unwrap();
        let metrics = shards.metrics();
        assert_eq!((metrics.rebuilds.get(), metrics.promotions[Cause::Swap as usize].get()), (0, 1));
        assert_eq!(status(&shards, "GET").await, 200);
    });
}

/// A clock by which every wait is over at once.
struct Hurried;

impl Time for Hurried {
    fn now(&self) -> std::time::Instant {
        std::time::Instant::now()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }

    fn sleep(&self, _: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(ready(()))
    }
}

#[test]
fn switch_ends_when_the_log_does_not_become_durable() {
    let cache = TempDir::new().unwrap();
    let engine = engine(cache.path());
    runtime().block_on(async {
        let env = Env { clock: Clock::given(Arc::new(Hurried)), ..Env::real() };
        let Begun { _data, log, shards, other, replicas } = begin_with(&engine, env).await;
        let error = shards.switch(other, replicas).await.err().unwrap();
        assert!(error.to_string().contains("the log does not become durable"), "{error:#}");
        log.watermark.advance(1);
        let metrics = shards.metrics();
        assert_eq!((metrics.promotions[Cause::Swap as usize].get(), status(&shards, "GET").await), (0, 200));
    });
}

#[test]
fn spare_is_dropped_when_the_data_outgrows_the_memory() {
    let [cache, data] = [(); 2].map(|()| TempDir::new().unwrap());
    let engine = engine(cache.path());
    Builder::new_multi_thread().enable_all().build().unwrap().block_on(async {
        let log = Arc::new(FileLog::open(options(&data)).unwrap());
        let guest = engine.load(Source::BuiltIn).unwrap();
        let arrangement = Arrangement { count: 1, with_spares: true };
        let (shards, _) = Shards::build(guest, log, arrangement, Env::real()).unwrap();
        let held: u64 = shards.memory_bytes().sum();
        shards.keep_spares(2 * held + (8 << 20));
        shards.spares().next().unwrap().1.ready().await;
        let lack = || match shards.spare_condition() {
            Condition::But(reason) => reason,
            _ => String::new(),
        };
        for number in 0..100 {
            let put = incoming("PUT", &format!("/v1/{number}"), vec![b'x'; 1 << 19].into());
            let answer = shards.call(put, Instant::now() + Duration::from_secs(600)).await.unwrap();
            assert!(matches!(answer.response, Given::Fresh { record, .. } if record.status == 201));
            if lack().contains("twice that is more than the memory") {
                assert!(number > 2, "there was memory");
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("it is kept: {}", lack());
    });
}
