//! `kvs import --from`: a copy from a real Redis and a real etcd, and from a server that responds as in the documentation of
//! Consul, for which there is no package.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::server::{PATIENCE, Server, kvs};
use crate::support::wire::{Connection, short};

/// A process that is killed with its test.
struct Killed {
    child: Child,
    _data: TempDir,
}

impl Drop for Killed {
    fn drop(&mut self) {
        // Fails only when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    listener.local_addr().expect("it has an address")
}

/// Starts another store in a directory of its own, and waits until it accepts connections.
fn start(program: &str, address: SocketAddr, args: &[&str]) -> Killed {
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = Command::new(program);
    command.current_dir(data.path()).args(args).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().unwrap_or_else(|error| panic!("`just test` installs {program}: {error}"));
    let started = Killed { child, _data: data };
    let begun = Instant::now();
    while TcpStream::connect(address).is_err() {
        assert!(begun.elapsed() < PATIENCE, "{program} does not listen on {address}");
        thread::yield_now();
    }
    started
}

fn import(server: &Server, from: &str) -> Output {
    let mut command = kvs();
    command.args(["import", "--url", &server.url(""), "--from", from]);
    command.output().expect("the binary can be started")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn has(client: &mut Connection, key: &str, value: &[u8]) {
    let response = client.ask("GET", &short(key), b"");
    assert_eq!((response.status, &*response.body), (200, value), "{key}");
}

/// The remaining time to live of a key, in seconds.
fn left(client: &mut Connection, key: &str) -> u64 {
    let page: Value =
        serde_json::from_slice(&client.ask("GET", &format!("/v1?prefix={key}"), b"").body).expect("it is JSON");
    let expires = page["keys"][0]["expires"].as_u64().unwrap_or_else(|| panic!("{key} has no TTL: {page}"));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
    expires.saturating_sub(now.as_millis() as u64) / 1_000
}

/// Sends commands to Redis, and waits for the last response.
fn redis(address: SocketAddr, commands: &[&[&[u8]]]) {
    let mut connection = TcpStream::connect(address).expect("it listens");
    for command in commands.iter().chain([&[b"ECHO".as_slice(), b"done"].as_slice()]) {
        let mut request = format!("*{}\r\n", command.len()).into_bytes();
        for word in *command {
            request.extend(format!("${}\r\n", word.len()).into_bytes());
            request.extend(*word);
            request.extend(b"\r\n");
        }
        connection.write_all(&request).expect("it reads");
    }
    for line in BufReader::new(connection).lines() {
        let line = line.expect("it answers");
        assert!(!line.starts_with('-'), "{line}");
        if line == "done" {
            return;
        }
    }
    panic!("it closed the connection");
}

#[test]
fn strings_of_redis_are_copied_with_their_ttl() {
    let address = free();
    let _redis =
        start("redis-server", address, &["--bind", "127.0.0.1", "--port", &address.port().to_string(), "--save", ""]);
    let many: Vec<Vec<u8>> = (0..1_000).map(|number| format!("many:{number}").into_bytes()).collect();
    let mut commands: Vec<Vec<&[u8]>> = many.iter().map(|key| vec![b"SET".as_slice(), key, key]).collect();
    let large = vec![b'x'; 700_000];
    commands.extend([
        vec![b"SET".as_slice(), "gr\u{fc}n/a".as_bytes(), b"\xff\0binary"],
        vec![b"SET", b"empty", b""],
        vec![b"SET", b"large", &large],
        vec![b"SET", b"session", b"soon gone", b"EX", b"1000"],
        vec![b"SET", b"gone", b"", b"PX", b"1"],
        vec![b"SET", b"\xff", b"no text"],
        vec![b"SET", b"line\nbreak", b""],
        vec![b"RPUSH", b"queue", b"job"],
        vec![b"HSET", b"user", b"name", b"ada"],
    ]);
    let commands: Vec<&[&[u8]]> = commands.iter().map(Vec::as_slice).collect();
    redis(address, &commands);

    let server = Server::start(&[]);
    let output = import(&server, &format!("redis://{address}"));
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for line in [
        "left out \"queue\": its type is list; only strings are copied",
        "left out \"user\": its type is hash; only strings are copied",
        "left out \"\u{fffd}\": the key is not UTF-8",
        "left out \"line\\nbreak\": no server accepts the key: it has the control character U+000A",
        "imported 1004 keys",
        &format!("4 keys of redis://{address} were left out"),
    ] {
        assert!(said.contains(line), "{line} is missing in: {said}");
    }
    let client = &mut Connection::open(server.address());
    for (key, value) in [("gr\u{fc}n/a", b"\xff\0binary".as_slice()), ("empty", b""), ("large", &large)] {
        has(client, key, value);
    }
    many.iter().for_each(|key| has(client, str::from_utf8(key).expect("it is text"), key));
    assert!((900..=1_000).contains(&left(client, "session")));
    client.ask("GET", "/v1/gone", b"").says(404, "no such key");

    let small = Server::start(&["--max-value-bytes", "100000"]);
    let output = import(&small, &format!("redis://{address}"));
    let said = self::said(&output);
    for line in ["left out \"large\": ", "imported 1003 keys", &format!("5 keys of redis://{address} were left out")] {
        assert!(said.contains(line), "{line} is missing in: {said}");
    }

    let output = import(&server, &format!("redis://{address}/1"));
    assert_eq!((output.status.code(), self::said(&output).contains("imported 0 keys")), (Some(0), true), "{output:?}");
}

#[test]
fn keys_of_etcd_are_copied_with_lease_ttl() {
    let (address, peers) = (free(), free());
    let (clients, peers) = (format!("http://{address}"), format!("http://{peers}"));
    let mut args =
        vec!["--listen-client-urls", &clients, "--advertise-client-urls", &clients, "--listen-peer-urls", &peers];
    let cluster = format!("default={peers}");
    args.extend(["--initial-advertise-peer-urls", &peers, "--initial-cluster", &cluster]);
    let _etcd = start("etcd", address, &args);
    let post = |path: &str, body: &Value| -> Value {
        let sent = ureq::post(format!("{clients}{path}")).send(body.to_string());
        let text = sent.and_then(|response| response.into_body().read_to_string()).expect("etcd answers");
        serde_json::from_str(&text).expect("it is JSON")
    };
    let encoded = |text: &[u8]| base64::Engine::encode(&base64::engine::general_purpose::STANDARD, text);
    let lease = post("/v3/lease/grant", &json!({ "TTL": 1_000 }))["ID"].clone();
    let put = |key: &[u8], value: &[u8]| post("/v3/kv/put", &json!({ "key": encoded(key), "value": encoded(value) }));
    for number in 0..250 {
        put(format!("/many/{number}").as_bytes(), format!("{number}").as_bytes());
    }
    put(b"binary", b"\xff\0");
    put(b"empty", b"");
    put(b"\xff", b"no text");
    post("/v3/kv/put", &json!({ "key": encoded(b"leased"), "value": encoded(b"soon gone"), "lease": lease }));

    let server = Server::start(&[]);
    let output = import(&server, &format!("etcd://{address}"));
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for line in ["left out \"\u{fffd}\": the key is not UTF-8", "imported 253 keys", "1 keys of etcd://"] {
        assert!(said.contains(line), "{line} is missing in: {said}");
    }
    let client = &mut Connection::open(server.address());
    (0..250).for_each(|number| has(client, &format!("/many/{number}"), number.to_string().as_bytes()));
    has(client, "binary", b"\xff\0");
    has(client, "empty", b"");
    assert!((900..=1_000).contains(&left(client, "leased")));
}

/// Responds to requests as in the documentation of Consul.
fn consul() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let address = listener.local_addr().expect("it has an address");
    thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = BufReader::new(connection.expect("it is accepted"));
            let mut head = String::new();
            while connection.read_line(&mut head).is_ok_and(|read| read > 2) {}
            let target = head.split(' ').nth(1).unwrap_or_default();
            let (status, body) = match target {
                _ if !head.contains("Bearer secret") => ("403 Forbidden", "Permission denied"),
                "/v1/kv/?keys" => ("200 OK", r#"["app/","app/a b","gone","\u0007"]"#),
                "/v1/kv/app%2F" => ("200 OK", r#"[{"Key":"app/","Flags":0,"Value":null}]"#),
                "/v1/kv/app%2Fa%20b" => ("200 OK", r#"[{"Key":"app/a b","Flags":42,"Value":"AP8="}]"#),
                "/v1/kv/%07" => ("200 OK", r#"[{"Key":"\u0007","Flags":0,"Value":"AA=="}]"#),
                _ => ("404 Not Found", ""),
            };
            let answer =
                format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
            let mut connection = connection.into_inner();
            connection.write_all(answer.as_bytes()).expect("it reads");
            let _ = connection.read(&mut [0]);
        }
    });
    address
}

#[test]
fn keys_of_consul_are_copied() {
    let address = consul();
    let server = Server::start(&[]);
    let output = import(&server, &format!("consul://secret@{address}"));
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for line in ["left out \"\\u{7}\": no server accepts the key", "imported 2 keys", "1 keys of consul://"] {
        assert!(said.contains(line), "{line} is missing in: {said}");
    }
    let client = &mut Connection::open(server.address());
    has(client, "app/", b"");
    has(client, "app/a b", b"\0\xff");
}

#[test]
fn failing_copy_is_one_line_without_password() {
    let server = Server::start(&[]);
    let address = free();
    for (from, reason) in [
        (format!("redis://:secret@{address}"), "cannot connect; check --from"),
        (format!("etcd://root:secret@{address}"), "cannot"),
        (format!("consul://secret@{address}"), "cannot"),
        (format!("consul://wrong@{}", consul()), "403"),
    ] {
        let output = import(&server, &from);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(1), "{from}: {said}");
        assert!(said.contains(reason) && said.contains("0 keys are stored"), "{from}: {said}");
        assert!(!said.contains("secret") && said.lines().count() == 1, "{from}: {said}");
    }
}
