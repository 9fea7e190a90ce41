//! Guests that misbehave: the request that triggers the failure gets 500, and nothing else is affected.
//!
//! The guest is `tests/guests/unruly`, which defines the paths used here. It is built once per run.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::guests::guest;
use crate::support::memory::peak;
use crate::support::server::{PATIENCE, Server};
use crate::support::wire::{Connection, get, plain};

/// A server with the guest, and a client.
fn start(args: &[&str]) -> (Server, Connection) {
    let server = Server::start(&[&[guest()], args].concat());
    let client = Connection::open(server.address());
    (server, client)
}

/// Triggers a failure, checks the 500, and that a new instance with all data serves the next request. Returns the log line.
#[track_caller]
fn fails_alone(args: &[&str], path: &str) -> String {
    let (server, mut client) = start(args);
    assert_eq!(client.ask("PUT", "/store/before", b"before").status, 201);
    get(&mut client, path).says(500, "the store failed on this request");
    assert_eq!(get(&mut client, "/handled").text(), "1", "after {path} the instance was kept");
    assert_eq!(get(&mut client, "/store/before").text(), "before");
    assert_eq!(client.ask("PUT", "/store/after", b"after").status, 201);
    assert_eq!(get(&mut client, "/store/after").text(), "after");
    let line = server.says("the guest trapped");
    server.says("the guest is rebuilt");
    server.terminate();
    for expected in ["unruly", "method=GET", path] {
        assert!(line.contains(expected), "{expected:?} is not in {line}");
    }
    line
}

/// An invalid response: 500, and the instance is kept.
#[track_caller]
fn is_invalid(server: &Server, path: &str, why: &str) {
    let mut client = Connection::open(server.address());
    let before: u64 = get(&mut client, "/handled").text().parse().expect("a count");
    let response = get(&mut client, path);
    assert_eq!((response.status, response.text()), (500, "the store gave an invalid response\n"), "{path}");
    let after: u64 = get(&mut client, "/handled").text().parse().expect("a count");
    assert_eq!(after, before + 2, "after {path} the instance was not kept");
    let line = server.says(why);
    assert!(line.contains("invalid response"), "{line}");
}

#[test]
fn other_guest_is_served() {
    let (server, mut client) = start(&[]);
    server.says("unruly");
    assert_eq!(client.ask("PUT", "/store/a", b"value").status, 201);
    assert_eq!(get(&mut client, "/store/a").text(), "value");
    assert_eq!(get(&mut client, "/v1/a").status, 404);
}

#[test]
fn guest_replays_entries_of_other_guest() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/{own}a", b"first").status, 201);
    assert_eq!(client.ask("PUT", "/v1/{own}b", b"second").status, 201);
    assert_eq!(client.ask("DELETE", "/v1/{own}b", b"").status, 200);
    let server = server.terminate().restart(&[guest()]);
    let mut client = Connection::open(server.address());
    assert_eq!(get(&mut client, "/applied").text(), "3");
    assert_eq!(get(&mut client, "/store/{own}a").text(), "first");
    assert_eq!(get(&mut client, "/store/{own}b").status, 404);
}

#[test]
fn trap_costs_one_request() {
    let line = fails_alone(&[], "/trap");
    assert!(line.contains("unruly_guest::fall_over"), "it does not name the guest's function: {line}");
}

#[test]
fn panic_costs_one_request() {
    let line = fails_alone(&[], "/panic");
    assert!(line.contains("panic"), "it does not name the guest's function: {line}");
}

#[test]
fn exit_costs_one_request() {
    let line = fails_alone(&[], "/exit");
    assert!(line.contains("the guest called exit"), "{line}");
}

#[test]
fn sleep_returns_at_once() {
    let line = fails_alone(&[], "/sleep");
    assert!(line.contains("may not wait"), "{line}");
}

#[test]
fn endless_loop_ends_at_cpu_limit() {
    let line = fails_alone(&["--guest-cpu-limit", "200ms"], "/loop");
    assert!(line.contains("longer than 200ms") && line.contains("circle"), "{line}");
}

#[test]
fn endless_recursion_ends_at_stack_limit() {
    let line = fails_alone(&[], "/recurse");
    assert!(line.contains("stack") && line.contains("dig"), "{line}");
}

#[test]
fn memory_over_limit_is_denied() {
    let line = fails_alone(&["--guest-max-memory-bytes", "32MiB"], "/grow");
    // A Rust program aborts when an allocation fails.
    assert!(line.contains("in unruly_guest::grow") && line.contains("memory allocation of"), "{line}");
}

