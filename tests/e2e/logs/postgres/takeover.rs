//! Linearizability over takeovers: clients record their requests to the primary and the responses, while it is killed, or paused
//! until another server has taken over. The histories must be linearizable.
//!
//! Requests also go to a server that has lost the log and does not know it yet, until it ends. Reads of a standby are stale by
//! design: they must never go back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::process::Signal;

use crate::support::linear::clients::{Stage, read_on};
use crate::support::linear::plan::OPERATIONS;
use crate::support::linear::{AT_ONCE, judge};
use crate::support::load::{SaysOver, count};
use crate::support::postgres::database::Database;
use crate::support::postgres::{DEPOSED, WHOLE, stand_by, start};
use crate::support::readiness::{WELL, becomes_ready};
use crate::support::server::Server;
use crate::support::zoo;

#[test]
fn histories_over_takeovers_are_linearizable() {
    let mut rng = zoo::dice();
    let (mut operations, mut unknown, mut shown) = (0, 0, 0);
    // Each with one kill and one pause.
    let rounds = count("KVS_TEST_TAKEOVERS", 2).div_ceil(2);
    for round in 0..rounds {
        let database = Database::start();
        let url = database.url();
        let (holder, standby) = (start(&url), stand_by(&url, &[]));
        let names: Vec<_> = (0..AT_ONCE).map(|n| format!("{round}-{n}")).collect();
        let stage = Stage::default();
        stage.set(Some(holder.address()));
        let (judged, servers) = judge(&stage, &names, &mut rng, |rng| {
            let mut ways = [Signal::KILL, Signal::STOP];
            rng.shuffle(&mut ways);
            let mut servers = vec![holder, standby];
            for (number, way) in ways.into_iter().enumerate() {
                let part = AT_ONCE * OPERATIONS / 10 * if number == 0 { 1 } else { 5 };
                stage.wait_for(part + rng.u64(..part / 2));
                let [.., holder, standby] = &servers[..] else { panic!("there are two at least") };
                let is_over = AtomicBool::new(false);
                let next = thread::scope(|scope| {
                    let reading =
                        scope.spawn(|| read_on(standby.address(), &names[0], || !is_over.load(Ordering::Relaxed)));
                    let says_over = SaysOver(&is_over);
                    let next = take_over(holder, standby, way, &stage, &url);
                    drop(says_over);
                    shown += reading.join().expect("what it shows does not go back");
                    next
                });
                servers.push(next);
            }
            servers
        });
        operations += judged.operations;
        unknown += judged.unknown;
        assert_eq!(database.sql(WHOLE), ["t"]);
        assert_eq!(database.sql("SELECT epoch FROM kvs.writer"), ["3"], "each took over once");
        drop(servers);
    }
    println!(
        "{rounds} rounds of {operations} operations, {unknown} of unknown outcome, {shown} reads of one that stood by"
    );
    assert_eq!(operations as u64, rounds * AT_ONCE * OPERATIONS);
    // The number of unknown outcomes is random, and can be zero: at a kill all clients may wait for reads.
    assert!(shown > 0, "one that stood by showed nothing");
}

/// Makes the primary lose the log, and returns the standby that takes over.
fn take_over(holder: &Server, standby: &Server, way: Signal, stage: &Stage, url: &str) -> Server {
    if way == Signal::KILL {
        stage.set(None);
    }
    holder.signal(way);
    becomes_ready(standby, 200, WELL);
    if way == Signal::STOP {
        // Clients use it until it detects the takeover: before the new primary has written, only the epoch differs.
        holder.signal(Signal::CONT);
        holder.says(DEPOSED);
    }
    let next = stand_by(url, &[]);
    stage.set(Some(standby.address()));
    next
}
