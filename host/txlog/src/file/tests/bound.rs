//! How much disk a log takes while it is written as fast as it can be: see the head of `compactor`.

use std::collections::{HashMap, VecDeque};
use std::future::ready;
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fastrand::Rng;
use kvs_runtime::{Clock, Time};

use super::compaction::store;
use super::*;
use crate::file::entry;

/// How the disk is used in a history.
#[derive(Clone, Copy, Debug)]
struct Load {
    segment_bytes: u64,
    keys: usize,
    /// Sizes of values, small ones and large ones.
    small: (usize, usize),
    large: (usize, usize),
    /// Of a hundred events, how many put a large value, and how many delete one.
    large_percent: usize,
    delete_percent: usize,
    /// See [`Options::retain`].
    retain: Duration,
}

const ALIKE: Load = Load {
    segment_bytes: 256 << 10,
    keys: 10,
    small: (400, 401),
    large: (0, 1),
    large_percent: 0,
    delete_percent: 0,
    retain: Duration::ZERO,
};

/// Time from one event to the next, where entries are retained.
const STEP_MS: u64 = 10;

/// A wall clock that a history sets.
#[derive(Default)]
struct Wall(AtomicU64);

impl Time for Wall {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wall(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.0.load(Ordering::Relaxed))
    }

    fn sleep(&self, _: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(ready(()))
    }
}

/// Live and retained data: of each key that is there, the newest put that is not retained, and all that is.
#[derive(Default)]
struct Live {
    sizes: HashMap<String, u64>,
    /// What is retained: time, key, size, and whether it is a put.
    retained: VecDeque<(u64, String, u64, bool)>,
    bytes: u64,
    /// The most there was between one run of compaction and the next, from the run before the last.
    most: VecDeque<(u64, u64)>,
}

impl Live {
    /// Notes an event of this time, when what is older than `retain_from` is retained no more.
    fn note(&mut self, runs: u64, (time, retain_from): (u64, u64), event: &Event) {
        let (key, is_put) = match event {
            Event::Put(put) => (&put.key, true),
            Event::Delete(key) => (key, false),
        };
        let size = entry::size(event) as u64;
        self.retained.push_back((time, key.clone(), size, is_put));
        self.bytes += size;
        while let Some((_, key, size, is_put)) = self.retained.pop_front_if(|(time, ..)| *time <= retain_from) {
            let kept = if is_put { size } else { 0 };
            let before = self.sizes.insert(key, kept).unwrap_or(0);
            self.bytes -= before + size - kept;
        }
        if self.most.back().is_none_or(|(at, _)| *at < runs) {
            self.most.push_back((runs, 0));
        }
        self.most.retain(|(at, _)| at + 2 >= runs);
        if let Some((_, most)) = self.most.back_mut() {
            *most = (*most).max(self.bytes);
        }
    }

    fn most(&self) -> u64 {
        self.most.iter().map(|(_, most)| *most).max().unwrap_or(0)
    }
}

/// Writes as fast as the log takes it. Gives the largest share of the bound that the disk held at any operation, in percent and
/// rounded up: a byte more than the bound is 101%.
fn percent_of_bound(load: Load, dice: &mut Rng) -> u64 {
    let disk = FakeDisk::default();
    let wall = Arc::new(Wall::default());
    let options = Options {
        segment_bytes: load.segment_bytes,
        group_bytes: 8192,
        durability: Durability::Os,
        retain: load.retain,
        env: Env { clock: Clock::given(wall.clone()), ..Env::real() },
        ..options()
    };
    let log = Arc::new(FileLog::open_on(Arc::new(disk.clone()), options.clone(), None).unwrap());
    log.compact_in_background().unwrap();
    let live = Arc::new(Mutex::new(Live::default()));
    let most = Arc::new(AtomicU64::new(0));
    // The disk is memory: no real one is written to as fast.
    disk.before_each({
        let (disk, live, most) = (disk.clone(), live.clone(), most.clone());
        move |_| {
            let bound = 2 * live.lock().unwrap().most() + 11 * load.segment_bytes / 2;
            most.fetch_max((100 * disk.size()).div_ceil(bound), Ordering::Relaxed);
            Ok(())
        }
    });
    for number in 0..60_000_usize {
        let key = format!("key {:04}", dice.usize(..load.keys));
        let kind = dice.usize(..100);
        // In every other part of the history large values come, and in the others they go.
        let grows = number / 10_000 % 2 == 0;
        let range = if kind < load.large_percent && grows { load.large } else { load.small };
        let deletes = kind >= 100 - load.delete_percent;
        let event = if deletes { Event::Delete(key) } else { put(&key, &vec![7; dice.usize(range.0..range.1)]) };
        // Long after the entries of a log that retains none, so that none is in a grace period.
        let now = (number as u64 + 1_000_000) * STEP_MS;
        let time = if load.retain.is_zero() { 1 } else { now };
        wall.0.store(now, Ordering::Relaxed);
        let retain_from = now - load.retain.as_millis() as u64;
        live.lock().unwrap().note(log.shared().metrics.compactions.get(), (time, retain_from), &event);
        let sequence = append(&log, time, &[event]);
        // What is live and what is written are not far apart.
        assert!(!number.is_multiple_of(64) || durable(&log, sequence));
    }
    assert!(durable(&log, log.appended()));
    let runs = log.shared().metrics.compactions.get();
    assert!(runs > 3, "{load:?}: the log was compacted {runs} times");
    let expected = store(&log);
    disk.before_each(|_| Ok(()));
    log.close().unwrap();
    assert!(store(&FileLog::open_on(Arc::new(disk), options, None).unwrap()) == expected);
    most.load(Ordering::Relaxed)
}

#[test]
fn disk_holds_twice_what_is_live_or_retained_and_five_and_a_half_segments() {
    let seed = count("KVS_TEST_SEED", fastrand::u64(..));
    println!("KVS_TEST_SEED={seed}");
    let dice = &mut Rng::with_seed(seed);
    for load in [
        ALIKE,
        Load { segment_bytes: 64 << 10, keys: 2_000, ..ALIKE },
        // A segment has room for a few values, and the next one often does not fit.
        Load { segment_bytes: 64 << 10, small: (6_000, 8_000), delete_percent: 20, ..ALIKE },
        Load { keys: 1_000, small: (0, 100), large: (4_000, 8_000), large_percent: 5, delete_percent: 20, ..ALIKE },
        Load { keys: 3_000, small: (1, 400), large: (2_000, 3_000), large_percent: 50, delete_percent: 50, ..ALIKE },
        // Of ten keys, the last 3,000 entries.
        Load { segment_bytes: 64 << 10, retain: Duration::from_secs(30), ..ALIKE },
        Load { keys: 1_000, delete_percent: 20, retain: Duration::from_secs(60), ..ALIKE },
    ] {
        let percent = percent_of_bound(load, dice);
        println!("{percent}% of the bound: {load:?}");
        assert!((20..=100).contains(&percent), "{percent}% of the bound, with KVS_TEST_SEED={seed}: {load:?}");
    }
}
