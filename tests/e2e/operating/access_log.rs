//! The access log and request ids: content, rate, and redaction.

use std::collections::HashSet;
use std::time::Instant;

use serde_json::Value;

use crate::support::guests::guest;
use crate::support::http_clients::curl;
use crate::support::metrics::Metrics;
use crate::support::server::{Refused, Server, serve_refused};
use crate::support::tokens::Tokens;
use crate::support::wire::{Connection, Response};

const JSON: [&str; 2] = ["--log-format", "json"];
const LOG: [&str; 2] = ["--access-log-rate", "1000"];

fn ask(server: &Server, method: &str, path: &str, headers: &str, body: &str) -> Response {
    let mut client = Connection::open(server.address());
    let length = body.len();
    client.send(format!("{method} {path} HTTP/1.1\r\nhost: kvs\r\n{headers}content-length: {length}\r\n\r\n{body}"));
    client.try_read(method == "HEAD").expect("it is answered")
}

fn id(response: &Response) -> String {
    response.header("x-request-id").expect("every answer has an id").to_owned()
}

/// Lines, each of which must be JSON.
fn parsed(lines: &[String]) -> Vec<Value> {
    let parse = |line: &String| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    lines.iter().map(parse).collect()
}

fn requests(lines: &[String]) -> Vec<Value> {
    parsed(lines).into_iter().filter(|line| line["message"] == "request").collect()
}

/// A server that logs every request.
fn start(args: &[&str]) -> Server {
    Server::start(&[&JSON[..], &LOG, args].concat())
}

#[test]
fn request_is_logged_as_json_line() {
    let tokens = Tokens::new();
    let alice = tokens.add(&["alice", "--scope", "write"]);
    let server = start(&["--tokens", &tokens.file()]);
    let bearer = format!("authorization: Bearer {alice}\r\n");
    let put = ask(&server, "PUT", "/v1/a%20%22b%22?ttl=60", &bearer, "value");
    let get = ask(&server, "GET", "/v1/a%20%22b%22", &bearer, "");
    let refused = ask(&server, "DELETE", "/v1/a", "x-request-id: my-own.1\r\n", "");
    assert_eq!((put.status, get.text(), refused.status), (201, "value", 401));
    let lines = server.terminate().stderr().to_vec();
    let expected = requests(&lines);
    let [first, second, third] = &expected[..] else { panic!("{expected:?}") };
    for (line, (method, target, status, bytes), response) in
        [(first, ("PUT", "/v1/a%20%22b%22?ttl=60", 201, 0), &put), (second, ("GET", "/v1/a%20%22b%22", 200, 5), &get)]
    {
        assert_eq!((&line["method"], &line["target"]), (&method.into(), &target.into()), "{line}");
        assert_eq!((&line["status"], &line["bytes"]), (&status.into(), &bytes.into()), "{line}");
        assert_eq!((&line["principal"], &line["request_id"]), (&"alice".into(), &id(response).into()), "{line}");
        assert!(line["peer"].as_str().is_some_and(|peer| peer.starts_with("127.0.0.1:")), "{line}");
        assert!(line["ms"].as_f64().is_some_and(|ms| ms > 0.0 && ms < 60_000.0), "{line}");
        assert!(line["time"].as_str().is_some_and(|time| time.starts_with("20") && time.ends_with('Z')), "{line}");
    }
    assert_eq!((&third["status"], &third["principal"]), (&401.into(), &Value::Null), "{third}");
    assert_eq!((&third["request_id"], id(&refused).as_str()), (&"my-own.1".into(), "my-own.1"));
}

#[test]
fn request_is_logged_as_text_line() {
    let server = Server::start(&LOG);
    let response = ask(&server, "GET", "/v1/a", "", "");
    let line = server.says("request_id=");
    let id = format!("request_id=\"{}\"", id(&response));
    for expected in ["INFO", "request", &id, "method=\"GET\"", "target=\"/v1/a\"", "status=404", "bytes=12", " ms="] {
        assert!(line.contains(expected), "{expected} is not in {line}");
    }
}

#[test]
fn access_log_is_off_by_default() {
    let server = Server::start(&[]);
    ask(&server, "GET", "/v1/a", "", "");
    let lines = server.terminate().stderr().join("\n");
    assert!(!lines.contains("/v1/a"), "{lines}");
}

