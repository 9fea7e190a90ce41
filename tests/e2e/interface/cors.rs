//! CORS: preflight requests, and headers of responses for pages of other origins.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use tempfile::TempDir;

use crate::support::browser::headless;
use crate::support::server::{PATIENCE, Server, serve_refused};
use crate::support::wire::{Connection, Response};

const PAGE: &str = "https://example.org";

fn ask(server: &Server, method: &str, path: &str, headers: &[(&str, &str)]) -> Response {
    Connection::open(server.address()).ask_with(method, path, headers, b"")
}

/// CORS headers of a response.
fn shared(response: &Response) -> [Option<&str>; 3] {
    ["access-control-allow-origin", "access-control-expose-headers", "vary"].map(|name| response.header(name))
}

#[test]
fn cors_headers_are_absent_by_default() {
    let server = Server::start(&[]);
    let preflight = [("origin", PAGE), ("access-control-request-method", "PUT")];
    let refused = ask(&server, "OPTIONS", "/v1/a", &preflight);
    assert_eq!((refused.status, shared(&refused)), (405, [None; 3]));
    assert_eq!(shared(&ask(&server, "GET", "/v1/a", &preflight)), [None; 3]);
}

#[test]
fn page_of_allowed_origin_may_send_and_read() {
    let tokens = TempDir::new().expect("a temporary directory can be made");
    let tokens = tokens.path().join("tokens");
    std::fs::write(&tokens, "").expect("the directory takes a file");
    let tokens = ["--tokens", tokens.to_str().expect("a temporary path is text")];
    let origins = ["--cors-origin", "http://localhost:3000", "--cors-origin", PAGE];
    let server = Server::start(&[&origins[..], &tokens].concat());
    // A preflight request has no token.
    let wanted = [
        ("origin", PAGE),
        ("access-control-request-method", "PUT"),
        ("access-control-request-headers", "authorization,if-match"),
    ];
    let answer = ask(&server, "OPTIONS", "/v1/a", &wanted);
    assert_eq!((answer.status, shared(&answer)), (204, [Some(PAGE), Some("*"), Some("origin")]));
    assert_eq!(answer.header("access-control-allow-methods"), Some("PUT"));
    assert_eq!(answer.header("access-control-allow-headers"), Some("authorization,if-match"));
    assert_eq!(answer.header("access-control-max-age"), Some("600"));
    // A page can read errors too.
    let refused = ask(&server, "GET", "/v1/a", &wanted[..1]);
    assert_eq!((refused.status, shared(&refused)), (401, [Some(PAGE), Some("*"), Some("origin")]));

    for origin in ["https://example.com", "https://example.org:444", "null"] {
        let wanted = [("origin", origin), wanted[1]];
        let answer = ask(&server, "OPTIONS", "/v1/a", &wanted);
        answer.says(403, "origin not allowed");
        // Caches must not mix responses for different origins.
        assert_eq!(shared(&answer), [None, None, Some("origin")]);
    }
    assert_eq!(shared(&ask(&server, "GET", "/v1/a", &[])), [None, None, Some("origin")]);
}

#[test]
fn any_origin_can_be_allowed() {
    let server = Server::start(&["--cors-origin", "*"]);
    let answer = ask(&server, "PUT", "/v1/a", &[("origin", PAGE)]);
    assert_eq!((answer.status, shared(&answer)), (201, [Some("*"), Some("*"), None]));
    // A request that only resembles a preflight request is served by the guest.
    assert_eq!(ask(&server, "OPTIONS", "/v1/a", &[("origin", PAGE)]).status, 405);
}

#[test]
fn invalid_origin_is_rejected() {
    serve_refused(&["--cors-origin", "example.org"]).with(2, &["--cors-origin", "https://example.org"]);
}

/// Script of a page: a write, a rejection, a read, a watch and a long poll, and the responses that it can read.
const SCRIPT: &str = r#"
const seen = [];
const see = async (path, options) => {
  const response = await fetch(store + path, options);
  seen.push(`${response.status} ${response.headers.get('etag')} ${(await response.text()).trim()}`);
};
await see('/v1/a', { method: 'PUT', headers: { 'content-type': 'text/plain' }, body: 'from a page' });
await see('/v1/a', { method: 'PUT', headers: { 'if-none-match': '*' }, body: 'again' });
await see('/v1/a', {});
const waiting = see('/v1/a?wait=300s', { headers: { 'if-none-match': '"1"' } });
const events = new EventSource(store + '/v1?watch&since=0');
const event = new Promise((resolve) => events.addEventListener('put', resolve, { once: true }));
seen.push(`${(await event).lastEventId} ${(await event).data}`);
await see('/v1/a', { method: 'DELETE' });
await waiting;
events.close();
return seen.join('\n');
"#;

/// Serves a page at another origin. Returns its URL, and the reports of its script.
fn page(store: &str) -> (String, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let address = listener.local_addr().expect("a listener has an address");
    let page = format!(
        "<!doctype html><script type=module>const store = '{store}';const run = async () => {{ {SCRIPT} }};\
         fetch('/', {{ method: 'POST', body: await run().catch((error) => 'failed: ' + error) }})</script>"
    );
    let (report, reports) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut stream = BufReader::new(stream);
            let mut lines = stream.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty());
            let asked = lines.next().unwrap_or_default();
            let length =
                lines.filter_map(|line| line.to_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
            let mut body = vec![0; length.last().unwrap_or(0)];
            let _ = stream.read_exact(&mut body);
            if asked.starts_with("POST") {
                let _ = report.send(String::from_utf8_lossy(&body).into_owned());
            }
            let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {}\r\n", page.len());
            let _ = stream.get_mut().write_all(format!("{head}connection: close\r\n\r\n{page}").as_bytes());
        }
    });
    (format!("http://{address}"), reports)
}

/// Reports of a page in a browser.
fn browse((url, reports): &(String, Receiver<String>)) -> String {
    let home = TempDir::new().expect("a temporary directory can be made");
    let mut chromium = Command::new("chromium");
    headless(&mut chromium, home.path());
    chromium.args(["--remote-debugging-port=0", url]).stdout(Stdio::null());
    let mut chromium =
        chromium.spawn().unwrap_or_else(|error| panic!("no chromium ({error}): `just test` installs it"));
    let report = reports.recv_timeout(PATIENCE);
    let _ = chromium.kill().and_then(|()| chromium.wait());
    report.expect("the page reports")
}

#[test]
fn page_in_browser_uses_store() {
    let server = Server::start(&["--cors-origin", PAGE]);
    assert_eq!(browse(&page(&server.url(""))), "failed: TypeError: Failed to fetch");

    let server = Server::start(&["--cors-origin", "*"]);
    let seen = [
        r#"201 "1" "#,
        r#"412 "1" if-none-match does not hold: the key has the etag "1""#,
        r#"200 "1" from a page"#,
        r#"1 {"key":"a","metadata":{"content-type":"text/plain"},"value":"from a page"}"#,
        "200 null ",
        "404 null no such key",
    ];
    let reported = browse(&page(&server.url("")));
    let (mut reported, mut seen) = (reported.lines().collect::<Vec<_>>(), seen.to_vec());
    // The last two can come in any order.
    reported.sort_unstable();
    seen.sort_unstable();
    assert_eq!(reported, seen);
}
