//! The server is killed under load from several clients, and again while it recovers, on one directory. All writes that were
//! acknowledged or read must be there afterwards.

use std::process::Command;

use fastrand::Rng;

use crate::support::faults::{Fault, inject};
use crate::support::load::{Clients, SMALL_SEGMENTS, count, run_until_killed};
use crate::support::server::{Server, Stopped, serve};
use crate::support::zoo;

/// Least number of responses before a kill; the number is random, up to three times this.
const ANSWERS_BEFORE_KILL: u64 = 400;

#[test]
fn acknowledged_and_seen_data_survives_kills() {
    let mut rng = zoo::dice();
    let mut clients = Clients::new(&mut rng);
    let mut server = Server::start(&SMALL_SEGMENTS);
    for cycle in 1..=count("KVS_TEST_KILLS", 50) {
        let answers = rng.u64(ANSWERS_BEFORE_KILL..ANSWERS_BEFORE_KILL * 3);
        run_until_killed(&server, &mut clients, answers);
        let (status, mut stopped) = server.ends();
        assert_eq!(status.code(), None, "in cycle {cycle} it ended by itself: {status}");
        assert!(clients.unknown() > 0, "in cycle {cycle} the kill met no write in flight, and showed nothing");
        while rng.bool() {
            stopped = kill_during_recovery(stopped, &mut rng);
        }
        server = stopped.restart(&SMALL_SEGMENTS);
        clients.settle(server.address());
    }
}

/// Starts a server on the directory of the last one, and kills it at one of the system calls of recovery, or when it serves.
fn kill_during_recovery(stopped: Stopped, rng: &mut Rng) -> Stopped {
    const CALLS: [&str; 6] = ["openat", "pread64", "pwrite64", "fdatasync", "fsync", "fallocate"];
    let call = rng.choice(CALLS).expect("there are some");
    let at = rng.u64(1..if call == "openat" { 40 } else { 5 });
    let mut command: Command = inject(serve(stopped.data()), call, Fault::Kill, at, stopped.data());
    command.args(SMALL_SEGMENTS);
    match Server::try_spawn(command, stopped.into_data()) {
        Ok(server) => server.kill(),
        Err((_, stopped)) => stopped,
    }
}
