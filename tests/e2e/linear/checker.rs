//! Judges histories: whether all that was answered can have happened one after the other, each operation at some moment
//! between its question and its answer.
//!
//! The search of Wing and Gong with the memory of Lowe: whatever was asked before the first answer that is still to be
//! explained can be next; a set of operations and the state after them is looked at once. Keys that no operation has in
//! common with others are judged apart. Must never know: how a history came about.

use std::collections::{BTreeSet, HashSet};
use std::fmt::{self, Display};

use super::history::{Item, Key, Operation, Outcome, State, Step};

/// Sets of operations with a state that are looked at, at most: a verdict, or a failure that says that there is none.
const MAX_LOOKS: usize = 5_000_000;

/// The operations of a history that cannot have happened together.
#[derive(Debug)]
pub struct Violation(pub Vec<Operation>);

pub fn check(history: &[Operation]) -> Result<(), Violation> {
    for keys in components(history) {
        let part: Vec<_> = history.iter().filter(|operation| !operation.keys().is_disjoint(&keys)).cloned().collect();
        if !is_linearizable(&part) {
            return Err(Violation(smallest(part)));
        }
    }
    Ok(())
}

/// Sets of keys such that no operation has keys of two.
fn components(history: &[Operation]) -> Vec<BTreeSet<Key>> {
    let mut components: Vec<BTreeSet<Key>> = Vec::new();
    for operation in history {
        let (mut joined, others) = (operation.keys(), std::mem::take(&mut components));
        for other in others {
            if other.is_disjoint(&joined) {
                components.push(other);
            } else {
                joined.extend(other);
            }
        }
        components.push(joined);
    }
    components
}

pub fn is_linearizable(history: &[Operation]) -> bool {
    let mut search = Search::new(history);
    let keys = history.iter().flat_map(Operation::keys).max().map_or(0, |key| key + 1);
    let left = search.answered.len();
    search.go(&vec![0; history.len().div_ceil(64)], 0, left, &vec![None; keys])
}

type Set = Vec<u64>;

struct Search<'h> {
    history: &'h [Operation],
    /// Those whose outcome is known, and those that may never have happened, by when they were asked.
    answered: Vec<usize>,
    unknown: Vec<usize>,
    seen: HashSet<(Set, State)>,
}

impl<'h> Search<'h> {
    fn new(history: &'h [Operation]) -> Self {
        let mut order: Vec<_> = (0..history.len()).collect();
        order.sort_by_key(|at| history[*at].asked);
        let (unknown, answered) = order.into_iter().partition(|at| history[*at].is_unknown());
        Self { history, answered, unknown, seen: HashSet::new() }
    }

    /// Whether the rest can have happened after those in `done`, which are all before `first` and some behind it.
    fn go(&mut self, done: &Set, mut first: usize, left: usize, state: &State) -> bool {
        if left == 0 {
            return true;
        }
        if !self.seen.insert((done.clone(), state.clone())) {
            return false;
        }
        assert!(self.seen.len() < MAX_LOOKS, "no verdict on {} operations after {MAX_LOOKS} looks", self.history.len());
        let is_done = |at: usize| done[at / 64] >> (at % 64) & 1 == 1;
        while is_done(self.answered[first]) {
            first += 1;
        }
        // Nothing can be next that was asked after one of the others was answered.
        let (mut next, mut answer) = (Vec::new(), u64::MAX);
        for at in self.answered[first..].iter().copied() {
            if self.history[at].asked > answer {
                break;
            }
            if !is_done(at) {
                answer = answer.min(self.history[at].answered);
                next.push(at);
            }
        }
        // Those that must have happened soonest come first, and those that need not have happened at all come last.
        next.sort_by_key(|at| self.history[*at].answered);
        let unknown = self.unknown.iter().copied().take_while(|at| self.history[*at].asked < answer);
        next.extend(unknown.filter(|at| !is_done(*at)));
        next.into_iter().any(|at| {
            let operation = &self.history[at];
            let Some(after) = operation.happens(state) else { return false };
            let mut done = done.clone();
            done[at / 64] |= 1 << (at % 64);
            self.go(&done, first, left - usize::from(!operation.is_unknown()), &after)
        })
    }
}

