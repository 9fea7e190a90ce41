//! Tests of the checker: hand-written histories, and small random ones, compared with a search of all orders.

use proptest::prelude::*;

use crate::support::linear::checker::{Failure, check, check_with};
use crate::support::linear::history::{Item, Key, Operation, Outcome, State, Step, resolve};
use crate::support::linear::search::{Effort, Verdict, search};

fn operation(invoked: u64, returned: u64, steps: &[Step], outcome: Outcome) -> Operation {
    Operation { client: 0, invoked, returned, steps: steps.to_vec(), outcome }
}

fn done(invoked: u64, returned: u64, steps: &[Step]) -> Operation {
    operation(invoked, returned, steps, Outcome::Done)
}

fn unknown(invoked: u64, steps: &[Step]) -> Operation {
    operation(invoked, invoked + 1, steps, Outcome::Unknown)
}

fn item(value: u64) -> Item {
    Item { value, tag: value + 100 }
}

fn put(key: Key, value: u64) -> Step {
    Step::Put(key, item(value))
}

fn got(key: Key, value: u64) -> Step {
    Step::Get(key, Some(item(value)))
}

fn absent(key: Key) -> Step {
    Step::Get(key, None)
}

#[track_caller]
fn passes(history: &[Operation]) {
    check(history).unwrap_or_else(|failure| panic!("{failure}"));
}

/// Returns the number of operations that are left of the violation.
#[track_caller]
fn fails(history: &[Operation]) -> usize {
    violation(history).len()
}

#[track_caller]
fn violation(history: &[Operation]) -> Vec<Operation> {
    match check(history) {
        Err(Failure::Violation(operations)) => operations,
        other => panic!("{other:?} is no violation"),
    }
}

#[test]
fn read_concurrent_with_write_sees_either_value() {
    let write = done(10, 20, &[put(0, 1)]);
    passes(&[write.clone(), done(15, 16, &[absent(0)])]);
    passes(&[write.clone(), done(11, 12, &[got(0, 1)]), done(13, 14, &[got(0, 1)])]);
    passes(&[write.clone(), done(1, 2, &[absent(0)]), done(21, 22, &[got(0, 1)])]);
    // A stale read, one of the future, and one that goes back.
    assert_eq!(fails(&[write.clone(), done(21, 22, &[absent(0)])]), 2);
    assert_eq!(fails(&[write.clone(), done(1, 2, &[got(0, 1)])]), 1);
    assert_eq!(fails(&[write.clone(), done(11, 12, &[got(0, 1)]), done(13, 14, &[absent(0)])]), 3);
    // A value that was never put, and the tag of another.
    assert_eq!(fails(&[write.clone(), done(30, 40, &[got(0, 2)])]), 1);
    let other = Step::Get(0, Some(Item { value: 1, tag: 7 }));
    assert_eq!(fails(&[write, done(30, 40, &[other])]), 1);
}

#[test]
fn unknown_write_happens_once_or_never() {
    let before = done(1, 2, &[put(0, 1)]);
    let lost = unknown(10, &[put(0, 2)]);
    passes(&[before.clone(), lost.clone(), done(20, 21, &[got(0, 1)])]);
    passes(&[before.clone(), lost.clone(), done(20, 21, &[got(0, 1)]), done(30, 31, &[got(0, 2)])]);
    // It is not undone, and happens neither before its invocation nor twice.
    assert_eq!(fails(&[before.clone(), lost.clone(), done(20, 21, &[got(0, 2)]), done(30, 31, &[got(0, 1)])]), 4);
    assert_eq!(fails(&[before.clone(), lost.clone(), done(5, 6, &[got(0, 2)])]), 1);
    let twice = [done(20, 21, &[got(0, 2)]), done(22, 23, &[put(0, 3)]), done(24, 25, &[got(0, 2)])];
    assert_eq!(fails(&[&[before, lost][..], &twice].concat()), 4);
}

