//! Watches, over reconnects, restarts, compaction and traps.

use std::thread;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::events::{Event, Events};
use crate::support::guests::{DEFAULT_GUEST, component, copy_of, guest};
use crate::support::log::{is_compactable, kvs_at};
use crate::support::requests::put;
use crate::support::server::{Server, serve};
use crate::support::swap::{swaps, under_load};
use crate::support::wire::{Connection, Response};

fn event(id: u64, event: &str, data: Value) -> Option<Event> {
    Some(Event { id, event: event.to_owned(), data })
}

fn refused(server: &Server, target: &str) -> Response {
    Connection::open(server.address()).ask("GET", target, b"")
}

#[test]
fn watch_sends_changes_of_its_keys() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    client.ask("PUT", "/v1/a1", b"before");
    let mut all = Events::open(&server, "/v1?watch", &[]);
    let mut some = Events::open(&server, "/v1?watch=true&prefix=a", &[]);
    assert_eq!((all.begin, some.begin, Events::open(&server, "/v1?watch&since=0", &[]).begin), (1, 1, 0));
    client.ask_with("PUT", "/v1/a2", &[("content-type", "text/plain")], b"a \"value\"\nof two lines");
    client.ask("PUT", "/v1/b", b"\xff");
    client.ask("DELETE", "/v1/a1", b"");
    let put = json!({"key": "a2", "value": "a \"value\"\nof two lines", "metadata": {"content-type": "text/plain"}});
    for events in [&mut all, &mut some] {
        assert_eq!(events.next(), event(2, "put", put.clone()));
    }
    assert_eq!(all.next(), event(3, "put", json!({"key": "b", "value_base64": "/w=="})));
    for events in [&mut all, &mut some] {
        assert_eq!(events.next(), event(4, "delete", json!({"key": "a1"})));
    }
    // An expired key is deleted, and watches get the event.
    let expires = client.ask("PUT", "/v1/a3?ttl=1", b"").etag();
    let put = some.next().expect("a put");
    assert_eq!((Some(put.id), put.data["expires"].is_u64()), (expires, true));
    assert_eq!(some.next(), event(6, "delete", json!({"key": "a3"})));
}

#[test]
fn resumed_watch_sends_every_event_once() {
    let server = Server::start(&["--segment-bytes", "2MiB"]);
    let count = 2_000;
    thread::scope(|scope| {
        for writer in 0..4 {
            let server = &server;
            scope.spawn(move || {
                let mut client = Connection::open(server.address());
                for n in 0..count / 4 {
                    assert_eq!(client.ask("PUT", &format!("/v1/{writer}-{n}"), &[b'x'; 1_000]).status, 201);
                }
            });
        }
        let (mut last, mut round) = (0, 0);
        while last < count {
            let id = last.to_string();
            // In the header, as a browser sends it, or in the query.
            let (target, headers) = match round % 2 {
                0 => (format!("/v1?watch&since={last}"), vec![]),
                _ => ("/v1?watch&since=0".to_owned(), vec![("last-event-id", id.as_str())]),
            };
            let mut events = Events::open(&server, &target, &headers);
            round += 1;
            for _ in 0..(round * 13).min(count - last) {
                let event = events.next().expect("the stream continues");
                assert_eq!(event.id, last + 1);
                last = event.id;
            }
        }
    });
    // Also from before a restart.
    let server = server.kill().restart(&["--segment-bytes", "2MiB"]);
    let mut events = Events::open(&server, "/v1?watch&since=1000", &[]);
    for id in 1_001..=count {
        assert_eq!(events.next().map(|event| event.id), Some(id));
    }
    Connection::open(server.address()).ask("PUT", "/v1/new", b"");
    assert_eq!(events.next().map(|event| event.data), Some(json!({"key": "new", "value": ""})));
}

