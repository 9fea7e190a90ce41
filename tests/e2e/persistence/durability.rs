//! Acknowledged writes survive a kill: a hundred thousand keys, compared one by one. A directory has one server.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::thread;

use fastrand::Rng;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::guests::guest;
use crate::support::log::of_files;
use crate::support::mount::in_container;
use crate::support::requests::{get, put};
use crate::support::server::{Process, Server, Stopped, refused, serve};
use crate::support::wire::{Connection, long, short};
use crate::support::zoo;

const KEYS: usize = 100_000;
/// Writes wait for the disk, so that many clients wait for the same sync.
const CLIENTS: usize = 64;
/// Clients that also put a value of the largest size.
const LARGE_VALUES: usize = 5;

/// Expected content of the store.
type Model = HashMap<String, Item>;

struct Item {
    value: Vec<u8>,
    etag: u64,
}

#[test]
fn hundred_thousand_keys_equal_model_after_kill() {
    let mut rng = zoo::dice();
    let server = Server::start(&[]);
    let keys = zoo::keys(&mut rng, KEYS);
    let seed = rng.u64(..);
    let models = in_parallel(keys.chunks(KEYS.div_ceil(CLIENTS)), |client, keys| {
        write_at_random(server.address(), Rng::with_seed(seed ^ client as u64), keys, client < LARGE_VALUES)
    });
    refuse_control_keys(server.address());

    let server = server.kill().restart(&[]);
    in_parallel(keys.chunks(KEYS.div_ceil(CLIENTS)).zip(&models), |_, (keys, model)| {
        compare(server.address(), keys, model);
    });
    refuse_control_keys(server.address());

    // Sequences continue, and keys that were never written do not exist.
    let newest = models.iter().flat_map(HashMap::values).map(|item| item.etag).max();
    let mut client = Connection::open(server.address());
    client.ask("GET", "/v1/never%20written", b"").says(404, "no such key");
    let next = client.ask("PUT", "/v1/never%20written", b"until now").etag();
    assert!(next > newest, "after {newest:?} came {next:?}");
}

/// Runs `client` in a thread for each of these, and returns their results.
fn in_parallel<I: Send, T: Send>(inputs: impl Iterator<Item = I>, client: impl Fn(usize, I) -> T + Sync) -> Vec<T> {
    let client = &client;
    thread::scope(|scope| {
        let threads: Vec<_> =
            inputs.enumerate().map(|(index, input)| scope.spawn(move || client(index, input))).collect();
        threads.into_iter().map(|thread| thread.join().expect("the client saw what it was to see")).collect()
    })
}

/// Puts every key, then overwrites and deletes random ones.
fn write_at_random(address: SocketAddr, mut rng: Rng, keys: &[String], large: bool) -> Model {
    let mut client = Connection::open(address);
    let mut model = Model::new();
    let mut newest = 0;
    let mut put = |client: &mut Connection, rng: &mut Rng, model: &mut Model, key: &String, value: Vec<u8>| {
        let created = client.ask("PUT", &path(rng, key), &value);
        assert_eq!(created.status, 201, "PUT {key:?}: {}", created.text());
        let etag = created.etag().expect("a PUT is answered with its sequence");
        assert!(etag > newest, "PUT {key:?} got {etag} after {newest}");
        newest = etag;
        model.insert(key.clone(), Item { value, etag });
    };
    for key in keys {
        let value = zoo::value(&mut rng);
        put(&mut client, &mut rng, &mut model, key, value);
    }
    if large {
        let value = zoo::large_value(&mut rng);
        put(&mut client, &mut rng, &mut model, &keys[0], value);
    }
    for _ in 0..keys.len() / 2 {
        let key = rng.choice(keys).expect("there are keys");
        match rng.u8(0..10) {
            0..5 => {
                let value = zoo::value(&mut rng);
                put(&mut client, &mut rng, &mut model, key, value);
            }
            5..8 => {
                assert_eq!(client.ask("DELETE", &path(&mut rng, key), b"").status, 200, "DELETE {key:?}");
                model.remove(key);
            }
            _ => check(&mut client, &path(&mut rng, key), key, &model),
        }
    }
    model
}