#[test]
fn every_response_has_unique_id() {
    let tokens = Tokens::new();
    let server = Server::start(&["--max-value-bytes", "1KiB"]);
    tokens.add(&["alice"]);
    let guarded = Server::start(&["--tokens", &tokens.file()]);
    let mut ids = HashSet::new();
    for response in [
        ask(&server, "PUT", "/v1/a", "", "value"),
        ask(&server, "GET", "/v1/a", "", ""),
        ask(&server, "HEAD", "/v1/a", "", ""),
        ask(&server, "GET", "/v1/a", "if-none-match: *\r\n", ""),
        ask(&server, "PUT", "/v1/a", "", &"x".repeat(1_025)),
        ask(&server, "GET", "/nothing", "", ""),
        ask(&guarded, "GET", "/v1/a", "", ""),
    ] {
        let id = id(&response);
        assert!(id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
        assert!(ids.insert(id), "{ids:?}");
    }
}

#[test]
fn valid_request_id_is_reused() {
    let server = Server::start(&[]);
    let answer = |headers: &str| id(&ask(&server, "GET", "/v1/a", headers, ""));
    let longest = "x".repeat(128);
    for good in ["1", "my-own.id_7", "2f1acc6c-9d7a-4b3f-8a52-cd1e3b1f6a10", "Root=1-67:a/b+c", &longest] {
        assert_eq!(answer(&format!("x-request-id: {good}\r\n")), good);
    }
    let too_long = "x".repeat(129);
    for bad in ["", "a b", "a\"b", "a,b", "a;b", "<b>", "\\", "\u{e9}", "{}", "a\tb", &too_long] {
        let id = answer(&format!("x-request-id: {bad}\r\n"));
        assert!(id.len() == 16 && id != bad, "{bad:?} became {id:?}");
    }
    assert_eq!(answer("x-request-id: a\r\nx-request-id: b\r\n").len(), 16, "which of two");
}

#[test]
fn trap_line_has_request_id() {
    for (args, quoted) in [(&[][..], "request_id=\"trace-7\""), (&JSON, "\"request_id\":\"trace-7\"")] {
        let server = Server::start(&[args, &[guest()]].concat());
        let response = ask(&server, "GET", "/trap", "x-request-id: trace-7\r\n", "");
        assert_eq!((response.status, id(&response).as_str()), (500, "trace-7"));
        let line = server.says("the guest trapped");
        assert!(line.contains(quoted), "{line}");
        ask(&server, "GET", "/status/9", "x-request-id: trace-8\r\n", "");
        let line = server.says("invalid response");
        assert!(line.contains("trace-8"), "{line}");
    }
}

#[test]
fn flood_is_limited_and_skipped_requests_are_counted() {
    const REQUESTS: u64 = 2_000;
    let server = Server::start(&[&JSON[..], &["--access-log-rate", "10"]].concat());
    let begun = Instant::now();
    let mut client = Connection::open(server.address());
    for _ in 0..REQUESTS {
        client.ask("GET", "/v1/a", b"");
    }
    let seconds = begun.elapsed().as_secs() + 2;
    // Reported without another request, at most once a minute.
    server.says("access log rate exceeded");
    let left_out = Metrics::of(&server).get("kvs_access_log_skipped_requests_total") as u64;
    let stopped = server.terminate();
    let lines = parsed(stopped.stderr());
    let logged = lines.iter().filter(|line| line["message"] == "request").count() as u64;
    assert_eq!(logged + left_out, REQUESTS);
    assert!((10..=10 * seconds).contains(&logged), "{logged} lines in {seconds} s");
    let reports: Vec<_> = lines.iter().filter(|line| line["left_out"].is_u64()).collect();
    assert!((1..=1 + seconds / 60).contains(&(reports.len() as u64)), "{reports:?}");
    assert_eq!(reports[0]["level"], "INFO");
}

#[test]
fn secrets_are_not_logged_at_trace_level() {
    let tokens = Tokens::new();
    let good = tokens.add(&["alice", "--scope", "admin"]);
    let wrong = format!("kvs_{}", "0123456789abcdef".repeat(4));
    let secrets = [&good, &wrong, "c2VjcmV0OnBhc3N3b3Jk", "the-secret-value", "the-secret-cookie", "another-value"];
    for format in ["text", "json"] {
        let server = Server::start(
            &[&["--log-filter", "trace", "--log-format", format, "--tokens", &tokens.file()], &LOG[..]].concat(),
        );
        let with = |token: &str| format!("authorization: Bearer {token}\r\ncookie: the-secret-cookie\r\n");
        assert_eq!(ask(&server, "PUT", "/v1/a", &with(&good), "the-secret-value").status, 201);
        assert_eq!(ask(&server, "GET", "/v1/a", &with(&good), "").status, 200);
        let transaction = "[{\"op\":\"put\",\"key\":\"b\",\"value\":\"another-value\"}]";
        assert_eq!(ask(&server, "POST", "/v1", &with(&good), transaction).status, 200);
        assert_eq!(ask(&server, "GET", "/v1/a", &with(&wrong), "").status, 401);
        assert_eq!(ask(&server, "GET", "/v1/a", "authorization: Basic c2VjcmV0OnBhc3N3b3Jk\r\n", "").status, 401);
        // In a place for no token.
        ask(&server, "GET", &format!("/v1/{good}?token={wrong}"), &with(&good), "");
        ask(&server, "GET", "/v1/a", &format!("x-request-id: {good}\r\n"), "");
        let url = server.url("/v1/a");
        let bearer = format!("authorization: Bearer {good}");
        let http2 = ["--http2-prior-knowledge", "-H", &bearer, "-H", "cookie: the-secret-cookie", &url];
        assert_eq!(curl(&http2).0, 200);
        let lines = server.terminate().stderr().join("\n");
        assert!(lines.contains("/v1/kvs_…?token=kvs_…"), "the path is not logged:\n{lines}");
        for secret in secrets {
            let expected = lines.lines().find(|line| line.contains(secret));
            assert!(expected.is_none(), "{secret} is in: {}", expected.unwrap_or_default());
        }
    }
}

#[test]
fn failed_start_is_logged_in_selected_format() {
    let Refused { code, line } = serve_refused(&[&JSON[..], &["--tokens", "/nowhere"]].concat());
    let expected: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
    assert_eq!((code, &expected["level"]), (1, &"ERROR".into()));
    assert!(expected["message"].as_str().is_some_and(|message| message.contains("/nowhere")), "{line}");
    serve_refused(&["--log-format", "xml"]).with(2, &["--log-format", "text", "json"]);
    serve_refused(&["--access-log-rate", "0"]).with(2, &["--access-log-rate"]);
}

#[test]
fn slow_request_is_logged_with_times() {
    let server = Server::start(&[&JSON[..], &["--slow-request", "1ns"]].concat());
    let begun = Instant::now();
    let put = ask(&server, "PUT", "/v1/a", "", "value");
    ask(&server, "GET", "/v1/a", "", "");
    // A long poll that waited is not slow.
    assert_eq!(ask(&server, "GET", "/v1/a?wait=1ms", "if-none-match: \"1\"\r\n", "").status, 304);
    for _ in 0..100 {
        ask(&server, "GET", "/v1/a", "", "");
    }
    let seconds = usize::try_from(begun.elapsed().as_secs()).expect("it is not much") + 2;
    assert_eq!(Metrics::of(&server).get("kvs_slow_requests_total"), 102.0);
    let lines = server.terminate().stderr().to_vec();
    let slow: Vec<_> = parsed(&lines).into_iter().filter(|line| line["message"] == "slow request").collect();
    assert!((10..=10 * seconds).contains(&slow.len()), "{} lines in {seconds} s", slow.len());
    let line = &slow[0];
    assert_eq!((&line["method"], &line["target"], &line["status"]), (&"PUT".into(), &"/v1/a".into(), &201.into()));
    assert_eq!(line["request_id"], id(&put).as_str());
    let ms = |field: &str| line[field].as_f64().unwrap_or_else(|| panic!("{field} in {line}"));
    let parts = [ms("queue_ms"), ms("guest_ms"), ms("commit_ms")];
    assert!(parts[1..].iter().all(|part| *part > 0.0) && parts.iter().sum::<f64>() <= ms("ms"), "{line}");
}

#[test]
fn slow_request_has_queue_time() {
    let limits = ["--guest-cpu-limit", "2s", "--request-timeout", "1m"];
    let server = Server::start(&[&JSON[..], &["--slow-request", "500ms", guest()], &limits].concat());
    let mut busy = Connection::open(server.address());
    busy.send("GET /loop-aloud HTTP/1.1\r\nhost: kvs\r\n\r\n");
    server.says("going round in circles");
    assert_eq!(ask(&server, "GET", "/store/{own}a", "", "").status, 404);
    let lines = parsed(server.terminate().stderr());
    let is_it = |line: &&Value| line["message"] == "slow request" && line["target"] == "/store/{own}a";
    let line = lines.iter().find(is_it).unwrap_or_else(|| panic!("it is not logged: {lines:?}"));
    let ms = |field: &str| line[field].as_f64().unwrap_or_else(|| panic!("{field} in {line}"));
    assert!(ms("queue_ms") > 500.0 && ms("queue_ms") > 0.9 * ms("ms") && ms("queue_ms") <= ms("ms"), "{line}");
}

#[test]
fn slow_trapped_request_has_guest_time() {
    let limits = ["--guest-cpu-limit", "600ms", "--request-timeout", "1m"];
    let server = Server::start(&[&JSON[..], &["--slow-request", "500ms", guest()], &limits].concat());
    assert_eq!(ask(&server, "GET", "/loop-aloud", "", "").status, 500);
    let lines = parsed(server.terminate().stderr());
    let is_it = |line: &&Value| line["message"] == "slow request";
    let line = lines.iter().find(is_it).unwrap_or_else(|| panic!("it is not logged: {lines:?}"));
    let ms = |field: &str| line[field].as_f64().unwrap_or_else(|| panic!("{field} in {line}"));
    assert!(ms("guest_ms") > 500.0 && ms("guest_ms") + ms("queue_ms") <= ms("ms"), "{line}");
}

#[test]
fn request_that_is_not_slow_is_not_logged() {
    let server = Server::start(&["--slow-request", "1h"]);
    ask(&server, "PUT", "/v1/a", "", "value");
    assert_eq!(Metrics::of(&server).get("kvs_slow_requests_total"), 0.0);
    let stopped = server.terminate();
    assert!(!stopped.stderr().iter().any(|line| line.contains("slow request")), "{:?}", stopped.stderr());
    serve_refused(&["--slow-request", "soon"]).with(2, &["--slow-request"]);
}
