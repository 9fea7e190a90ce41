//! Shadow traffic: differences of a candidate are reported with the request, and no client is affected.
//!
//! Both guests are `tests/guests/unruly`, in two versions that differ on certain paths.

use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::guests::{DEFAULT_GUEST, component, copy_of, guest};
use crate::support::load::SaysOver;
use crate::support::metrics::Metrics;
use crate::support::server::{PATIENCE, Server, kvs};
use crate::support::swap::{serving, status, under_load};
use crate::support::tokens::Tokens;
use crate::support::wire::{Connection, Response, get};

/// The second version of the guest.
fn candidate() -> Vec<u8> {
    let (mark, other) = (b"version of unruly: serving  ", b"version of unruly: candidate");
    let mut bytes = component(guest());
    let found: Vec<_> = bytes.windows(mark.len()).enumerate().filter(|(_, window)| window == mark).collect();
    let [(at, _)] = found[..] else { panic!("the guest has {} marks", found.len()) };
    bytes[at..at + other.len()].copy_from_slice(other);
    bytes
}

/// Polls until there is a value.
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "in {PATIENCE:?} there was no {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn report(server: &Server) -> Value {
    status(server)["swap"]["shadow"].clone()
}

/// The example of this target.
fn example(report: &Value, target: &str) -> Option<Value> {
    report["examples"].as_array()?.iter().find(|example| example["target"] == target).cloned()
}

/// Runs shadow traffic of every request with the component during `work`, then ends it, and returns the report.
fn dry_run(server: &Server, component: &[u8], warm_up: &str, work: impl FnOnce()) -> Value {
    thread::scope(|scope| {
        let swapping = scope
            .spawn(|| Connection::open(server.admin()).ask("PUT", "/guest?dry-run&shadow=1h&sample=100", component));
        let end = Ends(server);
        is_in_step(server, warm_up);
        work();
        let ended = Connection::open(server.admin()).ask("DELETE", "/guest?rollback", b"");
        ended.says(202, "shadow traffic ends: the same guest continues to serve");
        drop(end);
        let answer = swapping.join().expect("the swap is answered");
        answer.says(422, "shadow traffic was ended on request, the same guest serves");
    });
    status(server)["last_swap"]["shadow"].clone()
}

/// Ends the shadow traffic, also when a test fails: otherwise the swap would wait for an hour.
struct Ends<'s>(&'s Server);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        // A server that does not answer fails the test elsewhere.
        if let Ok(mut admin) = Connection::try_open(self.0.admin()) {
            let _ = admin.try_ask("DELETE", "/guest?rollback", b"");
        }
    }
}

/// Waits until requests to this path are compared.
fn is_in_step(server: &Server, warm_up: &str) {
    let mut client = Connection::open(server.address());
    until("comparison", || {
        get(&mut client, warm_up);
        report(server)["compared"].as_u64().filter(|compared| *compared > 0)
    });
}

/// Sends the request until it is among the examples, and returns that. Checks each response.
fn differs(server: &Server, target: &str, mut ask: impl FnMut(&str) -> Response, status: u16, body: &str) -> Value {
    until(target, || {
        let answer = ask(target);
        assert_eq!(answer.status, status, "{target}: {}", answer.text());
        assert!(answer.text().contains(body), "{target}: {}", answer.text());
        example(&report(server), target)
    })
}

/// Sends this request, and waits until all earlier ones are compared.
fn settle(server: &Server, client: &mut Connection) {
    differs(server, "/candidate/status?settled", |target| get(client, target), 200, "");
}

/// Differences in all shadow traffic, as the metrics count them.
fn differences(server: &Server) -> u64 {
    Metrics::of(server).get("kvs_shadow_different_total") as u64
}

