use std::io::{self, BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener};
use std::thread;

use serde_json::Value;

use super::*;

#[test]
fn urls_are_parsed_and_shown_without_the_login() {
    for (url, shown) in [
        ("redis://localhost", "redis://localhost:6379"),
        ("rediss://user:p@ss@redis.example:1/3", "rediss://redis.example:1/3"),
        ("etcd://root:secret@[::1]", "etcd://[::1]:2379"),
        ("etcds://[::1]:9", "etcds://[::1]:9"),
        ("consul://token@127.0.0.1", "consul://127.0.0.1:8500"),
        ("consuls://127.0.0.1/", "consuls://127.0.0.1:8501"),
    ] {
        let origin: Origin = url.parse().unwrap_or_else(|error| panic!("{url}: {error}"));
        assert_eq!((origin.to_string(), format!("{origin:?}")), (shown.to_owned(), shown.to_owned()), "{url}");
    }
    for (url, reason) in [
        ("localhost", "a URL is meant"),
        ("http://localhost", "the scheme is none of"),
        ("redis://", "the host is missing"),
        ("redis://:6379", "the host is missing"),
        ("redis://localhost/all", "the database is a number"),
        ("etcd://localhost/app", "a path has no meaning"),
        ("etcd://root@localhost", "USER:PASSWORD"),
        ("consul://a:b@localhost", "the login of Consul is TOKEN"),
        ("consul://%ff@localhost", "the login is not UTF-8"),
    ] {
        let error = url.parse::<Origin>().expect_err(url);
        assert!(error.contains(reason), "{url}: {error}");
    }
}

#[test]
fn login_is_percent_decoded() {
    for (encoded, user, password) in
        [("a%3Ab:p%40s%25s", "a:b", Some("p@s%s")), (":p:s@100%", "", Some("p:s@100%")), ("token", "token", None)]
    {
        let login = Login::parse(encoded).expect(encoded);
        assert_eq!((login.user.as_str(), login.password.as_deref()), (user, password), "{encoded}");
    }
}

/// Answers requests with these, in order, each after a pause.
fn answering(answers: [(Duration, &'static str); 3]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let address = listener.local_addr().expect("it has an address");
    thread::spawn(move || {
        for (pause, body) in answers {
            let mut connection = BufReader::new(listener.accept().expect("it is asked").0);
            let (mut line, mut length) = (String::new(), 0);
            while connection.read_line(&mut line).is_ok_and(|read| read > 2) {
                let value = line.to_ascii_lowercase().strip_prefix("content-length:").map(|value| value.trim().parse());
                length = value.map_or(length, |value| value.expect("it is a number"));
                line.clear();
            }
            connection.read_exact(&mut vec![0; length]).expect("the body arrives");
            thread::sleep(pause);
            let length = body.len();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
            connection.get_mut().write_all(answer.as_bytes()).expect("it reads");
        }
    });
    address
}

#[test]
fn keys_of_one_lease_expire_together() {
    let etcd = answering([
        (Duration::ZERO, r#"{"header":{"revision":"5"},"kvs":[{"key":"YQ==","lease":"7"}],"more":true,"count":"2"}"#),
        (Duration::ZERO, r#"{"TTL":"100"}"#),
        (Duration::from_secs(1), r#"{"header":{"revision":"5"},"kvs":[{"key":"Yg==","lease":"7"}],"count":"2"}"#),
    ]);
    let (reader, writer) = io::pipe().expect("there is a pipe");
    let hooks = ImportHooks { bar: |_, _| ProgressBar::hidden(), check_key: |_| Ok(()), report: |_| () };
    let mut lines = Lines::new(writer, hooks, Arc::new(LeftOut::new(hooks)));
    let origin: Origin = format!("etcd://{etcd}").parse().expect("it is a URL");
    origin.copy(None, &mut lines).expect("it is copied");
    lines.finish();
    let expires = BufReader::new(reader).lines().map(|line| {
        let line: Value = serde_json::from_str(&line.expect("it is text")).expect("it is JSON");
        line["expires"].as_u64().expect("it has a TTL")
    });
    let expires: Vec<_> = expires.collect();
    assert!(expires.len() == 2 && expires[0].abs_diff(expires[1]) < 500, "{expires:?}");
}
