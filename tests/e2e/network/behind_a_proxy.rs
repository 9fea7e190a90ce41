//! nginx, Caddy and Envoy in front of a server, as `deploy/` and the book configure them: keys, conditions and watches pass
//! unchanged. Only trusted proxies, these and HAProxy, can give the addresses of their clients.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::certificates::{Authority, Kind};
use crate::support::events::Events;
use crate::support::guests::guest;
use crate::support::http_clients::curl;
use crate::support::metrics::until;
use crate::support::server::{PATIENCE, Process, Server, serve_refused};
use crate::support::wire::{Connection, long, short};

const CONFIG: &str = include_str!("../../../deploy/nginx.conf");
const ENVOY: &str = include_str!("../../../deploy/envoy.yaml");
const PAGE: &str = include_str!("../../../docs/behind-a-proxy.md");

/// The header of the PROXY protocol that gives 203.0.113.7:80 as the client.
const PROXY_HEADER: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xcb\0\x71\x07\x7f\0\0\x01\0\x50\0\x51";
/// The header with which a proxy connects on its own behalf.
const LOCAL_HEADER: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// A free address that only this test uses, so that no other test takes the port.
fn free(host: &str) -> SocketAddr {
    TcpListener::bind((host, 0)).and_then(|listener| listener.local_addr()).expect("a port is free")
}

fn listens(proxy: Process, address: SocketAddr) -> Process {
    let begun = Instant::now();
    while Connection::try_open(address).is_err() {
        assert!(begun.elapsed() < PATIENCE, "the proxy does not listen");
        thread::sleep(Duration::from_millis(20));
    }
    proxy
}

/// nginx at this address in front of a server, and the directory of its files.
fn nginx(server: &Server, address: SocketAddr) -> (Process, TempDir) {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let path = directory.path().display();
    let surroundings =
        format!("http {{ access_log off; client_body_temp_path {path}/body; proxy_temp_path {path}/proxy;");
    let config = CONFIG.replacen("http {", &surroundings, 1);
    let config =
        config.replace("127.0.0.1:8080", &server.address().to_string()).replace("127.0.0.1:8000", &address.to_string());
    let file = directory.path().join("nginx.conf");
    fs::write(&file, config).expect("it can be written");
    let mut nginx = Command::new("nginx");
    nginx.arg("-p").arg(directory.path()).arg("-c").arg(&file).args(["-e", "stderr"]).stdout(Stdio::null());
    // A single process, so that the test leaves none behind.
    nginx.args(["-g", &format!("daemon off; master_process off; pid {path}/pid;")]);
    (listens(Process::spawn(nginx), address), directory)
}

/// The configuration in a section of docs/behind-a-proxy.md, for this server.
fn configuration(section: &str, server: &Server) -> String {
    let section = PAGE.split("\n## ").find_map(|text| text.strip_prefix(section)?.strip_prefix('\n'));
    let lines: Vec<_> =
        section.expect("there is a section").lines().filter_map(|line| line.strip_prefix("    ")).collect();
    lines.join("\n").replace("127.0.0.1:8080", &server.address().to_string()) + "\n"
}

/// HAProxy at this address in front of a server, with the PROXY protocol.
fn haproxy(server: &Server, address: SocketAddr) -> (Process, TempDir) {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let file = directory.path().join("haproxy.cfg");
    let config = configuration("HAProxy", server).replace(":443", &address.to_string());
    fs::write(&file, config).expect("it can be written");
    let mut haproxy = Command::new("haproxy");
    haproxy.arg("-f").arg(&file);
    (listens(Process::spawn(haproxy), address), directory)
}

/// Caddy at this address in front of a server.
fn caddy(server: &Server, address: SocketAddr) -> (Process, TempDir) {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let file = directory.path().join("Caddyfile");
    // Any Host.
    let site = format!("http://:{} {{\n    bind {}", address.port(), address.ip());
    let config = configuration("Caddy", server).replace("kvs.example {", &site);
    fs::write(&file, format!("{{\n    admin off\n}}\n{config}")).expect("it can be written");
    let mut caddy = Command::new("caddy");
    caddy.args(["run", "--adapter", "caddyfile", "--config"]).arg(&file).env("HOME", directory.path());
    (listens(Process::spawn(caddy), address), directory)
}

/// Envoy at this address in front of a server.
fn envoy(server: &Server, address: SocketAddr) -> (Process, TempDir) {
    let directory = TempDir::new().expect("a temporary directory can be made");
    let file = directory.path().join("envoy.yaml");
    let endpoint = |address: SocketAddr| format!("{{ address: {}, port_value: {} }}", address.ip(), address.port());
    let config = ENVOY
        .replace("{ address: 127.0.0.1, port_value: 8080 }", &endpoint(server.address()))
        .replace("{ address: 0.0.0.0, port_value: 8000 }", &endpoint(address));
    fs::write(&file, config).expect("it can be written");
    let mut envoy = Command::new("envoy");
    // Tests run concurrently, and hot restart uses one shared memory.
    envoy.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "error", "-c"]).arg(&file);
    (listens(Process::spawn(envoy), address), directory)
}

