//! Linearizability: eight clients record their operations and the responses, while the server is killed, paused and swapped
//! and its guest traps. Each history must be one of a store that runs the operations one at a time.
//!
//! The recorder and the checker are in `support::linear`; `checks` and `stress` test the checker, by histories written by hand
//! and generated ones, and `faulty` is a server with faults for it to find.

mod checks;
mod faulty;
mod stress;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::process::Signal;

use self::faulty::{Fault, Faulty};
use crate::support::guests::{DEFAULT_GUEST, brittle, component, copy_of};
use crate::support::linear::checker::{Failure, check};
use crate::support::linear::clients::{GivenUp, Stage, record};
use crate::support::linear::plan::OPERATIONS;
use crate::support::linear::{AT_ONCE, judge, report};
use crate::support::load::{SMALL_SEGMENTS, SaysOver, count};
use crate::support::metrics::{Metrics, until};
use crate::support::server::Server;
use crate::support::swap::{put_in, swap};
use crate::support::wire::Connection;
use crate::support::zoo;

const ARGS: [&str; 2] = ["--probation", "100ms"];

#[test]
fn history_under_faults_is_linearizable() {
    let mut rng = zoo::dice();
    let histories = count("KVS_TEST_HISTORIES", 100);
    let args = [&SMALL_SEGMENTS[..], &ARGS].concat();
    let mut server = Server::start(&args);
    let mut operations = 0;
    let mut unknown = 0;
    let mut trapped = 0;
    let mut hits = 0;
    for round in 0..histories.div_ceil(AT_ONCE) {
        let names: Vec<_> = (0..AT_ONCE.min(histories - round * AT_ONCE)).map(|n| format!("{round}-{n}")).collect();
        let stage = Stage::default();
        put_in(&server, &component(brittle()));
        stage.set(Some(server.address()));
        let (judged, troubled) =
            judge(&stage, &names, &mut rng, |rng| trouble(server, &stage, &args, names.len() as u64 * OPERATIONS, rng));
        server = troubled.0;
        trapped += troubled.1 + traps(&server.stderr());
        operations += judged.operations;
        unknown += judged.unknown;
        hits += Metrics::of(&server).get("kvs_response_cache_hits_total") as usize;
        // Its log lines are counted once.
        server = server.terminate().restart(&args);
    }
    println!(
        "{histories} histories of {operations} operations, {unknown} of unknown outcome, {trapped} traps, {hits} hits"
    );
    assert_eq!(operations as u64, histories * OPERATIONS);
    assert!(unknown as u64 > histories && trapped as u64 > histories / 10, "{unknown} unknown, {trapped} traps");
    // Of the servers at the end of a round, whose histories have reads from the cache.
    assert!(hits > 0, "no read was given from the cache");
}

/// The guest traps every few operations, and spares are promoted; sometimes it is swapped.
#[test]
fn history_over_promotions_of_spares_is_linearizable() {
    let mut rng = zoo::dice();
    let histories = count("KVS_TEST_HISTORIES", 40).div_ceil(2);
    let args = [&SMALL_SEGMENTS[..], &ARGS, &[brittle(), "--spare"]].concat();
    let server = Server::start(&args);
    let (mut trapped, mut operations) = (0, 0);
    for round in 0..histories.div_ceil(AT_ONCE) {
        let names: Vec<_> = (0..AT_ONCE.min(histories - round * AT_ONCE)).map(|n| format!("{round}-{n}")).collect();
        let stage = Stage::default();
        stage.set(Some(server.address()));
        let all = names.len() as u64 * OPERATIONS;
        let (judged, ()) = judge(&stage, &names, &mut rng, |rng| {
            let mut moments: Vec<_> = (0..all / 250).map(|_| rng.u64(..all * 9 / 10)).collect();
            moments.sort_unstable();
            for (n, moment) in moments.into_iter().enumerate() {
                stage.wait_for(moment);
                if n % 10 == 9 {
                    put_in(&server, &if n % 20 == 9 { copy_of(brittle()) } else { component(brittle()) });
                } else {
                    until(&server, "there is a spare", |now| now.get("kvs_guest_spares") > 0.0);
                    let mut client = Connection::open(server.address());
                    let answer = client.ask("GET", "/trap/v1/a", b"");
                    // The response comes before the spare is promoted, and that of the next request after it.
                    client.ask("GET", "/v1/a", b"");
                    // Traps that come too fast are rejected while the guest is rebuilt.
                    assert!(matches!(answer.status, 500 | 503), "{}: {}", answer.status, answer.text());
                    trapped += usize::from(answer.status == 500);
                }
            }
        });
        operations += judged.operations as u64;
    }
    let promoted = Metrics::of(&server).get("kvs_guest_promotions_total{cause=\"spare\"}");
    println!("{histories} histories of {operations} operations, {trapped} traps, {promoted} promotions of spares");
    assert_eq!(operations, histories * OPERATIONS);
    // On a slow machine, a shard can trap again before its next spare is built.
    assert!(promoted >= histories as f64 / 4.0, "{promoted} spares were promoted in {trapped} traps");
}

