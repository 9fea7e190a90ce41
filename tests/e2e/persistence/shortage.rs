//! What the log needs and does not get for a while: file descriptors, and its directory.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::support::load::SMALL_SEGMENTS;
use crate::support::server::{PATIENCE, Server};
use crate::support::wire::Connection;

#[test]
fn descriptor_shortage_rejects_writes_until_it_ends() {
    let server = Server::start(&SMALL_SEGMENTS);
    let [mut client, mut admin] = [server.address(), server.admin()].map(Connection::open);
    // No other connection is accepted below.
    admin.ask("GET", "/livez", b"").says(200, "ok");
    client.ask("GET", "/v1/0", b"").says(404, "no such key");
    let pid = Pid::from_raw(server.pid().cast_signed());
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let limit = Rlimit { current: Some(3), maximum };
    let before = prlimit(pid, Resource::Nofile, limit).expect("a child can be limited");
    let mut put = |number: u32| client.ask("PUT", &format!("/v1/{number}"), &[b'x'; 10_000]).status;
    let rejected = (1..1_000).find(|number| put(*number) != 201).expect("a segment is full");
    assert_eq!(put(rejected), 503);
    server.says("out of file descriptors or memory: cannot allocate the next segment of the log");
    let ready = admin.ask("GET", "/readyz", b"");
    assert!(ready.status == 200 && ready.text().contains("[+]log ok, but cannot allocate"), "{}", ready.text());
    prlimit(pid, Resource::Nofile, before).expect("a child can be limited");
    server.says("the next segment of the log can be allocated again");
    assert_eq!(put(rejected), 201);
    let stopped = server.terminate();
    assert!(stopped.stderr().iter().all(|line| !line.contains("disk full")), "{:?}", stopped.stderr());
    let server = stopped.restart(&SMALL_SEGMENTS);
    let mut client = Connection::open(server.address());
    for number in 1..=rejected {
        assert_eq!(client.ask("GET", &format!("/v1/{number}"), b"").body, [b'x'; 10_000], "{number} of {rejected}");
    }
}

#[test]
fn removed_or_replaced_directory_of_log_is_reported() {
    for (is_replaced, reason) in [(false, "it is gone"), (true, "it is another directory")] {
        let server = Server::start(&[]);
        let (log, aside) = (server.data().join("log"), server.data().join("aside"));
        let mut client = Connection::open(server.address());
        assert_eq!(client.ask("PUT", "/v1/a", b"value").status, 201);
        // What is written there next is for the second value.
        let begun = Instant::now();
        while !log.join("watermark").exists() {
            assert!(begun.elapsed() < PATIENCE, "the watermark is not recorded");
            thread::sleep(Duration::from_millis(10));
        }
        fs::rename(&log, &aside).expect("it can be moved");
        if is_replaced {
            fs::create_dir(&log).expect("nothing is there");
        }
        assert_eq!(client.ask("PUT", "/v1/b", b"value").status, 201);
        let (status, stopped) = server.ends();
        let last = stopped.stderr().last().expect("it says why");
        let named = format!("{} was removed or replaced while the log was open ({reason})", log.display());
        assert!(status.code() == Some(1) && last.contains(&named), "{status}, it said: {last}");
        if is_replaced {
            fs::remove_dir_all(&log).expect("it is there");
        }
        fs::rename(&aside, &log).expect("it can be put back");
        let server = stopped.restart(&[]);
        let mut client = Connection::open(server.address());
        for path in ["/v1/a", "/v1/b"] {
            assert_eq!(client.ask("GET", path, b"").body, b"value", "{path}");
        }
    }
}
