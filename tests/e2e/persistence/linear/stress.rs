//! Verdicts within a bound: histories of the size and mix of the recorder, of a simulated store, with many unknown outcomes.

use std::collections::BTreeMap;

use fastrand::Rng;

use crate::support::linear::checker::{Failure, check, parts};
use crate::support::linear::history::{Operation, Outcome, State, Step, resolve};
use crate::support::linear::plan::{CLIENTS, KEYS, OPERATIONS, Seen, plan, remember};
use crate::support::linear::search::{Effort, Verdict, search};
use crate::support::load::count;

/// Configurations that a part of a history may need: a fifth of the limit. Of 120,000 parts, with KVS_TEST_GENERATED=500, one
/// needed 48,293 and half of them fewer than a hundred.
const BOUND: usize = 200_000;

/// Percentages of unknown outcomes.
const SHARES: [u64; 5] = [2, 10, 30, 40, 50];

/// Longest delays of operations of unknown outcome, in steps of the simulation. A request takes up to 20.
const DELAYS: [u64; 4] = [0, 50, 500, 5_000];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// Some writes are acknowledged and have no effect.
    LostUpdate,
    /// Some reads return an item that was overwritten.
    StaleRead,
    /// Sometimes the last three acknowledged operations are undone.
    LostTail,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    fault: Fault,
    unknown: u64,
    delay: u64,
}

/// A store that runs operations one at a time.
struct Store {
    fault: Fault,
    items: State,
    /// Its states before, the latest last.
    past: Vec<State>,
    tags: u64,
}

impl Store {
    fn run(&mut self, operation: &mut Operation, rng: &mut Rng) {
        let is_faulty = rng.u8(0..100) == 0;
        if is_faulty && self.fault == Fault::LostTail && self.past.len() >= 3 {
            self.items = self.past[self.past.len() - 3].clone();
        }
        let mut after = self.items.clone();
        for (at, step) in operation.steps.iter_mut().enumerate() {
            match step {
                Step::Check(key, tag) if after[*key].map(|item| item.tag) != *tag => {
                    operation.outcome = Outcome::Failed(at);
                    return;
                }
                Step::Compare(key, value) if after[*key].map(|item| item.value) != Some(*value) => {
                    operation.outcome = Outcome::Failed(at);
                    return;
                }
                Step::Check(..) | Step::Compare(..) => {}
                Step::Found(key, exists) => *exists = Some(after[*key].is_some()),
                Step::Get(key, seen) => {
                    *seen = after[*key];
                    if is_faulty && self.fault == Fault::StaleRead {
                        let old = self.past.iter().rev().map(|items| items[*key]).find(|old| old != seen);
                        *seen = old.unwrap_or(*seen);
                    }
                }
                Step::Put(key, item) => {
                    self.tags += 1;
                    item.tag = self.tags;
                    after[*key] = Some(*item);
                }
                Step::Delete(key) => after[*key] = None,
            }
        }
        if after != self.items && !(is_faulty && self.fault == Fault::LostUpdate) {
            self.past.push(std::mem::replace(&mut self.items, after));
        }
    }
}

enum Event {
    Invoke { client: usize },
    Effect { at: usize },
    Return { at: usize },
}