/// A copy of the guest is swapped in repeatedly and rolled back on request, or a guest that traps and is rolled back for that.
#[test]
fn history_over_rollbacks_is_linearizable() {
    let mut rng = zoo::dice();
    let rollbacks = count("KVS_TEST_HISTORIES", 40).div_ceil(5);
    let args = [&SMALL_SEGMENTS[..], &["--probation", "1h"]].concat();
    let server = Server::start(&args);
    let promotions = |now: &Metrics, cause| now.get(&format!("kvs_guest_promotions_total{{cause=\"{cause}\"}}"));
    let over = AtomicBool::new(false);
    let (histories, operations) = thread::scope(|scope| {
        let rolling = scope.spawn(|| {
            let _over = SaysOver(&over);
            for n in 0..rollbacks {
                let on_request = n % 2 == 0;
                let guest = if on_request { copy_of(DEFAULT_GUEST) } else { component(brittle()) };
                thread::scope(|scope| {
                    let swapping = scope.spawn(|| swap(&server, &guest));
                    let serves = |now: &Metrics| promotions(now, "swap") == (n + 1) as f64;
                    let begun = until(&server, "it serves on probation", serves).get("kvs_txlog_sequence");
                    if on_request {
                        until(&server, "it has written", |now| now.get("kvs_txlog_sequence") > begun + 100.0);
                        let answer = Connection::open(server.admin()).ask("DELETE", "/guest?rollback", b"");
                        assert_eq!(answer.status, 202, "{}", answer.text());
                    }
                    let answer = swapping.join().expect("it is answered");
                    assert_eq!(answer.status, 422, "{}", answer.text());
                    assert_eq!(answer.text().contains("rolled back on request"), on_request, "{}", answer.text());
                });
            }
        });
        let recorded = recorded_until(&over, &server, &mut rng);
        rolling.join().expect("each is rolled back");
        recorded
    });
    println!("{histories} histories of {operations} operations, {rollbacks} rollbacks");
    assert_eq!(operations, histories * OPERATIONS);
    // Each shard is promoted for itself.
    let promoted = promotions(&Metrics::of(&server), "rollback");
    assert!(promoted >= rollbacks as f64, "{promoted} promotions in {rollbacks} rollbacks");
}

/// A copy of the guest is swapped in repeatedly, after shadow traffic without a difference. Histories are recorded for as
/// long as that takes, which depends on how fast guests are compiled.
#[test]
fn history_over_swaps_with_shadow_is_linearizable() {
    let mut rng = zoo::dice();
    let swaps = count("KVS_TEST_HISTORIES", 40).div_ceil(5);
    let args = [&SMALL_SEGMENTS[..], &["--probation", "1ms"]].concat();
    let server = Server::start(&args);
    let over = AtomicBool::new(false);
    let (histories, operations, compared) = thread::scope(|scope| {
        let swapping = scope.spawn(|| {
            let _over = SaysOver(&over);
            let swapped = (0..swaps).map(|n| {
                let guest = if n % 2 == 0 { copy_of(DEFAULT_GUEST) } else { component(DEFAULT_GUEST) };
                let query = "/guest?shadow=200ms&sample=50";
                let answer = Connection::open(server.admin()).ask("PUT", query, &guest);
                assert_eq!(answer.status, 200, "{}", answer.text());
                let report: serde_json::Value = serde_json::from_slice(&answer.body).expect("the report is JSON");
                report["shadow"]["compared"].as_u64().expect("a count")
            });
            swapped.sum::<u64>()
        });
        let (histories, operations) = recorded_until(&over, &server, &mut rng);
        (histories, operations, swapping.join().expect("each swap succeeds"))
    });
    println!("{histories} histories of {operations} operations, {swaps} swaps, {compared} requests compared");
    assert_eq!(operations, histories * OPERATIONS);
    assert!(compared > 0, "nothing was compared");
}

