//! The rate limit of each client.

use tempfile::TempDir;

use crate::support::server::{Server, refused, serve, serve_refused};
use crate::support::tokens::{Tokens, ask, with};
use crate::support::wire::Connection;

#[test]
fn client_over_rate_gets_retry_after() {
    let tokens = Tokens::new();
    let (alice, bob) = (tokens.add(&["alice"]), tokens.add(&["bob"]));
    // One a minute, so that a slow test does not get another.
    let server = Server::start(&["--rate-limit", "1/m", "--rate-burst", "3", "--tokens", &tokens.file()]);
    for _ in 0..3 {
        ask(&server, "GET", "/v1/a", &with(&alice)).says(404, "no such key");
    }
    let refused = ask(&server, "GET", "/v1/a", &with(&alice));
    refused.says(429, "rate limit exceeded; retry later");
    let wait: u64 = refused.header("retry-after").and_then(|wait| wait.parse().ok()).expect("a number of seconds");
    assert!((1..=60).contains(&wait), "{wait}");
    assert_eq!(refused.header("ratelimit"), Some(format!("\"client\";r=0;t={wait}").as_str()));
    assert_eq!(refused.header("ratelimit-policy"), Some("\"client\";q=3;w=180"));
    ask(&server, "GET", "/v1/a", &with(&bob)).says(404, "no such key");
}

#[test]
fn clients_without_name_are_limited_by_address() {
    let server = Server::start(&["--rate-limit", "1/m"]);
    ask(&server, "GET", "/v1/a", "").says(404, "no such key");
    assert_eq!(ask(&server, "GET", "/v1/a", "").status, 429);
    let mut elsewhere = Connection::open_from("127.0.0.2", server.address());
    elsewhere.ask("GET", "/v1/a", b"").says(404, "no such key");
}

#[test]
fn request_over_rate_can_wait() {
    let server = Server::start(&["--rate-limit", "10/s", "--rate-burst", "1", "--rate-queue", "10s"]);
    let mut client = Connection::open(server.address());
    let begun = std::time::Instant::now();
    for _ in 0..4 {
        client.ask("GET", "/v1/a", b"").says(404, "no such key");
    }
    // The first does not wait. The others never come early, however slow the machine is.
    assert!(begun.elapsed().as_millis() >= 290, "they did not wait: {:?}", begun.elapsed());
}

#[test]
fn invalid_rate_is_usage_error() {
    for rate in ["", "10", "0/s", "10/h", "fast/s", "10/"] {
        serve_refused(&["--rate-limit", rate]).with(2, &["--rate-limit"]);
    }
    serve_refused(&["--rate-burst", "3"]).with(2, &["--rate-limit"]);
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = serve(data.path());
    command.args(["--rate-limit", "1/s", "--rate-burst", "0"]);
    refused(command).with(2, &["--rate-burst"]);
}
