//! TLS: certificate and key, versions, reloads while connections are open, and client certificates.

mod admin_listener;

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use rustls::{NamedGroup, ProtocolVersion};

use crate::support::certificates::{Authority, Kind};
use crate::support::events::Events;
use crate::support::guests::guest;
use crate::support::http_clients::curl;
use crate::support::load::SaysOver;
use crate::support::metrics::{Metrics, counts};
use crate::support::server::{Server, serve_refused};
use crate::support::tls::{Client, Secure, TLS12, TLS13, connect};
use crate::support::wire::Connection;

/// A server with a valid certificate and these flags, and the authority of the certificate.
fn start(args: &[&str]) -> (Authority, Server) {
    let authority = Authority::new();
    let pair = authority.issue("server", Kind::Server, 1);
    let server = Server::start(&[&["--tls-cert", &pair.certificate, "--tls-key", &pair.key], args].concat());
    (authority, server)
}

/// The subject of the certificate of a server.
fn shown(connection: &Connection<Secure>) -> Vec<u8> {
    connection.stream().conn.peer_certificates().expect("a server shows a certificate")[0].to_vec()
}

#[test]
fn session_over_https_through_curl() {
    let (authority, server) = start(&[]);
    let url = format!("https://localhost:{}/v1/key-a", server.address().port());
    for trust in [&["--insecure"][..], &["--cacert", &authority.file()]] {
        let ask = |args: &[&str]| curl(&[trust, args, &[&url]].concat());
        let (status, answer) = ask(&["-i", "-X", "PUT", "-d", "Hello, key-value store!"]);
        assert_eq!(status, 201);
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with("HTTP/2 201 "), "{answer}");
        assert_eq!(ask(&[]), (200, b"Hello, key-value store!".to_vec()));
        assert_eq!(ask(&["-X", "DELETE"]), (200, vec![]));
        assert_eq!(ask(&[]), (404, b"no such key\n".to_vec()));
    }
}

