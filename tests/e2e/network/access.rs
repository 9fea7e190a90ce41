//! Tokens and their scopes.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit};
use tempfile::TempDir;

use crate::support::events::Events;
use crate::support::guests::guest;
use crate::support::server::{Server, kvs, refused, serve_refused};
use crate::support::tokens::{Tokens, ask, with};
use crate::support::wire::{Connection, Response};

#[test]
fn token_allows_requests_of_its_scope() {
    let tokens = Tokens::new();
    let read = tokens.add(&["reader"]);
    let write = tokens.add(&["writer", "--scope", "write"]);
    let admin = tokens.add(&["boss", "--scope", "admin"]);
    let server = Server::start(&["--tokens", &tokens.file()]);
    let challenge = |response: &Response| response.header("www-authenticate").unwrap_or_default().to_owned();

    for method in ["GET", "PUT", "DELETE", "POST", "BREW"] {
        let response = ask(&server, method, "/v1/a", "");
        response.says(401, "a bearer token is required: Authorization: Bearer TOKEN");
        assert_eq!(challenge(&response), "Bearer realm=\"kvs\"");
    }
    let wrong = format!("kvs_{}", "0".repeat(64));
    for authorization in [
        with(&wrong),
        with(""),
        with(&read[..read.len() - 1]),
        with(&format!("{read} {read}")),
        format!("authorization: Basic {read}\r\n"),
        format!("authorization: {read}\r\n"),
        with(&read) + &with(&write),
    ] {
        let response = ask(&server, "GET", "/v1/a", &authorization);
        response.says(401, "the token is unknown");
        assert_eq!(challenge(&response), "Bearer realm=\"kvs\", error=\"invalid_token\"");
    }

    for token in [&read, &write, &admin] {
        ask(&server, "GET", "/v1/a", &with(token)).says(404, "no such key");
        assert_eq!(ask(&server, "HEAD", "/v1/a", &with(token)).status, 404);
        ask(&server, "GET", "/v1/a", &format!("Authorization: bearer  {token} \r\n")).says(404, "no such key");
    }
    for method in ["PUT", "DELETE", "POST", "BREW"] {
        let response = ask(&server, method, "/v1/a", &with(&read));
        response.says(403, "the token is read-only");
        assert_eq!(challenge(&response), "Bearer realm=\"kvs\", error=\"insufficient_scope\"");
    }
    ask(&server, "GET", "/v1/a", &with(&read)).says(404, "no such key");
    for token in [&write, &admin] {
        assert_eq!(ask(&server, "PUT", "/v1/a", &with(token)).status, 201);
        assert_eq!(ask(&server, "DELETE", "/v1/a", &with(token)).status, 200);
    }
    let said = server.terminate().stderr().join("\n");
    for secret in [&read, &write, &admin, &wrong] {
        assert!(!said.contains(secret.as_str()), "a token was logged:\n{said}");
    }
}

#[test]
fn token_can_be_restricted_to_paths() {
    let tokens = Tokens::new();
    let bound = tokens.add(&["team-a", "--scope", "admin", "--path-prefix", "/v1/a-"]);
    let server = Server::start(&["--tokens", &tokens.file()]);
    assert_eq!(ask(&server, "PUT", "/v1/a-1", &with(&bound)).status, 201);
    assert_eq!(ask(&server, "GET", "/v1/a-1?x=y", &with(&bound)).status, 400);
    for path in ["/v1/b", "/v1", "/", "/v1/%61-1", "/v1/key/a-1", "/v1/a-/../b", "/v1/a-%2F..%2Fb", "//v1/a-1"] {
        ask(&server, "GET", path, &with(&bound)).says(403, "the token is not valid for this path");
    }
}

#[test]
fn guest_gets_token_name_and_not_token() {
    let tokens = Tokens::new();
    let read = tokens.add(&["reader"]);
    let server = Server::start(&["--tokens", &tokens.file(), guest()]);
    assert_eq!(ask(&server, "GET", "/principal", &with(&read)).text(), "Some(\"reader\")");
}

