//! The checker's own tests: histories by hand, and any small ones, beside a search of all orders there are.

use proptest::prelude::*;

use super::checker::{check, is_linearizable};
use super::history::{Item, Key, Operation, Outcome, Step, resolve};

fn operation(asked: u64, answered: u64, steps: &[Step], outcome: Outcome) -> Operation {
    Operation { client: 0, asked, answered, steps: steps.to_vec(), outcome }
}

fn done(asked: u64, answered: u64, steps: &[Step]) -> Operation {
    operation(asked, answered, steps, Outcome::Done)
}

fn unknown(asked: u64, steps: &[Step]) -> Operation {
    operation(asked, asked + 1, steps, Outcome::Unknown)
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

fn nothing(key: Key) -> Step {
    Step::Get(key, None)
}

#[track_caller]
fn holds(history: &[Operation]) {
    assert!(check(history).is_ok(), "{}", check(history).expect_err("it does not hold"));
}

/// Gives how many operations are left of what cannot be.
#[track_caller]
fn fails(history: &[Operation]) -> usize {
    check(history).expect_err("it cannot have happened").0.len()
}

#[test]
fn reads_see_what_was_there_at_some_moment_of_theirs() {
    let write = done(10, 20, &[put(0, 1)]);
    holds(&[write.clone(), done(15, 16, &[nothing(0)])]);
    holds(&[write.clone(), done(11, 12, &[got(0, 1)]), done(13, 14, &[got(0, 1)])]);
    holds(&[write.clone(), done(1, 2, &[nothing(0)]), done(21, 22, &[got(0, 1)])]);
    // Too late, too early, and back again.
    assert_eq!(fails(&[write.clone(), done(21, 22, &[nothing(0)])]), 2);
    assert_eq!(fails(&[write.clone(), done(1, 2, &[got(0, 1)])]), 1);
    assert_eq!(fails(&[write.clone(), done(11, 12, &[got(0, 1)]), done(13, 14, &[nothing(0)])]), 3);
    // What nobody put, and a tag that is another's.
    assert_eq!(fails(&[write.clone(), done(30, 40, &[got(0, 2)])]), 1);
    let other = Step::Get(0, Some(Item { value: 1, tag: 7 }));
    assert_eq!(fails(&[write, done(30, 40, &[other])]), 1);
}

#[test]
fn what_is_unknown_happens_at_any_time_or_never() {
    let (before, lost) = (done(1, 2, &[put(0, 1)]), unknown(10, &[put(0, 2)]));
    holds(&[before.clone(), lost.clone(), done(20, 21, &[got(0, 1)])]);
    holds(&[before.clone(), lost.clone(), done(20, 21, &[got(0, 1)]), done(30, 31, &[got(0, 2)])]);
    // It cannot be undone, nor happen before it was asked, nor twice.
    assert_eq!(fails(&[before.clone(), lost.clone(), done(20, 21, &[got(0, 2)]), done(30, 31, &[got(0, 1)])]), 4);
    assert_eq!(fails(&[before.clone(), lost.clone(), done(5, 6, &[got(0, 2)])]), 1);
    let twice = [done(20, 21, &[got(0, 2)]), done(22, 23, &[put(0, 3)]), done(24, 25, &[got(0, 2)])];
    assert_eq!(fails(&[&[before, lost][..], &twice].concat()), 4);
}

#[test]
fn conditions_hold_when_they_are_said_to_and_only_then() {
    let (first, second) = (done(1, 2, &[put(0, 1)]), done(3, 4, &[Step::Check(0, Some(101)), put(0, 2)]));
    holds(&[first.clone(), second.clone()]);
    let same = done(5, 6, &[Step::Check(0, Some(101)), put(0, 3)]);
    assert_eq!(fails(&[first.clone(), second.clone(), same.clone()]), 3);
    holds(&[first.clone(), second.clone(), Operation { outcome: Outcome::Failed(0), ..same }]);
    let failed = operation(3, 4, &[Step::Check(0, Some(101)), put(0, 2)], Outcome::Failed(0));
    assert_eq!(fails(&[first.clone(), failed]), 2);
    let create = operation(5, 6, &[Step::Check(0, None), put(0, 3)], Outcome::Failed(0));
    holds(&[first.clone(), create.clone()]);
    assert_eq!(fails(&[first, done(3, 4, &[Step::Delete(0)]), create]), 3);
    // The place of the check counts, and what was done before it within a transaction does too.
    let both = [put(0, 1), Step::Check(0, Some(101)), Step::Check(1, Some(5))];
    holds(&[operation(1, 2, &both, Outcome::Failed(2))]);
    assert_eq!(fails(&[operation(1, 2, &both, Outcome::Failed(1))]), 1);
}

#[test]
fn a_transaction_happens_at_once() {
    let both = done(10, 20, &[put(0, 1), put(1, 2)]);
    holds(&[both.clone(), done(11, 12, &[nothing(0), nothing(1)]), done(13, 14, &[got(0, 1), got(1, 2)])]);
    // Half of it, at once or one after the other.
    assert_eq!(fails(&[both.clone(), done(11, 12, &[got(0, 1), nothing(1)])]), 2);
    assert_eq!(fails(&[both, done(11, 12, &[got(1, 2)]), done(13, 14, &[nothing(0)])]), 3);
}

#[test]
fn what_is_shown_of_a_violation_is_what_it_takes() {
    let mut history = vec![done(1, 2, &[put(0, 1), put(1, 50)]), done(11, 12, &[put(0, 2)])];
    // Reads of this key and others that are fine, before and after the one that is not.
    for n in 0..20 {
        history.push(done(20 + 4 * n, 21 + 4 * n, &[got(0, 2)]));
        history.push(done(22 + 4 * n, 23 + 4 * n, &[got(1, 50)]));
    }
    history.push(done(60, 62, &[got(0, 1)]));
    history.push(done(200, 201, &[put(0, 3)]));
    let violation = check(&history).expect_err("it cannot have happened");
    assert_eq!(violation.0.len(), 3, "{violation}");
    assert!(violation.to_string().contains("60..62 client 0: get key 0: 1 with tag 101;"), "{violation}");
}

#[test]
fn a_tag_that_nobody_was_told_is_the_one_that_others_saw() {
    let lost = unknown(1, &[Step::Put(0, Item { value: 1, tag: 0 })]);
    let mut history = [lost, done(5, 6, &[got(0, 1)]), done(7, 8, &[Step::Check(0, Some(101)), put(0, 2)])];
    resolve(&mut history);
    assert_eq!(history[0].steps, [put(0, 1)]);
    holds(&history);
}

/// Whether any order of any of those whose outcome is unknown and all others explains it.
fn any_order(history: &[Operation]) -> bool {
    fn go(history: &[Operation], order: &mut Vec<usize>) -> bool {
        let all = (0..history.len()).all(|at| history[at].is_unknown() || order.contains(&at));
        if all && explains(history, order) {
            return true;
        }
        (0..history.len()).any(|at| {
            let new = !order.contains(&at);
            new && {
                order.push(at);
                let found = go(history, order);
                order.pop();
                found
            }
        })
    }
    fn explains(history: &[Operation], order: &[usize]) -> bool {
        let too_late = |(at, later): (usize, &usize)| {
            let later = &history[*later];
            // Something that is before it was asked only after it was answered.
            !later.is_unknown() && order[..at].iter().any(|before| history[*before].asked > later.answered)
        };
        let mut state = Some(vec![None; 2]);
        for at in order {
            state = state.and_then(|state| history[*at].happens(&state));
        }
        state.is_some() && !order.iter().enumerate().any(too_late)
    }
    go(history, &mut Vec::new())
}

fn step(value: u64) -> impl Strategy<Value = Step> {
    let key = 0..2_usize;
    let tag = prop::option::of(101..104_u64);
    prop_oneof![
        2 => (key.clone(), tag.clone()).prop_map(|(key, tag)| Step::Check(key, tag)),
        3 => (key.clone(), tag).prop_map(|(key, tag)| Step::Get(key, tag.map(|tag| item(tag - 100)))),
        3 => key.clone().prop_map(move |key| put(key, value)),
        1 => key.prop_map(Step::Delete),
    ]
}

/// Few operations that meet, with what they saw made so that it often fits.
fn history() -> impl Strategy<Value = Vec<Operation>> {
    let one = |value: u64| (prop::collection::vec(step(value), 1..3), 0..6_u64, 0..60_u64, 1..40_u64, 0..4_u8);
    (one(1), one(2), one(3), one(1), one(2)).prop_map(|(a, b, c, d, e)| {
        let mut state = vec![None; 2];
        let all = [a, b, c, d, e].into_iter().enumerate();
        let operations = all.map(|(at, (mut steps, fate, asked, length, lie))| {
            // Put at most once, by the first three.
            if at > 2 {
                steps.retain(|step| !matches!(step, Step::Put(..)));
            }
            let mut outcome = if fate == 0 { Outcome::Unknown } else { Outcome::Done };
            let mut after = state.clone();
            if outcome == Outcome::Done && lie > 0 {
                for (at, step) in steps.iter_mut().enumerate() {
                    match step {
                        Step::Check(key, tag) if after[*key].map(|item: Item| item.tag) != *tag => {
                            outcome = Outcome::Failed(at);
                            break;
                        }
                        Step::Check(..) => {}
                        Step::Get(key, seen) => *seen = after[*key],
                        Step::Put(key, item) => after[*key] = Some(*item),
                        Step::Delete(key) => after[*key] = None,
                    }
                }
            }
            if outcome == Outcome::Done {
                state = after;
            }
            // In the order they are told in, mostly.
            let asked = 1_000 * (20 * at as u64 + asked) + at as u64;
            operation(asked, asked + 1_000 * length + 500, &steps, outcome)
        });
        operations.filter(|operation| !operation.steps.is_empty()).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_search_finds_what_all_orders_find(history in history()) {
        let expected = any_order(&history);
        prop_assert_eq!(is_linearizable(&history), expected);
        // Judged by parts, and what is left of a violation is one.
        match check(&history) {
            Ok(()) => prop_assert!(expected),
            Err(violation) => prop_assert!(!expected && !any_order(&violation.0)),
        }
    }
}
