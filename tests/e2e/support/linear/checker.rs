//! Linearizability of histories: all responses must be those of a store that runs the operations one at a time, each at
//! some moment between its invocation and its response.
//!
//! Keys that no operation has in common are checked apart, which is sound: a history is linearizable exactly if its parts
//! without common objects are (Herlihy and Wing). Must never know: the source of a history.

use std::collections::BTreeSet;
use std::fmt::{self, Display};
use std::mem;

use super::history::{Item, Key, Operation, Outcome, Step};
use super::search::{Effort, Verdict, search};

/// A history that did not pass.
#[derive(Debug)]
pub enum Failure {
    /// The operations that cannot have happened together.
    Violation(Vec<Operation>),
    /// The search reached its limit: neither a pass nor a violation.
    Undecided { operations: usize, limit: usize },
}

pub fn check(history: &[Operation]) -> Result<(), Failure> {
    check_with(history, Effort::default())
}

pub fn check_with(history: &[Operation], effort: Effort) -> Result<(), Failure> {
    let mut undecided = None;
    for part in parts(history) {
        match search(&part, effort).0 {
            Verdict::Linearizable => {}
            Verdict::NotLinearizable => return Err(Failure::Violation(minimize(part))),
            // A violation in another part says more.
            Verdict::Undecided => undecided = Some(Failure::Undecided { operations: part.len(), limit: effort.limit }),
        }
    }
    undecided.map_or(Ok(()), Err)
}

/// Parts of a history that have no key in common.
pub fn parts(history: &[Operation]) -> Vec<Vec<Operation>> {
    let part = |keys: BTreeSet<Key>| {
        history.iter().filter(|operation| !operation.keys().is_disjoint(&keys)).cloned().collect()
    };
    components(history).into_iter().map(part).collect()
}

/// Smallest sets of keys such that no operation has keys of two.
fn components(history: &[Operation]) -> Vec<BTreeSet<Key>> {
    let mut components: Vec<BTreeSet<Key>> = Vec::new();
    for operation in history {
        let mut joined = operation.keys();
        for other in mem::take(&mut components) {
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

/// The part of a violation that is enough for it: one key where one is enough, nothing after the first response that is
/// wrong, and no operation that can be left out. One that others depend on stays, since without it they are wrong anyway.
fn minimize(history: Vec<Operation>) -> Vec<Operation> {
    let keys: BTreeSet<_> = history.iter().flat_map(Operation::keys).collect();
    let one = keys.iter().map(|key| of_key(&history, *key)).find(|part| is_violation(part));
    let history = one.unwrap_or(history);

    let mut responses: Vec<_> = history.iter().map(|operation| operation.returned).collect();
    responses.sort_unstable();
    let right = responses.partition_point(|response| !is_violation(&until(&history, *response)));
    let cut = responses.get(right).map(|response| until(&history, *response));
    let mut history = cut.filter(|cut| is_violation(cut)).unwrap_or(history);

    loop {
        let before = history.len();
        for at in (0..before).rev() {
            let operation = history.remove(at);
            if history.iter().any(|other| other.depends_on(&operation)) || !is_violation(&history) {
                history.insert(at, operation);
            }
        }
        if history.len() == before {
            return history;
        }
    }
}

/// Not so without a verdict: then the larger violation, which has one, is shown.
fn is_violation(history: &[Operation]) -> bool {
    search(history, Effort::default()).0 == Verdict::NotLinearizable
}

/// The steps on one key. Operations with a failed check are left out: it may have been of another.
fn of_key(history: &[Operation], key: Key) -> Vec<Operation> {
    let operations = history.iter().filter(|operation| !matches!(operation.outcome, Outcome::Failed(_)));
    let of_key = operations.map(|operation| {
        let steps = operation.steps.iter().filter(|step| step.key() == key).cloned().collect();
        Operation { steps, ..operation.clone() }
    });
    of_key.filter(|operation| !operation.steps.is_empty()).collect()
}

/// The history at a moment: operations without a response so far are of unknown outcome.
fn until(history: &[Operation], moment: u64) -> Vec<Operation> {
    let invoked = history.iter().filter(|operation| operation.invoked < moment).cloned();
    let known = invoked.filter_map(|operation| match operation.returned <= moment || operation.is_unknown() {
        true => Some(operation),
        false if operation.is_read_only() => None,
        false => Some(Operation { outcome: Outcome::Unknown, ..operation }),
    });
    known.collect()
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Violation(operations) => {
                writeln!(f, "not linearizable, because of these {} operations:", operations.len())?;
                let mut operations: Vec<_> = operations.iter().collect();
                operations.sort_by_key(|operation| operation.invoked);
                operations.into_iter().try_for_each(|operation| writeln!(f, "{operation}"))
            }
            Self::Undecided { operations, limit } => writeln!(
                f,
                "no verdict on {operations} operations after {limit} configurations, which is no pass: the search in \
                 tests/e2e/support/linear/search.rs needs a further rule for such histories, and \
                 tests/e2e/persistence/linear/stress.rs a test that has one"
            ),
        }
    }
}

impl Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { client, invoked, returned, .. } = self;
        match self.outcome {
            Outcome::Unknown => write!(f, "{invoked}..      client {client}:")?,
            _ => write!(f, "{invoked}..{returned} client {client}:")?,
        }
        for step in &self.steps {
            match step {
                Step::Check(key, None) => write!(f, " check that key {key} does not exist;")?,
                Step::Check(key, Some(tag)) => write!(f, " check that key {key} has tag {tag};")?,
                Step::Compare(key, value) => write!(f, " check that key {key} has value {value};")?,
                Step::Found(key, Some(exists)) => write!(f, " key {key} exists: {exists};")?,
                Step::Found(_, None) => {}
                Step::Get(key, _) if self.outcome != Outcome::Done => write!(f, " get key {key};")?,
                Step::Get(key, None) => write!(f, " get key {key}: nothing;")?,
                Step::Get(key, Some(Item { value, tag })) => write!(f, " get key {key}: {value} with tag {tag};")?,
                Step::Put(key, Item { value, tag }) => write!(f, " put key {key} = {value} with tag {tag};")?,
                Step::Delete(key) => write!(f, " delete key {key};")?,
            }
        }
        match self.outcome {
            Outcome::Done => Ok(()),
            Outcome::Failed(at) => write!(f, " check {at} failed"),
            Outcome::Unknown => write!(f, " outcome unknown"),
        }
    }
}