/// Records histories and judges them until it is over. Returns the number of histories and of their operations.
fn recorded_until(over: &AtomicBool, server: &Server, rng: &mut Rng) -> (u64, u64) {
    let (mut histories, mut operations) = (0, 0);
    while !over.load(Ordering::Relaxed) {
        let names: Vec<_> = (histories..histories + AT_ONCE).map(|n| n.to_string()).collect();
        let stage = Stage::default();
        stage.set(Some(server.address()));
        let (judged, ()) = judge(&stage, &names, rng, |_| ());
        histories += AT_ONCE;
        operations += judged.operations as u64;
    }
    (histories, operations)
}

/// Kills, pauses and swaps the server, each twice, in a random order and at random moments while this number of operations
/// is recorded. Returns the server that runs in the end, and the number of traps in those before.
fn trouble(mut server: Server, stage: &Stage, args: &[&str], operations: u64, rng: &mut Rng) -> (Server, usize) {
    let mut moments: Vec<_> = (0..6).map(|_| rng.u64(operations / 20..operations * 9 / 10)).collect();
    moments.sort_unstable();
    let mut troubles = [0, 0, 1, 1, 2, 2];
    rng.shuffle(&mut troubles);
    let mut trapped = 0;
    for (moment, trouble) in moments.into_iter().zip(troubles) {
        stage.wait_for(moment);
        match trouble {
            0 => {
                stage.set(None);
                let stopped = server.kill();
                trapped += traps(stopped.stderr());
                server = stopped.restart(args);
                stage.set(Some(server.address()));
            }
            1 => {
                server.signal(Signal::STOP);
                // The length of the pause: nothing ends it but time.
                thread::sleep(Duration::from_millis(rng.u64(20..200)));
                server.signal(Signal::CONT);
            }
            _ => {
                let guests = [component(brittle()), copy_of(brittle()), component(DEFAULT_GUEST)];
                put_in(&server, rng.choice(&guests).expect("there are some"));
            }
        }
    }
    (server, trapped)
}

fn traps(said: &[String]) -> usize {
    said.iter().filter(|line| line.contains("the guest trapped")).count()
}

/// Records histories of a server with this fault until one is not linearizable. Returns the number of histories it took.
fn histories_until_found(fault: Fault, most: usize, rng: &mut Rng) -> Option<usize> {
    (1..=most).find(|number| {
        let server = Faulty::start(fault);
        let stage = Stage::default();
        stage.set(Some(server.address));
        let mut rng = rng.fork();
        let seed = rng.get_seed();
        let history = thread::scope(|scope| {
            let recording = scope.spawn(|| record(&stage, "faulty", &mut rng));
            let _given_up = GivenUp(&stage);
            for kill in 1..=4 {
                stage.wait_for(kill * OPERATIONS / 5);
                server.kill();
            }
            recording.join().expect("it is recorded")
        });
        let Err(failure) = check(&history) else { return false };
        let report = report(&format!("{number} of {fault:?}"), seed, &history, &failure);
        // A history without a verdict is not one in which the fault was found.
        assert!(matches!(failure, Failure::Violation(_)), "{report}");
        println!("{report}");
        true
    })
}

#[test]
fn faulty_server_is_found() {
    let mut rng = zoo::dice();
    assert_eq!(histories_until_found(Fault::None, 10, &mut rng), None);
    for fault in [Fault::AnswersEarly, Fault::ReadsWithoutWaiting, Fault::LosesUpdates] {
        let histories = histories_until_found(fault, 20, &mut rng);
        println!("{fault:?} was found in history {histories:?}");
        assert!(histories.is_some(), "{fault:?} was not found");
    }
}
