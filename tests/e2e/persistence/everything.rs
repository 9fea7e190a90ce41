//! Everything at once, for a configurable time: several shards, TLS, tokens, a rate limit, watches, swaps between three
//! guests, of which one traps, kills and compaction.
//!
//! No acknowledged write is lost, no watch misses one, all histories are linearizable, and memory and open files do not grow.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::support::certificates::{Authority, Kind};
use crate::support::events::Events;
use crate::support::guests::{DEFAULT_GUEST, built, component};
use crate::support::linear::clients::{Stage, keys_of};
use crate::support::linear::{AT_ONCE, judge};
use crate::support::load::{SMALL_SEGMENTS, SaysOver, count};
use crate::support::memory::memory;
use crate::support::metrics::Metrics;
use crate::support::server::{PATIENCE, Server};
use crate::support::swap::put_in;
use crate::support::tls::Client;
use crate::support::tokens::Tokens;
use crate::support::wire::{Connection, Response, Stream, Way};
use crate::support::zoo;

/// Duration: with kills ten seconds apart, and three swaps to each.
const SECONDS: u64 = 30;
/// Time between kills in a long run.
const LIFE: Duration = Duration::from_secs(60);
const WATCHERS: usize = 4;
/// Keys that one client writes in turn, each value the number of the write.
const KEYS: usize = 100;
const LAST: &str = "written-last";
/// Maximum number of open files: about thirty of the server, and eight connections for each concurrent history, also of
/// those that just ended.
const MAX_HANDLES: usize = 256;

#[test]
fn everything_at_once_loses_nothing() {
    let time = Duration::from_secs(count("KVS_TEST_EVERYTHING", SECONDS));
    let (authority, tokens) = (Authority::new(), Tokens::new());
    let pair = authority.issue("server", Kind::Server, 1);
    let known = format!("authorization: Bearer {}\r\n", tokens.add(&["client", "--scope", "write"]));
    let file = tokens.file();
    let args = [
        &SMALL_SEGMENTS[..],
        &["--shards", "4", "--probation", "1s", "--tls-cert", &pair.certificate, "--tls-key", &pair.key],
        &["--tokens", &file, "--admin-open", "--rate-limit", "1000/s", "--rate-burst", "100", "--rate-queue", "50ms"],
    ]
    .concat();
    let guests = [DEFAULT_GUEST.to_owned(), built("brittle"), built("counters")].map(|file| component(&file));
    let way = Way::new(move |address| Ok(Box::new(Client::of(&authority).connect(address)?)), &known);
    let stage = Stage::by(way);
    let server = Server::start(&args);
    stage.set(Some(server.address()));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watching: Vec<_> = (0..WATCHERS).map(|_| scope.spawn(|| watch(&stage))).collect();
        let writing = scope.spawn(|| write(&stage, &over));
        let judging = scope.spawn(|| judge_on(&stage, &over, &mut zoo::dice()));
        let says_over = SaysOver(&over);
        let (server, lives) = trouble(server, &stage, &args, &guests, time);
        drop(says_over);
        let (histories, written) =
            (judging.join().expect("all can have happened"), writing.join().expect("nothing is lost"));
        let seen: Vec<_> = watching.into_iter().map(|watcher| watcher.join().expect("nothing is missed")).collect();
        println!(
            "{histories} histories, {written} writes beside them, of which watchers saw {seen:?}; what was seen at the end of each life: {lives:?}"
        );
        assert!(lives.iter().any(|life| life.throttled > 0.0) && lives.iter().any(|life| life.compactions > 0.0));
        flat(&lives);
        server.terminate();
    });
}

/// Measurements of a server before it is killed.
#[derive(Debug)]
struct Life {
    kib: u64,
    handles: usize,
    throttled: f64,
    compactions: f64,
}

impl Life {
    fn of(server: &Server) -> Self {
        let metrics = Metrics::of(server);
        Self {
            kib: memory(server),
            handles: fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("it runs").count(),
            throttled: metrics.get("kvs_http_requests_throttled_total"),
            compactions: metrics.get("kvs_txlog_compactions_total"),
        }
    }
}

/// Swaps and kills for this time. Returns the last server, and the measurements of those before.
fn trouble(
    mut server: Server,
    stage: &Stage,
    args: &[&str],
    guests: &[Vec<u8>],
    time: Duration,
) -> (Server, Vec<Life>) {
    let life = LIFE.min(time / 3);
    let (begun, mut lives) = (Instant::now(), Vec::new());
    for step in 1.. {
        thread::sleep((life / 3 * step).saturating_sub(begun.elapsed()));
        put_in(&server, &guests[step as usize % guests.len()]);
        // No kill at the end, which could hide a crash.
        if begun.elapsed() >= time {
            return (server, lives);
        }
        if step % 3 == 0 {
            lives.push(Life::of(&server));
            stage.set(None);
            server = server.kill().restart(args);
            stage.set(Some(server.address()));
        }
    }
    unreachable!("steps go on")
}

