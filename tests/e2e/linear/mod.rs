//! Linearizability, shown: eight clients at a time record what they ask and what they are told, while the server is killed,
//! paused and swapped and its guest traps, and all of it must be something that can have happened one after the other.
//!
//! `clients` record a `history`, `checker` judges it; `faulty` is a server that breaks its promises, for the checker to find.

mod checker;
mod checks;
mod clients;
mod faulty;
mod history;

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::process::Signal;

use self::checker::{Violation, check};
use self::clients::{GivenUp, record};
pub use self::clients::{OPERATIONS, Stage, keys_of, read_on};
use self::faulty::{Fault, Faulty};
use self::history::Operation;
use crate::components::DEFAULT_GUEST;
use crate::guests::built;
use crate::load::{SMALL_SEGMENTS, count};
use crate::server::Server;
use crate::swap::{component, copy_of};
use crate::wire::Connection;
use crate::zoo;

/// Histories that are recorded at once, on one server.
pub const AT_ONCE: u64 = 10;

const ARGS: [&str; 2] = ["--probation", "100ms"];

/// The default store, that traps on demand.
fn brittle() -> &'static str {
    static GUEST: LazyLock<String> = LazyLock::new(|| built("brittle"));
    &GUEST
}

#[test]
fn whatever_happens_to_the_server_its_answers_can_have_happened_one_after_the_other() {
    let mut rng = zoo::dice();
    let histories = count("KVS_TEST_HISTORIES", 100);
    let args = [&SMALL_SEGMENTS[..], &ARGS].concat();
    let mut server = Server::start(&args);
    let (mut operations, mut unknown, mut trapped) = (0, 0, 0);
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
        // What it said is looked at once.
        server = server.terminate().restart(&args);
    }
    println!("{histories} histories of {operations} operations, {unknown} of unknown outcome, {trapped} traps");
    assert_eq!(operations as u64, histories * OPERATIONS);
    assert!(unknown as u64 > histories && trapped as u64 > histories / 10, "{unknown} unknown, {trapped} traps");
}

/// What histories were made of that can have happened.
pub struct Judged {
    pub operations: usize,
    pub unknown: usize,
}

/// Records histories of these names at once while there is `trouble`, and judges them. Gives also what that gave.
pub fn judge<T>(stage: &Stage, names: &[String], rng: &mut Rng, trouble: impl FnOnce(&mut Rng) -> T) -> (Judged, T) {
    let (recorded, troubled) = thread::scope(|scope| {
        let _given_up = GivenUp(stage);
        let recording = names.iter().map(|name| {
            let mut rng = rng.fork();
            scope.spawn(move || record(stage, name, &mut rng))
        });
        let recording: Vec<_> = recording.collect();
        let troubled = trouble(rng);
        (recording.into_iter().map(|history| history.join().expect("it is recorded")).collect::<Vec<_>>(), troubled)
    });
    let mut judged = Judged { operations: 0, unknown: 0 };
    for (name, history) in names.iter().zip(&recorded) {
        judged.operations += history.len();
        judged.unknown += history.iter().filter(|operation| operation.is_unknown()).count();
        check(history).unwrap_or_else(|violation| panic!("history {name}: {}", told(history, &violation)));
    }
    (judged, troubled)
}

/// What happens to a server while so many operations are recorded: two kills, two pauses and two swaps, at moments and in
/// an order of chance. Gives the server that is there in the end, and how often a guest trapped in those before.
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
                // This is what a pause is.
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

/// Swaps, where a trap can put back the guest that was there before.
pub fn put_in(server: &Server, component: &[u8]) {
    let answer = Connection::open(server.admin()).ask("PUT", "/guest", component);
    assert!(matches!(answer.status, 200 | 422), "{}: {}", answer.status, answer.text());
}

fn traps(said: &[String]) -> usize {
    said.iter().filter(|line| line.contains("the guest trapped")).count()
}

/// A violation, for people: what cannot be, and where the rest of the history is.
fn told(history: &[Operation], violation: &Violation) -> String {
    let mut whole = String::new();
    for operation in history {
        writeln!(whole, "{operation}").expect("a string takes it");
    }
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("history");
    fs::write(&file, whole).expect("the directory takes a file");
    format!("{violation}the whole history is in {}", file.display())
}

/// Records histories of a server that breaks a promise, or none, until one cannot have happened. Gives how many it took.
fn found(fault: Fault, most: usize, rng: &mut Rng) -> Option<usize> {
    (1..=most).find(|_| {
        let server = Faulty::start(fault);
        let stage = Stage::default();
        stage.set(Some(server.address));
        let history = thread::scope(|scope| {
            let recording = scope.spawn(|| record(&stage, "faulty", &mut rng.fork()));
            let _given_up = GivenUp(&stage);
            for kill in 1..=4 {
                stage.wait_for(kill * OPERATIONS / 5);
                server.kill();
            }
            recording.join().expect("it is recorded")
        });
        check(&history).inspect_err(|violation| println!("{fault:?}: {violation}")).is_err()
    })
}

#[test]
fn a_server_that_breaks_its_promises_is_found_out() {
    let mut rng = zoo::dice();
    assert_eq!(found(Fault::None, 10, &mut rng), None);
    for fault in [Fault::AnswersEarly, Fault::ReadsWithoutWaiting, Fault::LosesUpdates] {
        let histories = found(fault, 20, &mut rng);
        println!("{fault:?} was found in history {histories:?}");
        assert!(histories.is_some(), "{fault:?} was not found");
    }
}
