//! `kvs get`, `put`, `delete`, `list`, `watch`, `import` and `export`, as people and scripts use them: through pipes, over TLS,
//! with errors, and, in `interrupted`, when they or the server are killed.

mod interrupted;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Output, Stdio};
use std::thread;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::certificates::{Authority, Kind};
use crate::support::server::{PATIENCE, Refused, Server, kvs, refused};
use crate::support::wire::{Connection, short};
use crate::support::zoo;

/// `kvs COMMAND` on a server.
fn client(server: &Server, args: &[&str]) -> Command {
    let mut command = kvs();
    command.args(args).env("KVS_URL", server.url(""));
    command
}

/// Runs a command with this on its standard input.
fn run(mut command: Command, input: &[u8]) -> Output {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().expect("the binary can be started");
    let mut stdin = child.stdin.take().expect("it is piped");
    thread::scope(|scope| {
        // The command need not read its input.
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output().expect("a child can be waited for")
    })
}

/// Runs a command that must succeed, and returns its output.
#[track_caller]
fn printed(command: Command, input: &[u8]) -> Vec<u8> {
    let output = run(command, input);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}, it said: {said}", output.status);
    output.stdout
}

#[track_caller]
fn lines(command: Command) -> Vec<String> {
    String::from_utf8(printed(command, b"")).expect("text").lines().map(str::to_owned).collect()
}