#[test]
fn host_memory_is_bounded_for_greedy_guest() {
    let (server, mut client) = start(&["--guest-max-memory-bytes", "32MiB"]);
    let before = peak(&server);
    for _ in 0..3 {
        assert_eq!(get(&mut client, "/grow").status, 500);
    }
    assert_eq!(get(&mut client, "/handled").status, 200);
    let grown = peak(&server).saturating_sub(before);
    assert!(grown < 80 << 10, "three instances of 32 MiB, one after the other, took {grown} KiB");
}

/// A disconnected client cannot be distinguished from one that half-closed, so its requests stay, within the budget.
#[test]
fn disconnected_clients_stay_within_budget() {
    let limits = ["--guest-cpu-limit", "1h", "--request-timeout", "1h", "--max-value-bytes", "8MiB"];
    let (server, mut client) = start(&[&limits[..], &["--max-inflight-bytes", "32MiB"]].concat());
    client.send("GET /loop-aloud HTTP/1.1\r\nhost: kvs\r\n\r\n");
    server.says("going round in circles");
    let before = peak(&server);
    let head = b"PUT /handled HTTP/1.1\r\nhost: kvs\r\ncontent-length: 8388608\r\n\r\n";
    let request = [head.as_slice(), &vec![b'x'; 8 << 20]].concat();
    for _ in 0..40 {
        let mut leaving = plain(server.address()).expect("the server takes connections");
        // A rejected one is not read completely.
        let _ = leaving.write_all(&request);
    }
    let grown = peak(&server).saturating_sub(before);
    // In addition to the budget, each connection has a buffer.
    assert!(grown < 128 << 10, "40 requests of 8 MiB, whose clients had left, took {grown} KiB");
}

#[test]
fn entries_appended_before_trap_stay() {
    let (server, mut client) = start(&[]);
    client.ask("PUT", "/store-and-trap/{own}a", b"value").says(500, "the store failed on this request");
    assert_eq!(get(&mut client, "/store/{own}a").text(), "value");
    assert_eq!(get(&mut client, "/applied").text(), "1");
    let server = server.kill().restart(&[guest()]);
    assert_eq!(get(&mut Connection::open(server.address()), "/store/{own}a").text(), "value");
}

#[test]
fn traps_of_one_client_do_not_stop_others() {
    let (server, mut poisonous) = start(&["--request-timeout", "30s"]);
    thread::scope(|scope| {
        for client in 0..4 {
            let server = &server;
            scope.spawn(move || {
                let mut connection = Connection::open(server.address());
                for n in 0..50 {
                    let (path, value) = (format!("/store/{client}-{n}"), format!("{client} {n}"));
                    assert_eq!(connection.ask("PUT", &path, value.as_bytes()).status, 201, "{path}");
                    assert_eq!(get(&mut connection, &path).text(), value);
                }
            });
        }
        for _ in 0..4 {
            assert_eq!(get(&mut poisonous, "/trap").status, 500);
        }
    });
    assert_eq!(get(&mut poisonous, "/store/3-49").text(), "3 49");
}

#[test]
fn trap_in_tick_costs_no_request() {
    let (server, mut client) = start(&["--guest-config", "fault=tick-traps"]);
    for round in 0..2 {
        let path = format!("/store/{round}");
        assert_eq!(client.ask("PUT", &path, b"value").status, 201);
        server.says("the guest trapped in tick");
        assert_eq!(get(&mut client, &path).text(), "value");
    }
    server.terminate();
}

#[test]
fn tick_is_called() {
    let (_server, mut client) = start(&[]);
    // The first tick comes at once, so this waits for the next one: about a second.
    let ticks = |client: &mut Connection| get(client, "/ticks").text().parse::<u64>().expect("a count");
    let first = ticks(&mut client);
    let more = (0..1_000_000).find(|_| ticks(&mut client) > first);
    assert!(more.is_some(), "no tick in a million requests");
}

#[test]
fn unfinished_tick_continues_between_requests() {
    let (_server, mut client) = start(&["--guest-config", "fault=tick-again"]);
    // With one tick a second this would exceed the timeout.
    let deadline = Instant::now() + PATIENCE;
    while get(&mut client, "/ticks").text().parse::<u64>().expect("a count") < 200 {
        assert!(Instant::now() < deadline, "it is asked no more often than others");
    }
}

#[test]
fn invalid_status_is_500() {
    let (server, _) = start(&[]);
    for status in ["0", "100", "101", "199", "600", "1000", "65535"] {
        is_invalid(&server, &format!("/status/{status}"), &format!("status {status}"));
    }
}