fn compare(address: SocketAddr, keys: &[String], model: &Model) {
    let mut client = Connection::open(address);
    for key in keys {
        check(&mut client, &short(key), key, model);
    }
}

fn check(client: &mut Connection, path: &str, key: &str, model: &Model) {
    let got = client.ask("GET", path, b"");
    match model.get(key) {
        None => assert_eq!(got.status, 404, "{key:?} was deleted, but is {:?}", String::from_utf8_lossy(&got.body)),
        Some(item) => {
            assert_eq!((got.status, got.etag()), (200, Some(item.etag)), "{key:?}");
            // Not shown by assert_eq, as values can be large.
            assert!(got.body == item.value, "{key:?} has {} bytes, not its {}", got.body.len(), item.value.len());
        }
    }
}

fn path(rng: &mut Rng, key: &str) -> String {
    if rng.bool() { short(key) } else { long(key) }
}

fn refuse_control_keys(address: SocketAddr) {
    let mut client = Connection::open(address);
    for key in zoo::control_keys() {
        for method in ["PUT", "GET"] {
            let refused = client.ask(method, &short(&key), b"value");
            assert_eq!(refused.status, 400, "{method} {key:?}");
            assert!(refused.text().starts_with("key holds the control character"), "{key:?}: {}", refused.text());
        }
    }
}

#[test]
fn restart_replays_everything_and_reports_it() {
    let mut server = Server::start(&[]);
    for run in 1..=3 {
        let mut client = Connection::open(server.address());
        assert_eq!(client.ask("PUT", &format!("/v1/{run}"), b"value").status, 201);
        server = server.terminate().restart(&[]);
        server.says(&format!("entries={run} "));
        for before in 1..=run {
            let path = format!("/v1/{before}");
            assert_eq!(Connection::open(server.address()).ask("GET", &path, b"").body, b"value", "{path} after {run}");
        }
    }
}

#[test]
fn long_replay_logs_progress() {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for n in 1..=3 {
        // Each is so large that it is a batch of its own.
        assert_eq!(client.ask("PUT", &format!("/v1/{{x}}{n}"), &[b'x'; 1 << 20]).status, 201);
    }
    let server = server.terminate().restart(&[
        guest(),
        "--guest-config",
        "fault=apply-dawdles",
        "--guest-replay-cpu-limit",
        "10s",
    ]);
    // After the first, unless a busy machine slowed the first batch down.
    let line = server.says("replaying: ");
    let is_right = |entries: u64| line.contains(&format!("replaying: {entries} entries, sequence {entries} of 3"));
    assert!((1..=3).any(is_right), "{line}");
}

/// A log of 100 entries for one shard, of which one is poison.
fn poisoned() -> Stopped {
    let server = Server::start(&[]);
    let mut client = Connection::open(server.address());
    for n in 1..=100 {
        let key = if n == 57 { "poison".to_owned() } else { n.to_string() };
        assert_eq!(client.ask("PUT", &format!("/v1/{{x}}{key}"), b"value").status, 201);
    }
    server.terminate()
}

#[test]
fn replay_has_its_own_cpu_limit() {
    let args = [guest(), "--guest-config", "fault=apply-dawdles", "--guest-cpu-limit", "300ms"];
    let server = poisoned().restart(&args);
    assert_eq!(Connection::open(server.address()).ask("GET", "/store/{x}100", b"").body, b"value");
}

#[test]
fn entry_that_traps_on_replay_is_named() {
    let refused = poisoned().refuses(&[guest(), "--guest-config", "fault=apply-traps-on-poison"]);
    refused.with(1, &["apply of entry 57 failed", "fall_over"]);
}

#[test]
fn batches_are_smaller_after_timeout() {
    let limit = ["--guest-replay-cpu-limit", "200ms"];
    let server = poisoned().restart(&[&[guest(), "--guest-config", "fault=apply-loops-on-many"], &limit[..]].concat());
    let line = server.says("the log is replayed once more");
    for expected in ["batches of 3 from entry 1 on", "took longer than 200ms (--guest-replay-cpu-limit)"] {
        assert!(line.contains(expected), "{expected:?} is not in {line}");
    }
    assert_eq!(Connection::open(server.address()).ask("GET", "/store/{x}100", b"").body, b"value");
}

