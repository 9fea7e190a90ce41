//! A data directory is copied while a server under load has it: while the server is held still. The copy has all that was
//! acknowledged or seen before, and the server goes on as if nothing had been.

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};
use tempfile::TempDir;

use crate::load::{Clients, SMALL_SEGMENTS};
use crate::server::{PATIENCE, Server, serve};
use crate::zoo;

/// Answers before the copy, and after it.
const ANSWERS: u64 = 2_000;

#[test]
fn a_copy_made_while_the_server_is_held_still_is_a_backup() {
    let mut rng = zoo::dice();
    let mut clients = Clients::new(&mut rng);
    let mut server = Server::start(&SMALL_SEGMENTS);
    for cycle in 1..=6 {
        let copy = TempDir::new().expect("a temporary directory can be made");
        // Every other time the clients never see anything newer than the copy; else the server goes on after it.
        let restored = cycle % 2 == 1;
        let mut copied = false;
        run(&server, &mut clients, |answered| {
            answered(ANSWERS);
            copied = hold(&server) && copy_all(&server, &copy);
            if !restored {
                server.signal(Signal::CONT);
                answered(ANSWERS);
            }
            // Whatever failed: the clients end with the server.
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
        // The other of the two can be served as well, whatever it lacks.
        let mut command = serve(other.path());
        command.args(SMALL_SEGMENTS);
        Server::spawn(command, other).terminate();
    }
}

/// Lets all clients loose; `meanwhile` can wait for so many answers more, and has to end the server.
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
        awaited.recv_timeout(PATIENCE).expect("the server goes on answering");
    };
    clients.run(server.address(), counted, || meanwhile(&answered));
}

/// Stops it in whatever it does, as `systemctl freeze` and `docker pause` do, and waits until it stands.
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
    let mut command = crate::server::kvs();
    let status =
        command.args(["txlog", "verify", "--data-dir"]).arg(copy.path()).status().expect("the binary can be started");
    assert!(status.success(), "{status}");
}