#[test]
fn invalid_header_is_500() {
    let (server, _) = start(&[]);
    is_invalid(&server, "/header/in(valid)", "invalid HTTP header name");
    is_invalid(&server, "/header/", "invalid HTTP header name");
    is_invalid(&server, "/header-value", "failed to parse header value");
}

#[test]
fn connection_header_of_guest_is_500() {
    let (server, _) = start(&[]);
    let headers = ["connection", "content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"];
    for header in headers.into_iter().chain(["Content-Length"]) {
        let why = format!("the header {} is set by the host, not by the guest", header.to_ascii_lowercase());
        is_invalid(&server, &format!("/header/{header}"), &why);
    }
}

#[test]
fn guest_can_set_content_type_options() {
    let (_server, mut client) = start(&[]);
    let answer = get(&mut client, "/header/x-content-type-options");
    assert_eq!((answer.status, answer.header("x-content-type-options")), (200, Some("x")));
}

#[test]
fn too_many_response_headers_are_500() {
    let (server, _) = start(&[]);
    is_invalid(&server, "/many-headers/40000", "headers");
}

#[test]
fn response_waits_for_own_entries_despite_read_sequence() {
    let (mut server, mut client) = start(&[]);
    // Writing this much takes longer than responding, so if it was acknowledged early, the kill would come first.
    let value = vec![b'x'; 1 << 20];
    for n in 0..10 {
        let path = format!("/store-early/{n}");
        assert_eq!(client.ask("PUT", &path, &value).status, 201);
        server = server.kill().restart(&[guest()]);
        client = Connection::open(server.address());
        let got = get(&mut client, &format!("/store/{n}"));
        assert!(got.body == value, "entry {n} was answered, then lost: {}", got.status);
    }
}

#[test]
fn too_large_group_appends_nothing() {
    let (_server, mut client) = start(&[]);
    assert_eq!(get(&mut client, "/append-nothing").text(), "Ok(1)");
    let refused = get(&mut client, "/append-too-much");
    assert!(refused.text().starts_with("Err(AppendError::TooLarge("), "{}", refused.text());
    assert_eq!(get(&mut client, "/append-nothing").text(), "Ok(1)");
    assert_eq!(client.ask("PUT", "/store/a", b"").text(), "1");
}

#[test]
fn invalid_keys_are_rejected_at_append() {
    let (_server, mut client) = start(&["--shards", "1"]);
    let (longest, longest_own) = ("x".repeat(1_024), format!("\u{1}{}", "x".repeat(2_047)));
    let rejected = |client: &mut Connection, method: &str, key: &str| {
        let answer = client.ask(method, "/append-any", key.as_bytes()).text().to_owned();
        assert!(answer.starts_with("Ok(") || answer == "Err(AppendError::InvalidKey)", "{key:?}: {answer}");
        answer.starts_with("Err")
    };
    for key in ["", "\n", "a\u{1}", "\u{85}", "..", "a/./b", &format!("{longest}x"), &format!("{longest_own}x")] {
        assert!(rejected(&mut client, "PUT", key), "{key:?}");
        assert!(!rejected(&mut client, "DELETE", key), "{key:?} cannot be removed");
    }
    for key in ["a", "ä/..b", "\u{1}", "\u{1}\0/../\n", &longest, &longest_own] {
        assert!(!rejected(&mut client, "PUT", key), "{key:?}");
    }
}

#[test]
fn apply_finds_clocks_at_zero_and_fixed_randomness() {
    let (server, mut client) = start(&[]);
    for key in ["{own}a", "{own}b", "{own}c"] {
        // Each is so large that it is a batch of its own.
        assert_eq!(client.ask("PUT", &format!("/store/{key}"), &[b'x'; 1 << 20]).status, 201);
    }
    let mut stopped = server.terminate();
    let mut found = Vec::new();
    for _ in 0..2 {
        let server = stopped.restart(&[guest(), "--guest-config", "fault=apply-looks-around"]);
        let text = get(&mut Connection::open(server.address()), "/surroundings").text().to_owned();
        found.push(text.lines().map(str::to_owned).collect::<Vec<_>>());
        stopped = server.terminate();
    }
    let [first, second] = &found[..] else { panic!("two runs") };
    let (outside, inside) = first.split_last().expect("it looked around");
    assert!(inside.len() >= 2, "{inside:?}");
    for line in inside {
        assert!(line.starts_with("0.0 0 "), "{line}");
    }
    // The stream continues from one batch to the next, and is the same in every process.
    assert_ne!(inside[0], inside[1]);
    assert_eq!(inside, &second[..second.len() - 1]);
    // In `handle` everything is real.
    assert!(!outside.starts_with("0.") && !outside.contains(" 0 "), "{outside}");
    assert_ne!(Some(outside), second.last());
}