#[test]
fn durability_os_survives_kill() {
    let server = Server::start(&["--durability", "os"]);
    let mut client = Connection::open(server.address());
    for n in 0..100 {
        assert_eq!(client.ask("PUT", &format!("/v1/{n}"), b"value").status, 201);
    }
    let server = server.kill().restart(&[]);
    let mut client = Connection::open(server.address());
    for n in 0..100 {
        assert_eq!(client.ask("GET", &format!("/v1/{n}"), b"").body, b"value", "{n}");
    }
}

#[test]
fn one_of_concurrent_servers_gets_directory() {
    of_files!();
    let data = TempDir::new().expect("a temporary directory can be made");
    let processes: Vec<_> = (0..6).map(|_| Process::spawn(serve(data.path()))).collect();
    let serving = |process: &Process| process.stderr.find(|line| line.contains("serving on").then_some(()));
    let (served, refused): (Vec<_>, Vec<_>) = processes.iter().map(serving).partition(Result::is_ok);
    assert_eq!(served.len(), 1, "those that did not serve said: {refused:?}");
    let data = data.path().to_str().expect("a temporary path is text");
    for said in refused {
        let said = said.expect_err("it did not serve");
        let failed: Vec<_> = said.lines().filter(|line| !line.contains(" INFO ")).collect();
        assert!(failed.len() == 1 && said.contains(data) && said.contains("in use"), "{said}");
    }
}

#[test]
fn second_server_fails_and_names_first() {
    of_files!();
    let first = Server::start(&[]);
    let mut client = Connection::open(first.address());
    assert_eq!(client.ask("PUT", "/v1/a", b"value").status, 201);

    let (pid, data) = (first.pid().to_string(), first.data().display().to_string());
    refused(serve(first.data())).with(1, &[&pid, &data]);
    // Another path of the same directory.
    let link = first.data().with_extension("link");
    std::os::unix::fs::symlink(first.data(), &link).expect("a link can be made");
    let through_link = std::panic::catch_unwind(|| refused(serve(&link)));
    std::fs::remove_file(&link).expect("the link is there");
    through_link.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).with(1, &[&pid]);

    assert_eq!(client.ask("GET", "/v1/a", b"").body, b"value", "the first continues");
    assert_eq!(client.ask("PUT", "/v1/b", b"value").status, 201, "the first continues");
}

#[test]
fn one_of_two_containers_gets_their_volume() {
    of_files!();
    let [volume, one, other] = [(); 3].map(|()| TempDir::new().expect("a temporary directory can be made"));
    let serve_at = |path: &TempDir| in_container(volume.path(), path.path(), &serve(path.path()));
    let first = serve_at(&one);
    let first = Server::spawn(first, one);
    assert_eq!(put(&first, "a", "1"), 201);
    refused(serve_at(&other)).with(1, &["is in use by process"]);
    std::fs::remove_file(volume.path().join("LOCK")).expect("it is there");
    refused(serve_at(&other)).with(1, &["is in use by another process"]);
    refused(serve(volume.path())).with(1, &["is in use by another process"]);
    assert_eq!(put(&first, "b", "2"), 201);
    first.kill();
    let second = serve_at(&other);
    let second = Server::spawn(second, other);
    assert_eq!((get(&second, "a").1, get(&second, "b").1), ("1".into(), "2".into()));
}

#[test]
fn lock_is_released_by_kill() {
    let server = Server::start(&[]);
    server.signal(Signal::KILL);
    let (_, stopped) = server.ends();
    stopped.restart(&[]).terminate();
}

#[test]
fn data_directory_is_created_with_its_parents() {
    of_files!();
    let parent = TempDir::new().expect("a temporary directory can be made");
    let data = parent.path().join("not").join("yet").join("there");
    let server = Server::spawn(serve(&data), parent);
    assert_eq!(Connection::open(server.address()).ask("PUT", "/v1/a", b"value").status, 201);
    assert!(data.join("LOCK").exists(), "the log is elsewhere than in {}", data.display());
}
