//! Swaps of the guest over the admin listener, also under load.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::compiled::cache;
use super::guests::component;
use super::load::SaysOver;
use super::server::Server;
use super::wire::{Connection, Response, get};

/// Swaps a guest in, and waits for the response.
pub fn swap(server: &Server, component: &[u8]) -> Response {
    Connection::open(server.admin()).ask("PUT", "/guest", component)
}

#[track_caller]
pub fn swaps(server: &Server, component: &[u8]) {
    let answer = swap(server, component);
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// `GET /guest` of the admin listener.
pub fn status(server: &Server) -> serde_json::Value {
    let answer = Connection::open(server.admin()).ask("GET", "/guest", b"");
    assert_eq!(answer.header("content-type"), Some("application/json"));
    serde_json::from_slice(&answer.body).expect("the status is JSON")
}

pub fn serving(server: &Server) -> String {
    status(server)["name"].as_str().expect("a guest has a name").to_owned()
}

/// Runs `work` while clients write and read. Each has its own key, and must read its last write, whichever guest serves. The
/// work gets the number of requests so far.
pub fn under_load(server: &Server, work: impl FnOnce(&AtomicU64)) {
    let (stop, requests) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for client in 0..8 {
            let (server, stop, requests) = (&server, &stop, &requests);
            scope.spawn(move || {
                let mut connection = Connection::open(server.address());
                let path = format!("/v1/client-{client}");
                let mut newest = 0;
                for n in 0_u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let answer = connection.ask("PUT", &path, n.to_string().as_bytes());
                    assert_eq!(answer.status, 201, "{}", answer.text());
                    let sequence = answer.etag().expect("a PUT has an ETag");
                    assert!(sequence > newest, "sequence {sequence} after {newest}");
                    newest = sequence;
                    let answer = get(&mut connection, &path);
                    assert_eq!((answer.status, answer.text()), (200, n.to_string().as_str()));
                    assert_eq!(answer.etag(), Some(sequence));
                    requests.fetch_add(2, Ordering::Relaxed);
                }
            });
        }
        let _over = SaysOver(&stop);
        work(&requests);
    });
}

/// Swaps the guest. A trap can roll the swap back.
pub fn put_in(server: &Server, component: &[u8]) {
    let answer = Connection::open(server.admin()).ask("PUT", "/guest", component);
    assert!(matches!(answer.status, 200 | 422), "{}: {}", answer.status, answer.text());
}

/// Swaps a guest in for the built-in one, and back, while clients write and read. `meanwhile` runs in between.
#[track_caller]
pub fn comes_and_goes_under_load(
    guest: &str,
    args: &[&str],
    meanwhile: impl FnOnce(&Server, &mut Connection),
) -> Server {
    let server = Server::start(&[&["--probation", "100ms", "--request-timeout", "30s"], args].concat());
    // Compiled before the load, since a large one takes long.
    cache(Path::new(guest), server.data());
    let component = component(guest);
    let tried = Connection::open(server.admin()).ask("PUT", "/guest?dry-run", &component);
    assert_eq!(tried.status, 200, "{}", tried.text());
    under_load(&server, |_| {
        swaps(&server, &component);
        meanwhile(&server, &mut Connection::open(server.address()));
        let back = Connection::open(server.admin()).ask("DELETE", "/guest", b"");
        assert_eq!(back.status, 200, "{}", back.text());
        assert_eq!(serving(&server), "kvs");
    });
    server
}

/// Waits until this is true of the swap in progress.
pub fn in_phase(server: &Server, phase: &str) {
    // Each poll is a request.
    let there = (0..100_000).any(|_| status(server)["swap"]["phase"] == phase);
    assert!(there, "no swap came to {phase}: {}", status(server));
}