/// Checks that keys, conditions and watches pass the proxy at this address unchanged.
fn passes_all_on_unchanged(server: &Server, address: SocketAddr) {
    let mut client = Connection::open(address);
    // An event is not held back until a buffer is full.
    let watching = Events::over(Connection::open(address), "/v1?watch", &[]).expect("it is answered");
    let mut watching = watching.expect("there are events");
    for key in ["a/b", "a//b", "a%2Fb", "ä ?#+", "a.b/..c", "k;x=1"] {
        for target in [short(key), long(key)] {
            let tag = client.ask("PUT", &target, key.as_bytes()).etag().expect("a PUT has an ETag");
            let event = watching.next().expect("it comes at once");
            assert_eq!((event.id, event.data["key"].as_str()), (tag, Some(key)));
            let direct = Connection::open(server.address()).ask("GET", &target, b"");
            let proxied = client.ask("GET", &target, b"");
            assert_eq!((proxied.status, &proxied.body, proxied.etag()), (200, &direct.body, direct.etag()), "{target}");
            assert_eq!(proxied.header("cache-control"), Some("no-cache"));
            let unchanged = client.ask_with("GET", &target, &[("if-none-match", &format!("\"{tag}\""))], b"");
            assert_eq!(unchanged.status, 304);
        }
    }
    let missing = client.ask_with("GET", "/v1/nothing", &[("x-request-id", "trace-1")], b"");
    assert_eq!((missing.header("cache-control"), missing.header("x-request-id")), (Some("no-cache"), Some("trace-1")));
    assert_eq!(client.ask("PUT", "/v1/large", &vec![b'x'; 1 << 20]).status, 201);
}

#[test]
fn nginx_passes_keys_and_watches_unchanged() {
    let server = Server::start(&[]);
    let address = free("127.0.0.9");
    let _nginx = nginx(&server, address);
    passes_all_on_unchanged(&server, address);
    // nginx sends a whole body before it reads the response.
    for bytes in [(1 << 20) + 1, 64 << 20] {
        let large = vec![b'x'; bytes];
        for address in [address, server.address()] {
            assert_eq!(
                Connection::open(address).ask("PUT", "/v1/larger", &large).status,
                413,
                "{bytes} bytes to {address}"
            );
        }
    }
}

#[test]
fn caddy_passes_all_unchanged_with_addresses() {
    let server = Server::start(&[]);
    let address = free("127.0.0.13");
    let _caddy = caddy(&server, address);
    passes_all_on_unchanged(&server, address);
    gives_addresses(caddy, "127.0.0.14");
}

#[test]
fn envoy_passes_all_unchanged_with_addresses() {
    let server = Server::start(&[]);
    let address = free("127.0.0.15");
    let _envoy = envoy(&server, address);
    passes_all_on_unchanged(&server, address);
    gives_addresses(envoy, "127.0.0.16");
}

/// Checks that a proxy gives the address of its client, whatever headers the client sends.
fn gives_addresses(proxy: fn(&Server, SocketAddr) -> (Process, TempDir), host: &str) {
    let server = Server::start(&[guest(), "--trusted-proxy", "127.0.0.1"]);
    let address = free(host);
    let _proxy = proxy(&server, address);
    for spoofed in [&[][..], &[("x-forwarded-for", "6.6.6.6")], &[("forwarded", "for=6.6.6.6")]] {
        let peer = Connection::open_from("127.0.0.3", address).ask_with("GET", "/peer", spoofed, b"");
        assert_eq!((peer.status, peer.text().trim_end()), (200, "Some(\"127.0.0.3:0\")"), "{spoofed:?}");
    }
}