#[test]
fn guest_gets_scope_of_token() {
    let tokens = Tokens::new();
    let server_tokens = [
        ("Read", tokens.add(&["reader"])),
        ("Write", tokens.add(&["writer", "--scope", "write"])),
        ("Admin", tokens.add(&["boss", "--scope", "admin"])),
        // Not valid for the admin listener; a path prefix is not a key prefix.
        ("Write", tokens.add(&["bound", "--scope", "admin", "--path-prefix", "/grant"])),
    ];
    let server = Server::start(&["--tokens", &tokens.file(), guest()]);
    for (scope, token) in server_tokens {
        let expected = format!("Grant {{ scope: Scope::{scope}, key-prefix: None }}");
        assert_eq!(ask(&server, "GET", "/grant", &with(&token)).text(), expected);
    }
}

#[test]
fn tokens_are_reloaded_on_change() {
    let tokens = Tokens::new();
    let first = tokens.add(&["first"]);
    let server = Server::start(&["--tokens", &tokens.file()]);
    let second = tokens.add(&["second"]);
    // The server gets no signal.
    server.says("reloaded the token file");
    ask(&server, "GET", "/v1/a", &with(&second)).says(404, "no such key");

    fs::write(tokens.file(), "nonsense\n").expect("the file can be written");
    server.signal(Signal::HUP);
    let line = server.says("keeping the current one");
    assert!(line.contains("line 1: the line is not NAME SCOPE SHA256"), "{line}");
    ask(&server, "GET", "/v1/a", &with(&first)).says(404, "no such key");

    fs::write(tokens.file(), "").expect("the file can be written");
    server.signal(Signal::HUP);
    server.says_again("reloaded the token file", 2);
    ask(&server, "GET", "/v1/a", &with(&first)).says(401, "the token is unknown");
}

#[test]
fn tokens_are_reloaded_after_descriptor_shortage() {
    let tokens = Tokens::new();
    let token = tokens.add(&["alice"]);
    let server = Server::start(&["--tokens", &tokens.file()]);
    let mut client = Connection::open(server.address());
    let authorization = [("authorization", format!("Bearer {token}"))];
    let headers = authorization.each_ref().map(|(name, value)| (*name, value.as_str()));
    client.ask_with("GET", "/v1/a", &headers, b"").says(404, "no such key");
    let pid = Pid::from_raw(server.pid().cast_signed());
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let limit = Rlimit { current: Some(3), maximum };
    let before = prlimit(pid, Resource::Nofile, limit).expect("a child can be limited");
    fs::write(tokens.file(), "").expect("the file can be written");
    server.says("failed to reload the token file");
    prlimit(pid, Resource::Nofile, before).expect("a child can be limited");
    // The file does not change again, and the server gets no signal.
    server.says("reloaded the token file");
    client.ask_with("GET", "/v1/a", &headers, b"").says(401, "the token is unknown");
}

/// Replaces the line of a token, or removes it.
fn change(tokens: &Tokens, server: &Server, name: &str, line: impl Fn(&str) -> Option<String>) {
    let text = fs::read_to_string(tokens.file()).expect("the file is there");
    let of_it = |old: &str| old.starts_with(&format!("{name} "));
    let lines: Vec<_> =
        text.lines().filter_map(|old| if of_it(old) { line(old) } else { Some(old.to_owned()) }).collect();
    // Replaced atomically: a half-written file has no valid token.
    let new = tokens.file() + ".new";
    fs::write(&new, lines.join("\n")).and_then(|()| fs::rename(&new, tokens.file())).expect("the file can be written");
    server.signal(Signal::HUP);
}