#[test]
fn check_outcome_matches_state() {
    let first = done(1, 2, &[put(0, 1)]);
    let second = done(3, 4, &[Step::Check(0, Some(101)), put(0, 2)]);
    passes(&[first.clone(), second.clone()]);
    let same = done(5, 6, &[Step::Check(0, Some(101)), put(0, 3)]);
    assert_eq!(fails(&[first.clone(), second.clone(), same.clone()]), 3);
    passes(&[first.clone(), second.clone(), Operation { outcome: Outcome::Failed(0), ..same }]);
    let failed = operation(3, 4, &[Step::Check(0, Some(101)), put(0, 2)], Outcome::Failed(0));
    assert_eq!(fails(&[first.clone(), failed]), 2);
    let create = operation(5, 6, &[Step::Check(0, None), put(0, 3)], Outcome::Failed(0));
    passes(&[first.clone(), create.clone()]);
    assert_eq!(fails(&[first, done(3, 4, &[Step::Delete(0)]), create]), 3);
    // The index of the check counts, and so do steps of the transaction before it.
    let both = [put(0, 1), Step::Check(0, Some(101)), Step::Check(1, Some(5))];
    passes(&[operation(1, 2, &both, Outcome::Failed(2))]);
    assert_eq!(fails(&[operation(1, 2, &both, Outcome::Failed(1))]), 1);
}

#[test]
fn transaction_is_atomic() {
    let both = done(10, 20, &[put(0, 1), put(1, 2)]);
    passes(&[both.clone(), done(11, 12, &[absent(0), absent(1)]), done(13, 14, &[got(0, 1), got(1, 2)])]);
    // Half of the transaction, seen by one read or by two.
    assert_eq!(fails(&[both.clone(), done(11, 12, &[got(0, 1), absent(1)])]), 2);
    assert_eq!(fails(&[both, done(11, 12, &[got(1, 2)]), done(13, 14, &[absent(0)])]), 3);
}

#[test]
fn violation_is_minimized() {
    let mut history = vec![done(1, 2, &[put(0, 1), put(1, 50)]), done(11, 12, &[put(0, 2)])];
    // Reads of this key and others that are right, before and after the one that is wrong.
    for n in 0..20 {
        history.push(done(20 + 4 * n, 21 + 4 * n, &[got(0, 2)]));
        history.push(done(22 + 4 * n, 23 + 4 * n, &[got(1, 50)]));
    }
    history.push(done(60, 62, &[got(0, 1)]));
    history.push(done(200, 201, &[put(0, 3)]));
    let violation = Failure::Violation(violation(&history));
    assert!(violation.to_string().starts_with("not linearizable, because of these 3 operations:"), "{violation}");
    assert!(violation.to_string().contains("60..62 client 0: get key 0: 1 with tag 101;"), "{violation}");
}

#[test]
fn unknown_put_gets_tag_from_read() {
    let lost = unknown(1, &[Step::Put(0, Item { value: 1, tag: 0 })]);
    let mut history = [lost, done(5, 6, &[got(0, 1)]), done(7, 8, &[Step::Check(0, Some(101)), put(0, 2)])];
    resolve(&mut history);
    assert_eq!(history[0].steps, [put(0, 1)]);
    passes(&history);
}

#[test]
fn unknown_touch_gets_tag_from_read() {
    // The value has the tag 101, and 103 after the touch.
    let touched = Item { value: 1, tag: 103 };
    let touch = unknown(3, &[Step::Check(0, Some(101)), Step::Put(0, Item { value: 1, tag: 0 })]);
    let read = done(5, 6, &[Step::Get(0, Some(touched))]);
    let mut history = [done(1, 2, &[put(0, 1)]), touch, read, done(7, 8, &[Step::Compare(0, 1), put(0, 2)])];
    resolve(&mut history);
    assert_eq!(history[1].steps, [Step::Check(0, Some(101)), Step::Put(0, touched)]);
    passes(&history);
    // The touch did not happen before it was sent.
    let [first, touch, read, _] = history;
    assert_eq!(fails(&[first, Operation { invoked: 10, returned: 11, ..touch }, read]), 1);
}

#[test]
fn tag_that_no_read_has_shows_existence() {
    let mut history = [unknown(1, &[Step::Put(0, Item { value: 1, tag: 0 })]), done(5, 6, &[Step::Check(0, Some(77))])];
    resolve(&mut history);
    assert_eq!(history[1].steps, [Step::Found(0, Some(true))]);
    passes(&history);
    assert_eq!(fails(&history[1..]), 1);
}

#[test]
fn comparison_and_existence_match_state() {
    let first = done(1, 2, &[put(0, 1)]);
    passes(&[first.clone(), done(3, 4, &[Step::Compare(0, 1), put(0, 2)]), done(5, 6, &[Step::Found(0, Some(true))])]);
    assert_eq!(fails(&[first.clone(), done(3, 4, &[Step::Compare(0, 2), put(0, 3)])]), 1);
    let failed = operation(3, 4, &[Step::Compare(0, 2), put(0, 3)], Outcome::Failed(0));
    passes(&[first.clone(), failed.clone()]);
    assert_eq!(fails(&[done(1, 2, &[put(0, 2)]), failed]), 2);
    assert_eq!(fails(&[first, done(3, 4, &[Step::Found(0, Some(false)), Step::Delete(0)])]), 2);
}

