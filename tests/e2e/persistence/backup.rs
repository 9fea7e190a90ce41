//! Copies of a data directory while the server under load is frozen. The copy contains all writes that were acknowledged or
//! read before, and the server continues.

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};
use tempfile::TempDir;

use crate::support::load::{Clients, SMALL_SEGMENTS};
use crate::support::server::{PATIENCE, Server, kvs, serve};
use crate::support::zoo;

/// Responses before the copy, and after it.
const ANSWERS: u64 = 2_000;

#[test]
fn copy_of_frozen_server_is_backup() {
    let mut rng = zoo::dice();
    let mut clients = Clients::new(&mut rng);
    let mut server = Server::start(&SMALL_SEGMENTS);
    for cycle in 1..=6 {
        let copy = TempDir::new().expect("a temporary directory can be made");
        // Every other time the server ends with the copy; otherwise it continues.
        let restored = cycle % 2 == 1;
        let mut copied = false;
        run(&server, &mut clients, |answered| {
            answered(ANSWERS);
            copied = hold(&server) && copy_all(&server, &copy);
            if !restored {
                server.signal(Signal::CONT);
                answered(ANSWERS);
            }
            // On any failure, the clients end with the server.
            server.signal(Signal::KILL);
        });
        assert!(copied, "the server was not held still, or the directory not copied");
        verify(&copy);
        let (_, stopped) = server.ends();
        let (directory, other) = if restored { (copy, stopped.into_data()) } else { (stopped.into_data(), copy) };
        let mut command = serve(directory.path());
        command.args(SMALL_SEGMENTS);
        server = Server::spawn(command, directory);
        clients.settle(server.address());
        // The other directory can be served too.
        let mut command = serve(other.path());
        command.args(SMALL_SEGMENTS);
        Server::spawn(command, other).terminate();
    }
}

/// Runs all clients. `meanwhile` can wait for a number of further responses, and must end the server.
fn run(server: &Server, clients: &mut Clients, meanwhile: impl FnOnce(&dyn Fn(u64))) {
    let (count, wanted) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
    let (enough, awaited) = sync_channel(1);
    let counted = |status| {
        assert!(status < 500, "{status} from a server in good health");
        if count.fetch_add(1, Ordering::SeqCst) + 1 == wanted.load(Ordering::SeqCst) {
            enough.send(()).expect("it is awaited");
        }
    };
    let answered = |more: u64| {
        wanted.store(count.load(Ordering::SeqCst) + more, Ordering::SeqCst);
        awaited.recv_timeout(PATIENCE).expect("the server keeps answering");
    };
    clients.run(server.address(), counted, || meanwhile(&answered));
}

/// Pauses the server, as `systemctl freeze` and `docker pause` do, and waits until it is stopped.
fn hold(server: &Server) -> bool {
    server.signal(Signal::STOP);
    let pid = i32::try_from(server.pid()).ok().and_then(Pid::from_raw).expect("a child has a number");
    let stopped = waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED).expect("a child can be waited for");
    stopped.is_some_and(|status| status.stopped())
}

fn copy_all(server: &Server, copy: &TempDir) -> bool {
    let from = format!("{}/.", server.data().display());
    let status = Command::new("cp").args(["-a", &from]).arg(copy.path()).status();
    status.expect("cp is part of every system").success()
}

/// A copy may end in a torn write, and must be intact otherwise.
fn verify(copy: &TempDir) {
    let mut command = kvs();
    let status =
        command.args(["txlog", "verify", "--data-dir"]).arg(copy.path()).status().expect("the binary can be started");
    assert!(status.success(), "{status}");
}
