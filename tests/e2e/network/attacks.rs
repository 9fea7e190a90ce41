//! Continuous attacks, and their effect on honest clients: slowhttptest at the limit of connections, and harmful HTTP/2
//! frames.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::http2;
use crate::support::load::SaysOver;
use crate::support::memory::memory;
use crate::support::metrics::Metrics;
use crate::support::server::Server;
use crate::support::wire::Connection;

/// Duration of an attack.
const SECONDS: &str = "10";

/// Sends requests, on a new connection for every ten, as new clients do, until `over`. Returns the number of served requests, of
/// all requests, and the longest time of one.
fn honest(server: &Server, from: &str, over: &AtomicBool) -> (usize, usize, Duration) {
    let (mut served, mut asked, mut slowest) = (0, 0, Duration::ZERO);
    while !over.load(Ordering::Relaxed) {
        let mut client = Connection::open_from(from, server.address());
        for _ in 0..10 {
            let (value, begun) = (asked.to_string(), Instant::now());
            let path = format!("/v1/{from}");
            let put = client.try_ask("PUT", &path, value.as_bytes()).is_ok_and(|answer| answer.status == 201);
            let got = put && client.try_ask("GET", &path, b"").is_ok_and(|answer| answer.body == value.as_bytes());
            asked += 1;
            served += usize::from(got);
            slowest = slowest.max(begun.elapsed());
        }
    }
    (served, asked, slowest)
}

#[test]
fn slow_clients_at_connection_limit_block_no_others() {
    let server = Server::start(
        &[
            ["--max-connections", "400", "--max-connections-per-address", "300"],
            ["--header-timeout", "8s", "--idle-timeout", "8s"],
        ]
        .concat(),
    );
    let large = vec![b'x'; 1 << 20];
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/large", &large).status, 201);
    let url = server.url("/v1/large");
    // Slow heads, slow bodies, thousands of ranges, slow reading. Each uses more connections than the limit of an address.
    let attacks = [
        &["-H", "-i", "1"][..],
        &["-B", "-i", "1", "-s", "8192", "-t", "POST"],
        &["-R", "-a", "1", "-b", "3000", "-t", "HEAD"],
        &["-X", "-w", "512", "-y", "1024", "-n", "1", "-z", "32", "-k", "3"],
    ];
    let (over, most) = (AtomicBool::new(false), AtomicUsize::new(0));
    let results: Vec<_> = thread::scope(|scope| {
        let says_over = SaysOver(&over);
        let clients: Vec<_> =
            ["127.0.0.2", "127.0.0.3"].map(|from| scope.spawn(|| honest(&server, from, &over))).into();
        let watching = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let open = Metrics::of(&server).get("kvs_connections") as usize;
                most.fetch_max(open, Ordering::Relaxed);
                thread::yield_now();
            }
        });
        let attacks = attacks.map(|attack| {
            let mut tool = Command::new("slowhttptest");
            tool.args(attack).args(["-c", "400", "-r", "200", "-l", SECONDS, "-p", "3", "-u", &url]);
            tool.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            tool.spawn().unwrap_or_else(|error| panic!("slowhttptest cannot be run ({error}): `just test` installs it"))
        });
        for mut attack in attacks {
            attack.wait().expect("it ends");
        }
        drop(says_over);
        watching.join().expect("it ends");
        clients.into_iter().map(|client| client.join().expect("it ends")).collect()
    });
    let (served, asked) = results.iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    let slowest = results.iter().map(|one| one.2).max().unwrap_or_default();
    let most = most.into_inner();
    println!("{served} of {asked} honest requests were served, beside {most} connections, within {slowest:.1?}");
    assert!(most >= 300, "the attack came to no more than {most} connections");
    assert!(slowest < Duration::from_secs(5), "one waited for {slowest:.1?}");
    assert!(asked > 100 && served * 1_000 >= asked * 999, "{served} of {asked} were served");
}

/// The time within which 99% of an honest client's requests are answered.
fn p99(server: &Server) -> Duration {
    let mut client = Connection::open(server.address());
    let mut times: Vec<_> = (0..4_000)
        .map(|_| {
            let begun = Instant::now();
            assert_eq!(client.ask("GET", "/v1/honest", b"").status, 200);
            begun.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

/// The same time during an attack, and the number of attacks.
fn p99_beside(server: &Server, attack: Attack) -> (Duration, usize) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let attacker = scope.spawn(|| {
            gives_way();
            let mut times = 0;
            while !over.load(Ordering::Relaxed) {
                attack(server);
                times += 1;
            }
            times
        });
        let says_over = SaysOver(&over);
        let attacked = p99(server);
        drop(says_over);
        (attacked, attacker.join().expect("it ends"))
    })
}

/// Runs this thread only when the CPU is otherwise idle: a real attacker has another machine, and uses CPU time of the
/// server only by its requests.
fn gives_way() {
    let thread = fs::read_link("/proc/thread-self").expect("there is a thread");
    let thread = thread.file_name().expect("it has a number");
    let chrt = Command::new("chrt").args(["--idle", "--pid", "0"]).arg(thread).status();
    assert!(chrt.is_ok_and(|status| status.success()), "chrt, of util-linux, cannot be run");
}

/// An attack, which is repeated, each time on a new connection.
type Attack = fn(&Server);

const ATTACKS: [(&str, Attack); 6] = [
    ("rapid reset", |server| {
        http2::takes_back(server, 1_000);
    }),
    ("a flood of CONTINUATION", |server| {
        http2::goes_on_with_headers(server, 100);
    }),
    ("empty DATA", |server| http2::sends_nothing(server, 1_000)),
    ("a flood of PING", |server| http2::sends_many(server, http2::PING, b"12345678")),
    ("a flood of SETTINGS", |server| http2::sends_many(server, http2::SETTINGS, b"")),
    ("a window of nothing", |server| drop(http2::takes_nothing(server, 50))),
];

/// Checks that all other clients are served and that the memory of the server does not grow. Latencies with and without an
/// attack are only printed, since other tests share this machine.
#[test]
fn harmful_http2_frames_block_no_others() {
    let server = Server::start(&["--idle-timeout", "1s", "--request-timeout", "1s"]);
    let mut client = Connection::open(server.address());
    assert_eq!(client.ask("PUT", "/v1/honest", &[b'x'; 100]).status, 201);
    assert_eq!(client.ask("PUT", "/v1/a", &[b'x'; 100_000]).status, 201);
    for (name, attack) in ATTACKS {
        let (mut ratios, mut times, mut before) = (Vec::new(), 0, None);
        for _ in 0..5 {
            let alone = p99(&server);
            let (attacked, count) = p99_beside(&server, attack);
            ratios.push(attacked.div_duration_f64(alone));
            times += count;
            before.get_or_insert_with(|| memory(&server));
        }
        ratios.sort_unstable_by(f64::total_cmp);
        let grown = memory(&server).saturating_sub(before.unwrap_or_default());
        println!("{name}: {times} times, p99 is {ratios:.2?} of what it is alone, memory grew by {grown} KiB");
        assert!(grown < 32 << 10, "{name}: memory grew by {grown} KiB");
    }
}