fn objects(command: Command) -> Vec<Value> {
    lines(command).iter().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

fn refuses(server: &Server, args: &[&str]) -> Refused {
    refused(client(server, args))
}

#[test]
fn session_at_terminal_works() {
    let server = Server::start(&[]);
    let kvs = |args: &[&str]| client(&server, args);
    refuses(&server, &["get", "key-a"]).with(1, &["kvs: get key-a: no such key (404)"]);
    assert_eq!(printed(kvs(&["put", "key-a", "Hello, key-value store!"]), b""), b"1\n");
    assert_eq!(printed(kvs(&["get", "key-a"]), b""), b"Hello, key-value store!");

    refuses(&server, &["put", "key-a", "x", "--create"]).with(1, &["put key-a", "the key has the etag \"1\"", "(412)"]);
    refuses(&server, &["put", "key-a", "x", "--if-match", "7"]).with(1, &["put key-a", "(412)"]);
    refuses(&server, &["delete", "key-a", "--if-match", "7"]).with(1, &["delete key-a", "(412)"]);
    assert_eq!(printed(kvs(&["put", "key-a", "again", "--if-match", "1"]), b""), b"2\n");
    assert_eq!(printed(kvs(&["put", "key-b", "--create", "--content-type", "image/x"]), b"\xff\0"), b"3\n");
    assert_eq!(printed(kvs(&["get", "key-b"]), b""), b"\xff\0");
    let file = server.data().join("file");
    fs::write(&file, "from a file").expect("the directory takes a file");
    let file = format!("@{}", file.display());
    assert_eq!(printed(kvs(&["put", "c", &file, "--ttl", "1h"]), b""), b"4\n");

    assert_eq!(lines(kvs(&["list"])), ["c", "key-a", "key-b"]);
    assert_eq!(lines(kvs(&["list", "key-"])), ["key-a", "key-b"]);
    let listed = objects(kvs(&["list", "--output", "json"]));
    assert_eq!(listed[1], json!({"key": "key-a", "etag": "\"2\"", "size": 5}));
    assert!(listed[0]["expires"].is_u64(), "{}", listed[0]);
    let dumped = objects(kvs(&["export", "key-"]));
    assert_eq!(dumped[0], json!({"key": "key-a", "etag": "\"2\"", "value": "again"}));
    assert_eq!(dumped[1], json!({"key": "key-b", "etag": "\"3\"", "value_base64": "/wA=", "content_type": "image/x"}));

    assert_eq!(printed(kvs(&["delete", "key-a"]), b""), b"");
    assert_eq!(printed(kvs(&["delete", "key-a"]), b""), b"");
    assert_eq!(lines(kvs(&["list", "key-"])), ["key-b"]);
}

#[test]
fn every_operation_has_command() {
    let server = Server::start(&[]);
    let kvs = |args: &[&str]| client(&server, args);
    let json = |args: &[&str]| objects(kvs(&[args, &["--output", "json"]].concat())).remove(0);
    assert_eq!(printed(kvs(&["add", "visits"]), b""), b"1\n");
    assert_eq!(printed(kvs(&["add", "visits", "-5", "--ttl", "1h"]), b""), b"-4\n");
    assert_eq!(
        json(&["add", "visits", "6", "--if-match", "2"]),
        json!({"key": "visits", "etag": "\"3\"", "value": "2"})
    );
    refuses(&server, &["add", "visits", "x"]).with(2, &["x"]);
    assert_eq!(printed(kvs(&["touch", "visits", "90"]), b""), b"4\n");
    refuses(&server, &["touch", "nothing", "90s"]).with(1, &["touch nothing", "no such key", "(404)"]);

    assert_eq!(
        json(&["put", "a", "text", "--content-type", "a/b"]),
        json!({"key": "a", "etag": "\"5\"", "created": true})
    );
    let shown = String::from_utf8(printed(kvs(&["get", "-i", "a"]), b"")).expect("text");
    assert_eq!(shown, "etag: 5\ncontent-type: a/b\n\ntext");
    let entry = json!({"key": "a", "etag": "\"5\"", "size": 4, "content_type": "a/b", "value": "text"});
    assert_eq!(json(&["get", "a", "--wait", "10ms"]), entry);
    refuses(&server, &["get", "nothing", "--wait", "10ms"]).with(1, &["get nothing: no such key (404)"]);
    let waiting = thread::scope(|scope| {
        let waiting = scope.spawn(|| printed(kvs(&["get", "awaited", "--wait", "1m"]), b""));
        printed(kvs(&["put", "awaited", "here"]), b"");
        waiting.join().expect("it is answered")
    });
    assert_eq!(waiting, b"here");

    let file = server.data().join("operations");
    let operations = r#"[{"op": "check", "key": "a", "value": "text"}, {"op": "put", "key": "a", "json": [1]}]"#;
    fs::write(&file, operations).expect("the directory takes a file");
    let file = file.to_str().expect("a temporary path is text");
    assert_eq!(lines(kvs(&["txn", file])), ["check \"a\" 5", "put \"a\" 7"]);
    refuses(&server, &["txn", file]).with(1, &["operation 0: the check of `a` failed", "(409)"]);

    assert_eq!(lines(kvs(&["list", "--reverse", "--limit", "2"])), ["visits", "awaited"]);
    assert_eq!(lines(kvs(&["list", "a", "--long"])), ["7\t3\t-\ta", "6\t4\t-\tawaited"]);
    assert_eq!(json(&["delete", "awaited"]), json!({"key": "awaited", "deleted": "\"6\"", "sequence": "8"}));
    assert_eq!(json(&["delete", "awaited"]), json!({"key": "awaited", "deleted": null, "sequence": null}));
    assert_eq!(json(&["delete", "--prefix", "a"]), json!({"prefix": "a", "count": 1, "deleted": 0}));
    assert_eq!(lines(kvs(&["delete", "--prefix", "a", "--yes"])), ["1 keys deleted"]);
    assert_eq!(lines(kvs(&["list"])), ["visits"]);
    refuses(&server, &["delete"]).with(2, &["KEY"]);
}

#[test]
fn every_key_and_value_comes_back() {
    let mut rng = zoo::dice();
    let server = Server::start(&[]);
    let mut curl = Connection::open(server.address());
    for key in zoo::keys(&mut rng, 140).into_iter().take(40) {
        let value = zoo::value(&mut rng);
        printed(client(&server, &["put", "--", &key]), &value);
        assert_eq!(curl.ask("GET", &short(&key), b"").body, value, "{key:?}");
        assert_eq!(printed(client(&server, &["get", "--", &key]), b""), value, "{key:?}");
        assert_eq!(lines(client(&server, &["list", "--", &key])), [&*key]);
        printed(client(&server, &["delete", "--", &key]), b"");
        assert_eq!(curl.ask("GET", &short(&key), b"").status, 404, "{key:?}");
    }
    let large = zoo::large_value(&mut rng);
    printed(client(&server, &["put", "large"]), &large);
    assert_eq!(printed(client(&server, &["get", "large"]), b""), large);
    for more in [1, 1 << 20, 40 << 20] {
        let output = run(client(&server, &["put", "large"]), &vec![0; large.len() + more]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains("(413)"), "{}: {said}", output.status);
    }
}

#[test]
fn error_is_one_line() {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let file = |name: &str, content: &str| {
        let path = directory.path().join(name);
        fs::write(&path, content).expect("the directory takes a file");
        path.to_str().expect("a temporary path is text").to_owned()
    };
    let tokens = directory.path().join("tokens");
    let tokens = tokens.to_str().expect("a temporary path is text");
    let token = |args: &[&str]| {
        let mut command = kvs();
        command.args(["token", "create", "--tokens", tokens]).args(args);
        String::from_utf8(printed(command, b"")).expect("a token is text")
    };
    let (reader, bound) = (token(&["reader"]), token(&["bound", "--scope", "write", "--path-prefix", "/v1/team-a_1:"]));
    let server = Server::start(&["--tokens", tokens]);

    let nobody = |args: &[&str]| refuses(&server, args);
    for args in [&["get", "a"][..], &["put", "a", "x"], &["list"], &["watch"], &["export"], &["delete", "a"]] {
        nobody(args).with(1, &["a bearer token is required", "KVS_TOKEN or --token-file", "(401)"]);
    }
    let unknown = file("unknown", "kvs_0\n");
    nobody(&["get", "a", "--token-file", &unknown]).with(1, &["the token is unknown", "(401)"]);
    nobody(&["get", "a", "--token-file", &file("odd", "kvs\0_0")]).with(1, &["the token contains invalid characters"]);
    nobody(&["get", "a", "--token-file", "/nowhere"]).with(1, &["cannot read --token-file /nowhere"]);
    nobody(&["get", "a", "--token-file", &unknown, "--token", "x"]).with(2, &["--token", "cannot be used with"]);
    let reader = file("reader", &reader);
    nobody(&["get", "a", "--token-file", &reader]).with(1, &["no such key (404)"]);
    nobody(&["put", "a", "x", "--token-file", &reader]).with(1, &["the token is read-only (403)"]);
    // Characters that need no escape are not escaped.
    let by_variable = |args: &[&str]| {
        let mut command = client(&server, args);
        command.env("KVS_TOKEN", bound.trim());
        command
    };
    assert_eq!(printed(by_variable(&["put", "team-a_1:~!$&'()*+,;=@/1", "x"]), b""), b"1\n");
    refused(by_variable(&["put", "team-b", "x"])).with(1, &["the token is not valid for this path (403)"]);

    let open = Server::start(&["--guest-max-memory-bytes", "16MiB"]);
    refuses(&open, &["put", "", "x"]).with(1, &["key is empty (400)"]);
    refuses(&open, &["put", "a", "@/nowhere"]).with(1, &["cannot read /nowhere"]);
    refuses(&open, &["put", "a", "x", "--ttl", "soon"]).with(2, &["--ttl", "a time looks like"]);
    refuses(&open, &["watch", "--since", "7"]).with(1, &["the position 7 is not in the history of this log", "(410)"]);
    let many: String =
        (0..200).map(|n| format!("{{\"key\": \"{{full}}{n}\", \"value\": \"{}\"}}\n", "x".repeat(200_000))).collect();
    let many = file("many", &many);
    let full = refuses(&open, &["import", &many]);
    full.with(1, &["kvs: line ", "of ", "put ", "(507)", "lines are stored, resume with kvs import --resume"]);

    for command in [&["get", "a"][..], &["list"], &["watch"], &["import", &many]] {
        let mut unreachable = kvs();
        unreachable.args(command).args(["--url", "127.0.0.1:1"]);
        let expected =
            ["no response from http://127.0.0.1:1", "check that the server is running and that --url is right"];
        refused(unreachable).with(1, &expected);
    }
}

#[test]
fn export_is_imported_through_pipe_and_tls() {
    let mut rng = zoo::dice();
    let from = Server::start(&[]);
    let mut wire = Connection::open(from.address());
    let mut model = BTreeMap::new();
    for key in zoo::keys(&mut rng, 1_200) {
        let value = zoo::value(&mut rng);
        assert_eq!(wire.ask("PUT", &short(&key), &value).status, 201);
        model.insert(key, value);
    }
    wire.ask_with("PUT", "/v1/typed?ttl=5000", &[("content-type", "image/x")], b"x");
    wire.ask("PUT", "/v1/soon?ttl=1", b"x");
    let dump = printed(client(&from, &["export"]), b"");
    assert_eq!(dump.split(|byte| *byte == b'\n').count(), 1_203);

    let authority = Authority::new();
    let pair = authority.issue("server", Kind::Server, 1);
    let tls = ["--tls-cert", &pair.certificate, "--tls-key", &pair.key];
    let to = Server::start(&tls);
    let url = format!("https://localhost:{}", to.address().port());
    let secure = |args: &[&str]| {
        let mut command = kvs();
        command.args(args).env("KVS_URL", &url).env("KVS_CACERT", authority.file());
        command
    };
    // It has expired when it arrives.
    while String::from_utf8_lossy(&printed(client(&from, &["list", "soon"]), b"")).contains("soon") {}
    let output = run(secure(&["import"]), &dump);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "imported 1202 lines\n");
    for (key, value) in model.iter().take(20) {
        assert_eq!(printed(secure(&["get", "--", key]), b""), *value, "{key:?}");
    }
    let content = |command| {
        let with_etag = objects(command).into_iter().filter(|object| object["key"] != "typed");
        let entries =
            with_etag.map(|object| (object["key"].clone(), object["value"].clone(), object["value_base64"].clone()));
        entries.collect::<Vec<_>>()
    };
    let carried = content(secure(&["export"]));
    assert_eq!(carried.len(), 1_200);
    assert_eq!(carried, content(client(&from, &["export"])));
    let typed =
        [secure(&["export", "typed"]), client(&from, &["export", "typed"])].map(|command| objects(command).remove(0));
    assert_eq!(typed[0]["content_type"], "image/x");
    let expires = typed.map(|typed| typed["expires"].as_u64().expect("it expires"));
    assert!(expires[0].abs_diff(expires[1]) < 1_000 * PATIENCE.as_secs(), "{expires:?}");

    // A server without a trusted certificate receives nothing.
    let mut untrusting = kvs();
    untrusting.args(["get", "a", "--url", &url]);
    refused(untrusting).with(1, &["no response from https://localhost", "--cacert"]);
    let mut wrong = kvs();
    wrong.args(["get", "a", "--url", &url, "--cacert", "Cargo.toml"]);
    refused(wrong).with(1, &["--cacert Cargo.toml contains no PEM certificate"]);
    let mut unix = kvs();
    unix.args(["get", "a", "--url", "unix:/run/kvs.sock"]);
    refused(unix).with(1, &["--url unix:/run/kvs.sock", "curl --unix-socket /run/kvs.sock"]);
}