#[test]
fn narrowed_token_ends_its_watches_and_long_polls() {
    let tokens = Tokens::new();
    let names = ["revoked", "bound", "weaker", "renamed", "keyed"];
    let changed = names.map(|name| tokens.add(&[name, "--scope", "write"]));
    let stays = tokens.add(&["stays", "--scope", "write"]);
    // Nothing is to be seen by a heartbeat that comes early.
    let server = Server::start(&["--tokens", &tokens.file(), "--watch-keep-alive", "1h"]);
    let watch = |token: &str| Events::open(&server, "/v1?watch", &[("authorization", &format!("Bearer {token}"))]);
    let poll = |token: &str| {
        let mut client = Connection::open(server.address());
        client.send(format!("GET /v1/a?wait=300s HTTP/1.1\r\nhost: kvs\r\n{}\r\n", with(token)));
        assert!(client.is_silent_for(Duration::from_millis(100)), "it does not wait");
        client
    };
    let (mut watching, mut waiting) = (watch(&stays), poll(&stays));
    let ended = changed.each_ref().map(|token| (watch(token), poll(token)));
    change(&tokens, &server, "revoked", |_| None);
    change(&tokens, &server, "bound", |line| Some(format!("{line} /v1/elsewhere")));
    change(&tokens, &server, "weaker", |line| Some(line.replace(" write ", " read ")));
    change(&tokens, &server, "renamed", |line| Some(line.replace("renamed", "another")));
    change(&tokens, &server, "keyed", |line| Some(format!("{line} key-prefix=b")));
    let refusals = [
        (401, "the token is unknown"),
        (403, "the token is not valid for this path"),
        (403, "the permissions of the token were reduced during the request"),
        (403, "the permissions of the token were reduced during the request"),
        (403, "the permissions of the token were reduced during the request"),
    ];
    for ((mut watching, mut waiting), (status, expected)) in ended.into_iter().zip(refusals) {
        assert_eq!(watching.next(), None, "{expected}");
        waiting.read().says(status, expected);
    }
    // Other requests continue.
    assert_eq!(ask(&server, "PUT", "/v1/a", &with(&stays)).status, 201);
    assert_eq!(watching.next().map(|event| event.id), Some(1));
    assert_eq!(waiting.read().etag(), Some(1));
    change(&tokens, &server, "stays", |line| Some(line.replace(" write ", " admin ")));
    server.says_again("reloaded the token file", 2);
    assert_eq!(ask(&server, "PUT", "/v1/b", &with(&stays)).status, 201);
    assert_eq!(watching.next().map(|event| event.id), Some(2));
}

#[test]
fn body_that_arrives_after_a_revocation_is_not_stored() {
    let tokens = Tokens::new();
    let changed = ["revoked", "weaker"].map(|name| tokens.add(&[name, "--scope", "write"]));
    let stays = tokens.add(&["stays", "--scope", "write"]);
    let server = Server::start(&["--tokens", &tokens.file()]);
    let begun = [&changed[0], &changed[1], &stays].map(|token| {
        let mut client = Connection::open(server.address());
        // The server asks for the body once it has accepted the head.
        client.send(format!(
            "PUT /v1/of-{} HTTP/1.1\r\nhost: kvs\r\ncontent-length: 5\r\nexpect: 100-continue\r\n{}\r\n",
            &token[60..],
            with(token)
        ));
        assert_eq!(client.read().status, 100);
        (client, format!("/v1/of-{}", &token[60..]))
    });
    change(&tokens, &server, "revoked", |_| None);
    server.says("reloaded the token file");
    change(&tokens, &server, "weaker", |line| Some(line.replace(" write ", " read ")));
    server.says_again("reloaded the token file", 2);
    let expected = [(401, 404), (403, 404), (201, 200)];
    for ((mut client, path), (status, stored)) in begun.into_iter().zip(expected) {
        client.send("value");
        assert_eq!(client.read().status, status);
        assert_eq!(ask(&server, "GET", &path, &with(&stays)).status, stored);
    }
}