#[test]
fn compacted_position_is_410_with_new_position() {
    if !is_compactable() {
        return;
    }
    let data = TempDir::new().expect("a temporary directory can be made");
    let text = data.path().join("text");
    // Long ago, since deletes are retained for a while for resumed watches.
    let lines = "1\t2\tgone\tvalue\t1000\t\n2\t1\tgone\t\t1000\n3\t2\tstays\tvalue\t1000\t\n";
    std::fs::write(&text, lines).expect("the directory takes a file");
    for args in [&["import", text.to_str().expect("a temporary path is text")][..], &["compact"]] {
        let mut log = kvs_at(data.path());
        log.arg("txlog").args(args);
        let done = log.output().expect("the binary under test can be started");
        assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
    let server = Server::spawn(serve(data.path()), data);
    refused(&server, "/v1?watch&since=1")
        .says(410, "changes after sequence 1 were compacted; list the keys again and watch with since=3");
    let mut events = Events::open(&server, "/v1?watch&since=2", &[]);
    assert_eq!(events.next(), event(3, "put", json!({"key": "stays", "value": "value"})));
}

#[test]
fn invalid_watch_is_rejected() {
    let server = Server::start(&[]);
    Connection::open(server.address()).ask("PUT", "/v1/a", b"");
    for (query, expected) in [
        ("watch&since=x", "the position is malformed; positions are what a watch or a list gave"),
        ("watch&since=-1", "the position is malformed; positions are what a watch or a list gave"),
        ("watch&since=", "the position is malformed; positions are what a watch or a list gave"),
        ("watch&limit=5", "unknown query parameter `limit`"),
        ("since=0", "unknown query parameter `since`"),
    ] {
        refused(&server, &format!("/v1?{query}")).says(400, expected);
    }
    let unknown =
        "the position 2 is not in the history of this log, which was restored or is another one; read the keys again";
    refused(&server, "/v1?watch&since=2").says(410, unknown);
    let mut client = Connection::open(server.address());
    client.ask_with("GET", "/v1?watch", &[("last-event-id", "2")], b"").says(410, unknown);
    for (position, status) in [("2", 410), ("x", 400)] {
        let target = format!("/v1?watch&since={position}");
        let problem = client.ask_with("GET", &target, &[("accept", "application/problem+json")], b"");
        assert_eq!((problem.status, problem.header("content-type")), (status, Some("application/problem+json")));
        let head = client.ask("HEAD", &target, b"");
        assert_eq!(head.status, status);
    }
    let head = client.ask("HEAD", "/v1?watch&since=1", b"");
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
    assert_eq!(client.ask("GET", "/v1/a", b"").status, 200);
}

#[test]
fn watch_of_several_selectors_gets_each_change_once() {
    let server = Server::start(&[guest()]);
    let mut client = Connection::open(server.address());
    let mut events = Events::open(&server, "/watch/a*,ab*,abc,{own}x", &[]);
    let mut puts = Events::open(&server, "/watch/a*,{own}x//puts-only", &[]);
    let mut nothing = Events::open(&server, "/watch/", &[]);
    let put = |client: &mut Connection, key: &str| {
        assert_eq!(client.ask("PUT", &format!("/store/{key}"), b"").status, 201);
    };
    for key in ["abc", "b", "{own}x", "{own}xy"] {
        put(&mut client, key);
    }
    assert_eq!(client.ask("DELETE", "/append-any", b"{own}x").text(), "Ok(5)");
    put(&mut client, "ab");
    let expected = [(1, "put", "abc"), (3, "put", "{own}x"), (5, "delete", "{own}x"), (6, "put", "ab")];
    // Changes from the feed, and changes replayed from the log.
    let mut again = Events::open(&server, "/watch/a*,ab*,abc,{own}x/0", &[]);
    let mut puts_again = Events::open(&server, "/watch/a*,{own}x/0/puts-only", &[]);
    for (id, kind, key) in expected {
        for events in [&mut events, &mut again] {
            let next = events.next().expect("the stream continues");
            assert_eq!((next.id, next.event.as_str(), next.data["key"].as_str()), (id, kind, Some(key)));
        }
        for puts in [&mut puts, &mut puts_again] {
            if kind == "put" {
                assert_eq!(puts.next().map(|next| next.id), Some(id));
            }
        }
    }
    let many = format!("/watch/{}", "a,".repeat(101));
    refused(&server, &many).says(400, "a watch of 101 selectors, at most 100 are allowed");
    server.terminate();
    assert_eq!(nothing.next(), None, "a stream without selectors ends with the server");
}

#[test]
fn guest_keys_are_sent_only_to_their_selectors() {
    let server = Server::start(&[guest()]);
    let mut client = Connection::open(server.address());
    let mut all = Events::open(&server, "/watch/*", &[]);
    let mut own = Events::open(&server, "/watch/%01*", &[]);
    assert_eq!(client.ask("PUT", "/append-any", b"\x01{own}/a").text(), "Ok(1)");
    assert_eq!(client.ask("PUT", "/store/{own}a", b"value").text(), "2");
    let mut past = Events::open(&server, "/watch/*/0", &[]);
    for events in [&mut all, &mut past] {
        assert_eq!(events.next(), event(2, "put", json!({"key": "{own}a", "value": "value"})));
    }
    assert_eq!(own.next(), event(1, "put", json!({"key": "\u{1}{own}/a", "value": ""})));

    // The built-in guest keeps them, and shows them to no client.
    swaps(&server, &component(DEFAULT_GUEST));
    let list = client.ask("GET", "/v1", b"");
    assert_eq!(list.text(), r#"{"keys":[{"key":"{own}a","etag":"\"2\"","size":5}],"list_complete":true}"#);
    client.ask("GET", "/v1/%01%7Bown%7D%2Fa", b"").says(400, "key holds the control character U+0001");
    let mut none = Events::open(&server, "/v1?watch&prefix=%01&since=0", &[]);
    let mut all = Events::open(&server, "/v1?watch&since=0", &[]);
    assert_eq!(all.next(), event(2, "put", json!({"key": "{own}a", "value": "value"})));
    let server = server.terminate().restart(&[guest()]);
    assert_eq!(none.next(), None);
    let kept = Connection::open(server.address()).ask("GET", "/keys", b"");
    assert_eq!(kept.text(), r#"["\u{1}{own}/a", "{own}a"]"#);
}

#[test]
fn slow_consumer_is_disconnected_and_can_resume() {
    let server = Server::start(&["--watch-buffer-bytes", "64KiB", "--durability", "os"]);
    let mut slow = Events::open(&server, "/v1?watch", &[]);
    let mut client = Connection::open(server.address());
    // More than socket buffers hold.
    let count = 60;
    for n in 0..count {
        assert_eq!(client.ask("PUT", &format!("/v1/{n}"), &vec![b'x'; 1 << 20]).status, 201);
    }
    let mut last = 0;
    while let Some(event) = slow.next() {
        assert_eq!(event.id, last + 1);
        last = event.id;
    }
    assert!(last < count, "all {last} were kept for it");
    let mut again = Events::open(&server, "/v1?watch", &[("last-event-id", &last.to_string())]);
    for id in last + 1..=count {
        assert_eq!(again.next().map(|event| event.id), Some(id));
    }
}

#[test]
fn watch_without_events_is_kept_alive() {
    let server = Server::start(&["--watch-keep-alive", "50ms"]);
    let mut events = Events::open(&server, "/v1?watch", &[]);
    for _ in 0..3 {
        assert_eq!(events.block().expect("it continues").as_deref(), Some(":"));
    }
}

#[test]
fn watch_shows_positions_that_skip_nothing() {
    let server = Server::start(&["--watch-keep-alive", "50ms"]);
    let mut events = Events::open(&server, "/v1?watch&key=a", &[]);
    let mut block = || events.block().expect("it continues");
    assert_eq!((put(&server, "b", "1"), put(&server, "c", "2")), (201, 201));
    let mut shown = 0;
    while shown < 2 {
        let text = block().expect("it does not end");
        let Some(position) = text.strip_prefix("id: ") else { continue };
        // Before the watch subscribes, the first may come again.
        assert!(position.parse::<u64>().is_ok_and(|position| position > shown || shown == 0), "{text} after {shown}");
        shown = position.parse().expect("a number");
    }
    assert_eq!((put(&server, "a", "3"), put(&server, "b", "4")), (201, 201));
    while !block().expect("it does not end").starts_with("id: 3\nevent: put\n") {}
    // At once: no heartbeat comes so early.
    let server = server.terminate().restart(&["--watch-keep-alive", "1h"]);
    let mut events = Events::open(&server, "/v1?watch&key=a", &[]);
    assert_eq!(put(&server, "b", "5"), 201);
    server.terminate();
    assert_eq!(events.block().expect("it ends well").as_deref(), Some("id: 5"));
    assert_eq!(events.block().expect("it ends well"), None);
}

#[test]
fn watch_continues_over_trap() {
    let server = Server::start(&[guest()]);
    let mut client = Connection::open(server.address());
    let mut events = Events::open(&server, "/watch/key", &[]);
    assert_eq!(client.ask("GET", "/trap", b"").status, 500);
    assert_eq!(client.ask("PUT", "/store/other", b"value").status, 201);
    assert_eq!(client.ask("PUT", "/store/key", b"value").status, 201);
    assert_eq!(events.next(), event(2, "put", json!({"key": "key", "value": "value"})));
}

#[test]
fn stop_ends_watches() {
    let server = Server::start(&["--drain-timeout", "10m"]);
    let mut events = Events::open(&server, "/v1?watch", &[]);
    server.terminate();
    assert_eq!(events.next(), None);
}

#[test]
fn watch_continues_over_swaps_without_gap() {
    let server = Server::start(&["--probation", "1ms"]);
    let mut events = Events::open(&server, "/v1?watch", &[]);
    under_load(&server, |_| {
        for guest in [copy_of(DEFAULT_GUEST), component(DEFAULT_GUEST), copy_of(DEFAULT_GUEST)] {
            swaps(&server, &guest);
        }
    });
    let last = Connection::open(server.address()).ask("PUT", "/v1/last", b"").etag().expect("a PUT has an ETag");
    for id in 1..=last {
        assert_eq!(events.next().map(|event| event.id), Some(id));
    }
}

/// A watch that resumes misses no event, even if later puts superseded it.
#[test]
fn position_before_compacted_puts_is_410() {
    if !is_compactable() {
        return;
    }
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for n in 0..3 {
        client.ask("PUT", "/v1/a", n.to_string().as_bytes());
    }
    client.ask("PUT", "/v1/b", b"stays");
    let stopped = server.terminate();
    let mut compact = kvs_at(stopped.data());
    compact.args(["txlog", "compact"]);
    assert!(compact.status().expect("the binary under test can be started").success());
    let server = stopped.restart(&[]);
    for since in [0, 1] {
        let expected =
            format!("changes after sequence {since} were compacted; list the keys again and watch with since=4");
        refused(&server, &format!("/v1?watch&prefix=b&since={since}")).says(410, &expected);
    }
    // The recommended position is valid, and proxies must not buffer the response.
    let head = Connection::open(server.address()).ask("HEAD", "/v1?watch&prefix=b&since=4", b"");
    assert_eq!((head.status, head.header("x-accel-buffering")), (200, Some("no")));
    let mut events = Events::open(&server, "/v1?watch&since=2", &[]);
    assert_eq!(events.next(), event(3, "put", json!({"key": "a", "value": "2"})));
    assert_eq!(events.next(), event(4, "put", json!({"key": "b", "value": "stays"})));
}

/// Resident memory of a server, in KiB.
fn memory(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// CPU time of a PUT and of a GET of a key that is not watched, in nanoseconds: the median of some hundreds each. They are
/// pipelined, since most of the cost of a single one is the wake-up, which varies.
fn costs(server: &Server, client: &mut Connection) -> [u64; 2] {
    ["PUT", "GET"].map(|method| {
        let mut costs: Vec<_> = (0..15)
            .map(|_| {
                let before = cpu(server);
                client.send(
                    format!("{method} /v1/key HTTP/1.1\r\nhost: kvs\r\ncontent-length: 5\r\n\r\nvalue").repeat(500),
                );
                (0..500).for_each(|_| assert!(client.read().status < 300));
                (cpu(server) - before) / 500
            })
            .collect();
        costs.sort();
        costs[costs.len() / 2]
    })
}

/// The CPU time of all threads so far, in nanoseconds.
fn cpu(server: &Server) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{}/task", server.pid())).expect("it runs");
    let time = |thread: std::io::Result<std::fs::DirEntry>| {
        let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    };
    threads.filter_map(time).sum()
}

#[test]
fn ten_thousand_idle_watches_cost_little() {
    let count: u32 = 10_000;
    // This process has the other ends of the connections.
    let least = 2 * u64::from(count);
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < least) {
        let raised = Rlimit { current: Some(least), maximum: limit.maximum.map(|most| most.max(least)) };
        setrlimit(Resource::Nofile, raised).expect("20,000 files may be open, as `ulimit -Hn 20000` allows");
    }
    let places = ["--max-connections", "11000", "--max-connections-per-address", "11000"];
    let server = Server::start(&[&places[..], &["--durability", "os", "--watch-keep-alive", "1h"]].concat());
    let mut client = Connection::open(server.address());
    let (memory_before, costs_before) = (memory(&server), costs(&server, &mut client));
    let mut watchers: Vec<_> =
        (0..count).map(|n| Events::open(&server, &format!("/v1?watch&prefix=other{n}."), &[])).collect();
    let each = (memory(&server) - memory_before) as f64 / f64::from(count);
    let costs = costs(&server, &mut client);
    let [put, get] = [0, 1].map(|at| costs[at] as f64 / costs_before[at] as f64);
    println!("a watcher holds {each:.1} KiB; with {count} a PUT costs {put:.2} times the CPU, a GET {get:.2} times");
    assert!(each < 64.0 && put < 5.0 && get < 5.0, "{costs_before:?} {costs:?}");
    let id = client.ask("PUT", "/v1/other7.a", b"value").etag().expect("a PUT has an ETag");
    let expected = event(id, "put", json!({"key": "other7.a", "value": "value"}));
    assert_eq!(watchers[7].next(), expected);
}

#[test]
fn watch_is_not_closed_by_idle_timeout() {
    let server =
        Server::start(&["--header-timeout", "500ms", "--idle-timeout", "500ms", "--watch-keep-alive", "100ms"]);
    let mut events = Events::open(&server, "/v1?watch", &[]);
    for _ in 0..15 {
        assert_eq!(events.block().expect("it continues").as_deref(), Some(":"), "the stream ended");
    }
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", b"value").status, 201);
    assert_eq!(events.next(), event(1, "put", json!({"key": "a", "value": "value"})));
}