/// Checks that the last third of the servers takes hardly more memory than the first, which varies with the moment of the
/// kill, and that none has more open files than its clients need.
fn flat(lives: &[Life]) {
    let third = lives.len().div_ceil(3);
    let most = |lives: &[Life]| lives.iter().map(|life| life.kib).max().expect("there was a life");
    let (before, after) = (most(&lives[..third]), most(&lives[lives.len() - third..]));
    assert!(after < before + before / 4 + (16 << 10), "{before} KiB became {after}");
    assert!(lives.iter().all(|life| life.handles < MAX_HANDLES));
}

/// Records and checks histories until it is over, and returns their number.
fn judge_on(stage: &Stage, over: &AtomicBool, rng: &mut Rng) -> u64 {
    let mut client = Asking::new(stage);
    let mut histories = 0;
    while !over.load(Ordering::Relaxed) {
        let names: Vec<_> = (histories..histories + AT_ONCE).map(|n| format!("history-{n}")).collect();
        judge(stage, &names, rng, |_| ());
        histories += AT_ONCE;
        for key in names.iter().flat_map(|name| keys_of(name)) {
            client.ask("DELETE", &key, "");
        }
    }
    histories
}

/// Writes until it is over, reads all keys after each kill, and returns the number of writes.
fn write(stage: &Stage, over: &AtomicBool) -> u64 {
    let mut client = Asking::new(stage);
    let mut newest = vec![None; KEYS];
    for number in 0_u64.. {
        let key = number as usize % KEYS;
        assert_eq!(client.ask("PUT", &format!("written-{key}"), &number.to_string()).status, 201);
        newest[key] = Some(number);
        let is_over = over.load(Ordering::Relaxed);
        if std::mem::take(&mut client.broke) || is_over {
            for (key, newest) in newest.iter().enumerate().filter_map(|(key, newest)| Some((key, (*newest)?))) {
                let answer = client.ask("GET", &format!("written-{key}"), "");
                assert_eq!((answer.status, answer.text()), (200, newest.to_string().as_str()), "written-{key}");
            }
        }
        if is_over {
            client.ask("PUT", LAST, "");
            return number + 1;
        }
    }
    unreachable!("numbers go on")
}

/// Watches all writes to the last, and returns the number of events, and of resumes at a compacted position.
fn watch(stage: &Stage) -> (u64, u64) {
    // The position to resume from, and the number of the last write.
    let (mut last, mut newest, mut seen, mut late) = (None, None, 0, 0);
    let mut alone = Instant::now();
    loop {
        assert!(alone.elapsed() < PATIENCE, "nothing is reported");
        let since = last.map(|id| format!("&since={id}")).unwrap_or_default();
        let events = stage
            .open()
            .and_then(|connection| Events::over(connection, &format!("/v1?watch&prefix=written-{since}"), &[]));
        let mut events = match events {
            Ok(Ok(events)) => events,
            Ok(Err(refused)) => {
                match refused.status {
                    410 => (last, newest, late) = (None, None, late + 1),
                    status => assert!(matches!(status, 429 | 503), "{status}"),
                }
                continue;
            }
            Err(_) => continue,
        };
        last.get_or_insert(events.begin);
        while let Ok(Some(event)) = events.try_next() {
            assert!(last < Some(event.id), "{} came after {last:?}", event.id);
            (last, seen, alone) = (Some(event.id), seen + 1, Instant::now());
            if event.data["key"] == LAST {
                return (seen, late);
            }
            let number: u64 = event.data["value"].as_str().and_then(|text| text.parse().ok()).expect("a number");
            // Repeated when the first response was lost.
            assert!(newest.is_none_or(|newest| number == newest || number == newest + 1), "{number} after {newest:?}");
            newest = Some(number);
        }
    }
}

/// A client that repeats a request until it gets a response.
struct Asking<'s> {
    stage: &'s Stage,
    connection: Option<Connection<Box<dyn Stream>>>,
    /// A connection was lost.
    broke: bool,
}

impl<'s> Asking<'s> {
    fn new(stage: &'s Stage) -> Self {
        Self { stage, connection: None, broke: false }
    }

    fn ask(&mut self, method: &str, key: &str, value: &str) -> Response {
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < PATIENCE, "nobody answers {method} {key}");
            let connected = self.connection.take().map_or_else(|| self.stage.open(), Ok);
            let answered = connected.and_then(|mut connection| {
                let answer = connection.try_ask(method, &format!("/v1/{key}"), value.as_bytes())?;
                Ok((connection, answer))
            });
            match answered {
                Err(_) => self.broke = true,
                Ok((connection, answer)) => {
                    if answer.header("connection") != Some("close") {
                        self.connection = Some(connection);
                    }
                    if !matches!(answer.status, 429 | 500 | 503 | 504) {
                        return answer;
                    }
                }
            }
        }
    }
}