#[test]
fn guest_gets_grant() {
    let (_server, mut client) = start(&[]);
    assert_eq!(get(&mut client, "/grant").text(), "Grant { scope: Scope::Admin, key-prefix: None }");
}

#[test]
fn tick_is_called_at_requested_time() {
    let ticks = |client: &mut Connection| get(client, "/ticks").text().parse::<u64>().expect("a count");
    let (_server, mut client) = start(&["--guest-config", "fault=tick-in-50-ms"]);
    let (begun, first) = (Instant::now(), ticks(&mut client));
    while ticks(&mut client) < first + 40 {
        // Two seconds at the requested times; at one a second it would take forty.
        assert!(begun.elapsed() < Duration::from_secs(20), "it is asked no more often than others");
    }
    // Not earlier than requested.
    assert!(begun.elapsed() >= Duration::from_millis(39 * 50), "after {:?}", begun.elapsed());

    // A later requested time does not stop the calls.
    let (_server, mut client) = start(&["--guest-config", "fault=tick-never"]);
    let (begun, first) = (Instant::now(), ticks(&mut client));
    while ticks(&mut client) < first + 2 {
        assert!(begun.elapsed() < PATIENCE, "it is not asked any more");
    }
}

#[test]
fn tick_follows_every_rebuild() {
    let (_server, mut client) = start(&[]);
    let mut early = 0;
    for _ in 0..5 {
        assert_eq!(get(&mut client, "/trap").status, 500);
        assert_eq!(get(&mut client, "/ticks").status, 200);
        let begun = Instant::now();
        while get(&mut client, "/ticks").text() == "0" {
            assert!(begun.elapsed() < PATIENCE, "it is not asked");
        }
        early += usize::from(begun.elapsed() < Duration::from_millis(300));
    }
    // By the second alone, a third of them would come so early, and all five once in 400 times.
    assert!(early >= 4, "{early} of 5 came soon after the rebuild");
}

#[test]
fn append_during_replay_is_rejected() {
    let (server, mut client) = start(&[]);
    assert_eq!(client.ask("PUT", "/store/{own}a", b"").text(), "1");
    let server = server.terminate().restart(&[guest(), "--guest-config", "fault=apply-appends"]);
    let mut client = Connection::open(server.address());
    assert_eq!(get(&mut client, "/refusal").text(), "Err(AppendError::ReadOnly)");
    assert_eq!(get(&mut client, "/append-nothing").text(), "Ok(2)");
}

#[test]
fn guest_gets_peer_and_principal() {
    let (_server, mut client) = start(&[]);
    let port = client.port();
    assert_eq!(get(&mut client, "/peer").text(), format!("Some(\"127.0.0.1:{port}\")"));
    assert_eq!(get(&mut client, "/tls").text(), "None None");
}

#[test]
fn guest_reads_only_its_settings() {
    let (_server, mut client) = start(&["--guest-config", "color=blue", "--guest-config", "formula=a=b"]);
    assert_eq!(get(&mut client, "/config/color").text(), "Some(\"blue\")");
    assert_eq!(get(&mut client, "/config/formula").text(), "Some(\"a=b\")");
    assert_eq!(get(&mut client, "/config/shape").text(), "None");
}

#[test]
fn guest_cannot_read_environment() {
    let (_server, mut client) = start(&[]);
    assert_eq!(get(&mut client, "/environment").text(), "[]");
    assert_eq!(get(&mut client, "/arguments").text(), "[]");
    assert_eq!(get(&mut client, "/input").text(), "");
}

#[test]
fn guest_output_is_logged_with_its_name() {
    let (server, mut client) = start(&[]);
    get(&mut client, "/print/hello-from-inside");
    let line = server.says("hello-from-inside");
    assert!(line.contains("unruly"), "{line}");
}

#[test]
fn guest_output_cannot_forge_log_lines() {
    let (server, mut client) = start(&[]);
    get(&mut client, "/print-controls");
    let line = server.says("forged");
    assert!(line.chars().all(|character| !character.is_control()), "{line:?}");
}

#[test]
fn guest_output_is_limited() {
    let (server, mut client) = start(&["--guest-log-bytes", "16KiB"]);
    get(&mut client, "/chatter");
    server.says("output beyond 16384 bytes in 1s is dropped");
    let lines = server.stderr().iter().filter(|line| line.contains("does not stop talking")).count();
    assert!((100..400).contains(&lines), "{lines} lines of one call");
}
