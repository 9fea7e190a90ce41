//! What a guest can ask of the host beside the log: the identifier of the request, log lines with a level, the timer, metrics.
//! What is too much is cut, which is counted.
//!
//! The guest is `tests/guests/unruly`, whose paths `/ask/…` are in its `asks.rs`.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::guests::{DEFAULT_GUEST, component, guest};
use crate::support::metrics::{Metrics, until};
use crate::support::server::{PATIENCE, Server};
use crate::support::swap::{in_phase, swap};
use crate::support::wire::{Connection, get};

/// A server with the guest, and a client.
fn start(args: &[&str]) -> (Server, Connection) {
    let server = Server::start(&[&[guest()], args].concat());
    let client = Connection::open(server.address());
    (server, client)
}

#[track_caller]
fn ask(client: &mut Connection, what: &str) -> String {
    let response = get(client, &format!("/ask/{what}"));
    assert_eq!(response.status, 200, "{what}");
    response.text().to_owned()
}

fn exceeded(metrics: &Metrics, limit: &str) -> f64 {
    metrics.get(&format!("kvs_guest_limit_exceeded_total{{limit=\"{limit}\"}}"))
}

/// Samples of the metrics that the guest defined.
fn custom(metrics: &Metrics) -> BTreeMap<String, f64> {
    let custom = metrics
        .values
        .iter()
        .filter_map(|(name, value)| Some((name.strip_prefix("kvs_guest_custom_")?.to_owned(), *value)));
    custom.collect()
}

fn ticks(client: &mut Connection) -> u64 {
    get(client, "/ticks").text().parse().expect("a count")
}

#[test]
fn request_id_is_that_of_the_response_and_of_log_lines() {
    let (server, mut client) = start(&[]);
    let given = client.ask_with("GET", "/ask/request-id", &[("x-request-id", "from-the-client-1")], b"");
    assert_eq!(given.text(), "Some(\"from-the-client-1\")");
    let made = client.ask("GET", "/ask/request-id", b"");
    let id = made.header("x-request-id").expect("the host made one").to_owned();
    assert_eq!(made.text(), format!("Some({id:?})"));

    client.ask_with("GET", "/ask/log/info/with-an-id", &[("x-request-id", "from-the-client-2")], b"");
    let line = server.says("with-an-id");
    assert!(line.contains("request_id=\"from-the-client-2\"") && line.contains("guest=\"unruly\""), "{line}");
}

#[test]
fn log_lines_have_their_level_and_are_filtered() {
    let (server, mut client) = start(&[]);
    for level in ["trace", "debug", "info", "warn", "error"] {
        ask(&mut client, &format!("log/{level}/of-level-{level}"));
    }
    for level in ["info", "warn", "error"] {
        let line = server.says(&format!("of-level-{level}"));
        assert!(line.contains(&level.to_uppercase()), "{line}");
    }
    // All were logged in order.
    assert!(!server.stderr().iter().any(|line| line.contains("of-level-trace") || line.contains("of-level-debug")));

    let (server, mut client) = start(&["--log-filter", "info,kvs::guest::output=debug"]);
    for level in ["trace", "debug"] {
        ask(&mut client, &format!("log/{level}/of-level-{level}"));
    }
    assert!(server.says("of-level-debug").contains("DEBUG"));
    assert!(!server.stderr().iter().any(|line| line.contains("of-level-trace")));
}

#[test]
fn message_cannot_forge_log_lines() {
    let (server, mut client) = start(&[]);
    ask(&mut client, "log/info/first%0Aforged");
    let line = server.says("first");
    assert!(line.contains("first\\nforged"), "{line}");
}

#[test]
fn flood_of_log_lines_is_cut_and_counted() {
    let (server, mut client) = start(&["--guest-log-lines", "100"]);
    let begun = Instant::now();
    ask(&mut client, "log-often/3000");
    let spans = begun.elapsed().as_secs() as usize + 2;
    server.says("output beyond 100 lines in 1s is dropped");
    let dropped = exceeded(&Metrics::of(&server), "guest-log-lines");
    // The lines are written by a thread of their own.
    let written = 3_000 - dropped as usize;
    assert!((100..=100 * spans).contains(&written), "{written} lines in {spans} spans");
    assert_eq!(exceeded(&Metrics::of(&server), "guest-log-bytes"), 0.0);
}

#[test]
fn metrics_of_all_shards_are_shown() {
    let (server, mut client) = start(&["--shards", "4"]);
    ask(&mut client, "add/orders/2");
    ask(&mut client, "add/orders/3");
    ask(&mut client, "add-labelled/requests/kind/a%22b");
    ask(&mut client, "set/open/1.5");
    ask(&mut client, "set/open/-2");
    let shown = custom(&Metrics::of(&server));
    let gauge = shown.iter().find(|(name, _)| name.starts_with("open{shard=\"")).expect("it has a shard");
    assert_eq!(*gauge.1, -2.0);
    assert_eq!(shown.len(), 3, "{shown:?}");
    assert_eq!((shown["orders_total"], shown["requests_total{kind=\"a%22b\"}"]), (5.0, 1.0));

    // They outlive the instance, and begin again with the process.
    assert_eq!(get(&mut client, "/trap").status, 500);
    ask(&mut client, "add/orders/1");
    assert_eq!(custom(&Metrics::of(&server))["orders_total"], 6.0);
    let server = server.terminate().restart(&[guest()]);
    assert_eq!(custom(&Metrics::of(&server)), BTreeMap::new());
}

