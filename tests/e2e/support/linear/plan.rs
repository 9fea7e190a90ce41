//! Operations that clients of a history send: the mix of the recorder and of the generated histories.

use fastrand::Rng;

use super::history::{Item, Key, Step};

/// Clients of a history.
pub const CLIENTS: usize = 8;

/// Operations of a history, by all clients.
pub const OPERATIONS: u64 = 500;

/// Keys that a transaction can have together. Few, so that clients conflict. The names of a group have a prefix.
pub const GROUPS: [&[Key]; 3] = [&[0], &[1, 2], &[3, 4, 5]];

/// Keys of a history.
pub const KEYS: usize = 6;

/// The request that carries the steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// PUT, GET or DELETE of a key, with a condition or without.
    Plain,
    Head,
    /// GET of a value that has another tag than this one.
    Changed(u64),
    /// A list of the keys of a group, with their values.
    List,
    /// Reads of the values of the keys of a group.
    Many,
    /// A check and a put of a number that is greater by this: an addition to what the client has seen.
    Add(u64),
    /// A check and a put of the value that is there.
    Touch,
    /// Deletes of the keys of a group.
    DeletePrefix,
    Transaction,
}

/// What a client knows when it draws its next operation.
#[derive(Clone, Copy, Default)]
pub struct Seen {
    /// The items it last saw, for its conditions.
    pub items: [Option<Item>; KEYS],
    /// The item it last put, unless it has touched it. Nobody else touches it, so that its value has two tags at most.
    own: Option<(Key, Item)>,
    /// The value that it touched last.
    touched: Option<u64>,
}

/// Draws an operation of a client, and takes the values it puts from `values`.
pub fn plan(rng: &mut Rng, seen: &mut Seen, mut next_value: impl FnMut() -> u64) -> (Form, Vec<Step>) {
    // Far from all values that are put, so that no sum is equal to one of them, or to another sum.
    let delta = rng.u64(1 << 32..1 << 48);
    // The response has the tag.
    let mut put = |key| Step::Put(key, Item { value: next_value(), tag: 0 });
    let group = rng.choice(GROUPS).expect("there are some");
    let key = rng.choice(group.iter().copied()).expect("there are some");
    let item = seen.items[key];
    let tag = item.map(|item| item.tag);
    match (rng.u8(0..30), item) {
        (0..5, _) => (Form::Plain, vec![Step::Get(key, None)]),
        (5, _) => (Form::Head, vec![Step::Found(key, None)]),
        (6, Some(Item { tag, .. })) => (Form::Changed(tag), vec![Step::Get(key, None)]),
        (7, _) => (Form::List, group.iter().map(|key| Step::Get(*key, None)).collect()),
        (8, _) => (Form::Many, group.iter().map(|key| Step::Get(*key, None)).collect()),
        (9..14, _) => (Form::Plain, vec![Step::Found(key, None), put(key)]),
        (14..16, _) => (Form::Plain, vec![Step::Found(key, None), Step::Delete(key)]),
        (16..19, _) => (Form::Plain, vec![Step::Check(key, tag), put(key)]),
        (19, Some(Item { value, tag })) => {
            (Form::Add(delta), vec![Step::Check(key, Some(tag)), Step::Put(key, Item { value: value + delta, tag: 0 })])
        }
        (20, Some(_)) => (Form::Plain, vec![Step::Check(key, tag), Step::Delete(key)]),
        (21, _) => (Form::DeletePrefix, deletes(group)),
        (22..24, _) if seen.own.is_some() => {
            let (key, Item { value, tag }) = seen.own.take().expect("there is one");
            seen.touched = Some(value);
            (Form::Touch, vec![Step::Check(key, Some(tag)), Step::Put(key, Item { value, tag: 0 })])
        }
        _ => {
            let mut steps = Vec::new();
            for key in group.iter().copied() {
                let item = seen.items[key];
                match (rng.u8(0..6), item) {
                    (0..2, _) => steps.push(Step::Check(key, item.map(|item| item.tag))),
                    (2, Some(Item { value, .. })) => steps.push(Step::Compare(key, value)),
                    _ => {}
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

/// The deletes of all keys of a group, each with what the response shows of it.
fn deletes(group: &[Key]) -> Vec<Step> {
    group.iter().flat_map(|key| [Step::Found(*key, None), Step::Delete(*key)]).collect()
}

/// Keeps the items of an operation that is done, for later operations of its client.
pub fn remember(seen: &mut Seen, steps: &[Step]) {
    for step in steps {
        match *step {
            Step::Get(key, item) => seen.items[key] = item,
            Step::Put(key, item) => {
                seen.items[key] = Some(item);
                seen.own = (seen.touched != Some(item.value)).then_some((key, item));
            }
            Step::Delete(key) => seen.items[key] = None,
            Step::Check(..) | Step::Compare(..) | Step::Found(..) => {}
        }
    }
}
