//! Metrics: Prometheus parses them, each changes with its events, and the dashboard uses only existing ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::certificates::{Authority, Kind};
use crate::support::guests::{DEFAULT_GUEST, component, copy_of, guest};
use crate::support::http2::takes_back;
use crate::support::log::of_files;
use crate::support::metrics::{Metrics, counts, until};
use crate::support::server::{PATIENCE, Server, serve};
use crate::support::swap::{in_phase, swaps};
use crate::support::tokens::Tokens;
use crate::support::wire::Connection;

/// Parses the text with the library of the Prometheus project, and prints each family and each value on a line.
const PARSER: &str = r#"
import sys
if sys.argv[1] == "openmetrics":
    from prometheus_client.openmetrics.parser import text_string_to_metric_families
else:
    from prometheus_client.parser import text_string_to_metric_families
for family in text_string_to_metric_families(sys.stdin.read()):
    print("family", family.name, family.type, family.documentation, sep="\t")
    for sample in family.samples:
        labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
        print("sample", sample.name + ("{" + labels + "}" if labels else ""), sample.value, sep="\t")
"#;

/// Parsed metrics: families with type and help, and values.
type Parsed = (BTreeMap<String, (String, String)>, BTreeMap<String, f64>);

fn parse(text: &str, format: &str) -> Parsed {
    let mut python = Command::new("python3");
    python.args(["-c", PARSER, format]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut python = python.spawn().expect("python3 is there");
    python.stdin.take().expect("it is piped").write_all(text.as_bytes()).expect("the parser takes it");
    let output = python.wait_with_output().expect("the parser ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`just test` installs what this needs: {said}\n{text}");
    let (mut families, mut values) = (BTreeMap::new(), BTreeMap::new());
    for line in String::from_utf8(output.stdout).expect("text").lines() {
        match line.split('\t').collect::<Vec<_>>()[..] {
            ["family", name, kind, help] => drop(families.insert(name.to_owned(), (kind.to_owned(), help.to_owned()))),
            ["sample", name, value] => drop(values.insert(name.to_owned(), value.parse().expect("a number"))),
            _ => panic!("{line:?}"),
        }
    }
    (families, values)
}

#[test]
fn prometheus_parses_metrics_and_accepts_names() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for method in ["PUT", "GET", "HEAD", "DELETE", "POST", "BREW"] {
        client.send(format!("{method} /v1/a HTTP/1.1\r\nhost: kvs\r\ncontent-length: 0\r\n\r\n"));
        client.try_read(method == "HEAD").expect("an answer");
    }
    let metrics = Metrics::of(&server);
    let (families, values) = parse(&metrics.text, "openmetrics");
    assert_eq!(values, metrics.values);
    for (name, (kind, help)) in &families {
        assert!(name.starts_with("kvs_") && help.len() > 9, "{name}: {help:?}");
        let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        assert!(name.bytes().all(word), "{name}");
        // Base units, which are in the name.
        for unit in ["_ms", "milli", "micro", "nano", "_kb", "_kib", "percent", "minutes"] {
            assert!(!name.contains(unit), "{name}");
        }
        assert!(!name.contains("duration") || name.ends_with("_seconds"), "{name}");
        assert!(!name.ends_with("_total") && !name.ends_with("_count"), "{name} of type {kind}");
    }
    for name in ["http_requests", "tls_errors", "guest_traps"] {
        assert_eq!(families[&format!("kvs_{name}")].0, "counter");
    }
    let version = format!("kvs_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    assert_eq!(values[&version], 1.0);
    assert!(values.keys().any(|name| name.starts_with("kvs_guest_info{name=\"kvs\",version=\"0.1.0\",sha256=\"")));
}

#[test]
fn scraper_gets_preferred_format() {
    let server = Server::start(&[]);
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", b"").status, 201);
    let scrape = |accept| {
        let answer = Connection::open(server.admin()).ask_with("GET", "/metrics", &[("accept", accept)], b"");
        (answer.header("content-type").expect("it has a type").to_owned(), answer.text().to_owned())
    };
    for accept in ["*/*", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5", "text/html"] {
        assert_eq!(scrape(accept).0, "application/openmetrics-text; version=1.0.0; charset=utf-8", "{accept}");
    }
    for accept in ["text/plain", "text/plain;version=0.0.4, application/openmetrics-text;q=0.2", "text/plain;q=0.3,*/*"]
    {
        assert_eq!(scrape(accept).0, "text/plain; version=0.0.4; charset=utf-8", "{accept}");
    }
    // Those of the listener itself may change in between.
    let (families, values) = parse(&scrape("text/plain;version=0.0.4").1, "text");
    let (expected, expected_values) = parse(&scrape("application/openmetrics-text").1, "openmetrics");
    assert_eq!(values.keys().collect::<Vec<_>>(), expected_values.keys().collect::<Vec<_>>());
    for (name, (kind, help)) in expected {
        // Its type is that of a gauge, under the name of the sample.
        let (name, kind) = if kind == "info" { (format!("{name}_info"), "gauge".into()) } else { (name, kind) };
        assert_eq!(families.get(&name), Some(&(kind, help)), "{name}");
    }
}

#[test]
fn dashboard_shows_existing_metrics() {
    of_files!();
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"").status, 201);
    let there: BTreeSet<String> =
        Metrics::of(&server).values.into_keys().map(|name| name.split('{').next().unwrap_or_default().into()).collect();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/grafana.json");
    let dashboard: serde_json::Value = serde_json::from_slice(&fs::read(file).expect("it is there")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let expressions: Vec<_> = targets.map(|target| target["expr"].as_str().expect("an expression")).collect();
    let words = expressions.iter().flat_map(|text| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
    let shown: BTreeSet<String> = words.filter(|word| word.starts_with("kvs_")).map(str::to_owned).collect();
    assert!(shown.len() > 20, "it shows hardly anything: {shown:?}");
    // Panels that an operator needs, by any name; `alerts` tests that their metrics exist.
    for name in there.iter().filter(|name| !name.ends_with("_sum") && !name.ends_with("_count")) {
        assert!(shown.contains(name), "it does not show {name}");
    }
}

#[test]
fn requests_are_counted_by_method_and_status() {
    let server = Server::start(&[]);
    let before = Metrics::of(&server);
    let mut client = Connection::open(server.address());
    for (method, path, status) in [
        ("PUT", "/v1/a", 201),
        ("GET", "/v1/a", 200),
        ("GET", "/v1/b", 404),
        ("GET", "/v1/b", 404),
        ("DELETE", "/v1/a", 200),
        ("BREW", "/v1/a", 405),
        ("BREW-MORE", "/v1/a", 405),
    ] {
        assert_eq!(client.ask(method, path, b"").status, status);
    }
    let after = until(&server, "the last is counted", |now| {
        now.values.get("kvs_http_requests_total{method=\"other\",status=\"405\"}") == Some(&2.0)
    });
    let moved = after.since(&before);
    for (name, by) in [
        ("kvs_http_requests_total{method=\"PUT\",status=\"201\"}", 1.0),
        ("kvs_http_requests_total{method=\"GET\",status=\"200\"}", 1.0),
        ("kvs_http_requests_total{method=\"GET\",status=\"404\"}", 2.0),
        ("kvs_http_requests_total{method=\"DELETE\",status=\"200\"}", 1.0),
        ("kvs_http_request_duration_seconds_count{method=\"GET\"}", 3.0),
        ("kvs_http_request_duration_seconds_count{method=\"PUT\"}", 1.0),
        ("kvs_http_request_duration_seconds_count{method=\"other\"}", 2.0),
        // The second of two equal requests got the cached response of the first.
        ("kvs_guest_call_duration_seconds_count", 6.0),
        ("kvs_response_cache_hits_total", 1.0),
        ("kvs_connections_opened_total", 1.0),
        ("kvs_connections", 1.0),
    ] {
        assert_eq!(moved.get(name), Some(&by), "{name} in {moved:?}");
    }
    assert_eq!(moved.get("kvs_http_requests_in_flight"), None);
    // Each in its bucket, and in all larger ones.
    assert_eq!(after.get("kvs_http_request_duration_seconds_bucket{le=\"+Inf\",method=\"GET\"}"), 3.0);
    drop(client);
    counts(&server, "kvs_connections", 0.0);
}

#[test]
fn bytes_are_counted_as_sent_on_wire() {
    let server = Server::start(&[]);
    let (mut asked, mut answered) = (0, 0);
    let mut exchange = |method: &str, body: &str| {
        let length = body.len();
        let head =
            format!("{method} /v1/a HTTP/1.1\r\nhost: kvs\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
        let mut client = Connection::open(server.address());
        client.send(format!("{head}{body}"));
        let answer = client.end();
        (asked, answered) = (asked + head.len() + length, answered + answer.len());
        answer
    };
    assert!(exchange("PUT", &"x".repeat(100_000)).starts_with("HTTP/1.1 201"));
    assert!(exchange("GET", "").len() > 100_000);
    counts(&server, "kvs_network_receive_bytes_total", asked as f64);
    counts(&server, "kvs_network_transmit_bytes_total", answered as f64);
}

#[test]
fn requests_in_flight_and_waiting_are_shown() {
    let server = Server::start(&[guest(), "--guest-cpu-limit", "1h"]);
    let mut slow = Connection::open(server.address());
    slow.send("PUT /store/{own}a HTTP/1.1\r\nhost: kvs\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    assert_eq!(slow.read().status, 100);
    let metrics = Metrics::of(&server);
    assert_eq!(metrics.get("kvs_http_requests_in_flight"), 1.0);
    assert_eq!(metrics.get("kvs_guest_queue_length"), 0.0);
    slow.send("value");
    assert_eq!(slow.read().status, 201);
    counts(&server, "kvs_http_requests_in_flight", 0.0);

    let mut busy = Connection::open(server.address());
    busy.send("GET /loop-aloud HTTP/1.1\r\nhost: kvs\r\n\r\n");
    server.says("going round in circles");
    let clients = (0..8).map(|_| {
        let mut client = Connection::open(server.address());
        client.send("GET /store/{own}a HTTP/1.1\r\nhost: kvs\r\n\r\n");
        client
    });
    let _clients: Vec<_> = clients.collect();
    // The busy thread delays none of them on the way to the guest.
    let metrics = until(&server, "all wait", |now| now.get("kvs_guest_queue_length") == 8.0);
    assert_eq!(metrics.get("kvs_http_requests_in_flight"), 9.0);
}

#[test]
fn guest_lifecycle_is_counted() {
    let server = Server::start(&[guest(), "--probation", "100ms"]);
    let mut client = Connection::open(server.address());
    for n in 0..3 {
        assert_eq!(client.ask("PUT", &format!("/store/{n}"), b"value").status, 201);
    }
    let counted = until(&server, "3 keys are counted", |now| now.get("kvs_store_keys") == 3.0);
    assert!(counted.get("kvs_guest_memory_bytes") >= 65_536.0);
    assert_eq!(client.ask("GET", "/trap", b"").status, 500);
    let after = until(&server, "it is rebuilt", |now| now.get("kvs_guest_rebuilds_total{outcome=\"done\"}") == 1.0);
    assert_eq!(after.get("kvs_guest_traps_total"), 1.0);

    let refused = Connection::open(server.admin()).ask("PUT", "/guest", b"no component");
    assert_eq!(refused.status, 422);
    assert_eq!(Metrics::of(&server).get("kvs_guest_swaps_total{outcome=\"refused\"}"), 1.0);
    swaps(&server, &component(DEFAULT_GUEST));
    let after = Metrics::of(&server);
    assert_eq!(after.get("kvs_guest_swaps_total{outcome=\"done\"}"), 1.0);
    assert!(after.text.contains("kvs_guest_info{name=\"kvs\","), "{}", after.text);
    counts(&server, "kvs_store_bytes", 18.0);
    let dry = Connection::open(server.admin()).ask("DELETE", "/guest?dry-run", b"");
    assert_eq!((dry.status, after.get("kvs_guest_swaps_total{outcome=\"rolled_back\"}")), (200, 0.0));

    // A new guest that traps while the previous one is still kept.
    let server = Server::start(&["--probation", "1h"]);
    thread::scope(|scope| {
        let swap = scope.spawn(|| Connection::open(server.admin()).ask("PUT", "/guest", &component(guest())).status);
        server.says("another guest serves, on probation");
        assert_eq!(Connection::open(server.address()).ask("GET", "/trap", b"").status, 500);
        assert_eq!(swap.join().expect("it is answered"), 422);
    });
    counts(&server, "kvs_guest_swaps_total{outcome=\"rolled_back\"}", 1.0);
    counts(&server, "kvs_guest_traps_total", 1.0);
}

#[test]
fn memory_during_swap_is_measured() {
    const SERVING: &str = "kvs_guest_memory_bytes";
    const ALL: &str = "kvs_guest_instances_memory_bytes";
    let server = Server::start(&["--probation", "1h"]);
    let only_serving = |when: &str| until(&server, when, |now| now.get(ALL) == now.get(SERVING));
    let is_rolled_back = || Connection::open(server.admin()).ask("DELETE", "/guest?rollback", b"").status == 202;
    only_serving("no other instance is there at the start");
    for (target, phase) in [("/guest?dry-run&shadow=1h", "shadow"), ("/guest", "probation")] {
        thread::scope(|scope| {
            scope.spawn(|| Connection::open(server.admin()).ask("PUT", target, &copy_of(DEFAULT_GUEST)));
            in_phase(&server, phase);
            let metrics = Metrics::of(&server);
            let (all, serving) = (metrics.get(ALL), metrics.get(SERVING));
            let begun = Instant::now();
            while !is_rolled_back() {
                assert!(begun.elapsed() < PATIENCE, "the {phase} cannot be ended");
            }
            assert!(all > 1.5 * serving, "{phase}: {all} bytes, of which {serving} serve");
        });
        only_serving(&format!("the instance of the {phase} is gone"));
    }

    let server = Server::start(&["--spare"]);
    until(&server, "the spare has memory", |now| now.get(ALL) > 1.5 * now.get(SERVING));
}

#[test]
fn log_is_measured() {
    of_files!();
    let server = Server::start(&["--segment-bytes", "128KiB", "--max-value-bytes", "1KiB"]);
    let mut client = Connection::open(server.address());
    let value = vec![b'x'; 1_000];
    for n in 0..10 {
        assert_eq!(client.ask("PUT", &format!("/v1/{n}"), &value).status, 201);
    }
    let metrics = until(&server, "the last is counted", |now| now.get("kvs_txlog_batch_entries_sum") == 10.0);
    for name in ["commit_duration_seconds", "write_duration_seconds", "fsync_duration_seconds"] {
        let (count, sum) =
            (metrics.get(&format!("kvs_txlog_{name}_count")), metrics.get(&format!("kvs_txlog_{name}_sum")));
        // One client, one request at a time: each a batch of its own.
        assert!(count == 10.0 && sum > 0.0 && sum < PATIENCE.as_secs_f64(), "{name}: {count}, {sum}");
    }
    let (append, sync) = ("kvs_txlog_commit_duration_seconds_sum", "kvs_txlog_fsync_duration_seconds_sum");
    assert!(metrics.get(append) > metrics.get(sync), "an append waits for its sync");
    assert_eq!(metrics.get("kvs_txlog_batch_entries_count"), 10.0);
    assert_eq!((metrics.get("kvs_txlog_sequence"), metrics.get("kvs_txlog_unsynced_entries")), (10.0, 0.0));
    assert!((10_000.0..20_000.0).contains(&metrics.get("kvs_txlog_written_bytes_total")));
    assert!((10_000.0..20_000.0).contains(&metrics.get("kvs_txlog_bytes")));
    assert_eq!((metrics.get("kvs_txlog_segments"), metrics.get("kvs_txlog_garbage_bytes")), (1.0, 0.0));

    // A full segment of overwritten values is garbage until it is compacted.
    let (mut dead, mut segments, begun) = (0.0, 0.0, Instant::now());
    while dead < 100_000.0 || segments < 2.0 || Metrics::of(&server).get("kvs_txlog_compactions_total") == 0.0 {
        for n in 0..100 {
            assert_eq!(client.ask("PUT", &format!("/v1/{}", n % 10), &value).status, 201);
        }
        let metrics = Metrics::of(&server);
        dead = metrics.get("kvs_txlog_garbage_bytes").max(dead);
        segments = metrics.get("kvs_txlog_segments").max(segments);
        assert!(begun.elapsed() < PATIENCE, "{segments} segments, {dead} dead bytes at most:\n{}", metrics.text);
    }
    assert!(Metrics::of(&server).get("kvs_txlog_reclaimed_bytes_total") > 0.0);
}

#[test]
fn exceeded_limit_is_counted_by_name() {
    let args = [
        ["--max-connections-per-address", "4"],
        ["--header-timeout", "500ms"],
        ["--max-header-bytes", "8KiB"],
        ["--max-target-bytes", "1KiB"],
        ["--max-value-bytes", "1KiB"],
        ["--max-requests", "2"],
        ["--request-timeout", "2s"],
    ];
    let args = [&[guest(), "--guest-cpu-limit", "1h"], &args.concat()[..]].concat();
    let server = Server::start(&args);
    let counted = |limit: &str| counts(&server, &format!("kvs_limit_exceeded_total{{limit=\"{limit}\"}}"), 1.0);
    let send = |bytes: &str| {
        let mut client = Connection::open(server.address());
        let _ = client.try_send(bytes);
        client
    };
    let ask = |lines: &str| send(&format!("PUT /store/a HTTP/1.1\r\nhost: kvs\r\n{lines}\r\n")).read().status;
    send("GET /store/a HT").end();
    counted("header-timeout");
    assert_eq!(ask(&format!("x: {}\r\n", "x".repeat(8_192))), 431);
    counted("max-header-bytes");
    let long = "x".repeat(1_100);
    assert_eq!(send(&format!("GET /{long} HTTP/1.1\r\nhost: kvs\r\n\r\n")).read().status, 414);
    counted("max-target-bytes");
    assert_eq!(ask("content-length: 1025\r\n"), 413);
    counted("max-value-bytes");
    assert_eq!(ask("content-length: 1\r\n"), 408);
    counted("min-body-rate");
    assert_eq!(send("no HTTP\r\n\r\n").read().status, 400);
    counts(&server, "kvs_http_parse_errors_total", 1.0);

    let waiting = || {
        let mut client =
            send("PUT /store/a HTTP/1.1\r\nhost: kvs\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\n");
        assert_eq!(client.read().status, 100);
        client
    };
    let (first, second) = (waiting(), waiting());
    assert_eq!(ask(""), 503);
    counted("max-requests");
    drop((first, second));
    counts(&server, "kvs_connections", 0.0);

    let idle = [(); 4].map(|()| {
        let mut client = Connection::open(server.address());
        assert_eq!(client.ask("GET", "/handled", b"").status, 200);
        client
    });
    assert_eq!(send("").end(), "");
    counted("max-connections-per-address");
    drop(idle);

    counts(&server, "kvs_connections", 0.0);
    let _busy = send("GET /loop-aloud HTTP/1.1\r\nhost: kvs\r\n\r\n");
    server.says("going round in circles");
    assert_eq!(send("GET /store/{own}a HTTP/1.1\r\nhost: kvs\r\n\r\n").read().status, 503);
    counted("request-timeout");
}

#[test]
fn throttled_requests_are_counted() {
    let server = Server::start(&["--rate-limit", "1/m", "--rate-burst", "2"]);
    let mut client = Connection::open(server.address());
    for status in [404, 404, 429, 429, 429] {
        assert_eq!(client.ask("GET", "/v1/a", b"").status, status);
    }
    let metrics = Metrics::of(&server);
    assert_eq!(metrics.get("kvs_http_requests_throttled_total"), 3.0);
    assert_eq!(metrics.get("kvs_http_requests_delayed_total"), 0.0);

    let server = Server::start(&["--rate-limit", "50/s", "--rate-burst", "1", "--rate-queue", "10s"]);
    let mut client = Connection::open(server.address());
    for _ in 0..3 {
        assert_eq!(client.ask("GET", "/v1/a", b"").status, 404);
    }
    let metrics = Metrics::of(&server);
    let waited = metrics.get("kvs_http_requests_delayed_total");
    assert!((1.0..=2.0).contains(&waited) && metrics.get("kvs_http_requests_throttled_total") == 0.0, "{waited}");
}

#[test]
fn failed_handshakes_are_counted_by_reason() {
    let authority = Authority::new();
    let pair = authority.issue("server", Kind::Server, 1);
    let (ca, pair) =
        (authority.file(), [&["--tls-cert", &pair.certificate[..]][..], &["--tls-key", &pair.key]].concat());
    let hasty = Server::start(&[&pair[..], &["--handshake-timeout", "300ms"]].concat());
    assert_eq!(Connection::open(hasty.address()).end(), "");
    counts(&hasty, "kvs_limit_exceeded_total{limit=\"handshake-timeout\"}", 1.0);

    let server = Server::start(&[&pair[..], &["--tls-min", "1.3", "--client-ca", &ca]].concat());
    let counted = |reason: &str| counts(&server, &format!("kvs_tls_errors_total{{reason=\"{reason}\"}}"), 1.0);
    let mut plain = Connection::open(server.address());
    plain.send("GET /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n");
    assert!(!plain.end().contains("HTTP"));
    counted("not-tls");
    drop(Connection::open(server.address()));
    counted("gone");

    let client = |args: &[&str]| {
        let mut openssl = Command::new("openssl");
        openssl.args(["s_client", "-verify_return_error", "-connect", &server.address().to_string()]).args(args);
        openssl.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        openssl.status().expect("openssl is installed");
    };
    client(&["-CAfile", &ca]);
    counted("client-certificate");
    client(&["-CAfile", &ca, "-tls1_2"]);
    counted("incompatible");
    // It does not trust the server.
    client(&["-CAfile", &Authority::named("stranger").file()]);
    counted("refused");
}

#[test]
fn excessive_resets_are_counted() {
    let server = Server::start(&["--http2-max-resets", "5"]);
    takes_back(&server, 20_000);
    until(&server, "it is counted", |now| now.get("kvs_limit_exceeded_total{limit=\"http2-max-resets\"}") >= 1.0);
}

#[test]
fn metrics_respond_while_guest_uses_every_thread() {
    let data = tempfile::tempdir().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(["--guest-cpu-limit", "1h"]).arg(guest()).env("TOKIO_WORKER_THREADS", "1");
    let server = Server::spawn(command, data);
    let mut client = Connection::open(server.address());
    client.send("GET /loop-aloud HTTP/1.1\r\nhost: kvs\r\n\r\n");
    server.says("going round in circles");
    assert_eq!(Metrics::of(&server).get("kvs_http_requests_in_flight"), 1.0);
    assert!(client.is_silent_for(Duration::from_millis(1)), "the guest was not busy after all");
}

#[test]
fn process_disk_and_reloads_are_measured() {
    let tokens = Tokens::new();
    tokens.add(&["alice", "--scope", "read"]);
    let server = Server::start(&["--tokens", &tokens.file(), "--admin-open"]);
    let before = Metrics::of(&server);
    for name in ["process_resident_memory_bytes", "process_open_fds", "data_dir_free_bytes"] {
        assert!(before.get(&format!("kvs_{name}")) > 0.0, "{name}");
    }
    assert!(before.get("kvs_process_cpu_seconds_total") >= 0.0);
    assert!(before.get("kvs_process_max_fds") >= before.get("kvs_process_open_fds"));
    assert!(before.get("kvs_data_dir_size_bytes") >= before.get("kvs_data_dir_free_bytes"));
    let (outcome, time) =
        ("kvs_last_reload_successful{files=\"tokens\"}", "kvs_last_reload_success_timestamp_seconds{files=\"tokens\"}");
    let started = before.get("kvs_start_time_seconds");
    assert!(before.get(outcome) == 1.0 && (before.get(time) - started).abs() < 60.0, "{}", before.get(time));
    std::fs::write(tokens.file(), "nonsense\n").expect("it can be written");
    counts(&server, outcome, 0.0);
    std::fs::write(tokens.file(), "").expect("it can be written");
    let after = until(&server, "it is reloaded", |now| now.get(outcome) == 1.0);
    assert!(after.get(time) >= before.get(time));
}
