//! Records the operations of clients and checks whether a history of them is linearizable.
//!
//! `clients` record a `history` of operations that they draw from a `plan`; `checker` has the verdict, by a `search` of the
//! `compiled` history.

pub mod checker;
pub mod clients;
mod compiled;
pub mod history;
pub mod plan;
pub mod search;

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::thread;

use fastrand::Rng;

use self::checker::{Failure, check};
use self::clients::{GivenUp, Stage, record};
use self::history::Operation;

/// Histories recorded concurrently, on one server.
pub const AT_ONCE: u64 = 10;

/// Sizes of linearizable histories.
pub struct Judged {
    pub operations: usize,
    pub unknown: usize,
}

/// Records histories of these names concurrently with `trouble`, and panics unless all are linearizable. Returns also the
/// result of `trouble`.
pub fn judge<T>(stage: &Stage, names: &[String], rng: &mut Rng, trouble: impl FnOnce(&mut Rng) -> T) -> (Judged, T) {
    let (recorded, troubled) = thread::scope(|scope| {
        let _given_up = GivenUp(stage);
        let recording = names.iter().map(|name| {
            let mut rng = rng.fork();
            let seed = rng.get_seed();
            (seed, scope.spawn(move || record(stage, name, &mut rng)))
        });
        let recording: Vec<_> = recording.collect();
        let troubled = trouble(rng);
        let recorded = recording.into_iter().map(|(seed, history)| (seed, history.join().expect("it is recorded")));
        (recorded.collect::<Vec<_>>(), troubled)
    });
    let mut judged = Judged { operations: 0, unknown: 0 };
    for (name, (seed, history)) in names.iter().zip(&recorded) {
        judged.operations += history.len();
        judged.unknown += history.iter().filter(|operation| operation.is_unknown()).count();
        check(history).unwrap_or_else(|failure| panic!("{}", report(name, *seed, history, &failure)));
    }
    (judged, troubled)
}

/// Describes a history that did not pass, and writes it to a file: its seed repeats the operations, but not their timing.
pub fn report(name: &str, seed: u64, history: &[Operation], failure: &Failure) -> String {
    let mut whole = String::new();
    for operation in history {
        writeln!(whole, "{operation}").expect("a string takes it");
    }
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("history-{seed}"));
    fs::write(&file, whole).expect("the directory takes a file");
    format!(
        "history {name}, whose clients had seed {seed}: {failure}The whole history is in {}. Its timing does not repeat: keep \
         the file. To run the same operations again, set KVS_TEST_SEED to the seed printed at the start of the test.",
        file.display()
    )
}