/// What is left of a history that cannot have happened: one key where one is enough, nothing after the first answer that
/// cannot be explained, and none that is not needed. What others rest on stays: without it they could not have happened.
fn smallest(history: Vec<Operation>) -> Vec<Operation> {
    let keys: BTreeSet<_> = history.iter().flat_map(Operation::keys).collect();
    let one = keys.iter().map(|key| of_key(&history, *key)).find(|part| !is_linearizable(part));
    let history = one.unwrap_or(history);

    let mut answers: Vec<_> = history.iter().map(|operation| operation.answered).collect();
    answers.sort_unstable();
    let fine = answers.partition_point(|answer| is_linearizable(&until(&history, *answer)));
    let mut history = answers.get(fine).map_or(history.clone(), |answer| until(&history, *answer));

    loop {
        let before = history.len();
        for at in (0..before).rev() {
            let operation = history.remove(at);
            if history.iter().any(|other| other.rests_on(&operation)) || is_linearizable(&history) {
                history.insert(at, operation);
            }
        }
        if history.len() == before {
            return history;
        }
    }
}

/// What it says of one key. A check that failed may have been of another.
fn of_key(history: &[Operation], key: Key) -> Vec<Operation> {
    let operations = history.iter().filter(|operation| !matches!(operation.outcome, Outcome::Failed(_)));
    let of_key = operations.map(|operation| {
        let steps = operation.steps.iter().filter(|step| step.key() == key).cloned().collect();
        Operation { steps, ..operation.clone() }
    });
    of_key.filter(|operation| !operation.steps.is_empty()).collect()
}

/// What it was at a moment: what had not been answered was unknown.
fn until(history: &[Operation], moment: u64) -> Vec<Operation> {
    let asked = history.iter().filter(|operation| operation.asked < moment).cloned();
    let known = asked.filter_map(|operation| match operation.answered <= moment || operation.is_unknown() {
        true => Some(operation),
        false if operation.changes_nothing() => None,
        false => Some(Operation { outcome: Outcome::Unknown, ..operation }),
    });
    known.collect()
}

impl Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "these {} operations cannot have happened one after the other:", self.0.len())?;
        let mut operations: Vec<_> = self.0.iter().collect();
        operations.sort_by_key(|operation| operation.asked);
        operations.into_iter().try_for_each(|operation| writeln!(f, "{operation}"))
    }
}

impl Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { client, asked, answered, .. } = self;
        match self.outcome {
            Outcome::Unknown => write!(f, "{asked}..      client {client}:")?,
            _ => write!(f, "{asked}..{answered} client {client}:")?,
        }
        for step in &self.steps {
            match step {
                Step::Check(key, None) => write!(f, " check that key {key} is not there;")?,
                Step::Check(key, Some(tag)) => write!(f, " check that key {key} has tag {tag};")?,
                Step::Get(key, _) if self.outcome != Outcome::Done => write!(f, " get key {key};")?,
                Step::Get(key, None) => write!(f, " get key {key}: nothing;")?,
                Step::Get(key, Some(Item { value, tag })) => write!(f, " get key {key}: {value} with tag {tag};")?,
                Step::Put(key, Item { value, tag }) => write!(f, " put key {key} = {value} with tag {tag};")?,
                Step::Delete(key) => write!(f, " delete key {key};")?,
            }
        }
        match self.outcome {
            Outcome::Done => Ok(()),
            Outcome::Failed(at) => write!(f, " the check at {at} failed"),
            Outcome::Unknown => write!(f, " outcome unknown"),
        }
    }
}
