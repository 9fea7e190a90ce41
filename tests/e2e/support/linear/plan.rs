//! Operations that clients of a history send: the mix of the recorder and of the generated histories.

use fastrand::Rng;

use super::history::{Item, Key, Step};

/// Clients of a history.
pub const CLIENTS: usize = 8;

/// Operations of a history, by all clients.
pub const OPERATIONS: u64 = 500;

/// Keys that a transaction can have together. Few, so that clients conflict.
const GROUPS: [&[Key]; 3] = [&[0], &[1, 2], &[3, 4, 5]];

/// Keys of a history.
pub const KEYS: usize = 6;

/// The request that carries the steps.
#[derive(Clone, Copy, PartialEq)]
pub enum Form {
    Plain,
    /// A check and a put of a number that is greater by this: an addition to what the client has seen.
    Add(u64),
    Transaction,
}

/// Draws an operation of a client that last saw these items, and takes the values it puts from `values`.
pub fn plan(rng: &mut Rng, seen: &[Option<Item>; KEYS], mut next_value: impl FnMut() -> u64) -> (Form, Vec<Step>) {
    // Far from all values that are put, so that no sum is equal to one of them, or to another sum.
    let delta = rng.u64(1 << 32..1 << 48);
    // The response has the tag.
    let mut put = |key| Step::Put(key, Item { value: next_value(), tag: 0 });
    let group = rng.choice(GROUPS).expect("there are some");
    let key = rng.choice(group.iter().copied()).expect("there are some");
    let tag = seen[key].map(|item| item.tag);
    match rng.u8(0..20) {
        0..6 => (Form::Plain, vec![Step::Get(key, None)]),
        6..10 => (Form::Plain, vec![put(key)]),
        10..12 => (Form::Plain, vec![Step::Delete(key)]),
        12..14 => (Form::Plain, vec![Step::Check(key, tag), put(key)]),
        14 if tag.is_some() => {
            let value = seen[key].map_or(0, |item| item.value) + delta;
            (Form::Add(delta), vec![Step::Check(key, tag), Step::Put(key, Item { value, tag: 0 })])
        }
        15 if tag.is_some() => (Form::Plain, vec![Step::Check(key, tag), Step::Delete(key)]),
        _ => {
            let mut steps = Vec::new();
            for key in group.iter().copied() {
                if rng.u8(0..3) == 0 {
                    steps.push(Step::Check(key, seen[key].map(|item| item.tag)));
                }
                steps.push(match rng.u8(0..4) {
                    0 => Step::Get(key, None),
                    1 => Step::Delete(key),
                    _ => put(key),
                });
                if rng.u8(0..3) == 0 {
                    steps.push(Step::Get(key, None));
                }
            }
            (Form::Transaction, steps)
        }
    }
}

/// Keeps the items of an operation that is done, for later conditions of its client.
pub fn remember(seen: &mut [Option<Item>; KEYS], steps: &[Step]) {
    for step in steps {
        match *step {
            Step::Get(key, item) => seen[key] = item,
            Step::Put(key, item) => seen[key] = Some(item),
            Step::Delete(key) => seen[key] = None,
            Step::Check(..) => {}
        }
    }
}