#[test]
fn common_kinds_of_keys_are_accepted() {
    let authority = Authority::new();
    let (certificate, key) = (authority.path("any.pem"), authority.path("any.key"));
    for newkey in [
        &["rsa:2048"][..],
        &["ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
        &["ec", "-pkeyopt", "ec_paramgen_curve:P-384"],
        &["ed25519"],
    ] {
        openssl(
            &[&["req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=any", "-newkey"], newkey].concat(),
            &["-out", &certificate, "-keyout", &key],
        );
        let mut forms = vec![key.clone()];
        // The older format of these.
        if newkey[0] != "ed25519" {
            let traditional = authority.path("traditional.key");
            openssl(&["pkey", "-traditional", "-in", &key, "-out", &traditional], &[]);
            forms.push(traditional);
        }
        for key in forms {
            let server = Server::start(&["--tls-cert", &certificate, "--tls-key", &key]);
            let url = format!("https://localhost:{}/v1/a", server.address().port());
            assert_eq!(curl(&["--insecure", &url]).0, 404, "{newkey:?}");
        }
    }
}

fn openssl(args: &[&str], more: &[&str]) {
    let output = Command::new("openssl").args(args).args(more).output().expect("openssl is installed");
    assert!(output.status.success(), "openssl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn unusable_certificate_is_rejected_at_start() {
    let authority = Authority::new();
    let good = authority.issue("good", Kind::Server, 1);
    let other = authority.issue("other", Kind::Server, 2);
    let expired = authority.issue("expired", Kind::ExpiredServer, 3);
    let early = authority.issue("early", Kind::EarlyServer, 4);
    let (missing, empty) = (authority.path("missing.pem"), authority.write("empty.pem", ""));
    let encrypted = authority.path("encrypted.key");
    openssl(&["pkey", "-aes256", "-passout", "pass:secret", "-in", &good.key, "-out", &encrypted], &[]);
    let cut = authority.write("cut.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n");
    let nonsense = authority.write("nonsense.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let directory = authority.path("");
    for (certificate, key, expected) in [
        (&missing, &good.key, &["--tls-cert", &missing, "cannot read", "No such file"][..]),
        (&directory, &good.key, &["--tls-cert", &directory, "cannot read"]),
        (&empty, &good.key, &["--tls-cert", &empty, "no PEM certificate"]),
        (&cut, &good.key, &["--tls-cert", &cut]),
        (&nonsense, &good.key, &["--tls-cert", &nonsense]),
        (&good.certificate, &missing, &["--tls-key", &missing, "cannot read"]),
        (&good.certificate, &good.certificate, &["--tls-key", &good.certificate, "no PEM private key"]),
        (&good.certificate, &encrypted, &["--tls-key", &encrypted, "encrypted", "openssl"]),
        (&good.certificate, &other.key, &[&good.certificate, &other.key, "does not belong"]),
        (&expired.certificate, &expired.key, &["--tls-cert", &expired.certificate, "expired at 2020"]),
        (&early.certificate, &early.key, &["--tls-cert", &early.certificate, "not valid before 3000"]),
    ] {
        serve_refused(&["--tls-cert", certificate, "--tls-key", key]).with(1, expected);
    }
    for (flag, file) in [("--client-ca", &missing), ("--client-ca", &empty), ("--client-crl", &empty)] {
        let pair = ["--tls-cert", &good.certificate, "--tls-key", &good.key];
        let authority = ["--client-ca", &authority.file()];
        // The last of two counts.
        let wrong = [flag, file];
        let args =
            if flag == "--client-ca" { [&pair[..], &wrong].concat() } else { [&pair[..], &authority, &wrong].concat() };
        serve_refused(&args).with(1, &[flag, file]);
    }
}

#[test]
fn incomplete_tls_flags_are_usage_error() {
    serve_refused(&["--tls-cert", "cert.pem"]).with(2, &["--tls-key"]);
    serve_refused(&["--tls-key", "cert.key"]).with(2, &["--tls-cert"]);
    serve_refused(&["--client-ca", "ca.pem"]).with(2, &["--tls-cert"]);
    serve_refused(&["--client-crl", "crl.pem"]).with(2, &["--client-ca"]);
    serve_refused(&["--tls-min", "1.1"]).with(2, &["--tls-min", "1.1", "1.2", "1.3"]);
}

#[test]
fn lowest_tls_version_is_set_by_its_flag() {
    let (authority, server) = start(&[guest()]);
    let old = Client { versions: TLS12, ..Client::of(&authority) };
    let new = Client { versions: TLS13, ..Client::of(&authority) };
    assert_eq!(old.get(&server, "/tls").expect("1.2 is spoken"), "Some(\"TLSv1.2\") None");
    assert_eq!(new.get(&server, "/tls").expect("1.3 is spoken"), "Some(\"TLSv1.3\") None");

    let (authority, server) = start(&["--tls-min", "1.3", guest()]);
    let old = Client { versions: TLS12, ..Client::of(&authority) };
    let connection = Client::of(&authority).open(server.address()).expect("1.3 is spoken");
    assert_eq!(connection.stream().conn.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    let refused = old.get(&server, "/tls").expect_err("1.2 is spoken all the same");
    assert!(refused.to_string().contains("ProtocolVersion"), "{refused}");
}

#[test]
fn key_exchange_is_post_quantum() {
    let (authority, server) = start(&[]);
    let connection = Client::of(&authority).open(server.address()).expect("it is served");
    let group = connection.stream().conn.negotiated_key_exchange_group().expect("keys were exchanged");
    assert_eq!(group.name(), NamedGroup::X25519MLKEM768);
}

#[test]
fn plain_text_on_tls_is_closed() {
    let (authority, server) = start(&["--log-filter", "info,kvs::edge=debug"]);
    for bytes in [&b"GET /v1/a HTTP/1.1\r\nhost: kvs\r\n\r\n"[..], b"\0\0\0\0\0\0\0\0", b"SSH-2.0-x\r\n"] {
        let mut plain = Connection::open(server.address());
        plain.send(bytes);
        let answer = plain.end();
        assert!(!answer.contains("HTTP"), "{answer:?}");
        server.says(&format!("corrupt message of type InvalidContentType peer=127.0.0.1:{}", plain.port()));
    }
    assert_eq!(Client::of(&authority).get(&server, "/v1/a").expect("others are served"), "no such key\n");
}

#[test]
fn handshake_timeout_closes_connection() {
    let (_authority, server) = start(&["--handshake-timeout", "300ms"]);
    assert_eq!(Connection::open(server.address()).end(), "");
    let mut slow = Connection::open(server.address());
    slow.send(b"\x16\x03\x01");
    assert_eq!(slow.end(), "");
}

#[test]
fn pending_handshake_does_not_delay_stop() {
    let (authority, server) = start(&["--handshake-timeout", "1h", "--drain-timeout", "1h"]);
    let mut silent = Connection::open(server.address());
    // It was accepted after the silent one.
    Client::of(&authority).get(&server, "/v1/a").expect("others are served");
    server.terminate();
    assert_eq!(silent.end(), "");
}

#[test]
fn new_certificate_is_loaded_and_connections_stay() {
    let (authority, server) = start(&[]);
    let client = Client::of(&authority);
    let mut open = client.open(server.address()).expect("it is served");
    open.ask("PUT", "/v1/a", b"value");
    let first = shown(&open);

    // Both are replaced in place, as its own line says; the server gets no signal.
    authority.issue("server", Kind::Server, 2);
    server.says("reloaded the TLS certificate");
    let second = shown(&client.open(server.address()).expect("it is served"));
    assert!(first != second, "the first certificate is still in use");

    authority.issue("server", Kind::Server, 3);
    server.signal(Signal::HUP);
    server.says_again("reloaded the TLS certificate", 2);
    let third = shown(&client.open(server.address()).expect("it is served"));
    assert!(third != second, "the second certificate is still in use");
    // On SIGHUP it reloads files that have not changed too.
    server.signal(Signal::HUP);
    server.says_again("reloaded the TLS certificate", 3);

    assert_eq!(open.ask("GET", "/v1/a", b"").body, b"value");
    server.terminate();
}

#[test]
fn thousand_reloads_fail_no_handshake() {
    let (authority, server) = start(&[]);
    let pairs = [authority.issue("one", Kind::Server, 2), authority.issue("two", Kind::Server, 3)];
    let (certificate, key) = (authority.path("server.pem"), authority.path("server.key"));
    let (over, shaken) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let client = Client::of(&authority);
                while !over.load(Ordering::Relaxed) {
                    // At the end, the server may have stopped.
                    let answer = client.get(&server, "/v1/a").expect("a handshake failed");
                    assert_eq!(answer, "no such key\n");
                    shaken.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _over = SaysOver(&over);
        let in_force = "reloaded the TLS certificate";
        let times = || server.stderr().iter().filter(|line| line.contains(in_force)).count();
        for round in 0..1_000 {
            let pair = &pairs[round % 2];
            let seen = times();
            fs::copy(&pair.key, &key).expect("a file can be replaced");
            fs::copy(&pair.certificate, &certificate).expect("a file can be replaced");
            server.signal(Signal::HUP);
            server.says_again(in_force, seen + 1);
        }
    });
    let shaken = shaken.into_inner();
    println!("{shaken} handshakes beside 1000 new pairs");
    assert!(shaken > 200, "only {shaken} handshakes");
}

#[test]
fn sslscan_finds_no_weakness() {
    let (_authority, server) = start(&[]);
    let scan = Command::new("sslscan").args(["--no-colour", "--xml=-", &server.address().to_string()]).output();
    let scan = scan.unwrap_or_else(|error| panic!("sslscan cannot be run ({error}): `just test` installs it"));
    let found = String::from_utf8_lossy(&scan.stdout);
    let lines = |tag: &str| found.lines().map(str::trim).filter(move |line| line.starts_with(tag)).collect::<Vec<_>>();
    let has = |line: &str, all: &[&str]| all.iter().all(|text| line.contains(text));
    for line in lines("<protocol ") {
        let good = has(line, &["type=\"tls\""]) && (has(line, &["\"1.2\""]) || has(line, &["\"1.3\""]));
        assert!(has(line, &[if good { "enabled=\"1\"" } else { "enabled=\"0\"" }]), "{line}");
    }
    assert!(
        lines("<protocol ").len() >= 6 && lines("<cipher ").len() >= 6 && !lines("<heartbleed ").is_empty(),
        "{found}"
    );
    for line in lines("<cipher ") {
        assert!(line.contains("strength=\"strong\"") || line.contains("strength=\"acceptable\""), "{line}");
        assert!(has(line, &["ecdhebits="]), "without forward secrecy: {line}");
    }
    for line in [lines("<heartbleed "), lines("<compression ")].concat() {
        assert!(has(line, &["vulnerable=\"0\""]) || has(line, &["supported=\"0\""]), "{line}");
    }
    for line in lines("<renegotiation ") {
        assert!(has(line, &["supported=\"0\""]) || has(line, &["secure=\"1\""]), "{line}");
    }
    assert!(found.contains("<expired>false</expired>") && !found.contains("error=\"true\""), "{found}");
}

#[test]
fn certificate_expiry_is_metric() {
    let authority = Authority::new();
    let pair = authority.issue("server", Kind::ShortServer(3_600), 1);
    let server = Server::start(&["--tls-cert", &pair.certificate, "--tls-key", &pair.key]);
    let left = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later than 1970");
        Metrics::of(&server).get("kvs_tls_certificate_expiry_timestamp_seconds") - now.as_secs_f64()
    };
    let first = left();
    assert!((3_000.0..3_601.0).contains(&first), "{first} s are left");
    authority.issue("server", Kind::ShortServer(7_200), 2);
    server.signal(Signal::HUP);
    server.says("reloaded the TLS certificate");
    let second = left();
    assert!((6_600.0..7_201.0).contains(&second), "{second} s are left");
}

#[test]
fn invalid_certificate_is_logged_and_old_one_stays() {
    const RELOADED: &str = "kvs_last_reload_successful{files=\"tls\"}";
    const RELOAD_TIME: &str = "kvs_last_reload_success_timestamp_seconds{files=\"tls\"}";
    let (authority, server) = start(&[]);
    let started = Metrics::of(&server);
    assert!(started.get(RELOADED) == 1.0 && started.get(RELOAD_TIME) > 0.0);
    let client = Client::of(&authority);
    let first = shown(&client.open(server.address()).expect("it is served"));
    let other = authority.issue("other", Kind::Server, 2);
    let expired = authority.issue("expired", Kind::ExpiredServer, 3);
    let (certificate, key) = (authority.path("server.pem"), authority.path("server.key"));

    let mut times = 0;
    let mut refuses = |why: &str| {
        times += 1;
        server.signal(Signal::HUP);
        let line = server.says_again("keeping the current one", times);
        assert!(line.contains(why), "{line}");
        assert!(first == shown(&client.open(server.address()).expect("it is served")), "{why}: it is in use");
        counts(&server, RELOADED, 0.0);
    };
    fs::copy(&other.key, &key).expect("a file can be replaced");
    refuses("does not belong");
    fs::copy(&expired.key, &key).expect("a file can be replaced");
    fs::copy(&expired.certificate, &certificate).expect("a file can be replaced");
    refuses("expired at 2020");
    fs::remove_file(&certificate).expect("a file can be removed");
    refuses("cannot read");
    fs::copy(&other.certificate, &certificate).expect("a file can be replaced");
    fs::copy(&other.key, &key).expect("a file can be replaced");
    server.says("reloaded the TLS certificate");
    assert!(first != shown(&client.open(server.address()).expect("it is served")), "the good pair is not used");
    counts(&server, RELOADED, 1.0);
    assert!(Metrics::of(&server).get(RELOAD_TIME) >= started.get(RELOAD_TIME));
}

/// A server that authenticates clients by the authority of its own certificate.
fn start_mutual(authority: &Authority, args: &[&str]) -> Server {
    let pair = authority.issue("server", Kind::Server, 1);
    let args = [&["--tls-cert", &pair.certificate, "--tls-key", &pair.key, "--client-ca", &authority.file()], args];
    Server::start(&[&args.concat()[..], &[guest()]].concat())
}

#[test]
fn client_certificate_is_principal() {
    let authority = Authority::new();
    let server = start_mutual(&authority, &[]);
    let alice = authority.issue("alice", Kind::Client, 2);
    let client = Client::of(&authority).shows(&alice);
    assert_eq!(client.get(&server, "/tls").expect("it is served"), "Some(\"TLSv1.3\") Some(\"CN=alice\")");
    assert_eq!(client.get(&server, "/principal").expect("it is served"), "Some(\"CN=alice\")");
}

#[test]
fn client_without_valid_certificate_is_rejected() {
    let authority = Authority::new();
    let stranger = Authority::named("stranger");
    let impostor = Authority::new();
    let good = authority.issue("good", Kind::Client, 2);
    let revoked = authority.issue("revoked", Kind::Client, 3);
    let expired = authority.issue("expired", Kind::ExpiredClient, 4);
    let for_servers = authority.issue("for-servers", Kind::Server, 5);
    let of_stranger = stranger.issue("of-stranger", Kind::Client, 6);
    let of_impostor = impostor.issue("of-impostor", Kind::Client, 2);
    let list = authority.revoke(&[&revoked]);
    for demand in ["required", "optional"] {
        let server = start_mutual(&authority, &["--client-auth", demand, "--client-crl", &list]);
        for versions in [TLS12, TLS13] {
            let client = |shows| Client { shows, versions, ..Client::of(&authority) };
            assert_eq!(client(Some(&good)).get(&server, "/principal").expect("a good one"), "Some(\"CN=good\")");
            for (bad, why) in [
                (&revoked, "Revoked"),
                (&expired, "Expired"),
                (&for_servers, "UnsupportedCertificate"),
                (&of_stranger, "UnknownCA"),
                (&of_impostor, "DecryptError"),
            ] {
                let refused = client(Some(bad)).get(&server, "/principal").expect_err(&bad.certificate);
                assert!(refused.to_string().contains(why), "{}: {refused}", bad.certificate);
            }
            match client(None).get(&server, "/principal") {
                Ok(principal) => assert_eq!((demand, principal.as_str()), ("optional", "None")),
                Err(refused) => {
                    assert!(demand == "required" && refused.to_string().contains("CertificateRequired"), "{refused}")
                }
            }
        }
    }
}

#[test]
fn crl_is_reloaded() {
    let authority = Authority::new();
    let (alice, bob) = (authority.issue("alice", Kind::Client, 2), authority.issue("bob", Kind::Client, 3));
    let list = authority.revoke(&[&bob]);
    let server = start_mutual(&authority, &["--client-crl", &list]);
    let client = Client::of(&authority).shows(&alice);
    assert_eq!(client.get(&server, "/principal").expect("it is good"), "Some(\"CN=alice\")");
    authority.revoke(&[&alice, &bob]);
    server.signal(Signal::HUP);
    server.says("reloaded the TLS certificate");
    client.get(&server, "/principal").expect_err("it was revoked");
}

#[test]
fn revoked_certificate_ends_its_connections() {
    let authority = Authority::new();
    let (alice, bob) = (authority.issue("alice", Kind::Client, 2), authority.issue("bob", Kind::Client, 3));
    let carol = authority.issue("carol", Kind::Client, 4);
    let list = authority.revoke(&[&carol]);
    let pair = authority.issue("server", Kind::Server, 1);
    let files = ["--tls-cert", &pair.certificate, "--tls-key", &pair.key, "--client-ca", &authority.file()];
    let server = Server::start(&[&files[..], &["--client-crl", &list, "--watch-keep-alive", "1h"]].concat());
    let open = |pair| Client::of(&authority).shows(pair).open(server.address()).expect("it is good");
    let watch = |pair| Events::over(open(pair), "/v1?watch", &[]).expect("it is answered").expect("a watch");
    let (mut idle, mut stays) = (open(&alice), open(&bob));
    for client in [&mut idle, &mut stays] {
        client.ask("GET", "/v1/a", b"").says(404, "no such key");
    }
    let (mut watching, mut goes_on) = (watch(&alice), watch(&bob));
    authority.revoke(&[&alice, &carol]);
    server.signal(Signal::HUP);
    // In any way: the server sends no close notification.
    assert!(watching.try_next().is_err());
    assert!(idle.try_read(false).is_err());
    server.says("closed: the client certificate is no longer valid");
    assert_eq!(stays.ask("PUT", "/v1/a", b"value").status, 201);
    assert!(goes_on.next().is_some());
}

#[test]
fn expired_certificate_ends_its_watch_and_resumes_nothing() {
    let authority = Authority::new();
    let pair = authority.issue("server", Kind::Server, 1);
    let files = ["--tls-cert", &pair.certificate, "--tls-key", &pair.key, "--client-ca", &authority.file()];
    let server = Server::start(&[&files[..], &["--watch-keep-alive", "100ms"]].concat());
    // The first that is still valid at the request.
    let watching = [2, 4, 8, 16, 32].into_iter().find_map(|seconds| {
        let alice = authority.issue("alice", Kind::ShortClient(seconds), 2);
        let config = Client::of(&authority).shows(&alice).config();
        let connection = Connection::over(connect(&config, server.address()).ok()?);
        Some((config, Events::over(connection, "/v1?watch", &[]).ok()?.expect("a watch")))
    });
    let (config, mut watching) = watching.expect("one was good");
    assert!(watching.try_next().is_err());
    let again = connect(&config, server.address()).map(Connection::over);
    let refused = again.and_then(|mut client| client.try_ask("GET", "/v1/a", b""));
    assert!(refused.is_err(), "{refused:?}");
    server.says_again("closed: the client certificate is no longer valid", 2);
}