#[test]
fn unknown_writes_are_not_used_twice() {
    // Reads that need the key absent, between puts: each needs a delete of its own.
    let mut history = Vec::new();
    for round in 0..20 {
        history.push(unknown(10 * round, &[Step::Delete(0)]));
        history.push(done(10 * round + 2, 10 * round + 3, &[put(0, round)]));
        history.push(done(10 * round + 4, 10 * round + 5, &[absent(0)]));
    }
    passes(&history);
    history.remove(0);
    assert_eq!(fails(&history), 2);
    // At the end, with all the deletes of the others to choose from.
    history.insert(0, done(1, 2, &[put(1, 0)]));
    history.push(done(500, 501, &[put(0, 100)]));
    history.push(done(502, 503, &[absent(0)]));
    history.remove(1);
    history.remove(1);
    assert!(fails(&history) > 3);
}

#[test]
fn unknown_writes_are_chosen_with_foresight() {
    // Either delete explains the first read, and only the one without a check the second.
    let blind = unknown(3, &[Step::Delete(0)]);
    let checked = unknown(4, &[Step::Check(0, Some(101)), Step::Delete(0)]);
    let reads = [done(10, 11, &[absent(0)]), done(12, 13, &[put(0, 2)]), done(14, 15, &[absent(0)])];
    let mut history = [&[done(1, 2, &[put(0, 1)]), blind, checked][..], &reads].concat();
    agrees(&history).expect("a linearization is found");
    history.remove(2);
    agrees(&history).expect("a violation is found");
    // A delete or the put explains the failed check. The reads need both deletes, and it shows only at the second.
    let deletes = [unknown(3, &[Step::Delete(0)]), unknown(4, &[Step::Delete(0)])];
    let check = operation(10, 11, &[Step::Check(0, Some(101))], Outcome::Failed(0));
    let mut reads = Vec::new();
    for round in 0..2 {
        reads.push(done(12 + 4 * round, 13 + 4 * round, &[put(0, 2 + round)]));
        reads.push(done(14 + 4 * round, 15 + 4 * round, &[absent(0)]));
    }
    for invoked in [2, 5] {
        let write = unknown(invoked, &[put(0, 9)]);
        let history = [&[done(1, 2, &[put(0, 1)]), check.clone(), write][..], &deletes, &reads].concat();
        agrees(&history).expect("a linearization is found");
        agrees(&history[..history.len() - 1]).expect("a linearization is found");
    }
}

#[test]
fn limit_reached_is_no_verdict() {
    let history = [done(1, 2, &[put(0, 1)]), done(3, 4, &[put(0, 2)]), done(5, 6, &[got(0, 2)])];
    passes(&history);
    for depth_first in [0, 1, 2] {
        let failure = check_with(&history, Effort { limit: 1, depth_first, exact: false });
        assert!(matches!(failure, Err(Failure::Undecided { operations: 3, limit: 1 })), "{failure:?}");
    }
}

/// The definition: some order of all known operations and any unknown ones is a run of a store, and has no operation before
/// another that returned before its invocation.
fn any_order(history: &[Operation]) -> bool {
    fn go(history: &[Operation], order: &mut Vec<usize>, state: &State) -> bool {
        let left: Vec<_> = (0..history.len()).filter(|at| !order.contains(at)).collect();
        let known = || left.iter().map(|at| &history[*at]).filter(|operation| !operation.is_unknown());
        if known().next().is_none() {
            return true;
        }
        left.iter().any(|at| {
            let operation = &history[*at];
            let is_late = known().any(|other| other.returned < operation.invoked);
            !is_late
                && operation.apply(state).is_some_and(|after| {
                    order.push(*at);
                    let found = go(history, order, &after);
                    order.pop();
                    found
                })
        })
    }
    go(history, &mut Vec::new(), &vec![None; KEYS])
}

const KEYS: usize = 2;

/// A step that puts this value, if it puts one.
fn step(keys: usize, value: u64) -> impl Strategy<Value = Step> {
    let key = 0..keys;
    let tag = prop::option::of(101..105_u64);
    prop_oneof![
        3 => (key.clone(), tag.clone()).prop_map(|(key, tag)| Step::Check(key, tag)),
        2 => (key.clone(), 1..5_u64).prop_map(|(key, value)| Step::Compare(key, value)),
        2 => (key.clone(), any::<bool>()).prop_map(|(key, exists)| Step::Found(key, Some(exists))),
        4 => (key.clone(), tag).prop_map(|(key, tag)| Step::Get(key, tag.map(|tag| item(tag - 100)))),
        4 => key.clone().prop_map(move |key| put(key, value)),
        3 => key.prop_map(Step::Delete),
    ]
}

