//! nginx in front of a server, as `deploy/nginx.conf` configures it: keys, conditions and watches come through unchanged.

use std::fs;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::server::{PATIENCE, Process, Server};
use crate::watch::Events;
use crate::wire::{Connection, long, short};

const CONFIG: &str = include_str!("../../deploy/nginx.conf");

#[test]
fn nginx_passes_keys_and_watches_on_unchanged() {
    let server = Server::start(&[]);
    // An address of its own, so that nobody takes the port meanwhile.
    let free = TcpListener::bind("127.0.0.9:0").and_then(|listener| listener.local_addr()).expect("a port is free");
    let directory = TempDir::new().expect("a temporary directory can be made");
    let path = directory.path().display();
    let surroundings =
        format!("http {{ access_log off; client_body_temp_path {path}/body; proxy_temp_path {path}/proxy;");
    let config = CONFIG.replacen("http {", &surroundings, 1);
    let config =
        config.replace("127.0.0.1:8080", &server.address().to_string()).replace("127.0.0.1:8000", &free.to_string());
    let file = directory.path().join("nginx.conf");
    fs::write(&file, config).expect("it can be written");
    let mut nginx = Command::new("nginx");
    nginx.arg("-p").arg(directory.path()).arg("-c").arg(&file).args(["-e", "stderr"]).stdout(Stdio::null());
    // One process, so that none is left.
    nginx.args(["-g", &format!("daemon off; master_process off; pid {path}/pid;")]);
    let _nginx = Process::spawn(nginx);
    let begun = Instant::now();
    while Connection::try_open(free).is_err() {
        assert!(begun.elapsed() < PATIENCE, "nginx does not listen");
        thread::sleep(Duration::from_millis(20));
    }

    let mut client = Connection::open(free);
    // An event is not held back until a buffer is full.
    let watching = Events::over(Connection::open(free), "/v1?watch", &[]).expect("it is answered");
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
    assert_eq!(client.ask("GET", "/v1/nothing", b"").header("cache-control"), Some("no-cache"));
    assert_eq!(client.ask("PUT", "/v1/large", &vec![b'x'; 1 << 20]).status, 201);
    assert_eq!(client.ask("PUT", "/v1/larger", &vec![b'x'; (1 << 20) + 1]).status, 413);
}