#[test]
fn revoked_token_ends_its_backup() {
    let tokens = Tokens::new();
    let admin = tokens.add(&["operator", "--scope", "admin"]);
    let server = Server::start(&["--tokens", &tokens.file(), "--backup-timeout", "1h"]);
    let value = "x".repeat(1 << 20);
    let mut client = Connection::open(server.address());
    for n in 0..32 {
        let head = format!("PUT /v1/{n} HTTP/1.1\r\nhost: kvs\r\ncontent-length: {}\r\n", value.len());
        client.send(head + &with(&admin) + "\r\n" + &value);
        assert_eq!(client.read().status, 201);
    }
    let mut backup = TcpStream::connect(server.admin()).expect("the server listens");
    let request = format!("GET /backup HTTP/1.1\r\nhost: kvs\r\n{}\r\n", with(&admin));
    backup.write_all(request.as_bytes()).expect("it is sent");
    let mut received = vec![0; 100];
    backup.read_exact(&mut received).expect("it begins");
    assert!(received.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&received));
    change(&tokens, &server, "operator", |_| None);
    server.says("reloaded the token file");
    // The content of the socket buffers arrives, or a reset.
    let _ = backup.read_to_end(&mut received);
    assert!(received.len() < 24 << 20, "{} bytes of 32 MiB came", received.len());
}

#[test]
fn expired_token_is_rejected_and_its_watch_ends() {
    let tokens = Tokens::new();
    let short = tokens.add(&["short", "--expires", "5s"]);
    // Nothing is to be seen by a heartbeat that comes early.
    let server = Server::start(&["--tokens", &tokens.file(), "--watch-keep-alive", "1h"]);
    let bearer = format!("Bearer {short}");
    let mut watch = Connection::open(server.address());
    let head = watch.ask_for_head("GET", "/v1?watch", &[("authorization", &*bearer)]);
    if head.status == 200 {
        // On a slow machine it has expired before.
        while watch.chunk().is_some() {}
    }
    let expired = ask(&server, "GET", "/v1/a", &with(&short));
    expired.says(401, "the token has expired");
    assert!(expired.header("www-authenticate").is_some_and(|challenge| challenge.contains("invalid_token")));
}

#[test]
fn metrics_token_allows_only_metrics() {
    let tokens = Tokens::new();
    let scraper = tokens.add(&["scraper", "--scope", "metrics"]);
    let write = tokens.add(&["writer", "--scope", "write"]);
    let admin = tokens.add(&["boss", "--scope", "admin"]);
    // On loopback too.
    let server = Server::start(&["--tokens", &tokens.file()]);
    let status = |method: &str, path: &str, token: &str| {
        let authorization = [("authorization", &*format!("Bearer {token}"))];
        Connection::open(server.admin()).ask_with(method, path, &authorization, b"").status
    };
    assert_eq!(["/metrics", "/guest"].map(|path| status("GET", path, &scraper)), [200, 403]);
    assert_eq!(["/metrics", "/guest"].map(|path| status("GET", path, &write)), [403, 403]);
    assert_eq!(["/metrics", "/guest"].map(|path| status("GET", path, &admin)), [200, 200]);
    assert_eq!(status("DELETE", "/guest", &scraper), 403);
    for path in ["/backup", "/history?key=a", "/stats", "/read-only", "/v1", "/v1/a"] {
        assert_eq!([&scraper, &write].map(|token| status("GET", path, token)), [403, 403], "{path}");
    }
    for path in ["/metrics", "/guest"] {
        assert_eq!(Connection::open(server.admin()).ask("GET", path, b"").status, 401, "{path}");
    }
    for method in ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "POST"] {
        assert_eq!(ask(&server, method, "/v1/a", &with(&scraper)).status, 403, "{method}");
    }
    ask(&server, "GET", "/v1/a", &with(&scraper)).says(403, "the token is for metrics");
}

