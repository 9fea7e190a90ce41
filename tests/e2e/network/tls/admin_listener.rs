//! TLS of the admin listener.

use rustix::process::Signal;

use super::{shown, start};
use crate::support::certificates::{Authority, Kind};
use crate::support::server::{Server, kvs, serve_refused};
use crate::support::tls::Client;
use crate::support::tokens::Tokens;
use crate::support::wire::Connection;

#[test]
fn admin_listener_uses_same_certificate() {
    let authority = Authority::new();
    let pair = authority.issue("server", Kind::Server, 1);
    // Unlike the HTTP interface, it requests no client certificate.
    let files = ["--tls-cert", &pair.certificate, "--tls-key", &pair.key, "--client-ca", &authority.file()];
    let server = Server::start(&[&files[..], &["--admin-tls"]].concat());
    server.says("admin on https://");
    let client = Client::of(&authority);
    let mut open = client.open(server.admin()).expect("it is served");
    assert_eq!((open.ask("GET", "/readyz", b"").status, open.ask("GET", "/metrics", b"").status), (200, 200));
    let url = format!("https://127.0.0.1:{}", server.admin().port());
    let kvs = |args: &[&str]| {
        let output = kvs().args(args).args(["--admin", &url]).output().expect("the binary under test can be started");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let trust = ["--cacert", &authority.file()];
    for command in [&["health"][..], &["read-only", "off"]] {
        let (done, said) = kvs(&[command, &trust].concat());
        assert!(done, "{command:?}: {said}");
    }
    let (trusted, said) = kvs(&["health"]);
    assert!(!trusted && said.contains("certificate"), "{said}");
    // Without TLS there is no HTTP response.
    let plain = Connection::open(server.admin()).try_ask("GET", "/readyz", b"");
    assert!(plain.is_err(), "{plain:?}");

    let first = shown(&open);
    authority.issue("server", Kind::Server, 2);
    server.signal(Signal::HUP);
    server.says("reloaded the TLS certificate");
    assert!(
        first != shown(&client.open(server.admin()).expect("it is served")),
        "the first certificate is still in use"
    );
    assert_eq!(open.ask("GET", "/livez", b"").status, 200);
    server.terminate();
    serve_refused(&["--admin-tls"]).with(2, &["--tls-cert"]);
}

#[test]
fn admin_tls_silences_warning_of_open_listener() {
    let tokens = Tokens::new();
    tokens.add(&["alice", "--scope", "admin"]);
    let (_authority, server) = start(&["--tokens", &tokens.file(), "--admin", "0.0.0.0:0", "--admin-tls"]);
    server.says("serving on");
    assert!(
        !server.stderr().iter().any(|line| line.contains("can be reached from elsewhere")),
        "{:?}",
        server.stderr()
    );
    let (_authority, server) = start(&["--tokens", &tokens.file(), "--admin", "0.0.0.0:0"]);
    server.says("--admin 0.0.0.0:0 can be reached from elsewhere, without TLS");
}