#[test]
fn closed_output_pipe_is_accepted() {
    let server = Server::start(&[]);
    let lines: String = (0..20_000).map(|n| format!("{{\"key\": \"key-{n}\", \"value\": \"{n}\"}}\n")).collect();
    printed(client(&server, &["import", "-"]), lines.as_bytes());
    for command in ["list", "export"] {
        let mut child = client(&server, &[command]);
        let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it can be started");
        let mut first = String::new();
        BufReader::new(child.stdout.take().expect("it is piped")).read_line(&mut first).expect("it prints");
        assert!(first.contains("key-0"), "{first}");
        let output = child.wait_with_output().expect("a child can be waited for");
        assert_eq!((output.status.code(), output.stderr), (Some(0), vec![]), "{command}");
    }
}

#[test]
fn malformed_line_is_reported_by_number() {
    let server = Server::start(&[]);
    let good = "{\"key\": \"a\", \"value\": \"1\"}\n";
    for (bad, expected) in [
        ("{\"key\": \"b\"}", "`value` or `value_base64` is missing"),
        ("{\"key\": \"b\", \"value\": 5}", "invalid type: integer `5`, expected a string at byte 23"),
        ("{\"key\": \"b\", \"colour\": \"red\"}", "unknown field `colour`"),
        ("{\"key\": \"b\", ", "EOF while parsing"),
        ("{\"key\": \"..\", \"value\": \"\"}", "no server accepts the key \"..\": it has a segment . or .."),
        ("{\"key\": \"\\u0001a\", \"value\": \"\"}", "keys that begin with U+0001 are kept for guests"),
        ("{\"key\": \"\", \"value\": \"\"}", "no server accepts the key \"\": it is empty"),
        (&format!("{{\"key\": \"{}\", \"value\": \"\"}}", "x".repeat(100_000)), "xxx… (100000 bytes)\""),
    ] {
        let file = server.data().join("lines");
        fs::write(&file, [good, bad, "\n", good].concat()).expect("the directory takes a file");
        let file = file.to_str().expect("a temporary path is text");
        // A file is checked completely before anything is put, a pipe as it is read.
        refuses(&server, &["import", file]).with(1, &["kvs: line 2 of ", file, expected]);
        assert_eq!(lines(client(&server, &["list"])), [""; 0]);
    }
    let output = run(client(&server, &["import"]), [good, "nonsense\n", good].concat().as_bytes());
    let said = String::from_utf8_lossy(&output.stderr);
    let expected = "kvs: line 2 of standard input: expected ident at byte 2; the first 1 lines are stored\n";
    assert_eq!((output.status.code(), said.as_ref()), (Some(1), expected));
    assert_eq!(lines(client(&server, &["list"])), ["a"]);
    // The server has further rules, and a key can be long.
    let long = format!("{{\"key\": \"{}\", \"value\": \"\", \"content_type\": \"none\"}}\n", "x".repeat(1_000));
    let output = run(client(&server, &["import"]), long.as_bytes());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("line 1 of standard input: put xxx") && said.contains("(400)"), "{said}");
    assert!(said.contains("xxx… (1000 bytes)") && said.len() < 600, "{said}");
}

#[test]
fn blank_lines_and_byte_order_mark_are_skipped() {
    let server = Server::start(&[]);
    let text = "\u{feff}{\"key\": \"a\", \"value\": \"1\"}\n\n \t\r\n{\"key\": \"b\", \"value\": \"2\"}\r\n\n";
    let file = server.data().join("lines");
    fs::write(&file, text).expect("the directory takes a file");
    printed(client(&server, &["import", file.to_str().expect("a temporary path is text")]), b"");
    assert_eq!(lines(client(&server, &["list"])), ["a", "b"]);
    printed(client(&server, &["delete", "a"]), b"");
    printed(client(&server, &["import"]), text.as_bytes());
    assert_eq!(lines(client(&server, &["list"])), ["a", "b"]);
    let output = run(
        client(&server, &["import"]),
        b"{\"key\": \"c\", \"value\": \"3\"}\n\n{\"key\": \"d\", \"value\": \"4\"}\nx\n",
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("line 4 of standard input") && said.contains("the first 3 lines are stored"), "{said}");
}