#[test]
fn difference_is_reported_with_its_request() {
    for shards in ["1", "4"] {
        let server = Server::start(&[guest(), "--shards", shards]);
        let mut client = Connection::open(server.address());
        for (how, what, ours, theirs) in [
            ("header", "header \"x-word\"", "\"usual\"", "\"other\""),
            ("cookie", "header \"set-cookie\"", "5 bytes, redacted", "5 bytes, redacted"),
            ("body", "body", "\"…xxxxxxxxusual end\" (1009 bytes)", "\"…xxxxxxxxother end\" (1009 bytes)"),
            ("wait", "watch or wait", "{own}a", "{own}b"),
            ("effect", "event 58 of append 1, \"{own}many-57\"", "\"usual\"", "\"other\""),
            ("more", "event 101 of append 1", "none", "put \"{own}one-more\", 0 bytes"),
            ("less", "event 100 of append 1", "put \"{own}many-99\"", "none"),
            ("parts", "event 1 of append 1", "many-0", "many-50"),
            ("trap", "trap", "status 200", "unreachable"),
        ] {
            let target = format!("/candidate/{how}");
            let is_effect = matches!(how, "effect" | "more" | "less" | "parts");
            let body = if is_effect { "appended" } else { "" };
            let counted = differences(&server);
            let report = dry_run(&server, &candidate(), "/candidate/same", || {
                let example = differs(&server, &target, |target| get(&mut client, target), 200, body);
                let text = |name: &str| example[name].as_str().unwrap_or_default().to_owned();
                assert!(text("difference").starts_with(what), "{how} in {shards} shards: {example}");
                assert!(text("serving").contains(ours) && text("candidate").contains(theirs), "{example}");
                assert_eq!((text("method"), &example["principal"]), ("GET".to_owned(), &Value::Null));
                assert!(!text("request_id").is_empty());
                if is_effect || how == "trap" {
                    until("rebuild", || self::report(&server)["rebuilds"].as_u64().filter(|rebuilds| *rebuilds > 0));
                }
            });
            assert_eq!(is_effect || how == "trap", report["rebuilds"].as_u64() > Some(0), "{report}");
            assert!(report["different"].as_u64() > Some(0), "{how}: {report}");
            assert_eq!(report["different"].as_u64(), Some(differences(&server) - counted), "{how}: {report}");
        }
        assert_eq!(serving(&server), "unruly");
        // The log has the effects of the serving guest only.
        let server = server.terminate().restart(&[guest(), "--shards", shards]);
        let mut client = Connection::open(server.address());
        assert_eq!(get(&mut client, "/store/{own}many-57").text(), "value", "the last of many");
        assert_eq!(get(&mut client, "/store/{own}many-99").text(), "value");
        assert_eq!(get(&mut client, "/store/{own}one-more").status, 404);
        server.terminate();
    }
}

#[test]
fn routing_that_differs_is_reported() {
    let server = Server::start(&[guest(), "--shards", "4"]);
    let mut client = Connection::open(server.address());
    let report = dry_run(&server, &candidate(), "/candidate/same", || {
        let route = differs(&server, "/candidate/route", |target| get(&mut client, target), 200, "the same");
        assert_eq!(route["difference"], "route", "{route}");
        assert!(route["serving"].to_string().contains("{own}"), "{route}");
        assert!(route["candidate"].to_string().contains("AnyShard"), "{route}");
        let merge = differs(&server, "/all-shards/candidate", |target| get(&mut client, target), 404, "");
        assert_eq!((&merge["difference"], &merge["candidate"]), (&"merge-responses: status".into(), &"299".into()));
    });
    assert!(report["routing_compared"].as_u64() > Some(0), "{report}");
    assert!(report["different"].as_u64() >= Some(2), "{report}");
    assert_eq!(report["different"].as_u64(), Some(differences(&server)), "{report}");
    server.terminate();
}

#[test]
fn one_different_effect_of_ten_thousand_is_found() {
    let server = Server::start(&[guest()]);
    let mut client = Connection::open(server.address());
    let report = dry_run(&server, &candidate(), "/candidate/same", || {
        // Each appends a hundred events.
        for query in (0..99).map(|n| n.to_string()).chain(["odd".to_owned()]) {
            let answer = get(&mut client, &format!("/candidate/rarely?{query}"));
            assert_eq!((answer.status, answer.text()), (200, "appended"));
        }
        until("difference", || example(&report(&server), "/candidate/rarely?odd"));
    });
    let examples = report["examples"].as_array().expect("a list");
    let [found] = &examples[..] else { panic!("{report}") };
    assert_eq!(found["difference"], "event 58 of append 1, \"{own}many-57\"", "{report}");
    assert_eq!((&found["serving"], &found["candidate"]), (&"\"usual\"".into(), &"\"other\"".into()), "{report}");
    assert_eq!((&report["different"], differences(&server)), (&1.into(), 1), "{report}");
    assert!(report["compared"].as_u64() > Some(100), "{report}");
    // The log has the effect of the serving guest.
    let server = server.terminate().restart(&[guest()]);
    assert_eq!(get(&mut Connection::open(server.address()), "/store/{own}many-57").text(), "usual");
    server.terminate();
}

