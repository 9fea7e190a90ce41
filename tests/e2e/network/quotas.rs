//! Quotas of tokens: the keys with a prefix are counted right whatever changes them, and nobody else is limited.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::guests::{DEFAULT_GUEST, copy_of};
use crate::support::metrics::Metrics;
use crate::support::server::{PATIENCE, Server};
use crate::support::swap::put_in;
use crate::support::tokens::{Client, Tokens};
use crate::support::wire::Response;

/// A server with a token that has this quota and one that has none, and the flags of the server.
struct Limited {
    server: Server,
    team: String,
    other: String,
    args: [String; 5],
    _tokens: Tokens,
}

impl Limited {
    fn start(quota: &[&str], shards: &str) -> Self {
        let tokens = Tokens::new();
        let prefix = ["--scope", "write", "--key-prefix", "team/"];
        let team = tokens.add(&[&["team"], &prefix[..], quota].concat());
        let other = tokens.add(&[&["other"], &prefix[..]].concat());
        let args = ["--admin-open", "--tokens", &tokens.file(), "--shards", shards].map(str::to_owned);
        let server = Server::start(&args.each_ref().map(String::as_str));
        Self { server, team, other, args, _tokens: tokens }
    }

    fn team(&self) -> Client {
        Client::new(&self.server, &self.team)
    }

    fn restarted(self) -> Self {
        let args = self.args.each_ref().map(String::as_str);
        Self { server: self.server.kill().restart(&args), ..self }
    }
}

#[track_caller]
fn exceeds(response: &Response) {
    assert_eq!((response.status, response.header("kvs-error")), (507, Some("quota_exceeded")), "{}", response.text());
}

fn number_of_keys_is_limited(shards: &str) {
    let limited = Limited::start(&["--max-keys", "50"], shards);
    // Clients that put different keys concurrently, in all shards.
    let stored: usize = thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let mut team = limited.team();
                scope.spawn(move || {
                    let put = |number| team.ask("PUT", &format!("/v1/team%2F{client}-{number}"), "");
                    let responses: Vec<_> = (0..40).map(put).collect();
                    responses.iter().filter(|response| response.status != 201).for_each(exceeds);
                    responses.iter().filter(|response| response.status == 201).count()
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().expect("no panic")).sum()
    });
    assert_eq!(stored, 50);
    let mut team = limited.team();
    assert_eq!(team.json("GET", "/v1?count=true", ""), json!({"count": 50}));
    assert!(Metrics::of(&limited.server).get("kvs_limit_exceeded_total{limit=\"quota\"}") >= 110.0);

    // Others are not limited, what is there can be changed, and what is deleted makes room.
    let mut other = Client::new(&limited.server, &limited.other);
    assert_eq!(other.status("PUT", "/v1/team%2F{a}1", "1"), 201);
    exceeds(&team.ask("POST", "/v1/team%2F{a}2?op=add&delta=1", ""));
    assert_eq!(team.status("POST", "/v1/team%2F{a}1?op=add&delta=1", ""), 200);
    let operations = |operations: Value| operations.to_string();
    let puts = json!([{"op": "put", "key": "team/{a}1", "value": "3"}, {"op": "put", "key": "team/{a}3", "value": ""}]);
    exceeds(&team.ask("POST", "/v1", &operations(puts)));
    assert_eq!(team.ask("GET", "/v1/team%2F{a}1", "").text(), "2", "nothing of it is stored");
    let moved = json!([{"op": "delete", "key": "team/{a}1"}, {"op": "put", "key": "team/{a}3", "value": ""}]);
    assert_eq!(team.status("POST", "/v1", &operations(moved)), 200);
    assert_eq!(team.json("DELETE", "/v1?prefix=team/0-", "")["complete"], true);
    let left = team.json("GET", "/v1?count=true", "")["count"].as_u64().expect("a number");

    // The same after a crash.
    let limited = limited.restarted();
    let mut team = limited.team();
    for number in left..50 {
        assert_eq!(team.status("PUT", &format!("/v1/team%2Fnew-{number}"), ""), 201, "{number}");
    }
    exceeds(&team.ask("PUT", "/v1/team%2Fmore", ""));
    assert_eq!(team.status("DELETE", "/v1/team%2Fnew-49", ""), 200);
    assert_eq!(team.status("PUT", "/v1/team%2Fmore", ""), 201);
    exceeds(&team.ask("PUT", "/v1/team%2Fmost", ""));
}

#[test]
fn number_of_keys_is_limited_in_one_shard() {
    number_of_keys_is_limited("1");
}

#[test]
fn number_of_keys_is_limited_in_four_shards() {
    number_of_keys_is_limited("4");
}

#[test]
fn bytes_are_limited_until_keys_expire() {
    let limited = Limited::start(&["--max-bytes", "1KiB"], "1");
    let mut team = limited.team();
    // Keys have six bytes.
    assert_eq!(team.status("PUT", "/v1/team%2Fa", &"x".repeat(494)), 201);
    assert_eq!(team.status("PUT", "/v1/team%2Fb?ttl=1h", &"x".repeat(512)), 201);
    exceeds(&team.ask("PUT", "/v1/team%2Fc", &"x".repeat(7)));
    exceeds(&team.ask("PUT", "/v1/team%2Fa", &"x".repeat(501)));
    assert_eq!(team.status("PUT", "/v1/team%2Fa", &"x".repeat(500)), 201);
    // The key is deleted at its time.
    assert_eq!(team.status("PUT", "/v1/team%2Fb?ttl=1s", &"x".repeat(512)), 201);
    let begun = Instant::now();
    while team.status("PUT", "/v1/team%2Fc", &"x".repeat(512)) != 201 {
        assert!(begun.elapsed() < PATIENCE, "what expires makes no room");
        thread::sleep(Duration::from_millis(50));
    }
    exceeds(&team.ask("PUT", "/v1/team%2Fd", ""));
}

#[test]
fn quota_holds_over_a_swap() {
    let tokens = Tokens::new();
    let team = tokens.add(&["team", "--scope", "write", "--key-prefix", "a", "--max-keys", "2"]);
    let server = Server::start(&["--tokens", &tokens.file(), "--admin-open", "--probation", "1ms"]);
    let mut team = Client::new(&server, &team);
    for key in ["a1", "a2"] {
        assert_eq!(team.status("PUT", &format!("/v1/{key}"), ""), 201);
    }
    put_in(&server, &copy_of(DEFAULT_GUEST));
    exceeds(&team.ask("PUT", "/v1/a3", ""));
    assert_eq!(team.status("DELETE", "/v1/a1", ""), 200);
    assert_eq!(team.status("PUT", "/v1/a3", ""), 201);
    exceeds(&team.ask("PUT", "/v1/a4", ""));
}