#[test]
fn metrics_of_restored_guest_begin_again() {
    let (server, mut client) = start(&["--probation", "60s"]);
    ask(&mut client, "add/orders/5");
    assert_eq!(custom(&Metrics::of(&server))["orders_total"], 5.0);
    thread::scope(|scope| {
        let swapping = scope.spawn(|| swap(&server, &component(DEFAULT_GUEST)));
        in_phase(&server, "probation");
        assert_eq!(custom(&Metrics::of(&server)), BTreeMap::new());
        assert_eq!(Connection::open(server.admin()).ask("DELETE", "/guest?rollback", b"").status, 202);
        assert_eq!(swapping.join().expect("it has a response").status, 422);
    });
    assert_eq!(custom(&Metrics::of(&server)), BTreeMap::new());
    ask(&mut client, "add/orders/1");
    assert_eq!(custom(&Metrics::of(&server))["orders_total"], 1.0);
}

#[test]
fn invalid_metrics_are_refused_and_counted() {
    let (server, mut client) = start(&[]);
    let invalid =
        ["add/Orders/1", "add/orders_total/1", "set/open/NaN", "add-labelled/a/shard/1", "add-labelled/a/B/1"];
    for what in invalid {
        ask(&mut client, what);
    }
    let metrics = Metrics::of(&server);
    assert_eq!((custom(&metrics), exceeded(&metrics, "invalid-metric")), (BTreeMap::new(), invalid.len() as f64));
    let line = server.says("the guest's metric");
    assert!(line.contains("\"Orders\" is refused") && line.contains("lower-case letters"), "{line}");
    assert_eq!(server.stderr().iter().filter(|line| line.contains("is refused")).count(), 1, "a line for each");
}

#[test]
fn flood_of_metrics_is_cut_and_counted() {
    let (server, mut client) = start(&["--guest-max-metrics", "10"]);
    ask(&mut client, "add-many/2000");
    ask(&mut client, "add-many/20");
    ask(&mut client, "add/another/1");
    let metrics = Metrics::of(&server);
    let shown = custom(&metrics);
    assert_eq!(shown.len(), 10, "{shown:?}");
    assert!(shown.values().all(|count| *count == 2.0), "those that are there can be changed: {shown:?}");
    assert_eq!(exceeded(&metrics, "guest-max-metrics"), 1_990.0 + 10.0 + 1.0);
    server.says("metrics of the guest beyond 10 (--guest-max-metrics) are dropped");
}

#[test]
fn timer_ends_the_ticks_of_every_second() {
    let (server, mut client) = start(&["--shards", "1", "--guest-config", "fault=tick-sets-timer-to-never"]);
    let begun = Instant::now();
    while ticks(&mut client) == 0 {
        assert!(begun.elapsed() < PATIENCE, "there is no first tick");
    }
    // The rounds of each second continue, since they count keys too.
    for n in 1..=3 {
        assert_eq!(client.ask("PUT", &format!("/store/{n}"), b"").status, 201);
        until(&server, "they are counted", |metrics| metrics.get("kvs_store_keys") == f64::from(n));
    }
    assert_eq!(ticks(&mut client), 1);

    // Set in a request, it fires once and not before its time.
    let begun = Instant::now();
    ask(&mut client, "timer/300");
    while ticks(&mut client) == 1 {
        assert!(begun.elapsed() < PATIENCE, "the timer does not fire");
    }
    assert!(begun.elapsed() >= Duration::from_millis(300), "after {:?}", begun.elapsed());
    // One that is later than a second, and one in its place that is not.
    ask(&mut client, "timer/3600000");
    ask(&mut client, "timer/0");
    let begun = Instant::now();
    while ticks(&mut client) == 2 {
        assert!(begun.elapsed() < PATIENCE, "the timer does not fire");
    }
    // It is lost with the instance, which has a tick soon.
    assert_eq!(get(&mut client, "/trap").status, 500);
    let begun = Instant::now();
    while ticks(&mut client) == 0 {
        assert!(begun.elapsed() < PATIENCE, "there is no tick after the rebuild");
    }
}

#[test]
fn flood_of_timers_is_cut_and_counted() {
    let args =
        ["--shards", "1", "--guest-min-tick-interval", "200ms", "--guest-config", "fault=tick-sets-timer-to-never"];
    let (server, mut client) = start(&args);
    let (begun, first) = (Instant::now(), ticks(&mut client));
    while ticks(&mut client) < first + 6 {
        ask(&mut client, "timer/0");
        assert!(begun.elapsed() < PATIENCE, "the timer does not fire");
    }
    // The first may have been due.
    assert!(begun.elapsed() >= Duration::from_millis(5 * 200), "after {:?}", begun.elapsed());
    assert!(exceeded(&Metrics::of(&server), "guest-min-tick-interval") >= 6.0);
    // The same of ticks that want to be called again.
    let (server, _) = start(&["--guest-config", "fault=tick-again"]);
    until(&server, "ticks are postponed", |metrics| exceeded(metrics, "guest-min-tick-interval") >= 5.0);
}

#[test]
fn apply_has_no_request_id_metrics_or_timer() {
    let (server, mut client) = start(&[]);
    assert_eq!(client.ask("PUT", "/store/{own}a", b"value").status, 201);
    let server = server.terminate().restart(&[guest(), "--guest-config", "fault=apply-asks"]);
    let mut client = Connection::open(server.address());
    assert_eq!(get(&mut client, "/refusal").text(), "None");
    assert!(server.says("asked for everything").contains("WARN"));
    assert_eq!(custom(&Metrics::of(&server)), BTreeMap::new());
    // A timer would have ended the ticks.
    let (begun, first) = (Instant::now(), ticks(&mut client));
    while ticks(&mut client) < first + 2 {
        assert!(begun.elapsed() < PATIENCE, "there are no ticks");
    }
}
