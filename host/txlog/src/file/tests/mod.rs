//! What the log promises, tried on a disk that the tests own and on a real directory.

mod beside;
mod bound;
mod compaction;
mod content;
mod crash;
mod damage;
mod descriptors;
mod disk;
mod faults;
mod formats;
mod frames;
mod handover;
mod history;
mod incarnations;
mod interleavings;
mod life;
mod lost_end;
mod model;
pub mod mutants;
mod queue;
mod runs;
mod standby;
mod supervision;
mod surface;
mod tail;
mod tombstones;
mod tools;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::disk::FakeDisk;
use kvs_runtime::Env;

use super::disk::Disk;
use super::writer::Writer;
use super::{Before, Durability, FileLog, Options, Shared, replay};
use crate::{AppendError, Event, EventRef, Put};
use crate::{Receive, TransactionLog};

/// Small, so that rotation is met at every turn.
pub const SEGMENT_BYTES: u64 = 4096;
pub const GROUP_BYTES: u64 = 2048;

pub fn options() -> Options {
    Options {
        data: "data".into(),
        segment_bytes: SEGMENT_BYTES,
        group_bytes: GROUP_BYTES,
        durability: Durability::Sync,
        retain: std::time::Duration::ZERO,
        advertise: None,
        env: Env::real(),
    }
}

pub fn open(disk: &FakeDisk) -> anyhow::Result<FileLog> {
    FileLog::open_on(Arc::new(disk.clone()), options(), None)
}

pub fn put(key: &str, value: &[u8]) -> Event {
    Event::Put(Put { key: key.into(), value: value.into(), metadata: Vec::new(), expires: None })
}

/// An entry, owned: its sequence, its time and what happened.
pub type Owned = (u64, u64, String);

/// Opens a log without its threads.
fn recover(disk: Arc<dyn Disk>, options: Options) -> anyhow::Result<(Arc<Shared>, Writer)> {
    Shared::begin(disk, options, Before::default())
}

/// What recovery makes of a disk, without the threads of an open log.
pub fn recovered(disk: &FakeDisk) -> anyhow::Result<Vec<Owned>> {
    let (shared, _) = recover(Arc::new(disk.clone()), options())?;
    gather(|receive| replay::replay(&shared, 0, receive))
}

/// All that a replay hands over, in its words.
pub fn replayed(log: &FileLog) -> Vec<Owned> {
    replayed_after(log, 0).unwrap()
}

pub fn replayed_after(log: &FileLog, after: u64) -> anyhow::Result<Vec<Owned>> {
    gather(|receive| log.replay(after, receive))
}

fn gather(replay: impl FnOnce(&mut Receive<'_>) -> anyhow::Result<u64>) -> anyhow::Result<Vec<Owned>> {
    let mut all = Vec::new();
    replay(&mut |entries| {
        all.extend(entries.iter().map(|entry| (entry.sequence, entry.time, describe(&entry.event))));
        Ok(())
    })?;
    Ok(all)
}

pub fn describe(event: &EventRef<'_>) -> String {
    match event {
        EventRef::Put(put) => format!("put {:?} {:?} {:?} {:?}", put.key, put.value, put.metadata, put.expires),
        EventRef::Delete(key) => format!("delete {key:?}"),
    }
}

/// The same words for an event as it was handed in.
pub fn describe_owned(event: &Event) -> String {
    match event {
        Event::Put(put) => format!("put {:?} {:?} {:?} {:?}", put.key, put.value, put.metadata, put.expires),
        Event::Delete(key) => format!("delete {key:?}"),
    }
}

/// Waits until the log is durable up to a sequence; false when it failed before, or takes so long that this may never be.
pub fn durable(log: &FileLog, sequence: u64) -> bool {
    block_on(async {
        let reached = log.watermark().reached(sequence);
        tokio::time::timeout(Duration::from_secs(30), reached).await.is_ok_and(|reached| reached.is_ok())
    })
}

pub fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// Appends, waiting where the log is only behind.
pub fn append(log: &FileLog, time: u64, events: &[Event]) -> u64 {
    loop {
        match log.append(time, events) {
            Ok(sequence) => return sequence,
            Err(AppendError::Unavailable) => {
                assert_eq!(log.failure(), None);
                std::thread::yield_now();
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// Appends one event and waits for it: a frame of its own.
pub fn commit(log: &FileLog, event: Event) -> u64 {
    let sequence = append(log, 1, &[event]);
    assert!(durable(log, sequence));
    sequence
}

/// Waits for what another thread is about to do.
pub fn eventually(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "this never came to be");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How often to try, unless a variable says how often.
pub fn count(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |count| count.parse().unwrap())
}
