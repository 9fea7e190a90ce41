//! Histories of appends, ends and crashes, compared with a list.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Append(Vec<(u8, Option<Vec<u8>>)>),
    Wait,
    Close,
    /// The process is gone; what it had written is there.
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    let value = proptest::option::weighted(0.8, proptest::collection::vec(any::<u8>(), 0..300));
    let group = proptest::collection::vec((0..8_u8, value), 0..5);
    prop_oneof![
        6 => group.prop_map(Step::Append),
        2 => Just(Step::Wait),
        1 => Just(Step::Close),
        1 => Just(Step::Kill),
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
        for (time, step) in (1..).zip(&steps) {
            match step {
                Step::Append(group) => {
                    let events: Vec<_> = group.iter().map(event).collect();
                    let first = append(&log, time, &events);
                    prop_assert_eq!(first, model.len() as u64 + 1);
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
                    let acknowledged = log.watermark().durable() as usize;
                    disk = disk.copy();
                    log = open(&disk).unwrap();
                    let left = replayed(&log);
                    prop_assert!(left.len() >= acknowledged, "{} of {acknowledged}", left.len());
                    prop_assert_eq!(&left[..], &model[..left.len()]);
                    model.truncate(left.len());
                }
            }
        }
    }
}