#[test]
fn nginx_forwards_client_address() {
    let server =
        Server::start(&[guest(), "--trusted-proxy", "127.0.0.1", "--access-log-rate", "1000", "--rate-limit", "9/m"]);
    let address = free("127.0.0.10");
    let _nginx = nginx(&server, address);
    let peer = |from: &str, to, headers: &[(&str, &str)]| {
        let response = Connection::open_from(from, to).ask_with("GET", "/peer", headers, b"");
        (response.status, response.text().trim_end().to_owned())
    };
    let is = |address: &str| (200, format!("Some({address:?})"));
    // Headers of the client are ignored.
    for spoofed in [
        &[][..],
        &[("x-forwarded-for", "6.6.6.6")],
        &[("forwarded", "for=6.6.6.6")],
        &[("x-forwarded-for", "127.0.0.1")],
    ] {
        assert_eq!(peer("127.0.0.3", address, spoofed), is("127.0.0.3:0"), "{spoofed:?}");
    }
    server.says("peer=127.0.0.3:0");
    // Also without the proxy.
    let mut client = Connection::open_from("127.0.0.4", server.address());
    let response =
        client.ask_with("GET", "/peer", &[("x-forwarded-for", "6.6.6.6"), ("forwarded", "for=\"6.6.6.6")], b"");
    assert_eq!(response.text(), format!("Some(\"127.0.0.4:{}\")", client.port()));
    // A proxy that sends different or malformed headers.
    let proxy = |headers: &[(&str, &str)]| peer("127.0.0.1", server.address(), headers);
    assert_eq!(proxy(&[("forwarded", "for=\"[2001:db8::7]:55\";proto=https")]), is("[2001:db8::7]:55"));
    assert_eq!(
        proxy(&[("forwarded", "for=203.0.113.8"), ("x-forwarded-for", "6.6.6.6, 203.0.113.8")]),
        is("203.0.113.8:0")
    );
    assert_eq!(
        proxy(&[("x-forwarded-for", &"6.6.6.6, ".repeat(6_000)), ("x-forwarded-for", "203.0.113.9")]),
        is("203.0.113.9:0")
    );
    let (status, reason) = proxy(&[("forwarded", "for=\"203.0.113.7")]);
    assert!(status == 400 && reason.contains("Forwarded is malformed"), "{status} {reason}");
    let (status, reason) = proxy(&[("forwarded", "for=6.6.6.6"), ("x-forwarded-for", "203.0.113.7")]);
    assert!(status == 400 && reason.contains("give different clients"), "{status} {reason}");
    // The rate limit applies to the client.
    assert!((0..10).any(|_| peer("127.0.0.5", address, &[]).0 == 429));
    assert_eq!(peer("127.0.0.6", address, &[]).0, 200);
}

#[test]
fn haproxy_forwards_client_address() {
    let authority = Authority::new();
    let pair = authority.issue("server", Kind::Server, 1);
    let flags = [guest(), "--trusted-proxy", "127.0.0.1", "--proxy-protocol"];
    let server = Server::start(&[&flags[..], &["--max-connections-per-address", "2"]].concat());
    let address = free("127.0.0.11");
    let _haproxy = haproxy(&server, address);
    let peer = |client: &mut Connection| client.ask("GET", "/peer", b"").text().trim_end().to_owned();
    let mut clients = ["127.0.0.3", "127.0.0.3", "127.0.0.4"].map(|from| (from, Connection::open_from(from, address)));
    for (from, client) in &mut clients {
        assert_eq!(peer(client), format!("Some(\"{from}:{}\")", client.port()));
    }
    // The limit of connections per address applies to the client.
    assert_eq!(Connection::open_from("127.0.0.3", address).end(), "");

    // TLS begins after the header.
    let tls = ["--tls-cert", &pair.certificate, "--tls-key", &pair.key];
    let secure = Server::start(&[&flags[..], &tls].concat());
    let address = free("127.0.0.12");
    let _haproxy = haproxy(&secure, address);
    let (status, body) = curl(&["--insecure", "--interface", "127.0.0.5", &format!("https://{address}/peer")]);
    assert_eq!((status, body.starts_with(b"Some(\"127.0.0.5:")), (200, true), "{}", String::from_utf8_lossy(&body));
}

#[test]
fn proxy_header_is_required_of_trusted_proxies_only() {
    let server = Server::start(&[guest(), "--trusted-proxy", "127.0.0.1/32", "--proxy-protocol"]);
    let request = b"GET /peer HTTP/1.1\r\nhost: kvs\r\nconnection: close\r\n\r\n";
    let answer = |from: &str, header: &[u8]| {
        let mut client = Connection::open_from(from, server.address());
        client.send([header, request].concat());
        let answer = client.end();
        (client.port(), answer)
    };
    let (_, answered) = answer("127.0.0.1", PROXY_HEADER);
    assert!(answered.contains("203.0.113.7:80"), "{answered}");
    let (port, answered) = answer("127.0.0.1", LOCAL_HEADER);
    assert!(answered.contains(&format!("127.0.0.1:{port}")), "{answered}");
    let (port, answered) = answer("127.0.0.2", b"");
    assert!(answered.contains(&format!("127.0.0.2:{port}")), "{answered}");
    let (_, refused) = answer("127.0.0.2", PROXY_HEADER);
    assert!(refused.is_empty() || refused.starts_with("HTTP/1.1 400 "), "{refused}");
    for wrong in [&b""[..], b"PROXY TCP4 203.0.113.7 127.0.0.1 80 81\r\n", &[&PROXY_HEADER[..12], &[0x11]].concat()] {
        assert_eq!(answer("127.0.0.1", wrong).1, "");
    }
    until(&server, "the errors are counted", |now| now.find("kvs_http_parse_errors_total") == Some(4.0));
}

#[test]
fn proxy_settings_are_checked() {
    serve_refused(&["--trusted-proxy", "proxy.example"]).with(2, &["--trusted-proxy", "10.0.0.0/8"]);
    serve_refused(&["--proxy-protocol"]).with(2, &["--trusted-proxy"]);
}