#[test]
fn admin_listener_on_loopback_is_open_only_by_flag() {
    let tokens = Tokens::new();
    tokens.add(&["alice"]);
    let server = Server::start(&["--tokens", &tokens.file(), "--admin-open"]);
    assert_eq!(Connection::open(server.admin()).ask("GET", "/metrics", b"").status, 200);
    serve_refused(&["--tokens", &tokens.file(), "--admin-open", "--admin", "0.0.0.0:0"])
        .with(1, &["--admin 0.0.0.0:0", "--admin-open"]);
    serve_refused(&["--admin-open"]).with(2, &["--tokens"]);
}

#[test]
fn unusable_token_file_is_reported() {
    let tokens = Tokens::new();
    serve_refused(&["--tokens", &tokens.file()]).with(1, &["--tokens", &tokens.file(), "cannot read"]);
    fs::write(tokens.file(), "alice read\n").expect("the file can be written");
    serve_refused(&["--tokens", &tokens.file()]).with(1, &["--tokens", &tokens.file(), "line 1"]);
}

#[test]
fn network_address_without_access_control_needs_flag() {
    let everywhere = |data: &Path, args: &[&str]| {
        let mut command = kvs();
        command.args(["serve", "--listen", "0.0.0.0:0", "--data-dir"]).arg(data).args(args);
        command
    };
    let data = || TempDir::new().expect("a temporary directory can be made");
    refused(everywhere(data().path(), &[])).with(1, &["--listen 0.0.0.0:0", "without TLS and tokens", "--insecure"]);
    let directory = data();
    let server = Server::spawn(everywhere(directory.path(), &["--insecure"]), directory);
    server.says("WARN --listen 0.0.0.0:0 can be reached from elsewhere, without TLS: everybody can read and change");

    let tokens = Tokens::new();
    tokens.add(&["alice"]);
    let directory = data();
    let server = Server::spawn(everywhere(directory.path(), &["--tokens", &tokens.file()]), directory);
    server.says("WARN --listen 0.0.0.0:0 can be reached from elsewhere, without TLS: tokens can be overheard");
}

#[test]
fn reachable_admin_listener_requires_token() {
    serve_refused(&["--admin", "0.0.0.0:0"]).with(1, &["--admin 0.0.0.0:0", "--tokens"]);
    let tokens = Tokens::new();
    let write = tokens.add(&["writer", "--scope", "write"]);
    let bound = tokens.add(&["bound", "--scope", "admin", "--path-prefix", "/"]);
    let admin = tokens.add(&["boss", "--scope", "admin"]);
    let ask = |server: &Server, authorization: &str| {
        let mut client = Connection::open(server.admin());
        client.send(format!("GET /guest HTTP/1.1\r\nhost: kvs\r\n{authorization}\r\n"));
        client.read()
    };
    let server = Server::start(&["--admin", "0.0.0.0:0", "--tokens", &tokens.file()]);
    assert_eq!(ask(&server, "").status, 401);
    ask(&server, &with(&write)).says(403, "the token is not valid for the admin listener");
    ask(&server, &with(&bound)).says(403, "the token is not valid for the admin listener");
    assert_eq!(ask(&server, &with(&admin)).status, 200);
    // Health needs no token, for load balancers.
    for path in ["/livez", "/readyz"] {
        assert_eq!(Connection::open(server.admin()).ask("GET", path, b"").status, 200, "{path}");
    }
    for path in ["/metrics", "/", "/livez/", "//livez"] {
        assert_eq!(Connection::open(server.admin()).ask("GET", path, b"").status, 401, "{path}");
    }
    let swap = |token: &str| {
        let mut command = kvs();
        command.args(["swap", "--dry-run", "--admin", &server.admin().to_string(), "--token", token]);
        command
    };
    refused(swap(&write)).with(1, &["not swapped", "403"]);
    assert!(swap(&admin).status().expect("the binary under test can be started").success());
}