#[test]
fn equal_requests_do_not_differ() {
    let server = Server::start(&[guest()]);
    let mut client = Connection::open(server.address());
    let report = dry_run(&server, &candidate(), "/candidate/same", || {
        for n in 0..20 {
            for path in ["tag", "surroundings", "append-wrongly", "principal", "flag"] {
                assert_eq!(get(&mut client, &format!("/candidate/{path}")).status, 200);
            }
            let key = format!("/store/{{own}}{n}");
            assert_eq!(client.ask("PUT", &key, b"value").status, 201);
            assert_eq!(get(&mut client, &key).text(), "value");
            // Reads a key that does not exist.
            get(&mut client, "/store/{own}unknown");
        }
        settle(&server, &mut client);
    });
    let targets: Vec<_> =
        report["examples"].as_array().expect("a list").iter().map(|example| &example["target"]).collect();
    assert!(targets.iter().all(|target| **target == "/candidate/status?settled"), "{report}");
    assert!(report["compared"].as_u64() > Some(20 * 8), "{report}");
    server.terminate();
}

#[test]
fn difference_for_one_principal_names_it() {
    let tokens = Tokens::new();
    let admin = tokens.add(&["root", "--scope", "admin"]);
    let (adam, eve) = (tokens.add(&["adam", "--scope", "write"]), tokens.add(&["eve", "--scope", "write"]));
    // The admin listener requires a token too, which the command has.
    let server = Server::start(&[guest(), "--tokens", &tokens.file()]);
    let bearer = |token: &str| format!("Bearer {token}");
    let (root, adam, eve) = (bearer(&admin), bearer(&adam), bearer(&eve));
    let as_root = [("authorization", root.as_str())];
    let mut client = Connection::open(server.address());
    thread::scope(|scope| {
        let swapping = scope.spawn(|| {
            let mut admin = Connection::open(server.admin());
            admin.ask_with("PUT", "/guest?shadow=1h&sample=100", &as_root, &candidate())
        });
        let mut admin = Connection::open(server.admin());
        until("comparison", || {
            let answer = client.ask_with("GET", "/candidate/principal", &[("authorization", &adam)], b"");
            assert_eq!(answer.text(), "the same");
            let answer = admin.ask_with("GET", "/guest", &as_root, b"");
            let status: Value = serde_json::from_slice(&answer.body).expect("JSON");
            status["swap"]["shadow"]["compared"].as_u64().filter(|compared| *compared > 2)
        });
        let answer = client.ask_with(
            "GET",
            "/candidate/principal?key=kvs_0123456789abcdef0123",
            &[("authorization", &eve)],
            b"",
        );
        assert_eq!(answer.text(), "usual");
        let refused = swapping.join().expect("the swap is answered");
        assert_eq!(refused.status, 422);
        assert!(refused.text().contains("1 of ") && refused.text().contains("at most 0 may"), "{}", refused.text());
        let answer = admin.ask_with("GET", "/guest", &as_root, b"");
        let status: Value = serde_json::from_slice(&answer.body).expect("JSON");
        let shadow = &status["last_swap"]["shadow"];
        assert_eq!((&shadow["different"], &shadow["examples"][0]["principal"]), (&1.into(), &"eve".into()), "{shadow}");
        assert_eq!(shadow["examples"][0]["target"], "/candidate/principal?key=kvs_…", "tokens are redacted");
        let all = answer.text();
        assert!(!all.contains("Bearer") && !all.contains("authorization"), "{all}");
    });
    server.terminate();
}

#[test]
fn difference_after_write_is_found() {
    let server = Server::start(&[guest()]);
    let mut client = Connection::open(server.address());
    let report = dry_run(&server, &candidate(), "/candidate/same", || {
        for _ in 0..20 {
            assert_eq!(get(&mut client, "/candidate/flag?before").text(), "the same");
        }
        assert_eq!(client.ask("PUT", "/store/{own}flag", b"1").status, 201);
        let example = differs(&server, "/candidate/flag?after", |target| get(&mut client, target), 200, "usual");
        assert_eq!((&example["serving"], &example["candidate"]), (&"\"usual\"".into(), &"\"other\"".into()));
    });
    assert!(example(&report, "/candidate/flag?before").is_none(), "{report}");
    server.terminate();
}

#[test]
fn slow_candidate_is_reported_and_delays_no_request() {
    let server = Server::start(&[guest()]);
    let mut client = Connection::open(server.address());
    let report = dry_run(&server, &candidate(), "/candidate/same", || {
        for _ in 0..3 {
            assert_eq!(get(&mut client, "/candidate/slow").text(), "the same");
        }
        // More than its queue holds.
        for n in 0..20 {
            assert_eq!(client.ask("PUT", &format!("/store/{{own}}{n}"), &vec![b'x'; 1 << 20]).status, 201);
        }
        until("drop", || report(&server)["dropped"].as_u64().filter(|dropped| *dropped > 0));
        settle(&server, &mut client);
    });
    let slowest = &report["slowest"];
    assert_eq!(slowest["target"], "/candidate/slow", "{report}");
    assert!(slowest["candidate_seconds"].as_f64() > slowest["serving_seconds"].as_f64(), "{slowest}");
    assert!(
        report["examples"].as_array().is_some_and(|all| all.iter().all(|one| one["difference"] == "status")),
        "{report}"
    );
    server.terminate();
}

