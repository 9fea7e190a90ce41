//! Every background task and thread of a server dies once: something notices.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::pin::pin;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use hyper::Request;
use hyper::header::HeaderValue;
use kvs_runtime::{BoxedTask, BoxedWork, Spawn, Tasks};
use kvs_txlog::file::FileLog;
use tempfile::TempDir;
use tokio::task;
use tokio::time::{Instant, sleep, timeout};

use super::check::too_large_with_spares;
use super::*;
use crate::contract::Scope;
use crate::guest::{CallError, Client, Engine, Incoming, Shards, Source};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Parser)]
struct Program {
    #[command(flatten)]
    serve: Serve,
}

/// Ends tasks and threads by panic when they begin: as often as is said for their name.
#[derive(Default)]
struct Saboteur(Mutex<BTreeMap<&'static str, u32>>);

impl Saboteur {
    fn of(names: &[&'static str], times: u32) -> Arc<Self> {
        Arc::new(Self(Mutex::new(names.iter().map(|name| (*name, times)).collect())))
    }

    fn env(self: &Arc<Self>) -> Env {
        Env { tasks: Tasks::given(self.clone()), ..Env::real() }
    }
}

impl Spawn for Saboteur {
    fn thread(&self, name: &str, work: BoxedWork) -> io::Result<()> {
        std::thread::Builder::new().name(name.into()).spawn(work).map(drop)
    }

    fn task(&self, _: &str, task: BoxedTask) {
        tokio::spawn(task);
    }

    fn begins(&self, name: &str) {
        let mut left = self.0.lock().unwrap();
        let Some(left_of_it) = left.get_mut(name).filter(|left| **left > 0) else { return };
        *left_of_it -= 1;
        drop(left);
        panic!("sabotage of {name}");
    }
}

struct Site {
    _data: TempDir,
    admin: SocketAddr,
    args: Serve,
}

impl Site {
    fn new() -> Self {
        let data = TempDir::new().unwrap();
        // An address of its own, so that nobody takes the port meanwhile.
        let admin = TcpListener::bind("127.0.0.4:0").unwrap().local_addr().unwrap();
        let args =
            ["kvs", "--listen", "127.0.0.4:0", "--admin", &admin.to_string(), "--tokens", "/dev/null", "--admin-open"];
        let others = [
            "--rate-limit",
            "1000/s",
            "--access-log-rate",
            "10",
            "--slow-request",
            "1s",
            "--data-dir",
            data.path().to_str().unwrap(),
        ];
        let args = Program::parse_from(args.into_iter().chain(others)).serve;
        Self { _data: data, admin, args }
    }

    /// Waits until the admin listener answers so.
    async fn until(&self, path: &'static str, is_so: impl Fn(&str) -> bool) {
        let mut last = String::new();
        let asking = async {
            loop {
                let admin = self.admin;
                let answer = task::spawn_blocking(move || ask(admin, path)).await.unwrap();
                last = answer.unwrap_or_else(|error| error.to_string());
                if is_so(&last) {
                    return;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        let asked = timeout(PATIENCE, asking).await;
        assert!(asked.is_ok(), "the last answer was:\n{last}");
    }
}

fn ask(admin: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(admin)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_task_that_panics_is_started_again() {
    const TASKS: [&str; 13] = [
        "access log",
        "admin",
        "change feed",
        "epoch",
        "guest reload",
        "housekeeping",
        "signals",
        "slow request log",
        "throttle sweep",
        "token reload",
        "upgrade requests",
        "upgrade signal",
        "watchdog",
    ];
    let site = Site::new();
    let env = Saboteur::of(&TASKS, 1).env();
    let looking = async {
        site.until("/readyz", |report| report.starts_with("HTTP/1.1 200") && report.contains("[+]tasks ok\n")).await;
        let restarted = |name: &&str| format!("kvs_task_restarts_total{{task=\"{name}\"}} 1\n");
        site.until("/metrics", |metrics| TASKS.iter().map(restarted).all(|line| metrics.contains(&line))).await;
    };
    let workers = Workers::default();
    tokio::select! {
        served = serve(&site.args, &env, &workers) => panic!("it ended: {served:?}"),
        () = looking => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn task_that_goes_on_panicking_is_reported() {
    let site = Site::new();
    let saboteur = Saboteur::of(&["housekeeping", "token reload"], u32::MAX);
    let env = saboteur.env();
    let looking = async {
        let named = |report: &str| report.contains("`housekeeping`") && report.contains("sabotage of token reload");
        site.until("/readyz", |report| report.contains("[+]tasks ok, but ") && named(report)).await;
        saboteur.0.lock().unwrap().clear();
        site.until("/readyz", |report| report.contains("[+]tasks ok\n")).await;
    };
    let workers = Workers::default();
    tokio::select! {
        served = serve(&site.args, &env, &workers) => panic!("it ended: {served:?}"),
        () = looking => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn thread_of_the_log_that_panics_ends_the_server() {
    for name in ["log writer", "log spare", "log compactor"] {
        let site = Site::new();
        let env = Saboteur::of(&[name], 1).env();
        let workers = Workers::default();
        let served = timeout(PATIENCE, serve(&site.args, &env, &workers)).await.expect("it still serves");
        let reason = format!("{:#}", served.expect_err("it ended well"));
        assert!(reason.contains(&format!("sabotage of {name}")), "{reason}");
    }
}

#[test]
fn spares_beyond_the_memory_are_reported() {
    const GIB: u64 = 1 << 30;
    let excess = |flags: &[&str], memory| {
        let args = Program::parse_from(["kvs"].iter().chain(flags)).serve;
        too_large_with_spares(&args, memory).unwrap_or_default()
    };
    // By default they fit.
    assert_eq!(excess(&["--spare", "--shards", "4"], GIB), "");
    assert_eq!(excess(&["--spare", "--guest-max-memory-bytes", "4GiB"], 8 * GIB), "");
    assert_eq!(excess(&["--shards", "64"], GIB), "");
    assert_eq!(excess(&["--spare", "--shards", "4", "--guest-max-memory-bytes", "1GiB"], 8 * GIB), "");
    let reported = excess(&["--spare", "--guest-max-memory-bytes", "4GiB"], 8 * GIB - 1);
    assert!(reported.contains("2 instances may take 8.0 GiB together"), "{reported}");
    let reported = excess(&["--spare", "--shards", "4", "--guest-max-memory-bytes", "4GiB"], 16 * GIB);
    assert!(reported.contains("8 instances may take 32.0 GiB together, and the memory is 16.0 GiB"), "{reported}");
}

/// Two shards, and the engine of their guest.
async fn two_shards(data: &TempDir) -> (Engine, Arc<Shards>) {
    let args = ["kvs", "--shards", "2", "--data-dir", data.path().to_str().unwrap()];
    let (args, env) = (Program::parse_from(args).serve, Env::real());
    let log = Arc::new(FileLog::open(store::file_options(&args, None, env.clone())).unwrap());
    let (engine, guest) = store::load(&args, &*log, false, &env).unwrap();
    let (engine, shards, _) = store::build(&args, engine, guest, log, &env).await.unwrap();
    (engine, shards)
}

fn incoming(method: &str, target: &str) -> Incoming {
    Incoming {
        request: Request::builder().method(method).uri(target).body(Bytes::new()).unwrap(),
        client: Arc::new(Client { address: None, tls_version: None, identity: None, turn: Arc::default() }),
        id: HeaderValue::from_static("1"),
        principal: None,
        scope: Scope::Admin,
        key_prefix: None,
        quota: None,
        is_sampled: false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_queue_during_failed_pause_are_served() {
    let data = TempDir::new().unwrap();
    let (_engine, shards) = two_shards(&data).await;
    let [first, second] = shards.each() else { panic!("two shards") };

    let busy = second.visit().await.unwrap();
    let mut pausing = Box::pin(shards.pause());
    assert!(pausing.as_mut().now_or_never().is_none());
    let mut call = pin!(first.call(incoming("GET", "/v1/a"), None, Instant::now() + PATIENCE));
    assert!(call.as_mut().now_or_never().is_none(), "its turn is held");
    drop(pausing);
    call.await.expect("nobody else makes the next call");
    busy.serve_others();
}

#[tokio::test(flavor = "multi_thread")]
async fn switch_and_handover_do_not_split_a_request_to_all_shards() {
    let data = TempDir::new().unwrap();
    let (engine, shards) = two_shards(&data).await;
    let [_, second] = shards.each() else { panic!("two shards") };
    let call = |method, target: &str| shards.call(incoming(method, target), Instant::now() + PATIENCE);

    let other = Arc::new(engine.load(Source::BuiltIn).unwrap());
    let replicas = shards.replicas(&other).unwrap();
    let switch = async { drop(shards.switch(other, replicas).await.unwrap()) };
    let hand_over = async { shards.pause().await.unwrap().hand_over() };
    let replacements: [LocalBoxFuture<'_, ()>; 2] = [Box::pin(switch), Box::pin(hand_over)];
    for mut replacement in replacements {
        for key in 0..40 {
            call("PUT", &format!("/v1/{key}")).await.unwrap();
        }
        let busy = second.visit().await.unwrap();
        let mut deleting = Box::pin(call("DELETE", "/v1?prefix="));
        assert!(deleting.as_mut().now_or_never().is_none(), "one shard is busy");
        assert!(replacement.as_mut().now_or_never().is_none(), "it waits for the request");
        busy.serve_others();
        let (deleted, ()) = tokio::join!(deleting, replacement);
        let deleted = deleted.expect("all shards are called").response.message().unwrap();
        assert_eq!(deleted.body(), r#"{"deleted":40,"complete":true}"#);
    }
    assert!(matches!(call("DELETE", "/v1?prefix=").await, Err(CallError::HandedOver(_))));
}
