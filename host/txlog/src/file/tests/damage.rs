//! Damage to a log of 64 KiB: every bit flipped, every file cut off at every byte, and files made longer.
//!
//! Each time the log opens and is right; or it opens without its last batch and says so; or it refuses in one line that
//! names the file, the offset and the command that helps. It never hands out what was not written.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::content::{Appended, Model, check_content};
use super::disk::Promise;
use super::*;
use crate::file::disk::Disk;
use crate::file::{identity, position};

const SEGMENT_BYTES: u64 = 8192;

/// A log that ends as after a power cut, and what it holds.
struct Sound {
    disk: FakeDisk,
    model: Model,
    /// The newest sequence before the last batch.
    before_last: u64,
}

impl Sound {
    /// A compacted segment, some that are full, the newest and a spare.
    fn new() -> Self {
        let disk = FakeDisk::default();
        let log = FileLog::open_on(Arc::new(disk.clone()), damaged_options(), None).unwrap();
        let mut dice = fastrand::Rng::with_seed(1);
        let (mut model, mut before_last) = (Model::default(), 0);
        while bytes(&disk) < 64 << 10 {
            before_last = log.appended();
            let mut value = vec![0; dice.usize(0..500)];
            dice.fill(&mut value);
            let event = put(&format!("key {}", dice.u8(0..60)), &value);
            let group = [event, Event::Delete(format!("key {}", dice.u8(0..60)))];
            let first = append(&log, 1, &group);
            assert!(durable(&log, first + 1));
            let appended = |(sequence, event)| Appended { sequence, time: 1, event, ends_group: true };
            model.entries.extend((first..).zip(group).map(appended));
            if model.compactions.is_empty() && log.shared().catalog.sealed().len() == 4 {
                assert!(super::compaction::compact_at(&log, 1, 0, 100).saved > 0);
                model.compactions.push((0, 1));
            }
        }
        // The spare is whole, and nothing else was begun.
        eventually(|| disk.names().iter().all(|name| !name.ends_with(".tmp")));
        let disk = disk.copy();
        // Written by a log that was idle for a moment; without it, nothing is wrong.
        let _ = disk.remove("watermark");
        assert!(disk.names().iter().any(|name| name.contains('-')), "{:?}", disk.names());
        Self { disk, model, before_last }
    }

    /// Every file of it, and its bytes.
    fn files(&self) -> Vec<(String, Arc<Vec<u8>>)> {
        self.disk.names().into_iter().map(|name| (name.clone(), self.disk.bytes(&name))).collect()
    }

    /// Whether the log with one file changed does as it should; returns whether it opened.
    fn check(&self, name: &str, bytes: Vec<u8>) -> Result<bool, String> {
        let disk = self.disk.copy();
        disk.put(name, bytes);
        let failed = |error: String| {
            let place = format!("data/log/{name} is damaged at byte ");
            let whole = error.contains(&place) && error.contains("; `kvs txlog verify --data-dir data` lists");
            if whole && !error.contains('\n') { Ok(false) } else { Err(error) }
        };
        let (shared, _) = match recover(Arc::new(disk.clone()), damaged_options()) {
            Ok(recovered) => recovered,
            Err(error) => return failed(format!("{error:#}")),
        };
        let promised = Promise { durable: self.before_last, seen: self.before_last };
        if let Err(error) = check_content(&shared, &self.model, 0, promised) {
            return failed(error);
        }
        let lost = shared.watermark.durable() < self.model.entries.len() as u64;
        match lost && !disk.names().iter().any(|name| name.ends_with(".torn")) {
            true => Err("it lost the last batch and said nothing".into()),
            false => Ok(true),
        }
    }
}

fn damaged_options() -> Options {
    Options { segment_bytes: SEGMENT_BYTES, ..options() }
}

fn bytes(disk: &FakeDisk) -> usize {
    // A copy holds still while the log continues renaming.
    let disk = disk.copy();
    disk.names().iter().map(|name| disk.bytes(name).len()).sum()
}

/// Does something for all numbers, on all processors.
fn each(numbers: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    match next.fetch_add(1, Ordering::Relaxed) {
                        number if number < numbers => work(number),
                        _ => break,
                    }
                }
            });
        }
    });
}

#[test]
fn every_flipped_bit_is_detected() {
    let sound = Sound::new();
    let (opened, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    for (name, whole) in sound.files() {
        each(whole.len(), |at| {
            for bit in 0..8 {
                let mut bytes = whole.to_vec();
                bytes[at] ^= 1 << bit;
                match sound.check(&name, bytes) {
                    Ok(true) => opened.fetch_add(1, Ordering::Relaxed),
                    Ok(false) => refused.fetch_add(1, Ordering::Relaxed),
                    Err(what) => panic!("bit {bit} of byte {at} of {name}: {what}"),
                };
            }
        });
    }
    println!("of {} bytes every bit: {opened:?} times it opened, {refused:?} times it refused", bytes(&sound.disk));
    assert!(opened.into_inner() > 1000 && refused.into_inner() > 100_000);
}

#[test]
fn file_truncated_at_any_byte_is_detected() {
    let sound = Sound::new();
    for (name, whole) in sound.files() {
        each(whole.len(), |size| match sound.check(&name, whole[..size].to_vec()) {
            Ok(false) => {}
            // As good as none, and the log continues as if it was a copy. A start writes a position of its own.
            Ok(true) if [identity::NAME, position::NAME].contains(&name.as_str()) => {}
            Ok(true) => panic!("{name} has {size} bytes, and nobody minded"),
            Err(what) => panic!("{name} has {size} bytes: {what}"),
        });
    }
}

#[test]
fn file_with_appended_bytes_is_detected() {
    let sound = Sound::new();
    for (name, whole) in sound.files() {
        each(700, |more| {
            for byte in [0, 1, 0xa5] {
                let mut bytes = whole.to_vec();
                bytes.resize(whole.len() + more, byte);
                if let Err(what) = sound.check(&name, bytes) {
                    panic!("{name} has {more} bytes of {byte} more: {what}");
                }
            }
        });
    }
}
