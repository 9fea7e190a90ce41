//! Tokens with a key prefix: a client can read and change only keys with this prefix, with any request.

use std::fs;
use std::process::{Command, Stdio};
use std::thread;

use serde_json::{Value, json};

use crate::support::events::Events;
use crate::support::guests::{brittle, component, guest};
use crate::support::server::{Server, kvs, refused};
use crate::support::tokens::{Client, Tokens};
use crate::support::wire::Connection;

/// Output of a command.
fn printed(mut command: Command) -> String {
    let output = command.stdout(Stdio::piped()).output().expect("the binary can be started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn keys_are_those_of_the_prefix(shards: &str) {
    let tokens = Tokens::new();
    let boss = tokens.add(&["boss", "--scope", "admin"]);
    let team = tokens.add(&["team", "--scope", "admin", "--key-prefix", "team/"]);
    let server = Server::start(&["--tokens", &tokens.file(), "--shards", shards]);
    let (mut boss, mut client) = (Client::new(&server, &boss), Client::new(&server, &team));
    let others = ["other/1", "team", "team0", "zoo"];
    let own = (1..=8).map(|number| format!("team/{number}")).collect::<Vec<_>>();
    for key in others.iter().copied().chain(own.iter().map(String::as_str)) {
        assert_eq!(boss.status("PUT", &format!("/v1/key/{key}"), "1"), 201);
    }

    for method in ["GET", "PUT", "DELETE", "POST"] {
        let refusal = client.ask(method, "/v1/zoo?op=add&delta=1", "");
        refusal.says(403, "the token is valid only for keys that begin with `team/`");
        assert_eq!(refusal.header("kvs-error"), Some("forbidden"));
    }
    assert_eq!(client.ask("GET", "/v1/key/team/1", "").text(), "1");
    assert_eq!(client.ask("POST", "/v1/key/team/1?op=add&delta=1", "").text(), "2");
    assert_eq!(client.keys(""), own);
    assert_eq!(client.keys("reverse=true&limit=1"), ["team/8"]);
    assert_eq!(client.keys("prefix=te&start=team/7"), ["team/7", "team/8"]);
    assert_eq!(client.json("GET", "/v1?count=true", ""), json!({"count": 8}));
    assert_eq!(client.json("GET", "/v1?delimiter=/", "")["prefixes"], json!(["team/"]));
    assert_eq!(client.status("GET", "/v1?prefix=zoo", ""), 403);
    assert_eq!(client.json("QUERY", "/v1", r#"["team/1"]"#)["keys"][0]["value"], json!("2"));
    assert_eq!(client.status("QUERY", "/v1", r#"["team/1", "zoo"]"#), 403);
    assert_eq!(client.status("GET", "/v1?key=team/1&key=zoo", ""), 403);
    assert_eq!(client.status("POST", "/v1", r#"[{"op": "put", "key": "team/{a}1", "value": ""}]"#), 200);
    let refusal = client.ask("POST", "/v1", r#"[{"op": "get", "key": "team/{a}1"}, {"op": "get", "key": "{a}"}]"#);
    refusal.says(403, "operation 1: the token is valid only for keys that begin with `team/`");

    let bearer = client.bearer.clone();
    let mut events = Events::open(&server, "/v1?watch", &[("authorization", &bearer)]);
    assert_eq!(client.status("GET", "/v1?watch&prefix=zoo", ""), 403);
    assert_eq!(boss.status("PUT", "/v1/zoo", "unseen"), 201);
    let seen = client.ask("DELETE", "/v1/key/team/%7Ba%7D1", "").header("kvs-sequence").map(str::to_owned);
    assert_eq!(events.next().map(|event| event.id.to_string()), seen);

    let command = |args: &[&str]| {
        let mut command = kvs();
        command.args(args).env("KVS_URL", server.url("")).env("KVS_TOKEN", &team);
        command
    };
    assert_eq!(printed(command(&["list"])).lines().collect::<Vec<_>>(), own);
    assert_eq!(printed(command(&["export"])).lines().count(), 8);
    refused(command(&["get", "zoo"])).with(1, &["get zoo: the token is valid only for keys", "(403)"]);
    assert_eq!(client.json("DELETE", "/v1?prefix=", "")["deleted"], json!(8));
    assert_eq!((client.keys(""), boss.keys("")), (vec![], others.map(str::to_owned).to_vec()));
    // Whatever its scope.
    let admin = [("authorization", &*bearer)];
    assert_eq!(Connection::open(server.admin()).ask_with("GET", "/metrics", &admin, b"").status, 403);
}

#[test]
fn client_with_key_prefix_sees_and_changes_no_other_keys() {
    keys_are_those_of_the_prefix("1");
}

#[test]
fn client_with_key_prefix_sees_no_other_keys_of_four_shards() {
    keys_are_those_of_the_prefix("4");
}

#[test]
fn host_enforces_key_prefix_on_appends_and_watches() {
    let tokens = Tokens::new();
    let team = tokens.add(&["team", "--scope", "write", "--key-prefix", "team-"]);
    let declares = ["--guest-config", "capabilities=key-prefix"];
    let server = Server::start(&[&["--tokens", &tokens.file(), guest()], &declares[..]].concat());
    let mut client = Client::new(&server, &team);
    assert_eq!(client.ask("GET", "/grant", "").text(), r#"Grant { scope: Scope::Write, key-prefix: Some("team-") }"#);
    for (key, appended) in [("team-1", true), ("team", false), ("other", false), ("\u{1}index", true)] {
        for method in ["PUT", "DELETE"] {
            let answer = client.ask(method, "/append-any", key);
            assert_eq!(answer.text().starts_with("Ok("), appended, "{method} {key}: {}", answer.text());
            assert!(appended || answer.text().contains("ReadOnly"), "{}", answer.text());
        }
    }
    for (selectors, status) in [("team-*", 200), ("team-1,team-2", 200), ("", 200), ("*", 403), ("team-1,team", 403)] {
        let mut watch = Client::new(&server, &team);
        let head =
            watch.connection.ask_for_head("GET", &format!("/watch/{selectors}"), &[("authorization", &watch.bearer)]);
        assert_eq!(head.status, status, "{selectors}");
    }
}

#[test]
fn guest_without_key_prefix_gets_no_such_request() {
    for shards in ["1", "4"] {
        let tokens = Tokens::new();
        let team = tokens.add(&["team", "--scope", "write", "--key-prefix", "team-"]);
        let paths = tokens.add(&["paths", "--path-prefix", "/store/team-"]);
        let server = Server::start(&["--tokens", &tokens.file(), "--shards", shards, guest()]);
        let mut client = Client::new(&server, &team);
        for (method, path) in [
            ("GET", "/handled"),
            ("PUT", "/store/team-1"),
            ("GET", "/store/team-1"),
            ("GET", "/all-shards"),
            ("GET", "/route-traps"),
        ] {
            client.ask(method, path, "").says(403, "the guest enforces no key prefix, which the token has");
        }
        assert_eq!(Client::new(&server, &paths).ask("GET", "/store/team-1", "").text(), "nothing there");
    }
}

#[test]
fn shadow_traffic_reports_guest_without_key_prefix() {
    let tokens = Tokens::new();
    let boss = tokens.add(&["boss", "--scope", "admin"]);
    let team = tokens.add(&["team", "--scope", "write", "--key-prefix", "team-"]);
    let server = Server::start(&["--tokens", &tokens.file(), "--probation", "1ms"]);
    let (boss, mut team) = (Client::new(&server, &boss), Client::new(&server, &team));
    let headers = [("authorization", boss.bearer.as_str())];
    let answer = thread::scope(|scope| {
        let swapping = scope.spawn(|| {
            let target = "/guest?shadow=10s&sample=100";
            Connection::open(server.admin()).ask_with("PUT", target, &headers, &component(brittle()))
        });
        // It decides on these requests as the built-in guest does.
        while !swapping.is_finished() {
            assert_eq!(team.status("PUT", "/v1/team-a", "1"), 201);
        }
        swapping.join().expect("the swap is answered")
    });
    assert_eq!(answer.status, 422, "{}", answer.text());
    let status = Connection::open(server.admin()).ask_with("GET", "/guest", &headers, b"");
    let status: Value = serde_json::from_slice(&status.body).expect("it is JSON");
    let example = &status["last_swap"]["shadow"]["examples"][0];
    assert_eq!((&example["target"], &example["difference"]), (&json!("/v1/team-a"), &json!("key prefix")), "{status}");
    assert_eq!(team.status("GET", "/v1/team-a", ""), 200);
}

#[test]
fn tokens_of_one_name_share_no_response_across_key_prefixes() {
    let tokens = Tokens::new();
    let clients = ["a", "b"].map(|prefix| tokens.add(&["twin", "--key-prefix", prefix]));
    let clients = [&clients[..], &[tokens.add(&["twin"])]].concat();
    let declares = ["--guest-config", "capabilities=key-prefix"];
    let server = Server::start(&[&["--tokens", &tokens.file(), guest()], &declares[..]].concat());
    let mut given = Vec::new();
    for token in &clients {
        let mut client = Client::new(&server, token);
        let [first, again] = [(); 2].map(|()| client.ask("GET", "/reuse/none/{own}a", "").body);
        assert_eq!(first, again, "it is not kept");
        given.push(first);
    }
    given.dedup();
    assert_eq!(given.len(), clients.len(), "a response was given to another client");
}

#[test]
fn key_prefix_is_stored_in_token_file() {
    let tokens = Tokens::new();
    tokens.add(&["alice", "--key-prefix", "team a%/ä"]);
    let text = fs::read_to_string(tokens.file()).expect("the file is there");
    assert!(text.ends_with(" key-prefix=team%20a%25/%C3%A4\n"), "{text}");
    let token = |args: &[&str]| {
        let mut command = kvs();
        command.arg("token").args(args).args(["--tokens", &tokens.file()]);
        command
    };
    assert!(printed(token(&["list"])).ends_with("never                 key-prefix=team%20a%25/%C3%A4\n"));
    refused(token(&["create", "bob", "--key-prefix", ""])).with(2, &["--key-prefix", "1 to 1024 bytes"]);
    refused(token(&["create", "bob", "--key-prefix", "a\n"])).with(2, &["--key-prefix", "control characters"]);
    refused(token(&["create", "bob", "--key-prefix", "a", "--path-prefix", "/v1"])).with(2, &["cannot be used with"]);
}

#[test]
fn value_is_printed_as_json_whatever_its_size_and_token() {
    let tokens = Tokens::new();
    let token = tokens.add(&["paths", "--scope", "write", "--path-prefix", "/v1/a"]);
    let server = Server::start(&["--tokens", &tokens.file(), "--max-value-bytes", "4MiB"]);
    let mut client = Client::new(&server, &token);
    let large = "x".repeat(3 << 20);
    assert_eq!(client.status("PUT", "/v1/a?ttl=1h", &large), 201);
    let mut command = kvs();
    command.args(["get", "a", "--output", "json"]).env("KVS_URL", server.url("")).env("KVS_TOKEN", &token);
    let entry: Value = serde_json::from_str(&printed(command)).expect("JSON");
    assert_eq!((&entry["key"], &entry["etag"], &entry["size"]), (&json!("a"), &json!("\"1\""), &json!(3 << 20)));
    assert!(entry["value"] == large && entry["expires"].is_u64());
}