/// Simulates clients of a store. An operation of unknown outcome may take effect long after its client has continued.
fn generate(shape: Shape, rng: &mut Rng) -> Vec<Operation> {
    let mut store = Store { fault: shape.fault, items: vec![None; KEYS], past: Vec::new(), tags: 0 };
    let mut seen = [Seen::default(); CLIENTS];
    let mut operations: Vec<Operation> = Vec::new();
    let mut unknown = Vec::new();
    let mut values = 0;
    let mut left = OPERATIONS;
    // By time, and then by the order in which they were scheduled.
    let mut events: BTreeMap<_, _> = (0..CLIENTS).map(|client| ((0, client), Event::Invoke { client })).collect();
    let mut scheduled = CLIENTS;
    let mut clock = 0;
    while let Some(((now, _), event)) = events.pop_first() {
        clock += 1;
        let mut schedule = |time: u64, event| {
            events.insert((time, scheduled), event);
            scheduled += 1;
        };
        match event {
            Event::Invoke { client } if left > 0 => {
                let (_, steps) = plan(rng, &mut seen[client], || {
                    values += 1;
                    values
                });
                let at = operations.len();
                let operation = Operation { client, invoked: clock, returned: 0, steps, outcome: Outcome::Done };
                let is_unknown = rng.u64(0..100) < shape.unknown;
                let end = now + rng.u64(2..20);
                match rng.u8(0..3) {
                    _ if !is_unknown => schedule(rng.u64(now + 1..end), Event::Effect { at }),
                    0 => {}
                    1 => schedule(now + rng.u64(1..20), Event::Effect { at }),
                    _ => schedule(now + rng.u64(1..20) + rng.u64(0..=shape.delay), Event::Effect { at }),
                }
                schedule(end, Event::Return { at });
                // The recorder drops reads without a response.
                left -= u64::from(!is_unknown || !operation.is_read_only());
                operations.push(operation);
                unknown.push(is_unknown);
            }
            Event::Invoke { .. } => {}
            Event::Effect { at } => store.run(&mut operations[at], rng),
            Event::Return { at } => {
                let operation = &mut operations[at];
                operation.returned = clock;
                if !unknown[at] && operation.outcome == Outcome::Done {
                    remember(&mut seen[operation.client], &operation.steps);
                }
                schedule(now + rng.u64(0..3), Event::Invoke { client: operation.client });
            }
        }
    }
    for (operation, is_unknown) in operations.iter_mut().zip(unknown) {
        if is_unknown {
            operation.outcome = Outcome::Unknown;
        }
    }
    operations.retain(|operation| !operation.is_unknown() || !operation.is_read_only());
    resolve(&mut operations);
    operations
}

/// Generates histories of every share and delay, from fixed seeds.
fn histories(fault: Fault, per_shape: u64) -> impl Iterator<Item = (String, Vec<Operation>)> {
    let shapes = SHARES.into_iter().flat_map(move |unknown| DELAYS.map(|delay| Shape { fault, unknown, delay }));
    shapes.flat_map(move |shape| {
        (0..per_shape)
            .map(move |seed| (format!("{shape:?} of seed {seed}"), generate(shape, &mut Rng::with_seed(seed))))
    })
}

/// Returns the verdicts on the parts of a history, each of which must be there within the bound.
fn verdicts(name: &str, history: &[Operation], most: &mut (usize, String)) -> Vec<Verdict> {
    let verdict = |part: &Vec<Operation>| {
        let (verdict, visited) = search(part, Effort { limit: BOUND, ..Effort::default() });
        assert_ne!(
            verdict,
            Verdict::Undecided,
            "{name}: no verdict after {BOUND} configurations: add a rule to search.rs"
        );
        if visited > most.0 {
            *most = (visited, name.to_owned());
        }
        verdict
    };
    parts(history).iter().map(verdict).collect()
}

#[test]
fn atomic_store_passes_within_bound() {
    let mut most = (0, String::new());
    let mut unknown = 0;
    for (name, history) in histories(Fault::None, count("KVS_TEST_GENERATED", 10)) {
        unknown += history.iter().filter(|operation| operation.is_unknown()).count();
        for verdict in verdicts(&name, &history, &mut most) {
            assert_eq!(verdict, Verdict::Linearizable, "{name}");
        }
    }
    println!("{unknown} of unknown outcome; at most {} configurations, for {}", most.0, most.1);
}

#[test]
fn faulty_store_has_verdict_within_bound() {
    for fault in [Fault::LostUpdate, Fault::StaleRead, Fault::LostTail] {
        let mut most = (0, String::new());
        let mut all = 0;
        let mut violations = 0;
        for (name, history) in histories(fault, count("KVS_TEST_GENERATED", 10)) {
            all += 1;
            violations += usize::from(verdicts(&name, &history, &mut most).contains(&Verdict::NotLinearizable));
        }
        println!("{fault:?}: {violations} violations of {all}; at most {} configurations, for {}", most.0, most.1);
        // Not all: an unknown write can be an excuse, and a lost write may never be missed.
        assert!(violations > all / 10, "{fault:?}: only {violations} violations in {all} histories");
    }
}

#[test]
fn violation_among_unknown_writes_is_minimized() {
    let shape = Shape { fault: Fault::LostTail, unknown: 40, delay: 500 };
    let history = generate(shape, &mut Rng::with_seed(0));
    match check(&history) {
        Err(Failure::Violation(operations)) => assert!(operations.len() < 60, "{}", Failure::Violation(operations)),
        other => panic!("{shape:?}: {other:?} is no violation"),
    }
}