/// An operation before its outcome is known.
#[derive(Clone, Debug)]
struct Draft {
    steps: Vec<Step>,
    /// Compared with the share of unknown outcomes of the history.
    fate: u8,
    /// Whether it takes effect though its outcome is unknown.
    has_effect: bool,
    /// Whether its outcome is the one of an atomic store. Otherwise it is random.
    is_right: bool,
    invoked: u64,
    length: u64,
}

fn draft(keys: usize, value: u64) -> impl Strategy<Value = Draft> {
    let steps = prop::collection::vec(step(keys, value), 1..=keys + 1);
    (steps, 0..100_u8, any::<bool>(), 0..20_u8, 0..60_u64, 1..40_u64).prop_map(
        |(steps, fate, has_effect, lie, invoked, length)| Draft {
            steps,
            fate,
            has_effect,
            is_right: lie > 0,
            invoked,
            length,
        },
    )
}

/// Few operations that conflict, of which this percentage is of unknown outcome, with responses that are mostly right.
fn history(keys: usize, unknown: u8) -> impl Strategy<Value = Vec<Operation>> {
    let draft = move |value| draft(keys, value);
    let drafts = (draft(1), draft(2), draft(3), draft(4), draft(5), draft(6), draft(7), draft(8));
    drafts.prop_map(move |(a, b, c, d, e, f, g, h)| {
        let mut state = vec![None; KEYS];
        let all = [a, b, c, d, e, f, g, h].into_iter().enumerate();
        let operations = all.map(|(at, Draft { mut steps, fate, has_effect, is_right, invoked, length })| {
            let is_unknown = fate < unknown;
            let mut outcome = Outcome::Done;
            let mut after = state.clone();
            for (at, step) in steps.iter_mut().enumerate() {
                match step {
                    Step::Check(key, tag) if is_right && after[*key].map(|item: Item| item.tag) != *tag => {
                        outcome = Outcome::Failed(at);
                        break;
                    }
                    Step::Compare(key, value)
                        if is_right && after[*key].map(|item: Item| item.value) != Some(*value) =>
                    {
                        outcome = Outcome::Failed(at);
                        break;
                    }
                    Step::Check(..) | Step::Compare(..) => {}
                    Step::Found(key, exists) if is_right => *exists = Some(after[*key].is_some()),
                    Step::Found(..) => {}
                    Step::Get(key, seen) if is_right => *seen = after[*key],
                    Step::Get(..) => {}
                    Step::Put(key, item) => after[*key] = Some(*item),
                    Step::Delete(key) => after[*key] = None,
                }
            }
            if outcome == Outcome::Done && (!is_unknown || has_effect) {
                state = after;
            }
            if is_unknown {
                outcome = Outcome::Unknown;
            }
            // Mostly in the order of the list.
            let invoked = 1_000 * (20 * at as u64 + invoked) + at as u64;
            operation(invoked, invoked + 1_000 * length + 500, &steps, outcome)
        });
        operations.collect()
    })
}

/// Compares the verdict of every kind of search with that of all orders.
fn agrees(history: &[Operation]) -> Result<(), TestCaseError> {
    let expected = any_order(history);
    let verdict = if expected { Verdict::Linearizable } else { Verdict::NotLinearizable };
    for exact in [false, true] {
        // Depth-first, by layers, and by layers from somewhere in the middle.
        for depth_first in [usize::MAX, 0, 5] {
            let effort = Effort { depth_first, exact, ..Effort::default() };
            prop_assert_eq!(search(history, effort).0, verdict, "{:?}", effort);
        }
    }
    // By parts, and minimized.
    match check(history) {
        Ok(()) => prop_assert!(expected),
        Err(Failure::Violation(operations)) => prop_assert!(!expected && !any_order(&operations)),
        Err(undecided) => prop_assert!(false, "{}", undecided),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn search_agrees_with_all_orders(history in history(2, 20)) {
        agrees(&history)?;
    }

    #[test]
    fn search_agrees_on_one_key(history in history(1, 50)) {
        agrees(&history)?;
    }

    #[test]
    fn search_agrees_where_most_is_unknown(history in history(2, 60)) {
        agrees(&history)?;
    }
}
