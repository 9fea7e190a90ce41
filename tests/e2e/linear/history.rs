//! What clients asked and what they were told: the history that is judged, and what each operation does to a store.
//!
//! Every operation is a list of steps that happen at once, all or none: a GET is one step, a conditional PUT a check and a
//! put, a transaction as many as it has.

use std::collections::{BTreeSet, HashMap};

/// A key, by its number within a history.
pub type Key = usize;

/// A value and its entity tag. No two puts have the same value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Item {
    pub value: u64,
    pub tag: u64,
}

/// What keys hold, by their numbers.
pub type State = Vec<Option<Item>>;

#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// The key has this entity tag, or, for none, there is no such key.
    Check(Key, Option<u64>),
    /// What was seen, once it was.
    Get(Key, Option<Item>),
    /// The tag is known once it was told, or seen.
    Put(Key, Item),
    Delete(Key),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    Done,
    /// The check at this place failed, and nothing happened.
    Failed(usize),
    /// It may happen at any time after it was asked, or never.
    Unknown,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Operation {
    pub client: usize,
    /// When it was asked and when it was answered, on one clock.
    pub asked: u64,
    pub answered: u64,
    pub steps: Vec<Step>,
    pub outcome: Outcome,
}

impl Step {
    pub fn key(&self) -> Key {
        match self {
            Step::Check(key, _) | Step::Get(key, _) | Step::Put(key, _) | Step::Delete(key) => *key,
        }
    }
}

impl Operation {
    pub fn keys(&self) -> BTreeSet<Key> {
        self.steps.iter().map(Step::key).collect()
    }

    pub fn is_unknown(&self) -> bool {
        self.outcome == Outcome::Unknown
    }

    /// Whether a store is the same after it.
    pub fn changes_nothing(&self) -> bool {
        let writes = self.steps.iter().any(|step| matches!(step, Step::Put(..) | Step::Delete(_)));
        !writes || matches!(self.outcome, Outcome::Failed(_))
    }

    /// Whether it can have happened only because of what the other wrote.
    pub fn rests_on(&self, other: &Self) -> bool {
        let writes = other.steps.iter().filter(|_| !matches!(other.outcome, Outcome::Failed(_)));
        let mut written = writes.filter_map(|step| match *step {
            Step::Put(key, item) => Some((key, Some(item))),
            Step::Delete(key) => Some((key, None)),
            Step::Check(..) | Step::Get(..) => None,
        });
        written.any(|(written, item)| {
            self.steps.iter().enumerate().any(|(at, step)| match *step {
                // Anything but what it was to be can have been why a check failed.
                Step::Check(key, _) if self.outcome == Outcome::Failed(at) => key == written,
                Step::Get(key, seen) => key == written && seen == item,
                Step::Check(key, tag) => key == written && tag == item.map(|item| item.tag),
                Step::Put(..) | Step::Delete(_) => false,
            })
        })
    }

    /// The store after it, when it can have happened in this state with this outcome.
    pub fn happens(&self, state: &State) -> Option<State> {
        let mut after = state.clone();
        for (at, step) in self.steps.iter().enumerate() {
            match *step {
                Step::Check(key, tag) if after[key].map(|item| item.tag) != tag => {
                    return (self.outcome == Outcome::Failed(at)).then(|| state.clone());
                }
                Step::Get(key, seen) if self.outcome == Outcome::Done && after[key] != seen => return None,
                Step::Check(..) | Step::Get(..) => {}
                Step::Put(key, item) => after[key] = Some(item),
                Step::Delete(key) => after[key] = None,
            }
        }
        match self.outcome {
            Outcome::Failed(_) => None,
            // What never shows need not happen.
            Outcome::Unknown if after == *state => None,
            _ => Some(after),
        }
    }
}

/// Gives puts whose answer got lost the tags that others saw. One that nobody saw has a tag that nobody names.
pub fn resolve(history: &mut [Operation]) {
    let mut tags = HashMap::new();
    for operation in history.iter().filter(|operation| operation.outcome == Outcome::Done) {
        for step in &operation.steps {
            if let Step::Get(_, Some(item)) | Step::Put(_, item) = step {
                tags.insert(item.value, item.tag);
            }
        }
    }
    for operation in history.iter_mut().filter(|operation| operation.outcome != Outcome::Done) {
        for step in &mut operation.steps {
            if let Step::Put(_, item) = step {
                item.tag = tags.get(&item.value).copied().unwrap_or(u64::MAX - item.value);
            }
        }
    }
}