#[test]
fn candidate_stays_in_step_after_trap_of_serving_guest() {
    let server = Server::start(&[guest(), "--spare"]);
    let mut client = Connection::open(server.address());
    let report = dry_run(&server, &candidate(), "/candidate/same", || {
        for n in 0..3 {
            let key = format!("{{own}}{n}");
            assert_eq!(client.ask("PUT", &format!("/store-and-trap/{key}"), b"1").status, 500);
            until("instance", || (get(&mut client, "/candidate/same").status == 200).then_some(()));
            assert_eq!(get(&mut client, &format!("/store/{key}")).text(), "1");
        }
        settle(&server, &mut client);
        for n in 0..3 {
            assert_eq!(get(&mut client, &format!("/store/{{own}}{n}")).text(), "1");
        }
        differs(&server, "/candidate/body?end", |target| get(&mut client, target), 200, "usual");
    });
    let found = report["examples"].as_array().expect("a list").iter().map(|example| example["target"].as_str());
    let found: Vec<_> = found.flatten().collect();
    assert!(
        found.iter().all(|target| matches!(*target, "/candidate/status?settled" | "/candidate/body?end")),
        "{report}"
    );
    server.terminate();
}

/// An instance that handled shadow traffic never serves.
#[test]
fn allowed_differences_do_not_stop_swap() {
    let server = Server::start(&[guest(), "--probation", "1ms"]);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let swapping = scope.spawn(|| {
            let _over = SaysOver(&over);
            let query = "/guest?shadow=3s&sample=100%25&max-differences=1000000";
            Connection::open(server.admin()).ask("PUT", query, &candidate())
        });
        let mut client = Connection::open(server.address());
        let mut answered = None;
        while !over.load(Ordering::Relaxed) && status(&server)["swap"]["phase"] != "probation" {
            let answer = get(&mut client, "/candidate/effect");
            assert_eq!((answer.status, answer.text()), (200, "appended"));
            if report(&server)["different"].as_u64() > Some(0) {
                answered = Some(());
                break;
            }
        }
        assert!(answered.is_some(), "nothing was compared in the time");
        let answer = swapping.join().expect("the swap is answered");
        assert_eq!(answer.status, 200, "{}", answer.text());
        let report: Value = serde_json::from_slice(&answer.body).expect("the report is JSON");
        assert!(report["shadow"]["different"].as_u64() > Some(0), "{report}");
        // The first request that it ever handled.
        assert_eq!(get(&mut client, "/handled").text(), "1");
        assert_eq!(get(&mut client, "/store/{own}many-57").text(), "usual");
        assert_eq!(get(&mut client, "/candidate/body?now").text().matches("other").count(), 1, "it serves");
        let metrics = Metrics::of(&server);
        assert!(metrics.get("kvs_shadow_different_total") > 0.0);
        assert!(metrics.get("kvs_shadow_compared_total") >= metrics.get("kvs_shadow_different_total"));
        assert!(metrics.get("kvs_shadow_call_duration_seconds_count") > 0.0);
    });
    server.terminate();
}

/// The instance that serves after the swap is not the one that did this: it has the log, and nothing else.
#[test]
fn effect_of_candidate_in_memory_is_never_seen() {
    for shards in ["1", "4"] {
        let server = Server::start(&[guest(), "--shards", shards, "--probation", "1ms"]);
        let mut client = Connection::open(server.address());
        assert_eq!(client.ask("PUT", "/store/{own}kept", b"value").status, 201);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let swapping = scope.spawn(|| {
                let _over = SaysOver(&over);
                let query = "/guest?shadow=3s&sample=100%25&max-differences=1000000";
                Connection::open(server.admin()).ask("PUT", query, &candidate())
            });
            let target = "/store/{own}memory";
            let mut found = None;
            while found.is_none() && !over.load(Ordering::Relaxed) {
                assert_eq!(get(&mut client, "/candidate/memory").text(), "the same");
                assert_eq!(get(&mut client, target).status, 404);
                // The candidate has it: its instance was not built again, and is the one with the effect.
                found = example(&report(&server), target);
            }
            let found = found.expect("nothing was compared in the time");
            assert_eq!((&found["serving"], &found["candidate"]), (&"404".into(), &"200".into()), "{found}");
            let answer = swapping.join().expect("the swap is answered");
            assert_eq!(answer.status, 200, "{}", answer.text());
            let report: Value = serde_json::from_slice(&answer.body).expect("the report is JSON");
            assert_eq!(report["shadow"]["rebuilds"], 0, "{report}");
        });
        // The first requests of the promoted instance.
        assert_eq!(get(&mut client, "/candidate/body?now").text().matches("other").count(), 1, "it serves");
        assert_eq!(get(&mut client, "/handled").text(), "2");
        assert_eq!(get(&mut client, "/store/{own}memory").status, 404);
        assert_eq!(get(&mut client, "/store/{own}kept").text(), "value");
        server.terminate();
    }
}

