//! Histories of appends, ends and crashes, compared with a list.

use proptest::prelude::*;

use super::*;
use crate::file::offline;

#[derive(Clone, Debug)]
enum Step {
    Append(Vec<(u8, Option<Vec<u8>>)>),
    Wait,
    Close,
    /// The process is gone; what it had written is there.
    Kill,
    /// It continues as a copy, and the original does too.
    Copy,
    Fork,
}

fn step() -> impl Strategy<Value = Step> {
    let value = proptest::option::weighted(0.8, proptest::collection::vec(any::<u8>(), 0..300));
    let group = proptest::collection::vec((0..8_u8, value), 0..5);
    prop_oneof![
        6 => group.prop_map(Step::Append),
        2 => Just(Step::Wait),
        1 => Just(Step::Close),
        1 => Just(Step::Kill),
        1 => Just(Step::Copy),
        1 => Just(Step::Fork),
    ]
}

fn event((key, value): &(u8, Option<Vec<u8>>)) -> Event {
    match value {
        Some(value) => put(&key.to_string(), value),
        None => Event::Delete(key.to_string()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn every_history_comes_back(steps in proptest::collection::vec(step(), 1..60)) {
        let mut disk = FakeDisk::default();
        let mut log = open(&disk).unwrap();
        let mut model: Vec<Owned> = Vec::new();
        // By clients of this log, and of those that it is a copy of.
        let mut seen = 0;
        for (time, step) in (1..).zip(&steps) {
            match step {
                Step::Append(group) => {
                    let events: Vec<_> = group.iter().map(event).collect();
                    let first = append(&log, time, &events);
                    let newest = model.last().map_or(0, |(sequence, ..)| *sequence);
                    prop_assert_eq!(first, log.history().next(newest));
                    prop_assert!(first > seen);
                    model.extend((first..).zip(&events).map(|(at, event)| (at, time, describe_owned(event))));
                }
                Step::Wait => {
                    prop_assert!(durable(&log, log.appended()));
                    prop_assert_eq!(&replayed(&log), &model);
                }
                Step::Close => {
                    log.close().unwrap();
                    log = open(&disk).unwrap();
                    prop_assert_eq!(&replayed(&log), &model);
                }
                Step::Kill => {
                    let acknowledged = log.watermark().durable();
                    disk = disk.copy();
                    log = open(&disk).unwrap();
                    let left = replayed(&log);
                    let newest = left.last().map_or(0, |(sequence, ..)| *sequence);
                    prop_assert!(newest >= acknowledged, "{newest} of {acknowledged}");
                    prop_assert_eq!(&left[..], &model[..left.len()]);
                    model.truncate(left.len());
                }
                Step::Copy | Step::Fork => {
                    log.close().unwrap();
                    if model.is_empty() {
                        log = open(&disk).unwrap();
                        continue;
                    }
                    let known = log.history().incarnations().to_vec();
                    if matches!(step, Step::Copy) {
                        disk.become_copy();
                    } else {
                        offline::fork(Arc::new(disk.clone()), options()).unwrap();
                    }
                    // The original gives some more.
                    let lost = log.history().next(log.appended()) + 7;
                    seen = lost.max(seen);
                    log = open(&disk).unwrap();
                    let history = log.history();
                    prop_assert_eq!(&history.incarnations()[..known.len()], &known[..]);
                    prop_assert_eq!(history.incarnations().len(), known.len() + 1);
                    prop_assert!(!history.contains(lost));
                    prop_assert!(model.iter().all(|(sequence, ..)| history.contains(*sequence)));
                    prop_assert_eq!(&replayed(&log), &model);
                }
            }
        }
    }
}
