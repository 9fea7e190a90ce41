//! History of the operations of clients, and the effect of each on a store.
//!
//! Every operation is a list of steps that is atomic: a GET is one step, a conditional PUT a check and a put, a transaction
//! as many as it has.

use std::collections::{BTreeSet, HashMap};

/// A key, by its number within a history.
pub type Key = usize;

/// A value and its entity tag. No two puts have the same value, except for one touch of it at most, which checks its tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Item {
    pub value: u64,
    pub tag: u64,
}

/// The items of all keys, by their numbers.
pub type State = Vec<Option<Item>>;

#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Passes when the key has this entity tag, or, for none, does not exist.
    Check(Key, Option<u64>),
    /// Passes when the key has this value.
    Compare(Key, u64),
    /// Whether the key exists, where the response shows it.
    Found(Key, Option<bool>),
    /// The item in the response, once there is one.
    Get(Key, Option<Item>),
    /// The tag comes with the response, or with that of a later read.
    Put(Key, Item),
    Delete(Key),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    Done,
    /// The check at this index failed, and nothing changed.
    Failed(usize),
    /// May take effect at any time after its invocation, or never.
    Unknown,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Operation {
    pub client: usize,
    /// Times of the invocation and of the response, on one clock.
    pub invoked: u64,
    pub returned: u64,
    pub steps: Vec<Step>,
    pub outcome: Outcome,
}

impl Step {
    pub fn key(&self) -> Key {
        match self {
            Step::Check(key, _)
            | Step::Compare(key, _)
            | Step::Found(key, _)
            | Step::Get(key, _)
            | Step::Put(key, _)
            | Step::Delete(key) => *key,
        }
    }

    /// The tag of a check.
    fn tag(&self) -> Option<u64> {
        if let Step::Check(_, tag) = self { *tag } else { None }
    }
}

impl Operation {
    pub fn keys(&self) -> BTreeSet<Key> {
        self.steps.iter().map(Step::key).collect()
    }

    pub fn is_unknown(&self) -> bool {
        self.outcome == Outcome::Unknown
    }

    /// Returns whether the store is the same after it in any case.
    pub fn is_read_only(&self) -> bool {
        let writes = self.steps.iter().any(|step| matches!(step, Step::Put(..) | Step::Delete(_)));
        !writes || matches!(self.outcome, Outcome::Failed(_))
    }

    /// Returns whether it can have this outcome because of a write of the other.
    pub fn depends_on(&self, other: &Self) -> bool {
        let writes = other.steps.iter().filter(|_| !matches!(other.outcome, Outcome::Failed(_)));
        let mut written = writes.filter_map(|step| match *step {
            Step::Put(key, item) => Some((key, Some(item))),
            Step::Delete(key) => Some((key, None)),
            Step::Check(..) | Step::Compare(..) | Step::Found(..) | Step::Get(..) => None,
        });
        written.any(|(written, item)| {
            self.steps.iter().enumerate().any(|(at, step)| match *step {
                // Any other tag can be the reason why a check failed.
                Step::Check(key, _) | Step::Compare(key, _) if self.outcome == Outcome::Failed(at) => key == written,
                Step::Get(key, seen) => key == written && seen == item,
                Step::Check(key, tag) => key == written && tag == item.map(|item| item.tag),
                Step::Compare(key, value) => key == written && Some(value) == item.map(|item| item.value),
                Step::Found(key, exists) => key == written && exists == Some(item.is_some()),
                Step::Put(..) | Step::Delete(_) => false,
            })
        })
    }

    /// Returns the state after it, when this state allows this outcome.
    pub fn apply(&self, state: &State) -> Option<State> {
        let mut after = state.clone();
        for (at, step) in self.steps.iter().enumerate() {
            match *step {
                Step::Check(key, tag) if after[key].map(|item| item.tag) != tag => {
                    return (self.outcome == Outcome::Failed(at)).then(|| state.clone());
                }
                Step::Compare(key, value) if after[key].map(|item| item.value) != Some(value) => {
                    return (self.outcome == Outcome::Failed(at)).then(|| state.clone());
                }
                Step::Get(key, seen) if self.outcome == Outcome::Done && after[key] != seen => return None,
                Step::Found(key, Some(exists)) if self.outcome == Outcome::Done && after[key].is_some() != exists => {
                    return None;
                }
                Step::Check(..) | Step::Compare(..) | Step::Found(..) | Step::Get(..) => {}
                Step::Put(key, item) => after[key] = Some(item),
                Step::Delete(key) => after[key] = None,
            }
        }
        match self.outcome {
            Outcome::Failed(_) => None,
            // Without an effect it can as well never have happened.
            Outcome::Unknown if after == *state => None,
            _ => Some(after),
        }
    }
}

/// Gives puts without a response the tags that reads saw with their values. One that was never read gets a tag that no check
/// names: a response that shows only such a tag shows that the key exists.
pub fn resolve(history: &mut [Operation]) {
    let mut tags = HashMap::<_, BTreeSet<_>>::new();
    for operation in history.iter().filter(|operation| operation.outcome == Outcome::Done) {
        for step in &operation.steps {
            if let Step::Get(_, Some(item)) | Step::Put(_, item) = step {
                tags.entry(item.value).or_default().insert(item.tag);
            }
        }
    }
    let seen: BTreeSet<_> = tags.values().flatten().copied().collect();
    for operation in history {
        let checked: Vec<_> = operation.steps.iter().filter_map(Step::tag).collect();
        for step in &mut operation.steps {
            match step {
                Step::Put(_, item) if operation.outcome != Outcome::Done => {
                    // Of a value that is touched, the tag after it.
                    let mut tags = tags.get(&item.value).into_iter().flatten().filter(|tag| !checked.contains(tag));
                    item.tag = tags.next().copied().unwrap_or(u64::MAX - item.value);
                }
                Step::Check(key, Some(tag)) if operation.outcome == Outcome::Done && !seen.contains(tag) => {
                    *step = Step::Found(*key, Some(true));
                }
                _ => {}
            }
        }
    }
}