#[test]
fn sampled_requests_bypass_response_cache() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"value").status, 201);
    let hits = |server: &Server| Metrics::of(server).get("kvs_response_cache_hits_total");
    get(&mut client, "/v1/a");
    let before = hits(&server);
    get(&mut client, "/v1/a");
    assert_eq!(hits(&server), before + 1.0);
    let mut dropped = None;
    let report = dry_run(&server, &copy_of(DEFAULT_GUEST), "/v1/b", || {
        let before = (hits(&server), report(&server)["compared"].as_u64().expect("a count"));
        // Until the candidate was in step.
        dropped = Some(report(&server)["dropped"].clone());
        for _ in 0..10 {
            assert_eq!(get(&mut client, "/v1/a").text(), "value");
        }
        until("comparison", || (report(&server)["compared"].as_u64()? >= before.1 + 10).then_some(()));
        assert_eq!(hits(&server), before.0);
    });
    assert_eq!((&report["different"], Some(&report["dropped"])), (&0.into(), dropped.as_ref()), "{report}");
    get(&mut client, "/v1/a");
    assert!(hits(&server) > before + 1.0, "the cache is used again");
    server.terminate();
}

#[test]
fn default_guest_does_not_differ_from_itself_under_load() {
    for shards in ["1", "4"] {
        let server = Server::start(&["--shards", shards, "--probation", "1ms"]);
        under_load(&server, |_| {
            let query = "/guest?shadow=3s&sample=50&max-differences=0";
            let answer = Connection::open(server.admin()).ask("PUT", query, &copy_of(DEFAULT_GUEST));
            assert_eq!(answer.status, 200, "{}", answer.text());
            let report: Value = serde_json::from_slice(&answer.body).expect("the report is JSON");
            assert!(report["shadow"]["compared"].as_u64() > Some(0), "{report}");
            assert_eq!(
                (&report["shadow"]["different"], &report["shadow"]["rebuilds"]),
                (&0.into(), &0.into()),
                "{report}"
            );
        });
        server.terminate();
    }
}

#[test]
fn server_stops_during_shadow_traffic() {
    let server = Server::start(&[guest()]);
    thread::scope(|scope| {
        // It ends without a response.
        scope.spawn(|| Connection::open(server.admin()).try_ask("PUT", "/guest?shadow=1h&sample=100", &candidate()));
        is_in_step(&server, "/candidate/same");
        server.signal(Signal::TERM);
    });
    server.ends_well();
}

#[test]
fn kvs_swap_prints_report() {
    let server = Server::start(&[guest(), "--probation", "1ms"]);
    let file = tempfile::NamedTempFile::new().expect("a temporary file can be created");
    std::fs::write(file.path(), candidate()).expect("the file takes the component");
    let swap = |args: &[&str]| {
        let mut command = kvs();
        command.args(["swap", "--admin", &server.admin().to_string()]).arg(file.path()).args(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary under test can be started")
    };
    let swapping = swap(&["--shadow", "1h", "--sample", "100%"]);
    is_in_step(&server, "/candidate/same");
    assert_eq!(get(&mut Connection::open(server.address()), "/candidate/header").header("x-word"), Some("usual"));
    let output = swapping.wait_with_output().expect("it ends");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{out}{err}");
    assert!(err.contains("not swapped") && err.contains("--max-differences"), "{err}");
    assert!(out.contains(" 1 different, ") && out.contains("  candidate  p50 "), "{out}");
    assert!(out.contains(": header \"x-word\": \"usual\", candidate: \"other\""), "{out}");

    let output = swap(&["--shadow", "10ms"]).wait_with_output().expect("it ends");
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(out.contains(" serves: ") && out.contains("\nshadow traffic: 0 compared, 0 different, "), "{out}");
    let refused = swap(&["--sample", "5%"]).wait_with_output().expect("it ends");
    assert_eq!(refused.status.code(), Some(2));
    server.terminate();
}
